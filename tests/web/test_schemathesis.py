"""Requests made up from the OpenAPI document, good and bad: no server error, and no reply but those documented."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bullpen.node.settings import Settings
from bullpen.web.app import create_app
from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES

EXAMPLES = 30
CALL_SECONDS = 20.0
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

api = schemathesis.openapi.from_dict(create_app(Settings(engine="sim")).openapi())


requests = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)


# The watch stays open for as long as its caller does.
@api.exclude(path_regex="/watch$").parametrize()
@requests
def test_documented_reply(case: schemathesis.Case, shared: Daemon) -> None:
    send(case, shared)


@api.include(path_regex="/(sleep|wake|explain|verdicts|swap|gpus)$").parametrize()
@requests
def test_documented_reply_about_instances_that_exist(case: schemathesis.Case, shared: Daemon) -> None:
    for name in ("a", "b"):
        if shared.http.get(f"{INSTANCES}/{name}").status_code == 404:
            shared.create(instance_id=name, gpus=1, gpu_share=0.5)
            shared.wait_state(name, "ready")
    if case.path_parameters:
        case.path_parameters["instance_id"] = "a"
    if isinstance(case.body, dict) and isinstance(case.body.get("in"), str):
        case.body["in"] = "b"
    if isinstance(case.body, dict) and isinstance(case.body.get("out"), list):
        case.body["out"] = ["a"]
    send(case, shared)


def send(case: schemathesis.Case, daemon: Daemon) -> None:
    for config in (case.body, case.body.get("in") if isinstance(case.body, dict) else None):
        if isinstance(config, dict) and config.get("engine") == "vllm":
            config["engine"] = "sim"  # the real engine takes half a minute to import
    if isinstance(case.query, dict):
        case.query.pop("follow", None)  # a follow lasts as long as the instance
    case.call_and_validate(base_url=daemon.url, checks=CHECKS, timeout=CALL_SECONDS)
