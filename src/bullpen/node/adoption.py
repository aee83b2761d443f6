"""What a new daemon does with the instances that the one before it left: go on with those that live, say what became of
the others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from bullpen.core.fleet import Fleet
from bullpen.core.instance import Instance, State
from bullpen.node.executor import SWAPS, Executor
from bullpen.node.journal import Journal
from bullpen.node.trees import read_process

logger = logging.getLogger("bullpen")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def adopt_all(saved: Iterable[Instance], journal: Journal, fleet: Fleet, executor: Executor) -> None:
    """Take over every instance of the journal, then take back the swaps that were under way.

    Raises:
        StateError: the journal cannot be written.
    """
    boot = BOOT_ID.read_text().strip()
    same_boot = journal.fact("boot_id") == boot
    journal.set_fact("boot_id", boot)
    for instance in saved:
        if not same_boot:
            instance.start_ticks = None  # its processes went with the boot; those numbers are strangers' by now
        pidfd = open_process(instance) if same_boot else None
        if pidfd is not None and instance.listed:
            executor.adopt(instance, pidfd)
            logger.info("adopted %s (pid %s, %s)", instance.id, instance.pid, instance.state)
        elif pidfd is not None:
            os.close(pidfd)
        elif instance.state is State.SLEEPING and instance.tree_gone:
            logger.info("kept %s (asleep without a process)", instance.id)
        executor.carry_out(fleet.restore(instance, time.time(), alive=pidfd is not None))
    for swap, forget in executor.adopt_swaps(journal.fact(SWAPS, [])):
        executor.carry_out([*fleet.restore_swap(swap, time.time()), forget])


def open_process(instance: Instance) -> int | None:
    """A pidfd of an instance's server process, where that very process still lives."""
    if instance.pid is None:
        return None
    try:
        pidfd = os.pidfd_open(instance.pid)
    except OSError:
        return None
    process = read_process(instance.pid)
    if process is None or process.start_ticks != instance.start_ticks or process.state in "ZX":
        os.close(pidfd)
        return None
    return pidfd
