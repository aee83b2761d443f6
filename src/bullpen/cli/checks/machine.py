"""The machine: kernel, limits, memory, shared memory."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from bullpen.cli.checks import GIB, Finding, ok, problem, warning
from bullpen.node.cgroups import Cgroups

OPEN_FILES = 4096
PROCESSES = 4096
SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")


def check_machine() -> list[Finding]:
    """All of it."""
    return [
        check_kernel(),
        check_cgroups(),
        check_open_files(),
        check_processes(),
        check_memory(),
        check_shared_memory(),
    ]


def check_kernel() -> Finding:
    """Does the kernel have pidfds?"""
    release = os.uname().release
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as trouble:
        return problem("kernel", f"{release} without pidfds ({trouble})", "Bullpen needs Linux 5.3 or newer")
    return ok("kernel", f"Linux {release} with pidfds")


def check_cgroups() -> Finding:
    """May this user make cgroups?"""
    cgroups = Cgroups(f"doctor-{os.getpid()}")
    try:
        if cgroups.available:
            return ok("cgroups", "version 2, writable: each instance gets one")
    finally:
        cgroups.close()
    return ok("cgroups", "not writable: instances are held together by session, ancestry and log")


def check_open_files() -> Finding:
    """How many files may a process have open?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{limit(soft)}, at most {limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raised = (
            "`ulimit -n 65536`"
            if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES
            else "LimitNOFILE or limits.conf"
        )
        return warning("open files", text, f"raise the limit with {raised} before many instances run")
    return ok("open files", text)


def check_processes() -> Finding:
    """How many processes may this user have, and this container?"""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [value for value in (None if soft == resource.RLIM_INFINITY else soft, own_limit("pids.max")) if value]
    if limits and min(limits) < PROCESSES:
        advice = "raise it with `ulimit -u`, or the container's --pids-limit: threads count, and vLLM has many"
        return warning("processes", str(min(limits)), advice)
    return ok("processes", str(min(limits)) if limits else "no limit")


def check_memory() -> Finding:
    """Is there memory for a warm engine and a model?"""
    memory = psutil.virtual_memory()
    total = min(memory.total, own_limit("memory.max") or memory.total)
    free = min(memory.available, total)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if free < 3 * GIB:
        return warning("memory", text, "a warm vLLM takes about 1.5 GiB before any model; end what is not needed")
    return ok("memory", text)


def check_shared_memory() -> Finding:
    """Is there shared memory for the processes of an engine?"""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as trouble:
        return problem("/dev/shm", f"cannot be used: {trouble.strerror}", "mount a tmpfs there")
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free"
    if usage.free < GIB:
        advice = "engines on several GPUs need more: run the container with --ipc=host or --shm-size=8g"
        return warning("/dev/shm", text, advice)
    return ok("/dev/shm", text)


def own_limit(name: str) -> int | None:
    """A limit of this process's cgroup (version 2), the lowest on the way up; None where there is none."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = CGROUP / own.strip().lstrip("/")
    found = []
    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # no such file here, or "max"
            found.append(int((place / name).read_text()))
        if place == CGROUP:
            break
    return min(found, default=None)


def limit(value: int) -> str:
    """A resource limit in words."""
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
