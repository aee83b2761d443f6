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

EXAMPLES = 30
CALL_SECONDS = 20.0
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

api = schemathesis.openapi.from_dict(create_app(Settings(engine="sim")).openapi())


# The watch stays open for as long as its caller does.
@api.exclude(path_regex="/watch$").parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_documented_reply(case: schemathesis.Case, shared: Daemon) -> None:
    if isinstance(case.body, dict) and case.body.get("engine") == "vllm":
        case.body["engine"] = "sim"  # the real engine takes half a minute to import
    if isinstance(case.query, dict):
        case.query.pop("follow", None)  # a follow lasts as long as the instance
    case.call_and_validate(base_url=shared.url, checks=CHECKS, timeout=CALL_SECONDS)
