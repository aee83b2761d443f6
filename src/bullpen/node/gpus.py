"""The accelerators of this host: which there are, what memory they have, and who holds it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from bullpen.core.devices import Gpu, GpuProcess, MemoryUse, select
from bullpen.errors import StateError
from bullpen.node.mock_gpus import MockGpus
from bullpen.node.nvml import Nvml
from bullpen.node.settings import Settings

__all__ = [
    "Gpu",
    "Gpus",
    "NvidiaGpus",
    "Owners",
    "find_gpus",
    "foreign_processes",
    "wait_for_memory",
]

T = TypeVar("T")
DRIVER_SECONDS = 10.0
"""How long the driver may take to answer. Seconds are usual on a host of many GPUs that no program keeps awake."""
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.25

Owners = Callable[[], Awaitable[Mapping[int, str]]]
"""Tells which process belongs to which instance, by pid and id."""


class Gpus(Protocol):
    """The GPUs that this daemon may use."""

    def list(self) -> tuple[Gpu, ...]:
        """All of them, as they were when the daemon started."""

    async def memory(self, uuid: str) -> MemoryUse:
        """The memory of one of them now.

        Raises:
            StateError: it cannot be told; the text says why.
        """


class Driver:
    """Calls into the driver, one after the other in one thread, each with a deadline.

    A call that hangs cannot be ended. Until it comes back, further ones are refused at once, so that no threads and
    no callers pile up behind it. The thread does not keep the daemon from ending.
    """

    def __init__(self, seconds: float = DRIVER_SECONDS) -> None:
        self._seconds = seconds
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._current: Future[Any] | None = None
        self._late: Future[Any] | None = None
        self._thread: threading.Thread | None = None

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function in the thread and return what it returns, or raise what it raises.

        Raises:
            StateError: it did not return in time, or an earlier one has not returned yet.
        """
        if self._late is not None and not self._late.done():
            raise self._silence()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nvidia-driver", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *arguments)))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError:
            self._late = self._current
            raise self._silence() from None

    def _silence(self) -> StateError:
        return StateError(f"the NVIDIA driver does not answer within {self._seconds:g} s; `nvidia-smi` may say more")

    def _run(self) -> None:
        while True:
            future, function = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            self._current = future
            try:
                future.set_result(function())
            except BaseException as problem:
                future.set_exception(problem)


class NvidiaGpus:
    """The GPUs that the NVIDIA driver shows, MIG devices included; see `Gpus`.

    Args:
        nvml: the driver's library.
        seconds: how long it may take to answer.
    """

    def __init__(self, nvml: Nvml | None = None, seconds: float = DRIVER_SECONDS) -> None:
        self._nvml = nvml or Nvml()
        self._driver = Driver(seconds)
        self._gpus: tuple[Gpu, ...] = ()

    async def find(self, visible: str | None) -> None:
        """Ask the driver which GPUs there are, and keep those that a value of ``CUDA_VISIBLE_DEVICES`` leaves.

        Raises:
            StateError: there is a driver and it does not work.
        """
        self._gpus = tuple(select(await self._driver.call(self._nvml.list_gpus), visible))

    def list(self) -> tuple[Gpu, ...]:
        """Those found; nothing where there is no driver."""
        return self._gpus

    async def memory(self, uuid: str) -> MemoryUse:
        """The memory of one of them now.

        Raises:
            StateError: the driver does not say, or not in time.
        """
        return await self._driver.call(self._nvml.memory, uuid)


