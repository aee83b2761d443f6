"""A zygote for tests, run as a program: its servers run the Python code that they are given as their options.

``--import`` names modules to preload, found in ``--path``; ``--trouble`` makes the warm parent one that must not fork.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bullpen.zygote import boot, guards
from bullpen.zygote.preload import PreloadReport, Progress, import_modules
from bullpen.zygote.server import Zygote, listen
from bullpen.zygote.worlds import OptionsError

LEFT_OPEN: list[Any] = []


def wait() -> None:
    """Stay until SIGTERM."""
    signal.pause()


class ScriptWorld:
    """An engine whose servers run code."""

    early_environment: Mapping[str, str] = {"BULLPEN_TEST_EARLY": "1"}

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def preload(self, report: PreloadReport, progress: Progress) -> dict[str, Any]:
        sys.path[:0] = self._options.path
        import_modules(getattr(self._options, "import"), report, progress)
        if self._options.trouble == "broken":
            raise ImportError("no engine here")
        if self._options.trouble == "exit":
            raise SystemExit("the engine gave up")
        if self._options.trouble:
            TROUBLES[self._options.trouble](self._options)
        LEFT_OPEN.append(os.open("/dev/zero", os.O_RDONLY))
        if self._options.management_device:
            guards.MANAGEMENT_DEVICES = (self._options.management_device,)
            LEFT_OPEN.append(os.open(self._options.management_device, os.O_RDONLY))
        signal.signal(signal.SIGUSR1, lambda *_: None)
        return {}

    def check(self, argv: Sequence[str]) -> dict[str, Any]:
        if argv == ["exit"]:
            raise SystemExit(0)
        if argv != ["ok"]:
            raise OptionsError("nothing but ok will do")
        return {"threads": threading.active_count()}

    def serve(self, argv: Sequence[str], user_environment: Mapping[str, str]) -> int:
        variables: dict[str, Any] = {"wait": wait, "user": dict(user_environment)}
        exec(argv[0], variables)
        return int(variables.get("code", 0))


def python_thread(options: argparse.Namespace) -> None:
    threading.Thread(target=threading.Event().wait, name="busybody", daemon=True).start()


def native_thread(options: argparse.Namespace) -> None:
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0


def open_device(options: argparse.Namespace) -> None:
    device = Path(options.device)
    LEFT_OPEN.append(os.open(device, os.O_RDONLY))
    guards.CONTEXT_DEVICES = (str(device),)


TROUBLES = {"python-thread": python_thread, "native-thread": native_thread, "device": open_device}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--exit-with-client", action="store_true")
    parser.add_argument("--import", action="append", default=[])
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--trouble", choices=["broken", "exit", *TROUBLES])
    parser.add_argument("--device")
    parser.add_argument("--management-device")
    options = parser.parse_args()
    zygote = Zygote(
        "script",
        ScriptWorld(options),
        listen(options.socket),
        spares=options.spares,
        exit_with_client=options.exit_with_client,
        # What cannot be forked is a simulator, in an interpreter of its own.
        spawn_command=[sys.executable, str(boot.__file__), "--engine", "sim"],
    )
    os._exit(zygote.run())


if __name__ == "__main__":
    main()
