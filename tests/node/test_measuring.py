"""What an instance is measured to hold of its accelerators: by the driver's word, or by what is missing there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.devices import MemoryUse
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Instance, State
from bullpen.node.actuation import Actuation
from bullpen.node.journal import Journal
from bullpen.node.mock_gpus import MockGpus
from bullpen.node.resources import Resources

TOTAL = 1000
EMPTY = 990
"""What an accelerator has free that nobody uses: the driver keeps some."""
OURS = 300


class Silent(MockGpus):
    """Mock GPUs that do not tell who holds their memory, as in a container."""

    async def memory(self, uuid: str) -> MemoryUse:
        use = await super().memory(uuid)
        return MemoryUse(use.total_mib, use.free_mib - (TOTAL - EMPTY))


class Bench:
    """An instance that is this process, on accelerators whose memory a test says."""

    def __init__(self, gpus: MockGpus) -> None:
        self.gpus = gpus
        self.fleet = Fleet(gpus=gpus.list())
        self.told: list[ev.Event] = []
        self.instance = self.add("a", pid=os.getpid())
        cgroups = SimpleNamespace(pids=lambda key: [os.getpid()])
        resources = cast(Resources, SimpleNamespace(gpus=gpus, cgroups=cgroups))
        self._actuation = Actuation(self.fleet, resources, self.told.append)

    def add(self, instance_id: str, pid: int | None = None, gpus: tuple[str, ...] = ("GPU-0",)) -> Instance:
        """Another instance; without a pid it has no process."""
        config = Config("m", ("m",), gpu_uuids=gpus)
        instance = Instance(instance_id, f"key-{instance_id}", config, 1.0, State.READY, gpus=gpus, listed=True)
        instance.pid, instance.start_ticks, instance.tree_gone = pid, 1, pid is None
        self.fleet.roster.adopt(instance)
        return instance

    def hold(self, mib: int, index: int = 0, pid: int | None = None) -> None:
        """Have a process hold memory: this one by default."""
        (self.gpus.folder / str(index) / str(pid or os.getpid())).write_text(str(mib))

    async def step(self, effect: Any) -> Any:
        """What an effect comes to."""
        await self._actuation.step(effect)
        return self.told.pop()

    async def measured(self, before: Mapping[str, int] | None = None) -> int | None:
        event = await self.step(fx.Measure("a", before or {}))
        assert isinstance(event, ev.Measured)
        assert event.memory.host is not None
        return event.memory.gpu


@pytest.fixture
def telling(tmp_path: Path) -> Bench:
    return Bench(MockGpus(tmp_path, 2, TOTAL))


@pytest.fixture
def silent(tmp_path: Path) -> Bench:
    return Bench(Silent(tmp_path, 2, TOTAL))


async def test_the_look_before_says_what_was_free(silent: Bench) -> None:
    free = await silent.step(fx.AwaitMemory("a", 7, {"GPU-0": 500, "GPU-1": 500}, 0))
    assert free == ev.MemoryFree("a", 7, {"GPU-0": EMPTY, "GPU-1": EMPTY})
    silent.hold(600)
    short = await silent.step(fx.AwaitMemory("a", 7, {"GPU-0": 500}, 0))
    assert isinstance(short, ev.MemoryShort)


async def test_the_driver_s_word_comes_first(telling: Bench) -> None:
    telling.hold(OURS)
    telling.hold(200, pid=os.getppid())
    assert await telling.measured({"GPU-0": EMPTY}) == OURS


async def test_what_is_missing_where_the_driver_shows_nobody(silent: Bench) -> None:
    silent.hold(OURS)
    assert await silent.measured({"GPU-0": EMPTY}) == OURS


async def test_without_a_look_before_nothing_is_said(silent: Bench) -> None:
    silent.hold(OURS)
    assert await silent.measured() is None


async def test_more_than_before_says_nothing(silent: Bench) -> None:
    assert await silent.measured({"GPU-0": EMPTY}) is None
    assert await silent.measured({"GPU-0": EMPTY - 1}) is None


async def test_nothing_is_said_once_another_instance_has_come(silent: Bench) -> None:
    silent.hold(OURS)
    silent.add("b", gpus=("GPU-1",))
    assert await silent.measured({"GPU-0": EMPTY}) == OURS
    silent.add("c")
    assert await silent.measured({"GPU-0": EMPTY}) is None


async def test_strangers_that_are_shown_are_no_part_of_it(telling: Bench) -> None:
    telling.hold(200, pid=os.getppid())
    assert await telling.measured({"GPU-0": TOTAL}) is None


async def test_the_most_of_several(silent: Bench) -> None:
    silent.instance.gpus = ("GPU-0", "GPU-1")
    silent.hold(100)
    silent.hold(OURS, 1)
    assert await silent.measured({"GPU-0": EMPTY, "GPU-1": EMPTY}) == OURS


def test_memory_before_is_in_the_journal(silent: Bench, tmp_path: Path) -> None:
    silent.instance.free_before = {"GPU-0": EMPTY}
    journal = Journal(tmp_path / "journal.db")
    journal.save(silent.instance)
    (read,) = journal.instances()
    journal.close()
    assert read.free_before == {"GPU-0": EMPTY}
