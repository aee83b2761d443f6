"""One server of one model: its configuration, its state and which states may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bullpen.engines.crash import Failure


class State(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.STOPPING, State.STOPPED, State.FAILED}),
    State.READY: frozenset({State.SLEEPING, State.STOPPING, State.STOPPED, State.FAILED}),
    State.SLEEPING: frozenset({State.READY, State.STARTING, State.STOPPING, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset({State.STARTING}),
    State.FAILED: frozenset({State.STARTING}),
}
"""The states that may follow each state. A stuck stop ends ``failed``; trying again changes the state no more."""

ENDED = frozenset({State.STOPPED, State.FAILED})
"""The states of an instance that is over: its server process has ended, or outlives SIGKILL."""


@dataclass(frozen=True)
class Config:
    """What a user asked for, as given and as read.

    Attributes:
        options: the command line as one string, as given.
        argv: the same, split as a POSIX shell splits words.
        env_vars: the instance's own environment; values may be secrets.
        gpu_uuids: the accelerators that it claims; None claims none.
        annotations: opaque to Bullpen.
        engine: the engine that runs it.
        face: the API that made it, ``v1`` or ``v2``.
    """

    options: str
    argv: tuple[str, ...]
    env_vars: Mapping[str, str] | None = None
    gpu_uuids: tuple[str, ...] | None = None
    annotations: Mapping[str, str] | None = None
    engine: str = "vllm"
    face: str = "v2"


@dataclass(frozen=True)
class Served:
    """What the engine's own parser read from the options."""

    model: str
    served_model_names: tuple[str, ...]
    port: int | None
    host: str | None
    uds: str | None
    tls: bool


@dataclass(frozen=True)
class Address:
    """Where an instance answers."""

    host: str
    port: int | None
    uds: str | None = None
    tls: bool = False

    @property
    def url(self) -> str:
        """The base URL for a caller on this host."""
        scheme = "https" if self.tls else "http"
        if self.uds is not None:
            return f"{scheme}+unix://{self.uds}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass
class Instance:
    """An instance as the fleet keeps it. Only the fleet changes it; everyone else reads.

    Attributes:
        key: what its files are called; an id never becomes a path.
        pid: the server process; kept after its end.
        start_ticks: the process's start time in kernel ticks, which tells it from a later one of the same pid.
        phase: what it does while it starts; `progress` is 0 to 1.
        revision: the counter's value at its last change that a watcher sees.
        exit_code: of an ended server; a signal's is negative; None where nobody saw it.
        ended_at: when the end of the server process was seen.
        tree_gone: whether there is no process of its tree: not yet, or no more.
    """

    id: str
    key: str
    config: Config
    created_at: float
    state: State = State.STARTING
    served: Served | None = None
    address: Address | None = None
    pid: int | None = None
    start_ticks: int | None = None
    phase: str | None = None
    progress: float = 0.0
    phase_started: dict[str, float] = field(default_factory=dict)
    how: str | None = None
    revision: int = 0
    ready_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    error: Failure | None = None
    tree_gone: bool = True
    listed: bool = False
    """Whether it is visible: from the moment its process exists."""

    @property
    def running(self) -> bool:
        """Whether its server process lives."""
        return self.pid is not None and self.ended_at is None

    def enter(self, state: State) -> None:
        """Change the state.

        Raises:
            AssertionError: `TRANSITIONS` has no such change.
        """
        assert state in TRANSITIONS[self.state], f"{self.id}: {self.state} -> {state}"
        self.state = state
