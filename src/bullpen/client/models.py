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
class Instance(Document):
    """One server of one model.

    Attributes:
        status: the wire's coarse word, such as ``running``.
        state: ``starting``, ``ready``, ``sleeping``, ``stopping``, ``stopped`` or ``failed``.
        start: how its process was made: ``spare``, ``fork`` or ``spawn``.
        phases: when each phase of the start began, in seconds after the process became the server.
        phase: while it starts: what it is doing; `progress` is 0 to 1.
        exit_code: of an ended server; a signal's is negative; None where nobody saw it.
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
    exit_code: int | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
    """

    ready: bool = False
    engine: str | None = None
    waiting: int = 0
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
class Event:
    """One line of the watch.

    Attributes:
        type: ``CREATED``, ``STOPPED``, ``DELETED``, and where finer events were asked for ``STATE`` and ``HEARTBEAT``.
        revision: the daemon's counter.
        instance: whom it is about; None for a heartbeat.
    """

    type: str
    revision: int
    instance: Instance | None

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Event:
        """Make one from a JSON object."""
        about = document["object"]
        instance = Instance.read(about) if "instance_id" in about else None
        return cls(document["type"], about.get("revision", 0), instance)


class LogChunk(NamedTuple):
    """Bytes of a log.

    Attributes:
        start: the place of the first one; later than asked for where the oldest are gone.
        total: bytes ever written.
    """

    data: bytes
    start: int
    total: int
