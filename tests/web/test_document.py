"""What the daemon says about itself: the index, the page, health, readiness and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

import bullpen
from bullpen.web import models, sleep_models
from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES

ENDPOINTS = {
    "index": "GET /",
    "health": "GET /health",
    "create_instance": "POST /v2/vllm/instances",
    "create_named_instance": "PUT /v2/vllm/instances/{instance_id}",
    "delete_instance": "DELETE /v2/vllm/instances/{instance_id}",
    "delete_all_instances": "DELETE /v2/vllm/instances",
    "get_instance_status": "GET /v2/vllm/instances/{instance_id}",
    "get_all_instances": "GET /v2/vllm/instances",
    "get_instance_logs": "GET /v2/vllm/instances/{instance_id}/log",
    "sleep_instance": "POST /v2/vllm/instances/{instance_id}/sleep",
    "wake_instance": "POST /v2/vllm/instances/{instance_id}/wake",
    "explain_instance": "GET /v2/vllm/instances/{instance_id}/explain",
    "judge_instance": "POST /v2/vllm/instances/{instance_id}/verdicts",
    "swap": "POST /v2/vllm/swap",
    "gpus": "GET /v2/vllm/gpus",
}
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"


@pytest.fixture
def document(shared: Daemon) -> dict[str, Any]:
    return dict(shared.http.get("/openapi.json").json())


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_index_for_programs(shared: Daemon, accept: str) -> None:
    index = shared.http.get("/", headers={"Accept": accept}).json()
    assert index["name"] == "Multi-Instance vLLM Management API"
    assert index["version"] == "2.0"
    assert ENDPOINTS.items() <= index["endpoints"].items()
    assert index["grpc_port"] is None, "it is off"


def test_index_for_browsers(shared: Daemon) -> None:
    reply = shared.http.get("/", headers={"Accept": BROWSER})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "<title>Bullpen</title>" in reply.text
    assert not re.search(r"(?:src|href)=.?https?://", reply.text), "the page needs nothing from elsewhere"


def test_index_names_real_routes(shared: Daemon, document: dict[str, Any]) -> None:
    for endpoint in shared.http.get("/").json()["endpoints"].values():
        method, path = endpoint.split()
        assert path == "/openapi.json" or method.lower() in document["paths"][path], endpoint


def test_health_before_the_engine_is_warm(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    assert daemon.http.get("/health").json() == {"status": "OK"}
    daemon.wait_warm()
    readiness = daemon.http.get("/ready").json()
    assert readiness["ready"] is True
    assert [zygote["state"] for zygote in readiness["zygotes"]] == ["warm"]


def test_openapi_document(document: dict[str, Any]) -> None:
    assert document["info"]["title"] == "Bullpen"
    assert document["info"]["version"] == bullpen.__version__
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one["summary"] and one["tags"] for one in operations)


@pytest.mark.parametrize(
    "name",
    [
        "VllmConfig",
        "V1Config",
        "Instance",
        "V1Status",
        "SwapRequest",
        "Swapped",
        "GpuReport",
        "Explanation",
        "NewVerdict",
    ],
)
def test_openapi_document_has_examples(document: dict[str, Any], name: str) -> None:
    schema = document["components"]["schemas"][name]
    # What is null in an example is left out of the document.
    never_null = {field for field in schema["required"] if {"type": "null"} not in kinds(schema["properties"][field])}
    assert schema["examples"]
    for example in schema["examples"]:
        assert never_null <= set(example) <= set(schema["properties"])


def kinds(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives for a field's value."""
    return list(field.get("anyOf", []))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (models.Instance, models.EXAMPLE_INSTANCE),
        (models.Instance, sleep_models.EXAMPLE_ASLEEP),
        (sleep_models.Swapped, sleep_models.EXAMPLE_SWAPPED),
        (sleep_models.GpuReport, sleep_models.EXAMPLE_GPUS),
        (sleep_models.Explanation, sleep_models.EXAMPLE_EXPLANATION),
    ],
)
def test_examples_of_replies_are_valid(model: type[BaseModel], example: dict[str, Any]) -> None:
    model.model_validate(example, extra="forbid")


