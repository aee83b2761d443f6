"""What can happen to the fleet. Each event is a value; `Fleet.handle` takes one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from bullpen.core.instance import Config, Served
from bullpen.engines.crash import Failure
from bullpen.errors import BullpenError


@dataclass(frozen=True)
class Create:
    """Somebody asks for an instance; ``request`` is what the answer will name, ``key`` names its files."""

    request: int
    id: str
    key: str
    config: Config


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

    A second one may bring the SIGKILL forward. One that comes before the instance is listed ends the create.
    """

    request: int
    id: str
    timeout: float


@dataclass(frozen=True)
class TimerFired:
    """A timer that an effect set has run out."""

    id: str
    name: str


Event = (
    Create
    | Checked
    | PortReady
    | Refused
    | Started
    | PhaseSeen
    | Answered
    | Exited
    | TreeGone
    | TreeStuck
    | Stop
    | TimerFired
)
