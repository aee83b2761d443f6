"""The daemon's zygotes: waited for, leased from, replaced when they die, and no more of them than wanted."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bullpen.errors import LaunchError
from bullpen.node import zygote as zygote_module
from bullpen.node import zygotes as zygotes_module
from bullpen.node.zygote import Leased, Zygote, ZygoteEndedError
from bullpen.node.zygotes import Zygotes, retry_pause
from tests.node.conftest import is_alive

SECONDS = 20.0
Make = Callable[..., Zygotes]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Make the zygotes of a daemon; they end with the test."""
    made: list[Zygotes] = []
    (tmp_path / "run").mkdir(mode=0o700)

    def make(python: str = sys.executable, limit: int = 3, spares: int = 0) -> Zygotes:
        environment = {**os.environ, "SHARED": "1"}
        made.append(Zygotes({"sim": python}, environment, tmp_path / "run", tmp_path, spares, limit))
        return made[-1]

    yield make
    for zygotes in made:
        await asyncio.wait_for(zygotes.close(), SECONDS)
    assert list((tmp_path / "run").iterdir()) == [], "no socket is left"


async def wait_for(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), SECONDS)


async def lease(zygote: Zygote) -> Leased:
    return await asyncio.wait_for(zygote.lease(), SECONDS)


async def ends(leased: Leased) -> int | None:
    return await asyncio.wait_for(leased.status, SECONDS)


def only(zygotes: Zygotes) -> Zygote:
    (zygote,) = zygotes.all()
    return zygote


# -- leasing -----------------------------------------------------------------------------------------------------------


async def test_a_lease_waits_until_it_is_warm(make: Make) -> None:
    zygote = make().get("sim", {})
    assert zygote.warmth.describe()["state"] == "warming"
    leased = await lease(zygote)
    described = zygote.warmth.describe()
    assert (described["state"], described["failed"]) == ("warm", {})
    assert described["version"]
    assert (await leased.channel.ask({"op": "check", "argv": ["--model", "m"]}))["model"] == "m"
    leased.give_back()
    assert await ends(leased) == 0


async def test_the_same_zygote_serves_all_who_ask_for_it(make: Make) -> None:
    zygotes = make()
    first = zygotes.get("sim", {})
    assert zygotes.get("sim", {}) is first
    assert zygotes.get("sim", {"SHARED": "1"}) is first, "the daemon's own value is no difference"
    assert zygotes.get("sim", {"SHARED": "2"}) is not first
    assert [dict(zygote.command.early) for zygote in zygotes.all()] == [{}, {"SHARED": "2"}]


async def test_many_ask_at_the_same_moment(make: Make) -> None:
    """More than a socket takes: they all waited for it to be warm."""
    zygote = make().get("sim", {})
    leases = await asyncio.wait_for(asyncio.gather(*(zygote.lease() for _ in range(300))), 60)
    assert len({leased.pid for leased in leases}) == 300
    assert zygote.waiting == 0
    for leased in leases:
        leased.give_back()
    assert set(await asyncio.gather(*(ends(leased) for leased in leases))) == {0}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_an_end_is_told_however_early_it_comes(make: Make, number: signal.Signals) -> None:
    zygote = make(spares=1).get("sim", {})
    for _ in range(10):
        leased = await lease(zygote)
        os.kill(leased.pid, number)
        assert await ends(leased) == -number
        leased.give_back()


async def test_a_daemon_without_descriptors_is_told_so(make: Make) -> None:
    zygote = make().get("sim", {})
    (await lease(zygote)).give_back()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
    try:
        with pytest.raises(LaunchError, match="may open no more files; raise its limit"):
            await lease(zygote)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    leased = await lease(zygote)
    leased.give_back()
    assert await ends(leased) == 0