def test_examples_can_be_sent(shared: Daemon, document: dict[str, Any]) -> None:
    for name, path in (("VllmConfig", INSTANCES), ("V1Config", "/v1/vllm")):
        (example,) = document["components"]["schemas"][name]["examples"]
        # Without the port, which may be in use on the machine that runs the tests.
        options = re.sub(r" --port \d+", "", example["options"])
        assert options != example["options"]
        reply = shared.http.post(path, json={**example, "options": options})
        assert reply.status_code in (200, 201), reply.text
    assert shared.http.delete("/v1/vllm").status_code == 200


def test_examples_of_a_swap_can_be_sent(shared: Daemon, document: dict[str, Any]) -> None:
    by_id, new = document["components"]["schemas"]["SwapRequest"]["examples"]
    (name,) = new["out"]
    shared.create(instance_id=name, gpus=1)
    shared.wait_state(name, "ready")
    options = re.sub(r" --port \d+", "", new["in"]["options"])
    assert shared.http.post("/v2/vllm/swap", json={**new, "in": {**new["in"], "options": options}}).status_code == 200
    assert shared.http.post("/v2/vllm/swap", json=by_id).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "codes"),
    [
        ("post", INSTANCES, {"201", "409", "422", "500"}),
        ("get", INSTANCES, {"200", "422"}),
        ("delete", INSTANCES, {"200", "500"}),
        ("get", f"{INSTANCES}/watch", {"200", "410", "422"}),
        ("put", INSTANCES + "/{instance_id}", {"201", "409", "422", "500"}),
        ("get", INSTANCES + "/{instance_id}", {"200", "404"}),
        ("delete", INSTANCES + "/{instance_id}", {"200", "404", "500"}),
        ("get", INSTANCES + "/{instance_id}/log", {"200", "206", "400", "404", "416"}),
        ("post", INSTANCES + "/{instance_id}/sleep", {"200", "404", "409", "422", "500"}),
        ("post", INSTANCES + "/{instance_id}/wake", {"200", "404", "409", "422", "500"}),
        ("get", INSTANCES + "/{instance_id}/explain", {"200", "404"}),
        ("post", INSTANCES + "/{instance_id}/verdicts", {"200", "404", "409", "422", "500"}),
        ("post", "/v2/vllm/swap", {"200", "404", "409", "422", "500"}),
        ("get", "/v2/vllm/gpus", {"200"}),
        ("post", "/v1/vllm", {"200", "409", "422", "500"}),
        ("delete", "/v1/vllm", {"200", "404", "500"}),
        ("get", "/v1/vllm", {"200", "404"}),
        ("get", "/health", {"200"}),
        ("get", "/ready", {"200", "503"}),
    ],
)
def test_openapi_document_has_every_reply(document: dict[str, Any], method: str, path: str, codes: set[str]) -> None:
    assert codes <= set(document["paths"][path][method]["responses"])


def test_instance_has_the_fields_of_the_document(shared: Daemon, document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Instance"]
    shared.create(instance_id="bad", env_vars={"BULLPEN_SIM_FAIL": "start"})
    found = [shared.wait_state("bad", "failed")]
    shared.create(
        instance_id="one",
        env_vars={"A": "b", "BULLPEN_SIM_START_SECONDS": "0.3"},
        gpu_uuids=[],
        annotations={},
        sleep="emulate",
        sleep_after=600,
        discard_after=700,
        stop_after=800,
        pin=True,
        priority=1,
        warm_up={"body": {"model": "m", "prompt": "hello", "max_tokens": 1}},
    )
    found += [shared.instance("one"), shared.wait_state("one", "ready")]
    shared.create(instance_id="two", gpus=1, gpu_share=0.5)
    shared.wait_state("two", "ready")
    for name in ("one", "two"):
        assert shared.http.post(f"{INSTANCES}/{name}/sleep").status_code == 200
        found.append(shared.instance(name))
    for instance in found:
        assert set(schema["required"]) <= set(instance) <= set(schema["properties"])
        models.Instance.model_validate(instance, extra="forbid")
    assert set().union(*found) == set(schema["properties"]), "and each field is used"
