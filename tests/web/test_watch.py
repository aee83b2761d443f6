"""The watch: what it begins with, what comes, what it replays, and how its counter goes on."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psutil
import pytest

from bullpen.node import bus
from tests.support.daemon import Daemon, wait_until
from tests.web.calls import INSTANCES, lives, problems, watching

WATCH = f"{INSTANCES}/watch"


def revision(daemon: Daemon) -> int:
    return int(daemon.http.get(INSTANCES).json()["revision"])


def summary(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(line["type"], line["object"]["instance_id"], line["object"]["revision"]) for line in lines]


def test_begins_with_what_exists(shared: Daemon) -> None:
    shared.create(instance_id="a")
    shared.create(instance_id="dead", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.05"})
    shared.wait_state("dead", "failed")
    with watching(shared) as watch:
        first, second = watch.next(), watch.next()
    assert [line["type"] for line in (first, second)] == ["CREATED", "CREATED"]
    assert (first["object"]["instance_id"], first["object"]["status"]) == ("a", "running")
    assert (second["object"]["instance_id"], second["object"]["status"]) == ("dead", "stopped")
    assert second["object"]["exit_code"] == 1
    assert all(set(line) == {"type", "object"} for line in (first, second))


def test_life_of_an_instance(shared: Daemon) -> None:
    start = revision(shared)
    with watching(shared) as watch:
        shared.create(instance_id="a", annotations={"k": "v"})
        created = watch.next()
        shared.wait_state("a", "ready")
        shared.delete("a")
        deleted = watch.next()
    assert summary([created, deleted]) == [("CREATED", "a", start + 1), ("DELETED", "a", start + 2)]
    assert created["object"]["annotations"] == {"k": "v"}
    assert created["object"]["pid"] == deleted["object"]["pid"]


def test_server_that_ends_by_itself(shared: Daemon) -> None:
    start = revision(shared)
    with watching(shared) as watch:
        shared.create(instance_id="a", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.1", "BULLPEN_SIM_EXIT_CODE": "9"})
        lines = watch.until("STOPPED")
        shared.delete("a")
        lines += watch.until("DELETED")
    assert summary(lines) == [
        ("CREATED", "a", start + 1),
        ("STOPPED", "a", start + 2),
        ("DELETED", "a", start + 3),
    ]
    assert lines[1]["object"]["exit_code"] == 9
    assert lines[1]["object"]["status"] == "stopped"


def test_revision_is_the_same_everywhere(shared: Daemon) -> None:
    created = shared.create(instance_id="a")
    assert created["revision"] == revision(shared) == shared.instance("a")["revision"]
    shared.create(instance_id="b")
    assert shared.instance("a")["revision"] == created["revision"], "an instance keeps the revision of its last change"
    listed = shared.http.get(INSTANCES, params={"detail": "False"}).json()
    assert listed["revision"] == created["revision"] + 1
    assert shared.delete("b")["revision"] == created["revision"] + 2


def test_since_replays_what_followed(shared: Daemon) -> None:
    start = revision(shared)
    for name in ("a", "b"):
        shared.create(instance_id=name)
    shared.delete("a")
    expected = [("CREATED", "a", start + 1), ("CREATED", "b", start + 2), ("DELETED", "a", start + 3)]
    for place in range(4):
        with watching(shared, since=start + place) as watch:
            assert summary([watch.next() for _ in expected[place:]]) == expected[place:]
            shared.create(instance_id=f"later-{place}")
            live = watch.next()
            assert (live["type"], live["object"]["instance_id"]) == ("CREATED", f"later-{place}")
            expected.append(("CREATED", f"later-{place}", live["object"]["revision"]))


def test_since_now_begins_with_nothing(shared: Daemon) -> None:
    shared.create(instance_id="a")
    with watching(shared, since=revision(shared)) as watch:
        shared.create(instance_id="b")
        assert watch.next()["object"]["instance_id"] == "b"


def test_list_then_watch_misses_nothing(shared: Daemon) -> None:
    """Each watcher lists and watches from there, while instances come and go; all see the same in the end."""
    listed = shared.http.get(INSTANCES, params={"detail": "0"}).json()
    with watching(shared, since=listed["revision"]) as watch:
        for number in range(5):
            shared.create(instance_id=f"i{number}")
            shared.delete(f"i{number}")
        lines = [watch.next() for _ in range(10)]
    assert [line["object"]["revision"] for line in lines] == list(
        range(listed["revision"] + 1, listed["revision"] + 11)
    )


@pytest.mark.parametrize("ahead", [1, 1000, 10**30])
def test_since_in_the_future(shared: Daemon, ahead: int) -> None:
    reply = shared.http.get(WATCH, params={"since": revision(shared) + ahead})
    assert reply.status_code == 410
    assert "has not happened" in reply.json()["detail"]


@pytest.mark.parametrize("since", ["", "-1", "-0", "abc", "1.0", " 1", "+1", "0x1", "None", "\u0663", "9" * 5000])
def test_since_that_is_none(shared: Daemon, since: str) -> None:
    assert problems(shared.http.get(WATCH, params={"since": since}))[0]["loc"] == ["query", "since"]


@pytest.mark.parametrize("events", ["", "some", "ALL"])
def test_events_that_are_none(shared: Daemon, events: str) -> None:
    assert problems(shared.http.get(WATCH, params={"events": events}))[0]["loc"] == ["query", "events"]


def test_finer_events_only_for_those_who_ask(shared: Daemon) -> None:
    start = revision(shared)
    with watching(shared, events="all") as fine, watching(shared) as coarse:
        shared.create(instance_id="a", env_vars={"BULLPEN_SIM_START_SECONDS": "0.5"})
        shared.wait_state("a", "ready")
        shared.delete("a")
        finer, plain = fine.until("DELETED"), coarse.until("DELETED")
    assert [line["type"] for line in plain] == ["CREATED", "DELETED"]
    assert [line for line in finer if line["type"] != "STATE"] == plain
    states = [line["object"] for line in finer if line["type"] == "STATE"]
    assert {state["state"] for state in states} >= {"starting", "ready", "stopping"}
    assert len({state.get("phase") for state in states}) > 3
    assert {state["revision"] for state in states} == {start + 1}, "they advance nothing"


def test_finer_events_are_not_replayed(shared: Daemon) -> None:
    start = revision(shared)
    shared.create(instance_id="a")
    shared.wait_state("a", "ready")
    shared.delete("a")
    with watching(shared, since=start, events="all") as watch:
        assert [watch.next()["type"] for _ in range(2)] == ["CREATED", "DELETED"]


def test_state_line_that_tells_of_an_older_instance_has_the_counter(shared: Daemon) -> None:
    shared.create(instance_id="a", env_vars={"BULLPEN_SIM_START_SECONDS": "1"})
    with watching(shared, events="all", since=revision(shared)) as watch:
        other = shared.create(instance_id="b")
        lines = watch.until("CREATED")
        while lines[-1]["type"] != "STATE" or lines[-1]["object"]["instance_id"] != "a":
            lines.append(watch.next())
    assert lines[-1]["object"]["revision"] == other["revision"]


def test_watchers_that_leave_are_forgotten(shared: Daemon) -> None:
    process = psutil.Process(shared.pid)
    shared.http.get("/health")
    before = process.num_fds()
    for _ in range(5):
        with watching(shared), watching(shared, events="all"):
            pass
    wait_until(lambda: process.num_fds() <= before)


async def test_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bus.HEARTBEAT_SECONDS == 15
    monkeypatch.setattr(bus, "HEARTBEAT_SECONDS", 0.02)
    events = bus.Bus(revision=7)
    fine, coarse = events.subscribe([], fine=True), events.subscribe([], fine=False)
    heartbeats = [json.loads(await asyncio.wait_for(anext(fine), 5)) for _ in range(2)]
    assert heartbeats == [{"type": "HEARTBEAT", "object": {"revision": 7}}] * 2
    events.publish("CREATED", {"instance_id": "a", "revision": 8}, 8)
    assert json.loads(await asyncio.wait_for(anext(coarse), 5))["type"] == "CREATED", "no heartbeat comes before it"


async def test_heartbeat_comes_while_much_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "HEARTBEAT_SECONDS", 0.1)
    events = bus.Bus()
    fine = events.subscribe([], fine=True)
    kinds = []
    for _ in range(50):
        events.publish_fine("STATE", {"revision": 0})
        kinds.append(json.loads(await asyncio.wait_for(anext(fine), 5))["type"])
        await asyncio.sleep(0.01)
    assert "HEARTBEAT" in kinds


@pytest.mark.slow
def test_heartbeat_over_the_wire(shared: Daemon) -> None:
    with watching(shared, events="all") as watch:
        assert watch.next(seconds=30) == {"type": "HEARTBEAT", "object": {"revision": revision(shared)}}


def test_a_thousand_events_are_kept_and_the_rest_is_gone() -> None:
    events = bus.Bus()
    for number in range(1, 3 * bus.BUFFERED_EVENTS):
        events.publish("CREATED", {"revision": number}, number)
    newest = events.revision
    assert len(events.missed(newest - 1000)) == 1000
    for too_old in (0, newest - bus.BUFFERED_EVENTS - 1):
        with pytest.raises(bus.RevisionGoneError, match="list, then watch"):
            events.missed(too_old)


# -- over a restart of the daemon ----------------------------------------------------------------------------------


def test_counter_goes_on_after_a_graceful_end(start_daemon: Callable[..., Daemon]) -> None:
    first = start_daemon().wait_warm()
    assert revision(first) == 0, "a new state directory begins anew"
    with watching(first, since=0):
        assert first.http.get(WATCH, params={"since": 1}).status_code == 410
    first.create(instance_id="a")
    first.create(instance_id="b")
    first.delete("a")
    assert revision(first) == 3
    assert first.end() == 0
    second = start_daemon(first.state_dir).wait_warm()
    listed = second.http.get(INSTANCES).json()
    assert (listed["revision"], listed["total_instances"]) == (4, 0), "the end deleted b"
    with watching(second, since=2) as watch:
        assert summary([watch.next(), watch.next()]) == [("DELETED", "a", 3), ("DELETED", "b", 4)]
        second.create(instance_id="c")
        assert summary([watch.next()]) == [("CREATED", "c", 5)]
    assert second.http.get(WATCH, params={"since": 6}).status_code == 410


def test_since_that_is_too_old(start_daemon: Callable[..., Daemon]) -> None:
    """The events before it are no longer in the journal, as they are after some thousand more."""
    first = start_daemon().wait_warm()
    for name in ("a", "b", "c"):
        first.create(instance_id=name)
    assert first.end() == 0
    with closing(sqlite3.connect(first.state_dir / "journal.sqlite")) as journal, journal:
        journal.execute("DELETE FROM events WHERE revision <= 2")
    second = start_daemon(first.state_dir)
    for since in (0, 1):
        reply = second.http.get(WATCH, params={"since": since})
        assert reply.status_code == 410
        assert "list, then watch" in reply.json()["detail"]
    with watching(second, since=2) as watch:
        assert summary([watch.next()]) == [("CREATED", "c", 3)]


def test_counter_goes_on_after_a_kill(
    start_daemon: Callable[..., Daemon], outliving: Callable[[int], psutil.Process]
) -> None:
    first = start_daemon().wait_warm()
    alive = outliving(first.create(instance_id="a")["pid"])
    ending = outliving(first.create(instance_id="b")["pid"])
    first.wait_state("b", "ready")
    first.kill()
    ending.kill()
    second = start_daemon(first.state_dir).wait_warm()
    wait_until(lambda: second.instance("b")["status"] == "stopped")
    assert second.instance("a")["status"] == "running"
    assert second.instance("b")["exit_code"] is None, "nobody saw its exit"
    with watching(second, since=0) as watch:
        lines = [watch.next() for _ in range(3)]
        assert summary(lines) == [("CREATED", "a", 1), ("CREATED", "b", 2), ("STOPPED", "b", 3)]
        second.delete("a")
        assert summary([watch.next()]) == [("DELETED", "a", 4)]
    assert not lives(alive)
