"""A leased process: waits for its configuration, lets the engine check it, becomes the server."""

from __future__ import annotations

import atexit
import ctypes
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from bullpen.zygote import guards, protocol
from bullpen.zygote.worlds import OptionsError, World

PYTHON_SIGNALS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGPIPE: signal.SIG_IGN,
    signal.SIGXFSZ: signal.SIG_IGN,
}
"""What a fresh interpreter does with signals; with all others, the default."""
UNCHANGEABLE = frozenset({signal.SIGKILL, signal.SIGSTOP})
PR_SET_NAME = 15
LIBC = ctypes.CDLL(None)


def detach(keep: socket.socket) -> None:
    """Leave the zygote's world right after the fork: own session, default signals, no descriptor of the zygote's."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - UNCHANGEABLE:
        signal.signal(number, PYTHON_SIGNALS.get(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    kept = {0, 1, 2, keep.fileno()}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):
                if not os.readlink(f"/proc/self/fd/{name}").startswith(guards.MANAGEMENT_DEVICES):
                    os.close(int(name))


def live(world: World, channel: socket.socket) -> NoReturn:
    """Answer ``check`` and ``start`` on the channel; end with the channel, or with the server."""
    code = 1
    try:
        start = wait_for_start(world, channel)
        if start is None:
            os._exit(0)
        if become(start, channel):
            code = serve(world, start)
    except BaseException:
        traceback.print_exc()
    finally:
        end(code)


def wait_for_start(world: World, channel: socket.socket) -> tuple[protocol.Message, int] | None:
    """Answer checks until ``start`` comes with the descriptor of a log; None when the client is gone."""
    while True:
        try:
            received = protocol.receive(channel)
        except (protocol.ProtocolError, OSError):
            return None
        if received is None:
            return None
        message, descriptors = received
        if message.get("op") == "start" and len(descriptors) == 1:
            return message, descriptors[0]
        for descriptor in descriptors:
            os.close(descriptor)
        answer = check(world, message) if message.get("op") == "check" else {"error": "unknown request"}
        with suppress(OSError):
            protocol.send(channel, answer)


def check(world: World, message: protocol.Message) -> protocol.Message:
    """Let the engine's parser read the command line of a ``check``."""
    try:
        return {"ok": True, **world.check(message["argv"])}
    except OptionsError as problem:
        return {"ok": False, "error": str(problem)}
    except (Exception, SystemExit) as problem:  # a parser may raise anything; the client must get an answer
        return {"ok": False, "error": f"{type(problem).__name__}: {problem}"}


def become(start: tuple[protocol.Message, int], channel: socket.socket) -> bool:
    """Take on the server's identity, say so and hang up; False, with the reason to the client, where that failed."""
    try:
        take_identity(*start)
    except Exception as problem:
        traceback.print_exc()
        answer = {"ok": False, "error": f"{type(problem).__name__}: {problem}"}
    else:
        answer = {"ok": True}
    with suppress(OSError):
        protocol.send(channel, answer)
    channel.close()
    return bool(answer["ok"])


def take_identity(message: protocol.Message, log: int) -> None:
    """Take on the server's cgroup, log, environment, folder, title and random numbers."""
    if message.get("cgroup"):
        with suppress(OSError):
            Path(message["cgroup"], "cgroup.procs").write_text("0")
    redirect_output(log)
    os.environ.update(message["env"])
    tempfile.tempdir = None  # the zygote's, found out before there was this environment
    time.tzset()
    os.chdir(message.get("cwd") or "/")
    if (adjustment := message.get("oom_score_adj")) is not None:
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(adjustment))
    set_title(message["title"])
    reseed()


def redirect_output(log: int) -> None:
    """Send everything this process and its children print, C code too, to the log."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(nothing)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # any more would seek, which a log that is a pipe cannot


def set_title(title: str) -> None:
    """Name the process, in ``ps`` where setproctitle is installed, in ``top`` everywhere."""
    try:
        import setproctitle
    except ImportError:
        LIBC.prctl(PR_SET_NAME, title.encode(errors="replace")[:15], 0, 0, 0)
    else:
        setproctitle.setproctitle(title)


def reseed() -> None:
    """Give this process random numbers of its own; forks of one parent would all draw the same ones."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(int.from_bytes(os.urandom(4), "little"))


def serve(world: World, start: tuple[protocol.Message, int]) -> int:
    """Run the engine's server; an exception of it ends in its traceback and exit code 1, as in a process of its own."""
    message, _ = start
    try:
        return world.serve(message["argv"], message.get("user_env") or {})
    except SystemExit as end_of_server:
        code = end_of_server.code
        if isinstance(code, int) or code is None:
            return code or 0
        print(code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


def end(code: int) -> NoReturn:
    """End as an interpreter would, without unwinding the zygote's frames below this one."""
    with suppress(BaseException):
        atexit._run_exitfuncs()
    flush_output()
    os._exit(code)


def flush_output() -> None:
    """Write out what Python and C still hold back: a fork would print it twice, ``os._exit`` would lose it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    LIBC.fflush(None)
