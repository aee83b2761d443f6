"""The supervisor in this process: what it takes over from an earlier one, and creates that go wrong on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bullpen.core.instance import Config, Instance, State
from bullpen.errors import InvalidRequestError, LaunchError, StateError
from bullpen.node import housekeeping
from bullpen.node.adoption import BOOT_ID
from bullpen.node.bus import RevisionGoneError, encode
from bullpen.node.journal import Journal
from bullpen.node.settings import Settings
from bullpen.node.supervisor import Supervisor
from bullpen.node.trees import read_process
from bullpen.node.zygote import Leased, Zygote
from tests.node.conftest import Servers, is_alive

SECONDS = 20.0
Start = Callable[[], Awaitable[Supervisor]]


@pytest.fixture
async def start(tmp_path: Path, subreaper: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Start supervisors on the simulator, one after another on the same state directory."""
    monkeypatch.setattr(housekeeping, "SECONDS", 0.05)
    started: list[Supervisor] = []

    async def start() -> Supervisor:
        supervisor = Supervisor(Settings(engine="sim", state_dir=tmp_path / "state", stop_timeout=5, spares=0))
        started.append(supervisor)
        await supervisor.start()
        return supervisor

    yield start
    for supervisor in started:
        await asyncio.wait_for(supervisor.close(), SECONDS)


async def create(supervisor: Supervisor, name: str, options: str = "--model m") -> Instance:
    return await asyncio.wait_for(supervisor.create(supervisor.read_config(options), name), SECONDS)


async def wait_for(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), SECONDS)


def journal(tmp_path: Path) -> Journal:
    (tmp_path / "state").mkdir(exist_ok=True)
    return Journal(tmp_path / "state" / "journal.sqlite")


def saved(name: str, **fields: Any) -> Instance:
    config = Config("--model m", ("--model", "m"), engine="sim")
    return Instance(name, f"key{name}", config, created_at=1.0, listed=True, tree_gone=False, **fields)


# -- what an earlier one left ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_boot", [True, False])
async def test_numbers_of_another_boot_mean_nothing(
    start: Start, servers: Servers, tmp_path: Path, same_boot: bool
) -> None:
    """A session that its leader has left lives on. Before a reboot it was the instance's; after one, it is anyone's."""
    tree, leader = servers.start(
        "import os, time\n"
        "if os.fork():\n    os._exit(0)\n"
        "os.write(1, str(os.getpid()).encode() + bytes([10])); time.sleep(60)"
    )
    (left,) = servers.pids(tree, 1)
    leader.wait(SECONDS)
    before = journal(tmp_path)
    before.set_fact("boot_id", BOOT_ID.read_text().strip() if same_boot else "another one")
    before.save(saved("a", state=State.READY, pid=tree.leader, start_ticks=tree.start_ticks, revision=1))
    before.close()
    supervisor = await start()
    await wait_for(lambda: supervisor.fleet.get("a").tree_gone)
    assert supervisor.fleet.get("a").state is State.STOPPED
    assert is_alive(left) is not same_boot
    os.kill(left, signal.SIGKILL) if not same_boot else None


async def test_the_counter_never_goes_back(start: Start, tmp_path: Path) -> None:
    """The last event could not be kept, but what it told of was saved."""
    before = journal(tmp_path)
    before.append_event(5, encode("CREATED", {"revision": 5}))
    before.save(saved("a", state=State.STOPPED, pid=2**22 + 1, start_ticks=1, ended_at=2.0, revision=7))
    before.close()
    supervisor = await start()
    assert supervisor.bus.revision == 7
    with pytest.raises(RevisionGoneError):
        supervisor.bus.missed(5)
    assert (await create(supervisor, "b")).revision == 8
    assert len(supervisor.bus.missed(7)) == 1