async def find_gpus(settings: Settings, folder: Path, environ: Mapping[str, str]) -> Gpus:
    """The GPUs that this daemon may use: mock ones or NVIDIA's, as far as its ``CUDA_VISIBLE_DEVICES`` leaves them.

    Args:
        settings: the daemon's.
        folder: where the memory of mock GPUs is noted.
        environ: the daemon's environment.

    Raises:
        StateError: there is a driver and it does not work, or the folder cannot be written.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if settings.mock_gpus:
        return MockGpus(folder, settings.mock_gpu_count, settings.mock_gpu_memory, visible=visible)
    gpus = NvidiaGpus()
    await gpus.find(visible)
    return gpus


# -- waiting for memory ----------------------------------------------------------------------------------------------


async def wait_for_memory(gpus: Gpus, needs: Mapping[str, int], seconds: float, owners: Owners) -> dict[str, int] | str:
    """Wait until each GPU has so much memory free. What a process held comes back some time after its end.

    Args:
        gpus: the host's.
        needs: MiB by UUID.
        seconds: the deadline.
        owners: asked at the deadline, for who holds the memory.

    Returns:
        What each has free, in MiB by UUID, once that is enough; else one sentence: which GPU, how much is missing, who
        holds it, what to do. At once where a GPU has not so much at all, or the driver does not answer.
    """
    end = time.monotonic() + seconds
    pause = FIRST_PAUSE
    while True:
        try:
            uses = {uuid: await gpus.memory(uuid) for uuid in needs}
        except StateError as problem:
            return str(problem)
        short = [uuid for uuid, use in uses.items() if use.free_mib < needs[uuid]]
        if not short:
            return {uuid: use.free_mib for uuid, use in uses.items()}
        named = {gpu.uuid: gpu for gpu in gpus.list()}
        for uuid in short:
            if uses[uuid].total_mib < needs[uuid]:
                return too_small(name_gpu(named, uuid), uses[uuid], needs[uuid])
        if time.monotonic() >= end:
            first = short[0]
            return held_by_others(name_gpu(named, first), uses[first], needs[first], await owners())
        await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(pause * 2, LONGEST_PAUSE)


def name_gpu(named: Mapping[str, Gpu], uuid: str) -> str:
    """How a sentence calls a GPU."""
    gpu = named.get(uuid)
    if gpu is None:
        return f"GPU {uuid}"
    return f"GPU {gpu.index} ({uuid})" if gpu.parent is None else f"MIG device {uuid}"


def too_small(gpu: str, use: MemoryUse, need_mib: int) -> str:
    """The sentence on a GPU that never has so much."""
    return (
        f"{gpu} has {use.total_mib} MiB in all, and {need_mib} MiB are needed; choose a larger GPU, more of them, or "
        "a lower --gpu-memory-utilization"
    )


def held_by_others(gpu: str, use: MemoryUse, need_mib: int, owners: Mapping[int, str]) -> str:
    """The sentence on a GPU whose memory somebody holds."""
    short = f"{gpu} has {use.free_mib} MiB free of the {need_mib} MiB needed"
    if not use.processes:
        rest = use.total_mib - use.free_mib
        return f"{short}; who holds the other {rest} MiB, `nvidia-smi` on the host, outside any container, may say"
    ours = sorted({owners[process.pid] for process in use.processes if process.pid in owners})
    foreign = foreign_processes(use, owners.__contains__)
    holders, ways = [], []
    for owner in ours:
        held = amount(process for process in use.processes if owners.get(process.pid) == owner)
        holders.append(f"instance '{owner}'{held}")
        ways.append(f"stop '{owner}' or put it to sleep")
    for process in foreign:
        holders.append(f"{name_process(process)} of no instance{amount([process])}")
    # In a container the driver may speak of the host's processes, by numbers that mean others here, or nobody.
    here = [str(process.pid) for process in foreign if Path(f"/proc/{process.pid}").exists()]
    if here:
        ways.append(f"`kill {' '.join(here)}`")
    if len(here) < len(foreign):
        ways.append("look with `nvidia-smi` on the host")
    return f"{short}; the rest is held by {', '.join(holders)}; {', or '.join(ways)}"


def foreign_processes(use: MemoryUse, is_ours: Callable[[int], bool]) -> list[GpuProcess]:
    """The processes on a GPU that belong to no instance."""
    return [process for process in use.processes if not is_ours(process.pid)]


def name_process(process: GpuProcess) -> str:
    """How a sentence calls a process."""
    return f"process {process.pid} ({process.name})" if process.name else f"process {process.pid}"


def amount(processes: Iterable[GpuProcess]) -> str:
    """What processes hold, for a sentence; nothing where that is not known of all of them."""
    held = [process.mib for process in processes]
    known = [mib for mib in held if mib is not None]
    return f" ({sum(known)} MiB)" if len(known) == len(held) else ""
