"""The gate in the simulator's server."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.sim.simulator import DEADLINE_SECONDS, Simulator, wait_for


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


@pytest.fixture
def gated(shared: Simulator) -> Iterator[Simulator]:
    """The shared simulator, whose gate is open again afterwards."""
    yield shared
    assert set_mode(shared, "open")["mode"] == "open"


def gate(simulator: Simulator) -> dict[str, Any]:
    document: dict[str, Any] = simulator.http.get("/bullpen/gate").json()
    return document


def set_mode(simulator: Simulator, mode: str) -> dict[str, Any]:
    document: dict[str, Any] = simulator.http.post("/bullpen/gate", params={"mode": mode}).json()
    return document


def test_streams_count_until_their_end(gated: Simulator, threads: ThreadPoolExecutor) -> None:
    before = gate(gated)["in_flight"]
    body = {"prompt": "x", "stream": True, "max_tokens": 4000}
    with gated.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        document = gate(gated)
        assert (document["in_flight"], document["idle_seconds"]) == (before + 1, 0)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    wait_for("it counts no longer", lambda: gate(gated)["in_flight"] == before)


def test_a_client_that_leaves_a_stream_counts_no_longer(gated: Simulator) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 4000}
    with httpx.stream("POST", f"{gated.url}/v1/completions", json=body, trust_env=False) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert gate(gated)["in_flight"] == 1
    wait_for("it counts no longer", lambda: gate(gated)["in_flight"] == 0)


def test_hold_open_refuse(gated: Simulator, threads: ThreadPoolExecutor) -> None:
    expected = gated.complete("x")["choices"]
    assert set_mode(gated, "hold")["mode"] == "hold"
    held = threads.submit(gated.ask)
    wait_for("it is held", lambda: gate(gated)["held"] == 1)
    assert gated.metric("vllm:num_requests_waiting") == 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gated.url}/v1/completions", json={"prompt": "x"}, timeout=0.1, trust_env=False)
    wait_for("who left is held no longer", lambda: gate(gated)["held"] == 1)
    assert gated.http.post("/reset_mm_cache").status_code == 200
    passed = gated.http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Bullpen-Pass": "1"})
    assert passed.json()["choices"] == expected
    set_mode(gated, "open")
    assert held.result(DEADLINE_SECONDS).json()["choices"] == expected

    set_mode(gated, "hold")
    held = threads.submit(gated.ask)
    wait_for("it is held", lambda: gate(gated)["held"] == 1)
    set_mode(gated, "refuse")
    for answer in (held.result(DEADLINE_SECONDS), gated.ask()):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["type"] == "service_unavailable"
    assert gated.http.get("/health").status_code == 200


def test_a_mode_that_there_is_not(gated: Simulator) -> None:
    for path in ("/bullpen/gate", "/bullpen/gate?mode=", "/bullpen/gate?mode=ajar"):
        assert gated.http.post(path).status_code == 400
    assert gated.http.delete("/bullpen/gate").status_code == 405
    assert gated.http.get("/bullpen/other").status_code == 404


def test_holding_has_a_deadline(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, BULLPEN_GATE_HOLD_SECONDS=0.05) as simulator:
        set_mode(simulator, "hold")
        assert simulator.ask().status_code == 503
    with Simulator(tmp_path, "m", "--port", "0", BULLPEN_GATE_HOLD_SECONDS="soon") as simulator:
        assert simulator.wait_ended() == 1
        assert "BULLPEN_GATE_HOLD_SECONDS is 'soon'" in simulator.log


def test_other_machines_see_neither_the_gate_nor_what_is_kept_from_them(tmp_path: Path) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but its loopback's")
    for variables, status in (({"BULLPEN_DEV_ENDPOINTS": "loopback"}, 404), ({}, 200)):
        with Simulator.serving(tmp_path, "--host", "0.0.0.0", **variables) as simulator:
            url = f"http://{address}:{simulator.port}"
            with httpx.Client(base_url=url, timeout=DEADLINE_SECONDS, trust_env=False) as remote:
                assert remote.get("/health").status_code == 200
                assert remote.get("/is_sleeping").status_code == status
                assert remote.post("/reset_mm_cache").status_code == status
                for answer in (remote.get("/bullpen/gate"), remote.post("/bullpen/gate?mode=refuse")):
                    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
                local = f"http://127.0.0.1:{simulator.port}"
                assert httpx.get(f"{local}/is_sleeping", trust_env=False).status_code == 200
                assert httpx.get(f"{local}/bullpen/gate", trust_env=False).json()["mode"] == "open"


def own_address() -> str | None:
    """An address of this machine that is not its loopback's; a caller that uses it counts as remote."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address
