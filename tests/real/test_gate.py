"""The gate inside real vLLM: it counts, holds and refuses, and hides what only this machine may use."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.real.serving import Models, complete, drain, open_stream, serving
from tests.support.daemon import Daemon, wait_until

Pair = dict[str, dict[str, Any]]
LONG_ANSWER = 20_000
A_MOMENT = 2500
"""Tokens: more than a test lasts, and so many that something can be asked meanwhile."""
DEVELOPMENT_MODE = {"VLLM_SERVER_DEV_MODE": "1", "BULLPEN_DEV_ENDPOINTS": "loopback"}
"""What Bullpen sets for a server that can sleep; on a CPU none can."""


HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
"""For all calls, for to make a client takes longer than many an answer. It keeps no connection: servers come and go."""


def long_options(models: Models) -> str:
    """A model that can talk for a long time."""
    return models.options("tiny-long", "--max-model-len", str(LONG_ANSWER + 1000))


def gate(instance: dict[str, Any], mode: str | None = None) -> dict[str, Any]:
    """What a server's gate says, after it was set to a mode where one is given."""
    method, query = ("GET", {}) if mode is None else ("POST", {"mode": mode})
    reply = HTTP.request(method, f"{instance['url']}/bullpen/gate", params=query)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


@contextmanager
def closed(instance: dict[str, Any], mode: str) -> Iterator[None]:
    """Close a gate, and open it again afterwards."""
    assert gate(instance, mode)["mode"] == mode
    try:
        yield
    finally:
        gate(instance, "open")


def succeeded(instance: dict[str, Any]) -> float:
    """How many requests the engine itself has answered."""
    lines = HTTP.get(f"{instance['url']}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))


def test_requests_are_counted(daemon: Daemon, models: Models) -> None:
    """A stream counts until it has ended or its reader has left; looking at the server does not count."""
    with serving(daemon, long_options(models), "talker") as instance:
        with open_stream(instance, 200) as lines:
            assert [line for line in drain(lines) if line][-1] == "data: [DONE]"
        wait_until(lambda: gate(instance)["in_flight"] == 0)
        with open_stream(instance, LONG_ANSWER) as lines:
            piece = next(line for line in lines if line)
            assert json.loads(piece.removeprefix("data: "))["choices"][0]["finish_reason"] is None
            assert gate(instance) == {"mode": "open", "in_flight": 1, "held": 0, "idle_seconds": 0.0}
        wait_until(lambda: gate(instance)["in_flight"] == 0)
        idle = gate(instance)["idle_seconds"]
        for path in ("/health", "/metrics", "/v1/models"):
            assert HTTP.get(instance["url"] + path).status_code == 200
        assert gate(instance)["idle_seconds"] > idle


def test_a_closed_gate_holds_requests_until_it_opens(pair: Pair) -> None:
    """They get the answer that they would have got; the engine does not see them before."""
    instance = pair["tiny-a"]
    expected, before = complete(instance), succeeded(instance)
    with ThreadPoolExecutor() as threads:
        with closed(instance, "hold"):
            answers = [threads.submit(complete, instance) for _ in range(3)]
            wait_until(lambda: gate(instance)["held"] == 3)
            assert gate(instance) == {"mode": "hold", "in_flight": 0, "held": 3, "idle_seconds": 0.0}
            assert HTTP.get(f"{instance['url']}/health").status_code == 200
            assert succeeded(instance) == before
            assert not any(answer.done() for answer in answers)
        assert [answer.result(30) for answer in answers] == [expected] * 3
    assert succeeded(instance) == before + 3


def test_who_leaves_while_held_is_never_passed_on(pair: Pair) -> None:
    instance = pair["tiny-a"]
    before = succeeded(instance)
    with closed(instance, "hold"):
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{instance['url']}/v1/completions", json={"model": "tiny-a", "prompt": "x"}, timeout=0.3)
        wait_until(lambda: gate(instance)["held"] == 0)
    complete(instance)
    assert succeeded(instance) == before + 1


def test_a_closed_gate_refuses_with_a_clean_answer(pair: Pair) -> None:
    """503 in OpenAI's shape, with the time after which to try again; who was held is sent away as well."""
    instance = pair["tiny-b"]
    url = f"{instance['url']}/v1/chat/completions"
    body = {"model": "tiny-b", "messages": [{"role": "user", "content": "Who is warm?"}], "max_tokens": 1}
    with ThreadPoolExecutor() as threads, closed(instance, "hold"):
        held = threads.submit(HTTP.post, url, json=body)
        wait_until(lambda: gate(instance)["held"] == 1)
        gate(instance, "refuse")
        for reply in (held.result(30), HTTP.post(url, json=body)):
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert reply.json()["error"]["type"] == "service_unavailable"
        passed = HTTP.post(url, json=body, headers={"x-bullpen-pass": "1"})
        assert passed.status_code == 200
        assert gate(instance)["idle_seconds"] > 0, "what passes a closed gate is not counted"
    assert HTTP.post(url, json=body).status_code == 200


def test_a_server_that_cannot_sleep_has_no_development_endpoints(pair: Pair) -> None:
    """Bullpen turns vLLM's development mode on for nobody else."""
    for path in ("/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache"):
        assert HTTP.post(pair["tiny-a"]["url"] + path).status_code == 404
    assert HTTP.get(pair["tiny-a"]["url"] + "/is_sleeping").status_code == 404


def own_address() -> str | None:
    """An address of this machine that is not a loopback one."""
    addresses = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family is socket.AF_INET
    ]
    return next((address for address in addresses if not ipaddress.ip_address(address).is_loopback), None)


def test_development_endpoints_are_for_this_machine_alone(daemon: Daemon, models: Models, pair: Pair) -> None:
    """For a caller from elsewhere neither they nor the gate exist; the model does."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but its loopback ones")
    options = models.options("tiny-a", "--host", "0.0.0.0")
    # What comes from that address to the loopback one looks to the server as if another machine had sent it.
    elsewhere = httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=30)
    with serving(daemon, options, "public", env_vars=DEVELOPMENT_MODE) as instance, elsewhere:
        url = instance["url"]
        for path in ("/is_sleeping", "/server_info", "/bullpen/gate"):
            assert HTTP.get(url + path).status_code == 200
            assert HTTP.get(url.replace("127.0.0.1", address) + path).status_code == 200
        usual = HTTP.get(f"{pair['tiny-a']['url']}/openapi.json").json()["paths"]
        added = set(elsewhere.get(f"{url}/openapi.json").json()["paths"]) - set(usual)
        assert {"/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/server_info"} <= added
        for path in (*sorted(added), "/bullpen/gate"):
            for method in ("GET", "POST"):
                reply = elsewhere.request(method, url + path, params={"mode": "refuse"})
                assert reply.status_code == 404, f"{method} {path}: {reply.status_code}"
        forwarded = HTTP.post(f"{url}/sleep", headers={"x-forwarded-for": "192.0.2.1"})
        assert forwarded.status_code == 404, "what comes through a proxy is not from this machine"
        assert gate(instance)["mode"] == "open"
        body = {"model": "tiny-a", "prompt": "the model", "max_tokens": 1}
        assert elsewhere.post(f"{url}/v1/completions", json=body).status_code == 200
