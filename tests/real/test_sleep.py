"""Sleep, wake and swap of real vLLM on a CPU, where a sleep is emulated or refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.serving import Models, complete, drain, open_stream, serving, wait_gone, wait_ready
from tests.real.test_gate import A_MOMENT, HTTP, LONG_ANSWER, gate, long_options
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import processes_of

Pair = dict[str, dict[str, Any]]
SECONDS = 30.0


def tell(daemon: Daemon, instance_id: str, verb: str, **how: Any) -> httpx.Response:
    """Ask for a sleep or a wake."""
    return HTTP.post(f"{daemon.url}/v2/vllm/instances/{instance_id}/{verb}", params=how)


def told(daemon: Daemon, instance_id: str, verb: str, **how: Any) -> dict[str, Any]:
    """The same where it must succeed; the instance then."""
    reply = tell(daemon, instance_id, verb, **how)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


def swap(daemon: Daemon, incoming: Any, *out: str) -> httpx.Response:
    """Ask for a swap."""
    return daemon.http.post("/v2/vllm/swap", json={"in": incoming, "out": list(out)})


def ask(instance: dict[str, Any]) -> httpx.Response:
    """Ask a server something, whatever it answers."""
    body = {"model": instance["served_model_names"][0], "prompt": "the model", "max_tokens": 1}
    return HTTP.post(f"{instance['url']}/v1/completions", json=body)


def explained(daemon: Daemon, instance_id: str) -> str:
    """All notes about an instance, a line each."""
    notes = daemon.http.get(f"/v2/vllm/instances/{instance_id}/explain").json()["notes"]
    return "\n".join(note["text"] for note in notes)


def test_an_emulated_sleep_keeps_the_slot(daemon: Daemon, models: Models, pair: Pair) -> None:
    """Its processes are gone; id, URL, port and log stay; awake again it gives the same answer."""
    with serving(daemon, models.options("tiny-a"), "napper", sleep="emulate") as before:
        answer, log = complete(before), daemon.log("napper")
        assert before["can_sleep"]
        asleep = told(daemon, "napper", "sleep")
        assert (asleep["state"], asleep["sleep_emulated"], asleep["status"]) == ("sleeping", True, "stopped")
        assert asleep["url"] == before["url"]
        assert not processes_of("napper", before["pid"])
        with pytest.raises(httpx.ConnectError):
            ask(before)
        assert told(daemon, "napper", "sleep")["state"] == "sleeping"

        taken = daemon.http.put("/v2/vllm/instances/napper", json={"options": models.options("tiny-a")})
        assert taken.status_code == 409
        options = models.options("tiny-a", "--port", str(httpx.URL(before["url"]).port))
        refused = daemon.http.post("/v2/vllm/instances", json={"options": options})
        assert (refused.status_code, "'napper'" in refused.text) == (409, True)
        assert complete(pair["tiny-a"]) == answer

        awake = told(daemon, "napper", "wake")
        assert (awake["state"], awake["url"]) == ("ready", before["url"])
        assert awake["pid"] != before["pid"]
        assert complete(awake) == answer
        assert daemon.log("napper").startswith(log) and len(daemon.log("napper")) > len(log)
        assert told(daemon, "napper", "wake")["pid"] == awake["pid"]
        assert not processes_of("napper", awake["pid"]).keys() & {before["pid"]}
        told(daemon, "napper", "sleep")
        assert not processes_of("napper", awake["pid"])


@pytest.mark.parametrize("new_requests", ["hold", "refuse"])
def test_what_is_in_flight_ends_before_an_emulated_sleep(daemon: Daemon, models: Models, new_requests: str) -> None:
    """A stream is sent whole; who asks meanwhile gets a clean refusal, for no server will be left to answer it."""
    with ThreadPoolExecutor() as threads, serving(daemon, long_options(models), "busy", sleep="emulate") as instance:
        with open_stream(instance, A_MOMENT) as lines:
            asleep = threads.submit(told, daemon, "busy", "sleep", new_requests=new_requests)
            wait_until(lambda: gate(instance)["mode"] == new_requests)
            asked = threads.submit(ask, instance)
            if new_requests == "hold":
                wait_until(lambda: gate(instance)["held"] == 1)
            else:
                assert asked.result(SECONDS).status_code == 503
            assert gate(instance)["in_flight"] == 1
            data = [line for line in drain(lines) if line]
        assert data[-1] == "data: [DONE]"
        assert json.loads(data[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        refused = asked.result(SECONDS)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable")
        assert refused.headers["retry-after"]
        assert asleep.result(SECONDS)["state"] == "sleeping"


def test_many_held_requests_are_all_answered(daemon: Daemon, models: Models) -> None:
    """None of those who wait at the gate sees a broken connection, however many there are."""
    count = 30
    with (
        ThreadPoolExecutor(count + 1) as threads,
        serving(daemon, long_options(models), "crowd", sleep="emulate") as instance,
    ):
        with open_stream(instance, LONG_ANSWER):
            asleep = threads.submit(told, daemon, "crowd", "sleep")
            wait_until(lambda: gate(instance)["mode"] == "hold")
            asked = [threads.submit(ask, instance) for _ in range(count)]
            wait_until(lambda: gate(instance)["held"] == count)
        assert [reply.result(SECONDS).status_code for reply in asked] == [503] * count
        assert asleep.result(SECONDS)["state"] == "sleeping"


def test_a_wake_during_the_drain_turns_it_back(daemon: Daemon, models: Models) -> None:
    """Nobody notices that it was to sleep but who asked for it."""
    with (
        ThreadPoolExecutor() as threads,
        serving(daemon, long_options(models), "moody", sleep="emulate") as instance,
        open_stream(instance, LONG_ANSWER) as lines,
    ):
        asleep = threads.submit(tell, daemon, "moody", "sleep")
        wait_until(lambda: gate(instance)["mode"] == "hold")
        asked = threads.submit(ask, instance)
        wait_until(lambda: gate(instance)["held"] == 1)
        assert told(daemon, "moody", "wake")["pid"] == instance["pid"]
        assert asked.result(SECONDS).status_code == 200
        assert asleep.result(SECONDS).status_code == 409
        assert next(line for line in lines if line), "the stream goes on"


def test_a_drain_has_an_end(daemon: Daemon, models: Models) -> None:
    """What has not ended by then is cut off, and that is said."""
    with serving(daemon, long_options(models), "endless", sleep="emulate") as instance:
        with open_stream(instance, LONG_ANSWER) as lines:
            assert told(daemon, "endless", "sleep", drain=0.2)["state"] == "sleeping"
            assert "broken off" in drain(lines)
        assert "1 requests were cut off after 0.2 s" in explained(daemon, "endless")


def test_swap_both_ways(daemon: Daemon, models: Models, pair: Pair) -> None:
    """One goes, the other comes, and each answers as itself; a swap back finds all as it was."""
    expected = {name: complete(instance) for name, instance in pair.items()}
    assert expected["tiny-a"] != expected["tiny-b"]
    with (
        serving(daemon, models.options("tiny-a"), "one", sleep="emulate") as one,
        serving(daemon, models.options("tiny-b"), "two", sleep="emulate") as two,
    ):
        told(daemon, "two", "sleep")
        for comes, goes, name in [(two, one, "tiny-b"), (one, two, "tiny-a")] * 2:
            leader = daemon.instance(goes["instance_id"])["pid"]
            reply = swap(daemon, comes["instance_id"], goes["instance_id"])
            assert reply.status_code == 200, reply.text
            done = reply.json()
            assert [(done["in"]["instance_id"], done["in"]["state"])] == [(comes["instance_id"], "ready")]
            assert [(out["instance_id"], out["state"]) for out in done["out"]] == [(goes["instance_id"], "sleeping")]
            assert list(done["stages"]) == ["out", "in", "done"]
            assert list(done["stages"].values()) == sorted(done["stages"].values())
            assert complete(comes) == expected[name]
            wait_gone(goes["instance_id"], leader)
        told(daemon, "two", "wake")  # both may be awake: there is no GPU to have


def test_swap_in_a_new_configuration(daemon: Daemon, models: Models, pair: Pair) -> None:
    """The one that comes in need not exist before."""
    with serving(daemon, models.options("tiny-a"), "old", sleep="emulate") as old:
        new = {"instance_id": "new", "options": models.options("tiny-b"), "sleep": "emulate"}
        reply = swap(daemon, new, "old")
        assert reply.status_code == 200, reply.text
        assert complete(reply.json()["in"]) == complete(pair["tiny-b"])
        assert daemon.instance("old")["state"] == "sleeping"
        assert swap(daemon, "old", "new").status_code == 200
        assert complete(old) == complete(pair["tiny-a"])
        assert daemon.delete("new")["status"] == "not_running"


@pytest.mark.parametrize("trouble", ["crash", "refusal"])
def test_a_swap_that_fails_is_taken_back(daemon: Daemon, models: Models, pair: Pair, trouble: str) -> None:
    """What was there before is ready again and answers; of what was to come nothing is left."""
    options = {
        "crash": models.options("unknown"),
        "refusal": models.options("tiny-b", "--no-such-flag", "1"),
    }[trouble]
    with serving(daemon, models.options("tiny-a"), "steady", sleep="emulate") as steady:
        reply = swap(daemon, {"instance_id": "hopeless", "options": options}, "steady")
        expected = {"crash": (500, "NobodyKnows"), "refusal": (422, "--no-such-flag")}[trouble]
        assert (reply.status_code, expected[1] in reply.text) == (expected[0], True), reply.text
        if trouble == "crash":
            assert "taken back" in reply.text and "'steady' is ready" in reply.text
        back = wait_ready(daemon, "steady")
        assert back["url"] == steady["url"]
        assert complete(back) == complete(pair["tiny-a"])
        assert gate(back)["mode"] == "open"
        assert daemon.http.get("/v2/vllm/instances/hopeless").status_code == 404


def test_vllm_cannot_sleep_on_a_cpu(daemon: Daemon, models: Models, pair: Pair) -> None:
    """It is said at once, with the way that there is; and before anything is started where sleep was asked for."""
    refused = tell(daemon, "tiny-a", "sleep")
    assert refused.status_code == 409
    assert "cannot sleep on cpu" in refused.text and "sleep: emulate" in refused.text
    assert not pair["tiny-a"]["can_sleep"]
    wishes: list[dict[str, Any]] = [
        {"sleep": "engine"},
        {"sleep_after": "5m"},
        {"discard_after": 60},
        {"options": models.options("tiny-a", "--enable-sleep-mode")},
    ]
    for wish in wishes:
        body = {"options": models.options("tiny-a"), **wish}
        reply = daemon.http.post("/v2/vllm/instances", json=body)
        assert reply.status_code == 422, reply.text
        [detail] = reply.json()["detail"]
        assert "cannot sleep on cpu" in detail["msg"] and "sleep: emulate" in detail["msg"]
        assert detail["loc"][-1] == next(iter(wish))
    assert gate(pair["tiny-a"])["mode"] == "open"


def test_what_is_learned_of_a_model(daemon: Daemon, models: Models) -> None:
    """A first start knows nothing; the second knows how long it takes. Memory is measured in both."""
    folder = models.folder / "tiny-news"
    folder.symlink_to(models.folder / "tiny-a")
    options = models.options("tiny-news", "--api-key", "s3cret")
    warm_up = {"path": "/v1/completions", "body": {"model": "tiny-news", "prompt": "good morning", "max_tokens": 2}}
    for name, known in (("first", False), ("second", True)):
        created = daemon.create(options, instance_id=name, sleep="emulate", warm_up=warm_up)
        assert created["state"] == "starting"
        assert (created["remaining_seconds"] is not None) == known
        if known:
            assert created["remaining_seconds"] > 0
        document = wait_ready(daemon, name)
        assert daemon.log(name).count('"POST /v1/completions HTTP/1.1" 200') == 1
        assert "warm-up request failed" not in explained(daemon, name)
        phases = document["phases"]
        assert phases["bind"] <= phases["first request"] < phases["ready"]
        wait_until(lambda name=name: "memory" in daemon.instance(name), SECONDS)  # type: ignore[misc]
        held = daemon.instance(name)["memory"]["awake"]
        assert held["gpu_mib"] is None
        # A tree that shares most pages with its zygote; its own part is some hundred MiB at most.
        assert 20 < held["host_mib"] < 2000
        daemon.delete(name)


def test_the_ladder_steps_down_when_idle_and_not_before(daemon: Daemon, models: Models) -> None:
    """A stream keeps it awake, however long it takes; the time counts from its end."""
    fields = {"sleep": "emulate", "sleep_after": 0.5}
    with serving(daemon, long_options(models), "tired", **fields) as instance:
        with open_stream(instance, LONG_ANSWER) as lines:
            begun = time.monotonic()
            while time.monotonic() - begun < 1.5:
                assert next(lines) is not None
                assert daemon.instance("tired")["state"] == "ready"
            ended = time.monotonic()
        asleep = daemon.wait_state("tired", "sleeping")
        assert time.monotonic() - ended > 0.4
        assert asleep["sleep_emulated"]
        assert "no request for 0.5 s" in asleep["reason"] or "no request for 0.5 s" in explained(daemon, "tired")
        assert not processes_of("tired", instance["pid"])
        assert told(daemon, "tired", "wake")["state"] == "ready"
        daemon.wait_state("tired", "sleeping")


def test_the_next_daemon_wakes_an_emulated_sleeper(
    start_real_daemon: Callable[..., Daemon], models: Models, pair: Pair, tmp_path: Path
) -> None:
    """kill -9 of the daemon: who slept is asleep for the next one too, and wakes under its old URL."""
    first = start_real_daemon(tmp_path / "s").wait_warm()
    first.create(models.options("tiny-a"), instance_id="napper", sleep="emulate")
    before = wait_ready(first, "napper")
    told(first, "napper", "sleep")
    first.kill()
    second = start_real_daemon(tmp_path / "s")
    asleep = second.instance("napper")
    assert (asleep["state"], asleep["sleep_emulated"], asleep["url"]) == ("sleeping", True, before["url"])
    awake = told(second, "napper", "wake")  # long before the zygote is warm
    assert (awake["state"], awake["url"]) == ("ready", before["url"])
    assert complete(awake) == complete(pair["tiny-a"])
    assert second.end() == 0
    assert not processes_of("napper", awake["pid"])
