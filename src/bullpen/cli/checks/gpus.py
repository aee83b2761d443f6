"""The GPUs: which there are, what memory is free, who holds it, and whether vLLM is built for them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from bullpen.cli import gpus as said
from bullpen.cli import words
from bullpen.cli.checks import Finding, ok, problem, warning
from bullpen.cli.checks.daemon import ANSWER_SECONDS, is_local
from bullpen.cli.checks.software import Interpreter
from bullpen.client import BullpenClient, ClientError, Gpu
from bullpen.core import devices
from bullpen.errors import StateError
from bullpen.node.gpus import Driver
from bullpen.node.mock_gpus import describe_mock
from bullpen.node.nvml import Nvml
from bullpen.node.settings import Settings

NAME = "GPUs"
END_IT = "end it if nobody needs it: what it holds is missing to every instance on that GPU"
END_OR_ADOPT = f"an instance of an earlier daemon is taken over by `bullpen serve`; any other program: {END_IT}"


def check_gpus(
    settings: Settings, interpreter: Interpreter | None, url: str | None, access_key: str | None
) -> list[Finding]:
    """All of it: as a daemon tells it, which knows whose processes are whose, else as the driver shows it."""
    told = ask_daemon(url, access_key)
    if told is not None and (settings.mock_gpus or any(map(is_mock, told)) or (url and not is_local(url))):
        return [*describe(told, END_IT), *check_fit(told, interpreter)]
    if settings.mock_gpus:
        return [ok(NAME, f"{settings.mock_gpu_count} mock ones, because the settings say so")]
    try:
        version, seen = asyncio.run(look())
    except StateError as trouble:
        return [problem(NAME, str(trouble), "install the driver that fits the kernel, or reboot after its update")]
    driver = [ok("driver", f"NVIDIA {version}")] if version else []
    gpus = told or seen
    found = [*driver, *describe(gpus, END_IT if told else END_OR_ADOPT)]
    if seen and "CUDA_VISIBLE_DEVICES" in os.environ:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        found.append(
            ok("visible", f"CUDA_VISIBLE_DEVICES is {value!r} here; a daemon uses no other GPUs than it names")
        )
    return [*found, *check_fit(gpus, interpreter)]


def ask_daemon(url: str | None, access_key: str | None) -> Sequence[Gpu] | None:
    """The GPUs of a daemon; None where none tells."""
    try:
        with BullpenClient(url, access_key, timeout=ANSWER_SECONDS) as client:
            client.health()
            return client.gpus().gpus
    except ClientError:
        return None


async def look() -> tuple[str | None, list[Gpu]]:
    """The driver's version, and the GPUs that it shows. Without a daemon, every process is a stranger.

    Raises:
        StateError: there is a driver and it does not work, or not in time.
    """
    driver, nvml = Driver(), Nvml()
    version = await driver.call(nvml.driver_version)
    found = []
    for gpu in await driver.call(nvml.list_gpus):
        try:
            use = await driver.call(nvml.memory, gpu.uuid)
        except StateError as trouble:
            found.append(as_reported(gpu, None, str(trouble)))
        else:
            found.append(as_reported(gpu, use, None))
    return version, found


def as_reported(gpu: devices.Gpu, use: devices.MemoryUse | None, trouble: str | None) -> Gpu:
    """A GPU as a daemon would report it."""
    processes = use.processes if use is not None else ()
    return Gpu.read(
        {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "parent": gpu.parent,
            "memory_mib": gpu.memory_mib,
            "free_mib": None if use is None else use.free_mib,
            "foreign": [{"pid": one.pid, "name": one.name, "mib": one.mib} for one in processes],
            "problem": trouble,
        }
    )


def describe(gpus: Sequence[Gpu], advice: str) -> list[Finding]:
    """Each GPU, and who holds memory there that is no instance."""
    findings = []
    for gpu in gpus:
        subject = said.name(gpu)
        if gpu.problem:
            findings.append(warning(subject, gpu.problem, "`nvidia-smi` may say more; the daemon does without it"))
            continue
        total = words.mib(gpu.memory_mib)
        amount = total if gpu.free_mib is None else f"{words.mib(gpu.free_mib)} of {total} are free"
        findings.append(ok(subject, f"{gpu.name}, {amount}, {gpu.uuid}"))
        findings += [warning(subject, said.held_by(process), advice) for process in gpu.foreign]
    return findings


def is_mock(gpu: Gpu) -> bool:
    """Whether a daemon only pretends to have this GPU."""
    return gpu.name == describe_mock(gpu.index).name


def check_fit(gpus: Sequence[Gpu], interpreter: Interpreter | None) -> list[Finding]:
    """Are there GPUs, and is this vLLM built for them?"""
    platform = interpreter.platform if interpreter is not None else None
    if gpus and all(map(is_mock, gpus)):
        return []
    if gpus and platform == "cpu":
        return [warning(NAME, "not used: this vLLM is built for the CPU", "install vLLM for CUDA")]
    if gpus:
        return []
    if platform == "cuda":
        advice = "check the driver with nvidia-smi, run the container with --gpus all, or install vLLM for the CPU"
        return [warning(NAME, "none is visible, and this vLLM is built for CUDA", advice)]
    return [ok(NAME, "none of NVIDIA's; vLLM runs on the CPU")]
