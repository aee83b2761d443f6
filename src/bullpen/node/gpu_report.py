"""The accelerators as people ask for them: who has them, who sleeps on them, what memory is held, and by strangers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from bullpen.core.book import Book, Claim, Hold
from bullpen.core.devices import Gpu
from bullpen.core.fleet import Fleet
from bullpen.core.laddering import host_used
from bullpen.errors import StateError
from bullpen.node import host_memory
from bullpen.node.gpus import Owners, foreign_processes
from bullpen.node.resources import Resources


async def gpu_report(fleet: Fleet, resources: Resources, owners: Owners) -> dict[str, Any]:
    """All accelerators and the host's memory, as JSON data."""
    book = fleet.roster.book()
    ours = frozenset(await owners()) if book.gpus else frozenset()
    return {
        "gpus": [await describe(gpu, book, resources, ours) for gpu in resources.gpus.list()],
        "host": {
            "asleep_mib": host_used(fleet.roster),
            "budget_mib": fleet.roster.limits.host_mib,
            "available_mib": await asyncio.to_thread(host_memory.available_mib),
        },
    }


async def describe(gpu: Gpu, book: Book, resources: Resources, ours: frozenset[int]) -> dict[str, Any]:
    """One accelerator, as JSON data."""
    document: dict[str, Any] = {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "parent": gpu.parent,
        "memory_mib": gpu.memory_mib,
        "free_mib": None,
        **{str(hold): claims(book.on(gpu.uuid, hold)) for hold in Hold},
        "foreign": [],
        "problem": None,
    }
    try:
        use = await resources.gpus.memory(gpu.uuid)
    except StateError as problem:
        return {**document, "problem": str(problem)}
    strangers = foreign_processes(use, ours.__contains__)
    document["free_mib"] = use.free_mib
    document["foreign"] = [{"pid": one.pid, "name": one.name, "mib": one.mib} for one in strangers]
    return document


def claims(found: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as JSON data."""
    return [{"instance_id": claim.id, "share": claim.share, "mib": claim.mib} for claim in found]