async def test_who_gives_up_gets_nothing_and_leaves_nothing(make: Make) -> None:
    zygote = make().get("sim", {})
    await asyncio.wait_for(zygote.wait_until_warm(), SECONDS)
    before = len(os.listdir("/proc/self/fd"))
    waiting = [asyncio.ensure_future(zygote.lease()) for _ in range(10)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 10
    (await lease(zygote)).give_back()
    assert len(os.listdir("/proc/self/fd")) == before
    assert zygote.waiting == 0


# -- dying and being replaced ------------------------------------------------------------------------------------------


async def test_a_killed_zygote_is_replaced_and_what_it_gave_lives_on(make: Make) -> None:
    zygotes = make()
    first = zygotes.get("sim", {})
    leased = await lease(first)
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.wait_for(first.gone.wait(), SECONDS)
    assert leased.status.result() is None, "nobody can tell any more"
    assert (await leased.channel.ask({"op": "check", "argv": ["--model", "m"]}))["ok"]
    leased.give_back()
    second = zygotes.get("sim", {})
    assert second is not first
    (await lease(second)).give_back()
    with pytest.raises(ZygoteEndedError):
        await lease(first)
    assert only(zygotes) is second


async def test_a_new_one_warms_by_itself(make: Make) -> None:
    zygotes = make()
    first = zygotes.get("sim", {})
    await asyncio.wait_for(first.wait_until_warm(), SECONDS)
    os.kill(first.pid, signal.SIGKILL)
    await wait_for(lambda: zygotes.all() and only(zygotes) is not first)
    await asyncio.wait_for(only(zygotes).wait_until_warm(), SECONDS)
    assert only(zygotes).warmth.state == "warm"


async def test_who_waits_while_it_dies_may_ask_the_next(make: Make) -> None:
    zygotes = make()
    first = zygotes.get("sim", {})
    await asyncio.wait_for(first.wait_until_warm(), SECONDS)
    os.kill(first.pid, signal.SIGSTOP)
    waiting = [asyncio.ensure_future(first.lease()) for _ in range(5)]
    await asyncio.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), SECONDS)
    assert [type(outcome) for outcome in outcomes] == [ZygoteEndedError] * 5


async def test_one_that_hangs_is_ended_and_replaced(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_module, "ANSWER_SECONDS", 0.2)
    zygotes = make()
    first = zygotes.get("sim", {})
    await asyncio.wait_for(first.wait_until_warm(), SECONDS)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="the zygote has not answered for 0 s and is replaced; try again"):
        await lease(first)
    await asyncio.wait_for(first.gone.wait(), SECONDS)
    monkeypatch.setattr(zygote_module, "ANSWER_SECONDS", SECONDS)
    (await lease(zygotes.get("sim", {}))).give_back()


