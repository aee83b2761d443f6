"""What the fleet wants done. ``bullpen.node`` carries out each effect, in order, and reports the outcome as an event.

The outcome that each effect must have sooner or later, whatever happens, stands in its docstring. It is reported only
while the fleet still has the very instance that the effect was for: another one may have the same id by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bullpen.core.instance import Depth, Instance
from bullpen.core.profile import Profile
from bullpen.errors import BullpenError


@dataclass(frozen=True)
class Check:
    """Lease a process and have the engine read the options. → ``Checked`` or ``Refused``."""

    id: str


@dataclass(frozen=True)
class HoldPort:
    """Make sure that ``port`` is free on this host, or pick one outside ``avoid`` where it is None, and hold it.
    Ports that are held for others meanwhile are not picked either. → ``PortReady`` or ``Refused``."""

    id: str
    port: int | None
    avoid: frozenset[int]


@dataclass(frozen=True)
class Save:
    """Write the instance to the journal before the next effect is carried out. → ``Refused`` where it cannot be
    written and the instance is not listed yet."""

    id: str


@dataclass(frozen=True)
class Start:
    """Turn the leased process into the server. → ``Started`` or ``Refused``."""

    id: str


@dataclass(frozen=True)
class Discard:
    """Let go of the leased process, the held port and the files of a create that came to nothing before its start. No
    outcome, nor any more of a check that is under way."""

    id: str
    key: str


@dataclass(frozen=True)
class Watch:
    """Follow log and health until the server is ready. → ``PhaseSeen``…, ``Answered``; and ``Exited`` at any time."""

    id: str


@dataclass(frozen=True)
class Terminate:
    """Send SIGTERM to the server process. → ``Exited``."""

    id: str


@dataclass(frozen=True)
class KillTree:
    """SIGKILL every process of the tree until a scan finds none; one that is under way is joined. A process that was
    leased and not yet told to start counts as a tree. → ``TreeGone`` or ``TreeStuck``; ``Exited`` before ``TreeGone``
    where this daemon leased or adopted the server process and has not reported its end yet."""

    id: str


@dataclass(frozen=True)
class SetTimer:
    """Start, or start again, the instance's timer of that name. → ``TimerFired``."""

    id: str
    name: str
    seconds: float


@dataclass(frozen=True)
class ClearTimers:
    """Forget all timers of the instance. No outcome."""

    id: str


@dataclass(frozen=True)
class LetGo:
    """Let go of the process that was leased for a start that is called off, and of the held port. Log and files stay.
    No outcome, nor any more of a check that is under way."""

    id: str


@dataclass(frozen=True)
class AwaitMemory:
    """Wait until the accelerators have so many MiB free, by UUID, ``seconds`` at most. → ``MemoryFree`` or
    ``MemoryShort``."""

    id: str
    operation: int
    needs: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Drain:
    """Close the server's gate, holding or refusing new requests, and wait until those in flight have ended, ``seconds``
    at most. → ``Drained`` or ``EngineFailed`` (not touched)."""

    id: str
    operation: int
    seconds: float
    refuse: bool


@dataclass(frozen=True)
class PutToSleep:
    """Ask the canary where that was never done, tell the engine to sleep, have it confirm; ``seconds`` for each of
    these at most. From another depth of sleep, wake it first. → ``Slept`` or ``EngineFailed``."""

    id: str
    operation: int
    depth: Depth
    seconds: float


@dataclass(frozen=True)
class WakeUp:
    """Tell the engine to wake from ``depth``, have it confirm, ask the canary, open the gate; ``seconds`` for each of
    these at most. → ``Woken`` or ``EngineFailed``."""

    id: str
    operation: int
    depth: Depth
    seconds: float


@dataclass(frozen=True)
class OpenGate:
    """Let requests through again. No outcome."""

    id: str


@dataclass(frozen=True)
class Inspect:
    """Ask an adopted engine whether it sleeps, ``seconds`` at most. → ``Inspected``."""

    id: str
    operation: int
    seconds: float


@dataclass(frozen=True)
class Measure:
    """Measure what an instance holds at the depth that it has come to; nobody waits for it. → ``Measured``, or nothing
    where it cannot be told.

    Attributes:
        before: MiB that were free on accelerators that it found empty, by UUID. Where the driver does not tell who
            holds what, that which is missing now is the instance's, if `Roster.is_alone` still says so.
    """

    id: str
    before: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SendWarmUp:
    """Send the warm-up request, ``seconds`` at most. → ``WarmedUp``."""

    id: str
    seconds: float


@dataclass(frozen=True)
class AskActivity:
    """Ask a server how busy it is. → ``Activity``."""

    id: str


@dataclass(frozen=True)
class Prefetch:
    """Bring the weight files into the page cache; the start does not wait for it. No outcome."""

    id: str


@dataclass(frozen=True)
class SaveProfile:
    """Write down what is remembered of a model. No outcome."""

    key: str
    profile: Profile


@dataclass(frozen=True)
class SaveSwap:
    """Write down a swap that is under way, or forget it where ``swap`` is None. No outcome."""

    number: int
    swap: Mapping[str, Any] | None


@dataclass(frozen=True)
class PublishSwap:
    """Tell the watchers who asked for finer events how far a swap is. No outcome."""

    document: Mapping[str, Any]


@dataclass(frozen=True)
class Publish:
    """Tell the watchers. ``kind`` is CREATED, STOPPED or DELETED; the instance carries the revision."""

    kind: str
    instance: Instance


@dataclass(frozen=True)
class PublishState:
    """Tell the watchers who asked for finer events that state, phase or progress changed."""

    instance: Instance


@dataclass(frozen=True)
class Forget:
    """Remove the instance's journal entry, log, cgroup and files; it is no more. No outcome."""

    id: str
    key: str


@dataclass(frozen=True)
class Reply:
    """Answer a request: with the instance and a word for what was done, or with an error.

    Attributes:
        details: more of the answer, where there is more.
    """

    request: int
    instance: Instance | None = None
    status: str = ""
    error: BullpenError | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


Effect = (
    Check
    | HoldPort
    | Save
    | Start
    | Discard
    | LetGo
    | AwaitMemory
    | Drain
    | PutToSleep
    | WakeUp
    | OpenGate
    | Inspect
    | Measure
    | SendWarmUp
    | AskActivity
    | Prefetch
    | SaveProfile
    | SaveSwap
    | PublishSwap
    | Watch
    | Terminate
    | KillTree
    | SetTimer
    | ClearTimers
    | Publish
    | PublishState
    | Forget
    | Reply
)