async def test_a_deleted_instance_stays_deleted(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the disk was full when it was to be forgotten."""
    supervisor = await start()
    await create(supervisor, "a")
    failures = [StateError("the disk is full")] * 3
    forget = supervisor.resources.journal.forget

    def try_to_forget(name: str) -> None:
        if failures:
            raise failures.pop()
        forget(name)

    monkeypatch.setattr(supervisor.resources.journal, "forget", try_to_forget)
    await asyncio.wait_for(supervisor.stop("a"), SECONDS)
    assert [one.id for one in supervisor.resources.journal.instances()] == ["a"]
    await wait_for(lambda: supervisor.resources.journal.instances() == [])
    assert not failures


# -- creates -----------------------------------------------------------------------------------------------------------


async def test_a_bug_on_the_way_is_an_answer_too(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await start()

    def stumble(*_: object) -> int:
        raise RuntimeError("unheard of")

    monkeypatch.setattr(supervisor.resources.ports, "hold", stumble)
    with pytest.raises(LaunchError, match=r"creating it failed inside Bullpen \(RuntimeError\); its log has more"):
        await create(supervisor, "a")
    assert "unheard of" in caplog.text
    assert supervisor.fleet.instances == {}
    monkeypatch.undo()
    assert (await create(supervisor, "a")).listed


async def test_a_process_that_dies_before_it_is_used_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = await start()
    lease, killed = Zygote.lease, []  # type: Any, list[int]

    async def lease_dying(self: Zygote) -> Leased:
        leased: Leased = await lease(self)
        if len(killed) < 2:
            os.kill(leased.pid, signal.SIGKILL)
            killed.append(leased.pid)
        return leased

    monkeypatch.setattr(Zygote, "lease", lease_dying)
    instance = await create(supervisor, "a")
    assert len(killed) == 2
    assert instance.pid not in killed


async def test_a_host_by_name(start: Start) -> None:
    supervisor = await start()
    instance = await create(supervisor, "a", "--model m --host localhost")
    assert instance.address is not None
    assert instance.address.url.startswith("http://localhost:")
    await wait_for(lambda: instance.state is State.READY)
    with pytest.raises(InvalidRequestError, match=r"--host nobody\.invalid: no address is known for that name"):
        await create(supervisor, "b", "--model m --host nobody.invalid")
    assert "b" not in supervisor.fleet.instances


async def test_a_folder_that_was_removed_is_no_obstacle(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        supervisor = await start()
        assert (await create(supervisor, "a")).listed
    finally:
        os.chdir(tmp_path)


async def test_a_folder_removed_later_is_named(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    supervisor = await start()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    with pytest.raises(LaunchError, match=r"the process cannot become the server: FileNotFoundError: .*gone"):
        await create(supervisor, "a")
    assert supervisor.fleet.instances == {}


async def test_ready_is_who_can_fork_a_plain_instance(start: Start) -> None:
    """A warm zygote with variables of its own makes nobody else's instance start."""
    supervisor = await start()
    await wait_for(lambda: supervisor.readiness()["ready"])
    extra = supervisor.resources.zygotes.get("sim", {"PYTHONHASHSEED": "7"})
    await asyncio.wait_for(extra.wait_until_warm(), SECONDS)
    plain, other = supervisor.readiness()["zygotes"]
    assert (plain["environment"], other["environment"]) == ([], ["PYTHONHASHSEED"])
    supervisor.resources.zygotes.get("sim", {}).warmth.state = "warming"
    assert not supervisor.readiness()["ready"]


# -- housekeeping ------------------------------------------------------------------------------------------------------


async def test_orphans_do_not_stay_as_zombies(start: Start, servers: Servers) -> None:
    await start()
    tree, parent = servers.start(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); os.write(1, str(os.getpid()).encode() + bytes([10])); time.sleep(0.2); os._exit(0)\n"
        "time.sleep(60)"
    )
    (orphan,) = servers.pids(tree, 1)
    parent.kill()
    parent.wait(SECONDS)
    await wait_for(lambda: read_process(orphan) is None)


async def test_housekeeping_goes_on_after_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await start()
    await create(supervisor, "a")
    calls: list[str] = []

    def stumble(key: str) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise RuntimeError("unheard of")

    monkeypatch.setattr(supervisor.resources.logs, "enforce_cap", stumble)
    await wait_for(lambda: len(calls) > 2)
    assert "unheard of" in caplog.text
