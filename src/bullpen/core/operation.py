"""What is being done with an instance, and what it waits for: kept beside the instance, not written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bullpen.core import events as ev
from bullpen.core.instance import Depth
from bullpen.errors import BullpenError


class Doing(StrEnum):
    """What an operation is for."""

    START = "start"
    SLEEP = "sleep"
    WAKE = "wake"
    INSPECT = "inspect"


class Stage(StrEnum):
    """How far an operation is."""

    PREPARING = "preparing"
    """Options are checked, a port is held."""
    DRAINING = "draining"
    """Requests in flight end."""
    QUEUED = "queued"
    """For its turn on its accelerators, or for others to leave them."""
    MEMORY = "waiting for memory"
    ENGINE = "telling the engine"
    ENDING = "ending the process"
    STARTING = "starting"


class After(StrEnum):
    """What follows once no process of a tree is left, where the instance stays."""

    START = "start"
    SLEEP = "sleep"
    STOP = "stop"


@dataclass
class Operation:
    """Something that is done with an instance, from the decision to its end. An instance has one at most.

    Attributes:
        depth: of a sleep, where it leads; of a wake, where it comes from.
        reason: why, in words.
        requests: those that are answered when it is over.
        waits_for: while it is queued: for what, in words.
        swap: the number of the swap that it is a part of.
        error: what is answered although it may have come to a good end: what was asked for could not be done.
        restarted: whether its process had to be replaced.
        wakers: requests to wake it again as soon as it sleeps.
        found_empty: of a start: MiB that were free just before on those of its accelerators that nobody used.
    """

    number: int
    doing: Doing
    stage: Stage
    depth: Depth
    reason: str
    since: float
    drain: float = 0.0
    requests: list[int] = field(default_factory=list)
    waits_for: str = ""
    swap: int | None = None
    error: str | None = None
    restarted: bool = False
    wakers: list[int] = field(default_factory=list)
    found_empty: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds_turn(self) -> bool:
        """Whether it may change what its accelerators hold just now, so that no other may. Memory that is given back
        disturbs a neighbour's measurement too."""
        return self.stage in (Stage.MEMORY, Stage.ENGINE, Stage.ENDING, Stage.STARTING)

    @property
    def is_half_told(self) -> bool:
        """Whether its engine was told something and has not said what became of it."""
        ending = self.stage is Stage.ENDING and self.doing is Doing.WAKE
        return ending or self.stage in (Stage.ENGINE, Stage.STARTING)


@dataclass
class Pending:
    """What an instance waits for, and the requests that wait with it.

    Attributes:
        awaits: the outcome that takes its start one step further; None where none is under way or it is decided.
        create: the create's request, until it is answered.
        refusal: what the create will be answered with when no process of it is left.
        stops: requests to remove it, each with the word that it will be answered with.
        kill_at: when the SIGKILL of a stop is due; None where nothing is timed.
        killing: whether its tree is being killed.
        after: what follows that kill where the instance stays.
        operation: what is being done with it.
    """

    awaits: type[ev.Event] | None = None
    create: int | None = None
    refusal: BullpenError | None = None
    stops: list[tuple[int, str]] = field(default_factory=list)
    kill_at: float | None = None
    killing: bool = False
    after: After | None = None
    operation: Operation | None = None
