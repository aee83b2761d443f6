"""GPUs as the book knows them: what names one, and what a word or ``CUDA_VISIBLE_DEVICES`` means by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bullpen.errors import InvalidRequestError

SHORTEST_PREFIX = 8
"""Characters of a UUID that a request must give at least. A mistyped shorter one would too easily fit another GPU."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device: a part of a GPU that is used like one.

    Attributes:
        index: what ``CUDA_VISIBLE_DEVICES`` counts by, in the order of the PCI bus. A MIG device's is its place in the
            list after all GPUs, which means nothing to CUDA.
        uuid: NVIDIA's name for it, ``GPU-…`` or ``MIG-…``.
        name: the product's name.
        memory_mib: its whole memory, in MiB.
        parent: the UUID of the GPU that a MIG device is part of; None for a GPU.
    """

    index: int
    uuid: str
    name: str
    memory_mib: int
    parent: str | None = None

    @property
    def visible(self) -> str:
        """What ``CUDA_VISIBLE_DEVICES`` calls it: a GPU by index, a MIG device by UUID."""
        return str(self.index) if self.parent is None else self.uuid


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU.

    Attributes:
        pid: its number as the driver knows it; inside a container that may be the host's number.
        mib: what it holds there, in MiB; None where the driver does not tell.
        name: its program's name; empty where the driver does not tell.
    """

    pid: int
    mib: int | None
    name: str


@dataclass(frozen=True)
class MemoryUse:
    """The memory of a GPU at one moment, in MiB. What is not free need not all be held by ``processes``: the driver
    keeps some for itself, and may not show every process."""

    total_mib: int
    free_mib: int
    processes: tuple[GpuProcess, ...] = ()


def select(gpus: Iterable[Gpu], visible: str | None) -> list[Gpu]:
    """The GPUs that a value of ``CUDA_VISIBLE_DEVICES`` leaves, in its order.

    CUDA's rules: entries are indices or UUIDs (or beginnings of a UUID that fit one GPU alone), the first entry says
    which; the first entry that names no GPU ends the list; a GPU named twice leaves none. CUDA shows a program one MIG
    device at most; here all that are named are left, for one instance each.

    Args:
        gpus: all of this host.
        visible: the value; None where the variable is not set, which leaves all.
    """
    known = list(gpus)
    if visible is None:
        return known
    entries = [entry.strip() for entry in visible.split(",")]
    find = by_index if is_index(entries[0]) else by_uuid
    chosen: list[Gpu] = []
    for entry in entries:
        gpu = find(known, entry)
        if gpu is None:
            break
        if gpu in chosen:
            return []
        chosen.append(gpu)
    return chosen


def resolve(gpus: Sequence[Gpu], word: str) -> Gpu:
    """The GPU that a request means: by its UUID, by at least `SHORTEST_PREFIX` characters of one, or by its index.

    Raises:
        InvalidRequestError: none fits, or more than one.
    """
    fitting = [gpu for gpu in gpus if word == gpu.uuid or (is_index(word) and gpu.index == int(word))]
    if not fitting and len(word) >= SHORTEST_PREFIX:
        fitting = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
    if len(fitting) == 1:
        return fitting[0]
    trouble = f"more than one GPU on this host begins with '{word}'" if fitting else f"no GPU '{word}' on this host"
    there = ", ".join(f"{gpu.uuid} (index {gpu.index})" for gpu in fitting or gpus) or "none"
    raise InvalidRequestError(f"{trouble}; there are: {there}", field="gpu_uuids")


def is_index(word: str) -> bool:
    """Whether a word counts GPUs. More digits than any count has could not even be read as a number."""
    return word.isascii() and word.isdigit() and len(word) <= 9


def by_index(gpus: Iterable[Gpu], word: str) -> Gpu | None:
    """The GPU of this index; never a MIG device, which CUDA does not count."""
    if not is_index(word):
        return None
    return next((gpu for gpu in gpus if gpu.parent is None and gpu.index == int(word)), None)


def by_uuid(gpus: Sequence[Gpu], word: str) -> Gpu | None:
    """The one GPU or MIG device whose UUID this is, or begins with this."""
    fitting = [gpu for gpu in gpus if gpu.uuid == word] or [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
    return fitting[0] if len(fitting) == 1 else None
