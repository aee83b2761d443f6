"""What a daemon answers, as typed values. Fields that a newer daemon adds are tolerated; ``document`` has them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, NamedTuple, Self


class Document:
    """A value read from JSON: known fields by name, unknown ones left in ``document``."""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Make one from a JSON object."""
        known = {one.name for one in fields(cls) if one.init}  # type: ignore[arg-type]  # every subclass is a dataclass
        return cls(**{name: value for name, value in {**document, "document": document}.items() if name in known})


@dataclass(frozen=True)
class InstanceError:
    """Why an instance ended: a stable word, such as ``out_of_memory``, and a sentence with the way out."""

    kind: str
    message: str


@dataclass(frozen=True)
class Activity(Document):
    """Something that is being done with an instance.

    Attributes:
        doing: ``start``, ``sleep``, ``wake`` or ``inspect``.
        stage: how far that is.
        since: when it began.
        reason: why it is done.
        waits_for: what keeps it waiting, in words; None where nothing does.
    """

    doing: str = ""
    stage: str = ""
    since: str | None = None
    reason: str = ""
    waits_for: str | None = None


@dataclass(frozen=True)
class Memory(Document):
    """Memory in MiB, on each GPU and of the host; None where nobody could tell."""

    gpu_mib: int | None = None
    host_mib: int | None = None


@dataclass(frozen=True)
class Instance(Document):
    """One server of one model.

    Attributes:
        status: the wire's coarse word, such as ``running``.
        state: ``starting``, ``ready``, ``sleeping``, ``stopping``, ``stopped`` or ``failed``.
        start: how its process was made: ``spare``, ``fork`` or ``spawn``.
        phases: when each phase of the start began, in seconds after the process became the server.
        phase: while it starts: what it is doing; `progress` is 0 to 1.
        remaining_seconds: while it starts: how long it should still take, going by earlier starts; None: unknown.
        exit_code: of an ended server; a signal's is negative; None where nobody saw it.
        assigned_gpus: UUIDs of the GPUs that are its own, awake or asleep.
        can_sleep: whether it can be put to sleep when it is ready.
        sleep_level: while its engine sleeps: how deep, 1 or 2.
        sleep_emulated: whether it sleeps by having no process.
        free_before_mib: what its GPUs had free just before its last start or wake, in MiB by UUID.
        reason: what was decided about it last, and why.
    """

    instance_id: str
    status: str = ""
    state: str = ""
    revision: int = 0
    options: str = ""
    engine: str = ""
    env_vars: Mapping[str, str] | None = None
    gpu_uuids: list[str] | None = None
    annotations: Mapping[str, str] | None = None
    model: str | None = None
    served_model_names: list[str] = field(default_factory=list)
    url: str | None = None
    pid: int | None = None
    start: str | None = None
    created_at: str | None = None
    ready_at: str | None = None
    ended_at: str | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    phase: str | None = None
    progress: float | None = None
    remaining_seconds: float | None = None
    exit_code: int | None = None
    assigned_gpus: list[str] = field(default_factory=list)
    can_sleep: bool = False
    sleep_level: int | None = None
    sleep_emulated: bool = False
    last_used_at: str | None = None
    free_before_mib: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def activity(self) -> Activity | None:
        """What is being done with it; None where that is nothing."""
        found = self.document.get("activity")
        return Activity.read(found) if isinstance(found, dict) else None

    @property
    def memory(self) -> Mapping[str, Memory]:
        """What it was measured to hold ``awake``, at ``level_1`` and at ``level_2``."""
        return {depth: Memory.read(held) for depth, held in self.document.get("memory", {}).items()}

    @property
    def error(self) -> InstanceError | None:
        """Why it ended, where it did not end by itself with code 0."""
        found = self.document.get("error")
        return InstanceError(str(found.get("class")), str(found.get("message"))) if isinstance(found, dict) else None

    @property
    def ended(self) -> bool:
        """Whether its server process is gone."""
        return self.state in ("stopped", "failed")

    @property
    def created(self) -> datetime | None:
        """When it was asked for."""
        return datetime.fromisoformat(self.created_at) if self.created_at else None

    @property
    def seconds_to_ready(self) -> float | None:
        """From the process becoming the server to its first healthy answer."""
        return self.phases.get("ready")


@dataclass(frozen=True)
class ZygoteState(Document):
    """How warm the parent of an engine's servers is.

    Attributes:
        state: ``warming``, ``warm`` or ``broken``.
        module: while warming: what was imported last, ``done`` of ``total`` modules.
        seconds: how long warming took.
    """

    engine: str = ""
    state: str = ""
    pid: int | None = None
    module: str | None = None
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    error: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Readiness(Document):
    """Whether a daemon can launch. Without its access key only ``ready`` is told.

    Attributes:
        engine: the engine of instances that name none.
        waiting: creates that are not answered yet.
        grpc_port: where gRPC listens; None where it is off.
    """

    ready: bool = False
    engine: str | None = None
    waiting: int = 0
    grpc_port: int | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def zygotes(self) -> list[ZygoteState]:
        """Each zygote there is."""
        return [ZygoteState.read(zygote) for zygote in self.document.get("zygotes", [])]


@dataclass(frozen=True)
class InstanceList(Document):
    """All instances, and the revision from which a watch goes on."""

    revision: int = 0
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def instances(self) -> list[Instance]:
        """Oldest first."""
        return [Instance.read(instance) for instance in self.document.get("instances", [])]


@dataclass(frozen=True)
class Swap(Document):
    """How far a swap is.

    Attributes:
        swap: its number.
        stage: ``out`` (what goes out goes to sleep), ``in`` (what comes in wakes or starts), ``back`` (it failed and is
            taken back) or ``done``.
        stages: when each stage began, in seconds after the call.
        error: why it is taken back.
    """

    swap: int = 0
    stage: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def incoming(self) -> str:
        """The id of what comes in."""
        return str(self.document.get("in"))

    @property
    def outgoing(self) -> list[str]:
        """The ids of what goes out."""
        return list(self.document.get("out", []))


@dataclass(frozen=True)
class Swapped(Document):
    """A swap that is done.

    Attributes:
        swap: its number.
        seconds: how long it took.
        stages: when each stage began, in seconds after the call.
    """

    swap: int = 0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def incoming(self) -> Instance:
        """What came in; it is ready."""
        return Instance.read(self.document["in"])

    @property
    def outgoing(self) -> list[Instance]:
        """What went to sleep for it."""
        return [Instance.read(instance) for instance in self.document.get("out", [])]


@dataclass(frozen=True)
class Event:
    """One line of the watch.

    Attributes:
        type: ``CREATED``, ``STOPPED``, ``DELETED``, and where finer events were asked for ``STATE``, ``SWAP`` and
            ``HEARTBEAT``.
        revision: the daemon's counter.
        instance: whom it is about; None for a swap and a heartbeat.
        swap: how far that swap is.
    """

    type: str
    revision: int
    instance: Instance | None
    swap: Swap | None = None

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Event:
        """Make one from a JSON object."""
        about = document["object"]
        instance = Instance.read(about) if "instance_id" in about else None
        swap = Swap.read(about) if document["type"] == "SWAP" else None
        return cls(document["type"], about.get("revision", 0), instance, swap)


class LogChunk(NamedTuple):
    """Bytes of a log.

    Attributes:
        start: the place of the first one; later than asked for where the oldest are gone.
        total: bytes ever written.
    """

    data: bytes
    start: int
    total: int
