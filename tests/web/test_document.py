"""What the daemon says about itself: the index, the page, health, readiness and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import bullpen
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


@pytest.mark.parametrize("name", ["VllmConfig", "V1Config", "Instance", "V1Status"])
def test_openapi_document_has_examples(document: dict[str, Any], name: str) -> None:
    schema = document["components"]["schemas"][name]
    (example,) = schema["examples"]
    assert set(schema["required"]) <= set(example) <= set(schema["properties"])


def test_examples_can_be_sent(shared: Daemon, document: dict[str, Any]) -> None:
    for name, path in (("VllmConfig", INSTANCES), ("V1Config", "/v1/vllm")):
        (example,) = document["components"]["schemas"][name]["examples"]
        # Without the port, which may be in use on the machine that runs the tests.
        options = re.sub(r" --port \d+", "", example["options"])
        assert options != example["options"]
        reply = shared.http.post(path, json={**example, "options": options})
        assert reply.status_code in (200, 201), reply.text
    assert shared.http.delete("/v1/vllm").status_code == 200


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
    shared.create(
        instance_id="one", env_vars={"A": "b", "BULLPEN_SIM_START_SECONDS": "0.3"}, gpu_uuids=[], annotations={}
    )
    starting, ready = shared.instance("one"), shared.wait_state("one", "ready")
    shared.create(instance_id="bad", env_vars={"BULLPEN_SIM_FAIL": "start"})
    failed = shared.wait_state("bad", "failed")
    for instance in (starting, ready, failed):
        assert set(schema["required"]) <= set(instance) <= set(schema["properties"])
    assert set(starting) | set(ready) | set(failed) == set(schema["properties"]), "and each field is used"
