"""What a daemon tells of its GPUs, and of why an instance is as it is, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bullpen.client.models import Document


@dataclass(frozen=True)
class Claim(Document):
    """What an instance has of a GPU.

    Attributes:
        share: the share of it that it takes, 0 to 1; None: it takes it alone.
        mib: the memory that it holds or needs there, in MiB; None: unknown.
    """

    instance_id: str = ""
    share: float | None = None
    mib: int | None = None


@dataclass(frozen=True)
class ForeignProcess(Document):
    """A process that holds memory of a GPU and belongs to no instance; ``mib`` is None where nobody tells."""

    pid: int = 0
    name: str = ""
    mib: int | None = None


@dataclass(frozen=True)
class Gpu(Document):
    """A GPU, or a MIG device.

    Attributes:
        parent: the UUID of the GPU that a MIG device is part of.
        memory_mib: its whole memory; `free_mib` is what is free of it now, None where nobody tells.
        problem: why it could not be read, one sentence.
    """

    index: int = 0
    uuid: str = ""
    name: str = ""
    parent: str | None = None
    memory_mib: int = 0
    free_mib: int | None = None
    problem: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def awake(self) -> list[Claim]:
        """Who uses it now."""
        return self._claims("awake")

    @property
    def coming(self) -> list[Claim]:
        """Who is on the way to it."""
        return self._claims("coming")

    @property
    def asleep(self) -> list[Claim]:
        """Who sleeps on it."""
        return self._claims("asleep")

    @property
    def foreign(self) -> list[ForeignProcess]:
        """Processes on it that belong to no instance."""
        return [ForeignProcess.read(process) for process in self.document.get("foreign", [])]

    def _claims(self, name: str) -> list[Claim]:
        return [Claim.read(claim) for claim in self.document.get(name, [])]


@dataclass(frozen=True)
class HostMemory(Document):
    """Host memory in MiB.

    Attributes:
        asleep_mib: what sleepers keep; `budget_mib` is what they may keep, None where there is no limit.
        available_mib: what is available now; None: unknown.
    """

    asleep_mib: int = 0
    budget_mib: int | None = None
    available_mib: int | None = None


@dataclass(frozen=True)
class GpuReport(Document):
    """All GPUs and who has them."""

    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def gpus(self) -> list[Gpu]:
        """By index."""
        return [Gpu.read(gpu) for gpu in self.document.get("gpus", [])]

    @property
    def host(self) -> HostMemory:
        """The host's memory."""
        return HostMemory.read(self.document.get("host", {}))


@dataclass(frozen=True)
class NextStep(Document):
    """The next step down the ladder.

    Attributes:
        to: ``level_1``, ``level_2`` or ``stopped``.
        in_seconds: when, if no request comes.
    """

    to: str = ""
    in_seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Verdict(Document):
    """Whether a level of sleep was seen to work for this model, engine and GPU."""

    works: bool = False
    why: str = ""
    at: str | None = None


def read_verdicts(document: Mapping[str, Any]) -> Mapping[str, Verdict | None]:
    """The verdicts of a JSON object, by ``level_1`` and ``level_2``; None where that was not tried yet."""
    return {level: Verdict.read(verdict) if verdict else None for level, verdict in document.items()}


@dataclass(frozen=True)
class Note(Document):
    """Something that was decided, and why; ``at`` is the time as RFC 3339."""

    at: str = ""
    text: str = ""


@dataclass(frozen=True)
class Explanation(Document):
    """Why an instance is as it is.

    Attributes:
        summary: one sentence.
        waits_for: what keeps it waiting, in words.
    """

    instance_id: str = ""
    state: str = ""
    summary: str = ""
    waits_for: str | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def next_step(self) -> NextStep | None:
        """What happens next if nobody uses it; None: nothing."""
        found = self.document.get("next_step")
        return NextStep.read(found) if isinstance(found, dict) else None

    @property
    def works(self) -> Mapping[str, Verdict | None]:
        """By ``level_1`` and ``level_2``: whether that works here; None where it was not tried yet."""
        return read_verdicts(self.document.get("works", {}))

    @property
    def notes(self) -> list[Note]:
        """What was decided about it, oldest first."""
        return [Note.read(note) for note in self.document.get("notes", [])]
