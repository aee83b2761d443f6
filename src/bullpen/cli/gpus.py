"""What there is to say about GPUs, for tables and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bullpen.cli import words
from bullpen.client import Claim, ForeignProcess, Gpu, GpuReport, Instance, Memory


def indices(report: GpuReport) -> dict[str, int]:
    """The index of each GPU by its UUID."""
    return {gpu.uuid: gpu.index for gpu in report.gpus}


def numbers(instance: Instance, index: Mapping[str, int]) -> str:
    """The indices of an instance's GPUs; of one that is not known, its UUID."""
    return ",".join(str(index.get(uuid, uuid)) for uuid in instance.assigned_gpus)


def memory(instance: Instance) -> Memory:
    """What an instance was measured to hold as it is now."""
    depth = "awake" if instance.state == "ready" else ""
    if instance.state == "sleeping" and instance.sleep_level is not None:
        depth = f"level_{instance.sleep_level}"
    return instance.memory.get(depth, Memory())


def troubles(report: GpuReport) -> list[str]:
    """A line for each GPU that does not answer, and for each process of no instance that holds memory on one."""
    lines = []
    for gpu in report.gpus:
        if gpu.problem:
            lines.append(f"{name(gpu)}: {gpu.problem}")
        lines += [f"{name(gpu)}: {held_by(process)}" for process in gpu.foreign]
    return lines


def held_by(process: ForeignProcess) -> str:
    """What a process of no instance holds."""
    amount = "some memory" if process.mib is None else words.mib(process.mib)
    called = f" ({process.name})" if process.name else ""
    return f"{amount} held by process {process.pid}{called}, which belongs to no instance"


def name(gpu: Gpu) -> str:
    """What a GPU is called: by its index; a MIG device, which CUDA does not count, by its UUID."""
    return f"GPU {gpu.index}" if gpu.parent is None else gpu.uuid


def claims(found: Sequence[Claim]) -> str:
    """Who has a GPU, and which share of it."""
    return ", ".join(
        claim.instance_id + ("" if claim.share is None else f" ({100 * claim.share:.0f} %)") for claim in found
    )
