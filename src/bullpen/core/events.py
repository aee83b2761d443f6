"""What can happen to the fleet. Each event is a value; `Fleet.handle` takes one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bullpen.core.instance import Config, Depth, Memory, Served
from bullpen.engines.crash import Failure
from bullpen.errors import BullpenError

NOBODY = 0
"""The request of a change that the fleet makes for itself; nobody waits for the answer."""


@dataclass(frozen=True)
class Create:
    """Somebody asks for an instance; ``request`` is what the answer will name, ``key`` names its files.

    ``at_once``: it is listed and answered before its options are checked; what is wrong with those makes it fail.
    """

    request: int
    id: str
    key: str
    config: Config
    at_once: bool = False


@dataclass(frozen=True)
class Checked:
    """The engine's parser accepts the options, in a leased process that waits to become the server."""

    id: str
    served: Served
    pid: int
    start_ticks: int
    how: str


@dataclass(frozen=True)
class PortReady:
    """A port is free on this host and held for the instance."""

    id: str
    port: int


@dataclass(frozen=True)
class Refused:
    """Check, port, save or start came to nothing, or the daemon ends; no matter to a create that is decided."""

    id: str
    error: BullpenError


@dataclass(frozen=True)
class Started:
    """The leased process has become the server."""

    id: str


@dataclass(frozen=True)
class PhaseSeen:
    """The log shows what the server is doing while it starts."""

    id: str
    phase: str
    progress: float


@dataclass(frozen=True)
class Answered:
    """The server's own health check says that it is ready."""

    id: str


@dataclass(frozen=True)
class Exited:
    """The server process has ended; ``code`` is None where nobody saw how."""

    id: str
    code: int | None
    failure: Failure | None


@dataclass(frozen=True)
class TreeGone:
    """A scan found no process of the instance's tree."""

    id: str


@dataclass(frozen=True)
class TreeStuck:
    """Processes of the tree live on although they were killed; ``detail`` names them."""

    id: str
    detail: str


@dataclass(frozen=True)
class Stop:
    """Somebody asks to stop and remove an instance; ``timeout``: seconds from SIGTERM to SIGKILL.

    A second one may bring the SIGKILL forward. One that comes before the instance is listed ends the create. With
    ``keep`` the instance stays listed, as one that has ended, with its log; a removal overrules that.
    """

    request: int
    id: str
    timeout: float
    keep: bool = False


@dataclass(frozen=True)
class Sleep:
    """Somebody asks an instance to sleep.

    Attributes:
        depth: how deep; None as it does by itself.
        drain: seconds that requests in flight may take to end.
        refuse: whether new requests are refused meanwhile; else they are held until it is awake.
    """

    request: int
    id: str
    depth: Depth | None
    drain: float
    refuse: bool


@dataclass(frozen=True)
class Wake:
    """Somebody asks for an instance to be ready, whatever it is now."""

    request: int
    id: str


@dataclass(frozen=True)
class Swap:
    """Somebody asks to have one instance ready in the place of others.

    Attributes:
        incoming: the id of what comes in; with ``key`` and ``config`` where it is to be created.
        outgoing: what goes to sleep for it; None leaves the choice to the policy.
        depth, drain, refuse: as for `Sleep`.
    """

    request: int
    incoming: str
    outgoing: tuple[str, ...] | None
    depth: Depth | None
    drain: float
    refuse: bool
    key: str | None = None
    config: Config | None = None


@dataclass(frozen=True)
class Judge:
    """Somebody has found out whether a depth of sleep works for an instance; ``why`` is one sentence."""

    request: int
    id: str
    depth: Depth
    works: bool
    why: str


@dataclass(frozen=True)
class Drained:
    """The gate is closed; ``left`` requests were still in flight when the time for them was over, and the last that
    ended did so ``idle_seconds`` ago."""

    id: str
    operation: int
    left: int
    idle_seconds: float = 0.0


@dataclass(frozen=True)
class Slept:
    """The engine sleeps, as it says itself; ``canary`` is what it answered before, where it was asked now."""

    id: str
    operation: int
    canary: str | None


@dataclass(frozen=True)
class Woken:
    """The engine is awake, as it says itself, and has answered the canary as before its sleep; its gate is open."""

    id: str
    operation: int


@dataclass(frozen=True)
class EngineFailed:
    """A step of a sleep or a wake did not work.

    Attributes:
        sentence: what happened.
        touched: whether the engine may have changed; where it has not, it is awake as before and its gate open.
        verdict: whether this is the fault of sleep on this engine, model and accelerator, and so worth remembering.
    """

    id: str
    operation: int
    sentence: str
    touched: bool
    verdict: bool = False


@dataclass(frozen=True)
class MemoryFree:
    """The accelerators have the memory free that was waited for; ``free`` is what each has, in MiB by UUID."""

    id: str
    operation: int
    free: Mapping[str, int]


@dataclass(frozen=True)
class MemoryShort:
    """They do not have it in time; ``sentence`` says who holds it."""

    id: str
    operation: int
    sentence: str


@dataclass(frozen=True)
class Measured:
    """What an instance held at a depth, after so many moves."""

    id: str
    moves: int
    depth: Depth
    memory: Memory


@dataclass(frozen=True)
class WarmedUp:
    """The warm-up request is over; ``problem`` says how it failed."""

    id: str
    attempt: int
    problem: str | None


@dataclass(frozen=True)
class Activity:
    """How busy an instance is: requests in flight or held, seconds since the last one. None: it does not say."""

    id: str
    in_flight: int | None
    idle_seconds: float


@dataclass(frozen=True)
class Inspected:
    """Whether an adopted instance's engine sleeps; None where it does not say."""

    id: str
    operation: int
    asleep: bool | None


@dataclass(frozen=True)
class TimerFired:
    """A timer that an effect set has run out."""

    id: str
    name: str


Request = Create | Stop | Sleep | Wake | Swap | Judge
"""What is answered with a `Reply`."""

Event = (
    Request
    | Checked
    | PortReady
    | Refused
    | Started
    | PhaseSeen
    | Answered
    | Exited
    | TreeGone
    | TreeStuck
    | Drained
    | Slept
    | Woken
    | EngineFailed
    | MemoryFree
    | MemoryShort
    | Measured
    | WarmedUp
    | Activity
    | Inspected
    | TimerFired
)
