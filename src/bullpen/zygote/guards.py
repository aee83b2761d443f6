"""May this process fork now? A fork copies one thread and no accelerator context, so it must have just those."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

CONTEXT_DEVICES: tuple[str, ...] = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/davinci", "/dev/accel/")
"""Device files that an accelerator context holds open. It does not survive a fork."""
MANAGEMENT_DEVICES: tuple[str, ...] = ("/dev/nvidia", "/dev/dri/")
"""Device files that management libraries hold open (NVML: ``/dev/nvidiactl``, ``/dev/nvidia0``; PyTorch initialises it
to count devices and leaves it so). They survive a fork, but not a close behind their back."""
ENDING_SECONDS = 0.02
"""How long a thread that Python has joined may still be seen by the kernel."""


def reason_not_to_fork() -> str | None:
    """Why a fork would give a broken child, in one sentence; None where it is safe."""
    return extra_threads() or accelerator_context()


def extra_threads() -> str | None:
    """Say which threads run beside the main one, Python's and C's."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        total = len(os.listdir("/proc/self/task"))
        if total == 1:
            return None
        python = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        native = total - 1 - len(python)
        if native <= 0 or time.monotonic() > deadline:
            return describe_threads(python, native)
        time.sleep(0.001)


def describe_threads(python: list[str], native: int) -> str:
    """The sentence for threads by name and others by number."""
    parts = [f"Python thread{'s' if len(python) > 1 else ''} {', '.join(python)}"] if python else []
    parts += [f"{native} native thread{'s' if native > 1 else ''}"] if native > 0 else []
    return f"{' and '.join(parts)} {'run' if len(python) + max(native, 0) > 1 else 'runs'} beside the main one"


def accelerator_context() -> str | None:
    """Say where this process holds an accelerator context, which no child of a fork could use."""
    torch = sys.modules.get("torch")
    for backend in ("cuda", "xpu"):
        is_initialized = getattr(getattr(torch, backend, None), "is_initialized", None)
        if is_initialized is not None and is_initialized():
            return f"torch.{backend} is initialised"
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        except OSError:
            continue
        if target.startswith(CONTEXT_DEVICES):
            return f"{target} is open"
    return None
