"""What there is on a host: process trees with their engines, what a daemon holds of them, what it has under way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bullpen.core.devices import Gpu
from bullpen.core.instance import Config, Depth, Instance, Ladder, Memory, Served, State, WarmUp
from bullpen.core.roster import Limits, Patience

CAPACITY = 80_000
"""MiB of each accelerator."""
PATIENCE = Patience(start=60.0, sleep=10.0, wake=20.0, memory=5.0, turn=300.0, drain=10.0)
START_TIMEOUT = PATIENCE.start
BUDGET = 35_000
LIMITS = Limits(host_mib=BUDGET, patience=PATIENCE)
GPUS = ("GPU-0", "GPU-1")
DEVICES = tuple(Gpu(index, uuid, "H100", CAPACITY) for index, uuid in enumerate(GPUS))
FOREIGN_PORT = 7000
"""Another program has it."""
FIRST_PORT = 20_000
NO_SLEEP = "vLLM on the CPU cannot sleep"


@dataclass(frozen=True)
class Model:
    """A model as it really is: MiB of each accelerator and of host memory, when awake and at each level of sleep."""

    name: str
    gpu: tuple[int, int, int] = field(repr=False)
    host: tuple[int, int, int] = field(repr=False)
    utilization: float | None = field(default=0.9, repr=False)
    cannot_sleep: str | None = field(default=None, repr=False)

    def holds(self, depth: Depth, share: float | None) -> Memory:
        """What it holds; with a share of an accelerator, that share of it while it is awake."""
        if depth is Depth.STOPPED:
            return Memory(0, 0)
        gpu = int(share * CAPACITY) if share is not None and depth is Depth.AWAKE else self.gpu[depth]
        return Memory(gpu, self.host[depth])


MODELS = (
    Model("small", (60_000, 1_500, 1_000), (2_000, 20_000, 1_000)),
    Model("large", (70_000, 15_000, 1_000), (2_000, 30_000, 1_500)),
    Model("unknown", (40_000, 1_500, 1_000), (1_000, 10_000, 500), utilization=None),
    Model("wakeful", (30_000, 0, 0), (1_000, 0, 0), cannot_sleep=NO_SLEEP),
)


@dataclass(frozen=True)
class Wish:
    """What a create says."""

    port: int | None = None
    uds: str | None = None
    gpus: tuple[str, ...] = ()
    count: int | None = None
    share: float | None = None
    sleep: str | None = None
    ladder: Ladder = field(default_factory=Ladder)
    warm_up: bool = False
    at_once: bool = False
    model: Model = MODELS[0]

    def served(self) -> Served:
        """What the engine's parser reads from its options."""
        utilization = None if self.share is not None else self.model.utilization
        name = self.model.name
        served = Served(name, (name,), self.port, None, self.uds, tls=False, version="1", utilization=utilization)
        return replace(served, cannot_sleep=self.model.cannot_sleep)


@dataclass(eq=False)
class Tree:
    """The processes of one start of an instance, as the kernel knows them, and the engine in them.

    Attributes:
        told: whether it was told to become the server; until then it ends with the daemon.
        depth: how deep its engine sleeps.
        moving: whether its engine is being told something.
        half: whether its engine is neither awake nor asleep, for a call went wrong.
        gate_open: whether requests get through to it.
        used: when it answered the last request, by a clock that nobody sets.
    """

    key: str
    wish: Wish
    gpus: frozenset[str]
    used: float
    told: bool = False
    port: int | None = None
    server: bool = True
    children: bool = False
    depth: Depth = Depth.AWAKE
    moving: bool = False
    half: bool = False
    gate_open: bool = True

    @property
    def alive(self) -> bool:
        return self.server or self.children

    @property
    def awake(self) -> bool:
        """Whether it uses its accelerators, or may."""
        return self.told and self.alive and (self.depth is Depth.AWAKE or self.moving)

    def holds(self, uuid: str) -> int:
        """MiB that it holds of an accelerator."""
        if not self.told or not self.alive or uuid not in self.gpus:
            return 0
        depth = Depth.AWAKE if self.awake or self.half else self.depth
        return self.wish.model.holds(depth, self.wish.share).gpu or 0


@dataclass(eq=False)
class Handle:
    """What the daemon holds of an instance's process."""

    tree: Tree | None = None
    reported: bool = False
    """Whether the fleet was told of the server's end."""
    held_port: int | None = None
    killing: bool = False
    timers: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Task:
    """Something that the daemon has begun and that has not come to anything yet.

    Attributes:
        effect: what it was begun for.
        tree: the processes that it is about.
        until: when it must have come to something; None where something else ends it.
    """

    kind: str
    instance: Instance
    effect: Any
    attempt: int
    depth: Depth
    tree: Tree | None = None
    until: float | None = None
    phase: int = 0
    moves: int = 0


@dataclass
class Request:
    """A request, and what must be true of its answer."""

    id: str
    kind: str
    exists: bool
    """Whether there was an instance of that id when it came."""
    over: bool
    """Whether that one had ended and the fleet knew."""
    outgoing: tuple[str, ...] = ()
    """Of a swap: what it began to put to sleep."""


def known(instance: Instance) -> str:
    """What a watcher must have heard of an instance: that it is there, or that its server has ended."""
    begun = instance.attempt == 1 or "start" in instance.phase_started
    lives = instance.running or instance.state is State.STOPPING
    is_on_its_way = instance.state is State.STARTING and instance.ended_at is None
    return "CREATED" if begun and (lives or is_on_its_way) else "STOPPED"


def configuration(wish: Wish) -> Config:
    """The configuration that says what a wish says."""
    return Config(
        "m",
        ("m",),
        gpu_uuids=wish.gpus or None,
        gpus=wish.count,
        gpu_share=wish.share,
        sleep=wish.sleep,
        ladder=wish.ladder,
        warm_up=WarmUp("/v1/completions", "{}") if wish.warm_up else None,
    )


def copied(instance: Instance) -> Instance:
    """An instance as the journal keeps it."""
    return replace(
        instance,
        phase_started=dict(instance.phase_started),
        memory=dict(instance.memory),
        free_before=dict(instance.free_before),
        notes=list(instance.notes),
    )
