"""One server of one model: its configuration, its state and which states may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

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
    State.STARTING: frozenset({State.READY, State.SLEEPING, State.STOPPING, State.STOPPED, State.FAILED}),
    State.READY: frozenset({State.SLEEPING, State.STARTING, State.STOPPING, State.STOPPED, State.FAILED}),
    State.SLEEPING: frozenset({State.READY, State.STARTING, State.STOPPING, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset({State.STARTING, State.STOPPING}),
    State.FAILED: frozenset({State.STARTING, State.STOPPING}),
}
"""The states that may follow each state. A stuck stop ends ``failed``; trying again changes the state no more.
``starting`` goes back to ``sleeping`` where a start that was to end an emulated sleep is called off."""

ENDED = frozenset({State.STOPPED, State.FAILED})
"""The states of an instance that is over: its server process has ended, or outlives SIGKILL."""


class Depth(IntEnum):
    """How far down the ladder an instance is: the deeper, the less memory it holds and the longer its way up."""

    AWAKE = 0
    LEVEL_1 = 1
    """Asleep, weights in host memory."""
    LEVEL_2 = 2
    """Asleep, weights discarded; the process lives."""
    STOPPED = 3
    """No process; its files may still be in the page cache."""


@dataclass(frozen=True)
class Ladder:
    """When an instance steps down by itself. Times are seconds without a request; None: never for that reason.

    Attributes:
        pin: never step down, whatever the time or the budget.
        priority: the higher, the later it is chosen where one must step down for another.
    """

    sleep_after: float | None = None
    discard_after: float | None = None
    stop_after: float | None = None
    pin: bool = False
    priority: int = 0

    def after(self, depth: Depth) -> float | None:
        """Seconds without a request until it may be at ``depth``."""
        return {1: self.sleep_after, 2: self.discard_after, 3: self.stop_after}.get(depth)


@dataclass(frozen=True)
class WarmUp:
    """A request to be sent once after each start, so that no user pays for what the first one brings about.

    Attributes:
        path: such as ``/v1/completions``.
        body: JSON text.
    """

    path: str
    body: str


@dataclass(frozen=True)
class Config:
    """What a user asked for, as given and as read.

    Attributes:
        options: the command line as one string, as given.
        argv: the same, split as a POSIX shell splits words.
        env_vars: the instance's own environment; values may be secrets.
        gpu_uuids: the accelerators that it claims, as given (UUIDs or indices); None claims none by name.
        gpus: how many accelerators of Bullpen's choice it claims.
        gpu_share: the share of each that it takes, 0 to 1; None takes them alone.
        sleep: ``engine`` (the engine's own sleep), ``emulate`` (a stop that keeps the slot), ``off``; None decides by
            what it claims: an instance that claims accelerators may sleep where its engine can.
        annotations: opaque to Bullpen.
        engine: the engine that runs it.
        face: the API that made it, ``v1``, ``v2`` or ``launch``.
    """

    options: str
    argv: tuple[str, ...]
    env_vars: Mapping[str, str] | None = None
    gpu_uuids: tuple[str, ...] | None = None
    annotations: Mapping[str, str] | None = None
    engine: str = "vllm"
    face: str = "v2"
    gpus: int | None = None
    gpu_share: float | None = None
    sleep: str | None = None
    ladder: Ladder = field(default_factory=Ladder)
    warm_up: WarmUp | None = None


@dataclass(frozen=True)
class Served:
    """What the engine's own parser read from the options.

    Attributes:
        version: of the engine.
        cannot_sleep: why the engine cannot sleep on this machine, one sentence; None where it can.
        sleep_enabled: whether the options ask for the engine's sleep mode themselves.
        utilization: the share of each accelerator's memory that the server takes by its options; None: it does not say.
        devices: how many accelerators its options need.
        pooling: whether it embeds instead of generating.
        weights_mib: the size of the model's weights, where its files are on this host.
        kv_mib: the size of the KV cache, where the options say it.
    """

    model: str
    served_model_names: tuple[str, ...]
    port: int | None
    host: str | None
    uds: str | None
    tls: bool
    version: str = ""
    cannot_sleep: str | None = None
    sleep_enabled: bool = False
    utilization: float | None = None
    devices: int = 1
    pooling: bool = False
    weights_mib: int | None = None
    kv_mib: int | None = None


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


@dataclass(frozen=True)
class Memory:
    """What an instance was measured to hold, in MiB; None where nobody could tell.

    Attributes:
        gpu: on each of its accelerators, the most of them.
        host: of host memory, what is shared with others counted in shares.
    """

    gpu: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Note:
    """Something that was decided about an instance, and why.

    Attributes:
        refusal: whether it only says what was not done.
    """

    at: float
    text: str
    refusal: bool = False


NOTES_KEPT = 50
NO_CANARY = "none: "
"""How a canary begins that could not be asked; what follows says why. It is not compared after a wake, and asked for
again before the next sleep."""


@dataclass
class Instance:
    """An instance as the fleet keeps it. Only the fleet changes it; everyone else reads.

    Attributes:
        key: what its files are called; an id never becomes a path.
        pid: the server process; kept after its end.
        start_ticks: the process's start time in kernel ticks, which tells it from a later one of the same pid.
        attempt: counts its starts; what an earlier one comes to is no matter any more.
        phase: what it does while it starts; `progress` is 0 to 1.
        expected_ready_at: when it should be ready, going by its earlier starts.
        revision: the counter's value at its last change that a watcher sees.
        exit_code: of an ended server; a signal's is negative; None where nobody saw it.
        ended_at: when the end of the server process was seen.
        tree_gone: whether there is no process of its tree: not yet, or no more.
        gpus: UUIDs of the accelerators that are its own, awake or asleep.
        can_sleep: whether its server was started so that it can sleep.
        depth: how deep it sleeps.
        heading: the depth that it is on its way to, while its engine is being told; ``STOPPED`` of one that is being
            stopped to stay.
        canary: what it answered to the canary before its first sleep.
        memory: by depth, what it was measured to hold.
        free_before: MiB by UUID, what its accelerators had free just before its last start or wake that was to wait for
            memory there.
        last_used: the last time at which it was seen to answer a request, or became ready.
        moves: counts what was begun with it; what was measured before is no matter any more.
        notes: what was decided about it and why, the newest last.
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
    attempt: int = 1
    phase: str | None = None
    progress: float = 0.0
    phase_started: dict[str, float] = field(default_factory=dict)
    expected_ready_at: float | None = None
    how: str | None = None
    revision: int = 0
    ready_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    error: Failure | None = None
    tree_gone: bool = True
    listed: bool = False
    """Whether it is visible: from the moment its process exists."""
    gpus: tuple[str, ...] = ()
    can_sleep: bool = False
    depth: Depth = Depth.AWAKE
    heading: Depth | None = None
    canary: str | None = None
    memory: dict[int, Memory] = field(default_factory=dict)
    free_before: dict[str, int] = field(default_factory=dict)
    last_used: float | None = None
    moves: int = 0
    notes: list[Note] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether its server process lives."""
        return self.pid is not None and self.ended_at is None

    @property
    def emulates_sleep(self) -> bool:
        """Whether its sleep is a stop that keeps the slot."""
        return self.config.sleep == "emulate"

    def enter(self, state: State) -> None:
        """Change the state.

        Raises:
            AssertionError: `TRANSITIONS` has no such change.
        """
        assert state in TRANSITIONS[self.state], f"{self.id}: {self.state} -> {state}"
        self.state = state

    @property
    def reason(self) -> str | None:
        """The newest thing that was decided about it, refusals aside."""
        return next((note.text for note in reversed(self.notes) if not note.refusal), None)

    @property
    def has_canary(self) -> bool:
        """Whether there is an answer to compare with after a wake."""
        return self.canary is not None and not self.canary.startswith(NO_CANARY)

    def note(self, now: float, text: str, *, refusal: bool = False) -> None:
        """Remember what was decided about it."""
        self.notes.append(Note(now, text, refusal))
        del self.notes[:-NOTES_KEPT]
