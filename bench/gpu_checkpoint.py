"""``gpu-checkpoint``: the NVIDIA driver suspends and resumes whole CUDA processes; how long that takes, by size.

Bullpen does not use this yet; decision 006 says what must be shown first. Needs an NVIDIA driver of version 570 or
later, PyTorch's CUDA build and the package ``cuda-bindings``.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench import gpu_common, servers
from bench.common import BenchError, Goal, Options, Progress, Result, Table, UnavailableError, median, mib, spread
from bench.docs import version

TITLE = "Suspending a CUDA process by the driver"
METHOD = """\
On {hardware}; cuda-bindings {bindings}. A PyTorch process fills tensors with numbers that it knows. Another process
suspends it with the driver's `cuCheckpointProcessLock` and `…Checkpoint`, which moves what it has on the GPU to the
host's memory, and resumes it with `…Restore` and `…Unlock`; then it compares every number. The tree is a process and
its child with {tree} each: all are locked before any is moved, all are moved back before any is unlocked. GPU memory is
the whole GPU's by NVML, less what was held before; host memory what the processes' resident size grows by."""

FIRST_DRIVER = 570
"""The first version of the driver with these functions in its library."""
FUNCTIONS = ("Lock", "Checkpoint", "Restore", "Unlock", "GetState")
RUNNING, CHECKPOINTED = 0, 2
LOCK_MILLISECONDS = 30_000
CALL_SECONDS = 600.0
"""How long a call into the driver may take."""
HOLD_SECONDS = 600.0
"""How long the process under test may take to fill its memory, or to compare it."""
END_SECONDS = 10.0
SIZES_MIB = (1024, 4096, 16384, 65536)
GPU_SHARE, HOST_SHARE = 0.8, 0.5
"""Of what is free on the GPU, and available on the host: what a size may take."""


class Checkpoints:
    """The driver's functions, of the module ``cuda.bindings.driver``.

    Raises:
        BenchError: where one does not do what it should; the text names it and the driver's word for what went wrong.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._call("cuInit", 0)

    def lock(self, pid: int) -> None:
        """Have a running process wait at its next call into CUDA."""
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = LOCK_MILLISECONDS
        self._call("cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """Move what a locked process has on the GPU to the host."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int) -> None:
        """Move it back; the process stays locked."""
        self._call("cuCheckpointProcessRestore", pid, None)

    def unlock(self, pid: int) -> None:
        """Let a process go on."""
        self._call("cuCheckpointProcessUnlock", pid, None)

    def expect(self, pid: int, state: int) -> None:
        """Make sure that the driver sees a process in this state."""
        (found,) = self._call("cuCheckpointProcessGetState", pid)
        if int(found) != state:
            raise BenchError(f"the driver sees process {pid} in state {int(found)}, not {state}")

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        """Call a function in a thread, since it may hang; return what it returns beside its status."""
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(getattr(self._driver, name)(*arguments))
            except Exception as problem:
                outcome.append(problem)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(CALL_SECONDS)
        if not outcome:
            raise BenchError(f"{name} did not return within {CALL_SECONDS:.0f} s")
        if isinstance(outcome[0], Exception):
            raise BenchError(f"{name}: {outcome[0]}") from outcome[0]
        status: Any
        rest: list[Any]
        status, *rest = outcome[0]
        if int(status) != 0:
            raise BenchError(f"{name}: {getattr(status, 'name', status)}")
        return rest


@dataclass(frozen=True)
class Cycle:
    """One suspend and resume: seconds of each step, MiB on the GPU, bytes on the host."""

    lock: float
    checkpoint: float
    restore: float
    unlock: float
    compare: float
    awake_mib: int
    asleep_mib: int
    host_added: int
    intact: bool

    @property
    def suspend(self) -> float:
        """Seconds until the GPU is free."""
        return self.lock + self.checkpoint

    @property
    def resume(self) -> float:
        """Seconds until it may go on."""
        return self.restore + self.unlock


@dataclass
class Case:
    """A number of processes with so many MiB each; what was measured, and what went wrong."""

    name: str
    sizes: tuple[int, ...]
    cycles: list[Cycle]
    problem: str = ""


class Holder(servers.Program):
    """A running ``gpu_holder``, its memory filled."""

    def __init__(self, options: Options, device: gpu_common.Device, sizes: tuple[int, ...]) -> None:
        command = [sys.executable, "-m", "bench.gpu_holder", *map(str, sizes)]
        environment = servers.environment(options, **device.visible)
        super().__init__(command, options.folder / f"holder-{sizes[0]}-{len(sizes)}.log", environment, pipes=True)
        try:
            self.pids: list[int] = json.loads(self.hear(HOLD_SECONDS))["pids"]
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Let it end by itself; one that is suspended may not, and is ended then."""
        assert self.process.stdin is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(END_SECONDS)
        super().end()

    def compare(self) -> tuple[bool, float]:
        """Whether its numbers are what they were, and how many seconds it took to find out."""
        self.tell("compare")
        answer = json.loads(self.hear(HOLD_SECONDS))
        return bool(answer["equal"]), float(answer["seconds"])


def run(options: Options, progress: Progress) -> Result:
    """Measure; UnavailableError says what this machine lacks."""
    device = gpu_common.find_device()
    if int(device.driver.partition(".")[0]) < FIRST_DRIVER:
        raise UnavailableError(
            f"the NVIDIA driver is {device.driver}; its version {FIRST_DRIVER} can suspend processes"
        )
    gpu_common.require_cuda("torch")
    return measure(options, progress, device, load_driver())


def load_driver() -> Any:
    """The module with the driver's functions.

    Raises:
        UnavailableError: it is not installed, or is too old.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as problem:
        raise UnavailableError("cuda-bindings is not installed: `pip install cuda-bindings`") from problem
    if not all(hasattr(driver, f"cuCheckpointProcess{name}") for name in FUNCTIONS):
        raise UnavailableError("cuda-bindings is too old to suspend processes: `pip install -U cuda-bindings`")
    return driver


def measure(options: Options, progress: Progress, device: gpu_common.Device, driver: Any) -> Result:
    """Suspend and resume one process of each size that fits here, and a tree of two."""
    sizes = fitting(SIZES_MIB[:2] if options.quick else SIZES_MIB, device)
    runs = 2 if options.quick else 5
    cases = [Case(f"{size // 1024} GiB", (size,), []) for size in sizes]
    cases.append(Case(f"a tree of two, {sizes[0] // 1024} GiB each", (sizes[0], sizes[0]), []))
    progress.expect(len(cases))
    checkpoints = Checkpoints(driver)
    for case in cases:
        progress.step(case.name)
        try:
            measure_case(options, device, checkpoints, case, runs)
        except BenchError as problem:
            case.problem = str(problem)
    return report(device, cases)


def fitting(sizes: tuple[int, ...], device: gpu_common.Device) -> list[int]:
    """The sizes for which GPU and host have memory; two of the smallest must fit.

    Raises:
        BenchError: they do not.
    """
    host_mib = psutil.virtual_memory().available / 2**20
    most = min(GPU_SHARE * device.memory().free_mib, HOST_SHARE * host_mib)
    if 2 * sizes[0] > most:
        raise BenchError(f"the GPU or the host has too little memory free: {most:.0f} MiB could be used")
    return [size for size in sizes if size <= most]


def measure_case(options: Options, device: gpu_common.Device, checkpoints: Checkpoints, case: Case, runs: int) -> None:
    """Suspend and resume processes so many times; what was measured is in the case, even where it fails in the end."""
    before = device.used_mib()
    with Holder(options, device, case.sizes) as holder:
        for _ in range(runs):
            case.cycles.append(measure_cycle(device, checkpoints, holder, before))
    device.wait_used(before)


def measure_cycle(device: gpu_common.Device, checkpoints: Checkpoints, holder: Holder, before: int) -> Cycle:
    """One suspend and resume of a tree."""
    awake, host = device.used_mib() - before, resident(holder.pids)
    lock = timed_each(checkpoints.lock, holder.pids)
    checkpoint = timed_each(checkpoints.checkpoint, holder.pids)
    for pid in holder.pids:
        checkpoints.expect(pid, CHECKPOINTED)
    asleep, host_added = device.used_mib() - before, resident(holder.pids) - host
    restore = timed_each(checkpoints.restore, holder.pids)
    unlock = timed_each(checkpoints.unlock, holder.pids)
    for pid in holder.pids:
        checkpoints.expect(pid, RUNNING)
    intact, compare = holder.compare()
    return Cycle(lock, checkpoint, restore, unlock, compare, awake, asleep, host_added, intact)


def timed_each(work: Callable[[int], None], pids: list[int]) -> float:
    """Do something with one process after the other; return the seconds of all."""
    begun = time.monotonic()
    for pid in pids:
        work(pid)
    return time.monotonic() - begun


def resident(pids: list[int]) -> int:
    """The resident size of processes, in bytes."""
    return sum(int(psutil.Process(pid).memory_info().rss) for pid in pids)


def report(device: gpu_common.Device, cases: list[Case]) -> Result:
    """The tables and what was to be reached."""
    measured = [case for case in cases if case.cycles]
    columns = ["", "runs", "suspend", "resume", "GPU memory awake", "asleep", "host memory added", "numbers"]
    steps = [
        [case.name, *(spread([getattr(cycle, step) for cycle in case.cycles]) for step in STEPS)] for case in measured
    ]
    method = METHOD.format(
        hardware=gpu_common.describe(device),
        bindings=version("cuda-bindings"),
        tree=f"{cases[-1].sizes[0] // 1024} GiB",
    )
    intact = all(cycle.intact for case in cases for cycle in case.cycles) and not any(case.problem for case in cases)
    return Result(
        TITLE,
        method,
        tables=[
            Table("Suspend and resume", columns, [row(case) for case in cases], troubles(cases)),
            Table("Their steps", ["", *STEPS], steps, "*compare*: the first work after it, over all its memory."),
        ],
        goals=[Goal("Resumed processes have every number as it was", "all", "all" if intact else "see there", intact)],
        data={case.name: {"problem": case.problem, "cycles": [asdict(one) for one in case.cycles]} for case in cases},
    )


STEPS = ("lock", "checkpoint", "restore", "unlock", "compare")


def row(case: Case) -> list[str]:
    """One line of the table."""
    cycles = case.cycles
    if not cycles:
        return [case.name, "0", *[""] * 5, "**not resumed**"]
    return [
        case.name,
        str(len(cycles)),
        spread([cycle.suspend for cycle in cycles]),
        spread([cycle.resume for cycle in cycles]),
        f"{median([cycle.awake_mib for cycle in cycles]):,.0f} MiB",
        f"{median([cycle.asleep_mib for cycle in cycles]):,.0f} MiB",
        mib(median([cycle.host_added for cycle in cycles])),
        "as before" if all(cycle.intact for cycle in cycles) else "**changed**",
    ]


def troubles(cases: list[Case]) -> str:
    """What went wrong, in sentences."""
    return " ".join(f"{case.name}: {case.problem}." for case in cases if case.problem)