@pytest.fixture
def broken_python(tmp_path: Path) -> str:
    """An interpreter in which the engine cannot be imported; it notes each try."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho tried >> {tmp_path}/tries\necho no such engine >&2\nexit 4\n")
    program.chmod(0o755)
    return str(program)


async def test_a_broken_engine_is_an_error_at_once_and_tried_again(
    make: Make, broken_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygotes_module, "RETRY_SECONDS", (0.05, 3600.0))
    zygotes = make(broken_python)
    says = r"engine sim cannot be used: the zygote ended with status 4; .*zygote-sim\.log may say why"
    with pytest.raises(LaunchError, match=says):
        await lease(zygotes.get("sim", {}))
    assert "no such engine" in (tmp_path / "zygote-sim.log").read_text()
    tries = tmp_path / "tries"
    await wait_for(lambda: len(tries.read_text().split()) == 2)
    await wait_for(lambda: only(zygotes).warmth.state == "broken")
    for _ in range(3):
        with pytest.raises(LaunchError, match="ended with status 4"):
            await asyncio.wait_for(zygotes.get("sim", {}).lease(), 5)
    assert len(tries.read_text().split()) == 2, "a create does not try it again; the next pause is an hour"
    assert only(zygotes).warmth.describe()["error"]


async def test_one_that_is_repaired_comes_back(make: Make, broken_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes_module, "RETRY_SECONDS", (0.3,))
    zygotes = make(broken_python)
    with pytest.raises(LaunchError):
        await lease(zygotes.get("sim", {}))
    Path(broken_python).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    await wait_for(lambda: only(zygotes).warmth.state == "warm")
    (await lease(zygotes.get("sim", {}))).give_back()


async def test_an_interpreter_that_is_not_there(make: Make, tmp_path: Path) -> None:
    zygotes = make(str(tmp_path / "nowhere" / "python"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(LaunchError, match=r"its zygote cannot be started with .*nowhere/python: .*No such"):
            zygotes.get("sim", {})
    assert len(os.listdir("/proc/self/fd")) == before
    assert zygotes.all() == []


async def test_an_engine_that_is_not_set_up(make: Make) -> None:
    with pytest.raises(LaunchError, match="no engine 'vllm' is set up here; there are: sim"):
        make().get("vllm", {})


def test_pauses_grow_to_a_limit() -> None:
    pauses = [retry_pause(failures) for failures in range(10)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 1 < pauses[-1] == pauses[-2] == zygotes_module.RETRY_SECONDS[-1]


async def test_one_that_dies_young_and_unused_is_not_restarted_in_a_rush(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygotes_module, "RETRY_SECONDS", (0.0, 3600.0))
    zygotes = make()
    zygotes.get("sim", {})
    for _ in range(2):
        zygote = only(zygotes)
        await asyncio.wait_for(zygote.wait_until_warm(), SECONDS)
        os.kill(zygote.pid, signal.SIGKILL)
        await asyncio.wait_for(zygote.gone.wait(), SECONDS)
        await asyncio.sleep(0.05)
    assert zygotes.all() == [], "the second time it waits"
    (await lease(zygotes.get("sim", {}))).give_back()


# -- environments ------------------------------------------------------------------------------------------------------


async def test_an_environment_of_its_own_reaches_the_import(make: Make, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    zygote = make(str(program)).get("sim", {"PYTHONHASHSEED": "7"})
    await asyncio.wait_for(zygote.wait_until_warm(), SECONDS)
    assert {"PYTHONHASHSEED=7", "SHARED=1"} <= set((tmp_path / "env").read_text().splitlines())


async def test_extra_ones_are_limited_and_the_least_used_goes(make: Make) -> None:
    zygotes = make(limit=2)
    main = zygotes.get("sim", {})
    one, two = (zygotes.get("sim", {"NUMBER": number}) for number in "12")
    for zygote in (main, two, one):
        (await lease(zygote)).give_back()
    three = zygotes.get("sim", {"NUMBER": "3"})
    assert zygotes.all() == [main, one, three]
    await asyncio.wait_for(two.gone.wait(), SECONDS)
    assert not is_alive(two.pid)
    assert is_alive(one.pid)
    again = zygotes.get("sim", {"NUMBER": "2"})
    assert again is not two
    (await lease(again)).give_back()


async def test_one_that_is_waited_for_is_not_retired(make: Make) -> None:
    zygotes = make(limit=1)

    async def create(number: int) -> Leased:
        return await zygotes.get("sim", {"NUMBER": str(number)}).lease()

    waiting = [asyncio.ensure_future(create(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert len(zygotes.all()) == 4, "more than the limit, for a while"
    leases = await asyncio.wait_for(asyncio.gather(*waiting), SECONDS)
    assert all(is_alive(leased.pid) for leased in leases)
    zygotes.get("sim", {"NUMBER": "9"})
    assert len(zygotes.all()) == 1
    for leased in leases:
        leased.give_back()


async def test_an_extra_one_that_dies_comes_back_when_asked_for(make: Make) -> None:
    zygotes = make()
    zygote = zygotes.get("sim", {"NUMBER": "1"})
    (await lease(zygote)).give_back()
    os.kill(zygote.pid, signal.SIGKILL)
    await asyncio.wait_for(zygote.gone.wait(), SECONDS)
    assert zygotes.all() == []
    (await lease(zygotes.get("sim", {"NUMBER": "1"}))).give_back()


# -- ending ------------------------------------------------------------------------------------------------------------


async def test_closing_ends_all_of_them(make: Make) -> None:
    zygotes = make(limit=1)
    started = [zygotes.get("sim", {}), zygotes.get("sim", {"NUMBER": "1"}), zygotes.get("sim", {"NUMBER": "2"})]
    await asyncio.wait_for(started[0].wait_until_warm(), SECONDS)
    await asyncio.wait_for(zygotes.close(), SECONDS)
    assert not [zygote.pid for zygote in started if is_alive(zygote.pid)]
    with pytest.raises(LaunchError, match="is ending"):
        zygotes.get("sim", {"NUMBER": "3"})


async def test_one_that_does_not_listen_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_module, "END_SECONDS", 0.2)
    zygotes = make()
    zygote = zygotes.get("sim", {})
    await asyncio.wait_for(zygote.wait_until_warm(), SECONDS)
    os.kill(zygote.pid, signal.SIGSTOP)
    await asyncio.wait_for(zygotes.close(), SECONDS)
    assert not is_alive(zygote.pid)


async def test_it_ends_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """At whatever moment: the zygote finds a client that has hung up, never none."""
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from bullpen.node.zygotes import Zygotes\n"
        "async def main():\n"
        "    folder = Path(sys.argv[1])\n"
        "    zygote = Zygotes({'sim': sys.executable}, dict(os.environ), folder, folder, 0).get('sim', {})\n"
        "    os.write(1, str(zygote.pid).encode())\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    tmp_path.chmod(0o700)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == -signal.SIGKILL
    await wait_for(lambda: not is_alive(int(said)))
