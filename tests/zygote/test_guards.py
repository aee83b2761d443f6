"""The checks before a fork, in processes of their own: a thread or a context would stay for the other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = (
    "import ctypes; libc = ctypes.CDLL(None)\n"
    "for _ in range({count}): libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)"
)
PYTHON = "import threading; threading.Thread(target=threading.Event().wait, name='{name}', daemon=True).start()"
TORCH = (
    "import sys, types; sys.modules['torch'] = torch = types.ModuleType('torch')\n"
    "torch.{backend} = types.SimpleNamespace({what})"
)


def reason(*statements: str) -> str:
    """What keeps a process from forking after some statements."""
    program = "\n".join(["from bullpen.zygote import guards", *statements, "print(guards.reason_not_to_fork())"])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([], "None"),
        ([PYTHON.format(name="busy")], "Python thread busy runs beside the main one"),
        (
            [PYTHON.format(name="one"), PYTHON.format(name="two")],
            "Python threads one, two run beside the main one",
        ),
        ([NATIVE.format(count=1)], "1 native thread runs beside the main one"),
        (
            [NATIVE.format(count=2), PYTHON.format(name="busy")],
            "Python thread busy and 2 native threads run beside the main one",
        ),
        (["import threading; t = threading.Thread(target=int); t.start(); t.join()"], "None"),
    ],
)
def test_threads(statements: list[str], expected: str) -> None:
    assert reason(*statements) == expected


@pytest.mark.parametrize(
    ("backend", "what", "expected"),
    [
        ("cuda", "is_initialized=lambda: True", "torch.cuda is initialised"),
        ("xpu", "is_initialized=lambda: True", "torch.xpu is initialised"),
        ("cuda", "is_initialized=lambda: False", "None"),
        ("cuda", "", "None"),
    ],
)
def test_torch_says_whether_it_has_a_context(backend: str, what: str, expected: str) -> None:
    assert reason(TORCH.format(backend=backend, what=what)) == expected


def test_an_open_device_is_a_context(tmp_path: Path) -> None:
    device = tmp_path / "nvidia-uvm"
    device.touch()
    watch = f"guards.CONTEXT_DEVICES = ({str(device)!r},)"
    assert reason(watch) == "None"
    assert reason(watch, f"file = open({str(device)!r})") == f"{device} is open"
    assert reason(watch, f"file = open({str(device)!r})", "file.close()") == "None"


def test_what_nvml_keeps_open_is_no_context() -> None:
    from bullpen.zygote import guards

    assert "/dev/nvidia-uvm".startswith(guards.CONTEXT_DEVICES)
    assert not "/dev/nvidiactl".startswith(guards.CONTEXT_DEVICES)
    assert not "/dev/nvidia0".startswith(guards.CONTEXT_DEVICES)
