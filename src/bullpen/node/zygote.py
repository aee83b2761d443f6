"""The daemon's side of one zygote: start it, wait until it is warm, lease processes, hear how they end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bullpen.errors import LaunchError
from bullpen.node.packets import ANSWER_SECONDS, PacketStream, close_all
from bullpen.zygote import boot, protocol
from bullpen.zygote.server import listen

logger = logging.getLogger("bullpen")

WARM_SECONDS = 900.0
"""How long a create waits for its engine to be imported; a cold disk and a big image take minutes."""
END_SECONDS = 3.0
SETTLED_SECONDS = 30.0
"""A warm zygote that lived this long, or gave a process, starts the row of pauses anew when it dies."""


class ZygoteEndedError(LaunchError):
    """A zygote that worked has ended; the next one may give what was asked of it."""


@dataclass
class Warmth:
    """How far a zygote has come, for people to see."""

    state: str = "warming"
    """``warming``, ``warm`` or ``broken``."""
    module: str | None = None
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def describe(self) -> dict[str, Any]:
        """As JSON data."""
        data: dict[str, Any] = {"state": self.state}
        if self.state == "warming":
            data |= {"module": self.module, "done": self.done, "total": self.total}
        if self.state == "warm":
            data |= {"seconds": self.seconds, **self.facts, "failed": self.failed}
        if self.error:
            data["error"] = self.error
        return data


@dataclass
class Leased:
    """A process that waits for its configuration. Its exit status comes through ``status``, as None where the zygote
    ended before it could tell."""

    pid: int
    pidfd: int
    how: str
    reason: str | None
    channel: PacketStream
    status: asyncio.Future[int | None]

    @property
    def answer_seconds(self) -> float:
        """How long it may take to its first answer; a fresh interpreter imports the engine before."""
        return WARM_SECONDS if self.how == "spawn" else ANSWER_SECONDS

    def give_back(self) -> None:
        """Do without it; it ends by itself."""
        self.channel.close()
        os.close(self.pidfd)


class Zygote:
    """One zygote process and the connection to it.

    Attributes:
        warmth: how far it has come.
        used: how many processes were asked of it.
        waiting: how many callers wait for a process now.
        used_at: when a process was last asked of it, on the monotonic clock.
        gone: set once it has ended and has made room for another.

    Args:
        command: engine, interpreter and environment of it.
        folder: where its socket goes (mode 0700).
        log: where its output goes.
        ended: called when it has gone.
    """

    def __init__(
        self, command: ZygoteCommand, folder: Path, log: Path, spares: int, ended: Callable[[Zygote], None]
    ) -> None:
        self.command = command
        self.warmth = Warmth()
        self.used = 0
        self.waiting = 0
        self.used_at = time.monotonic()
        self._ended = ended
        self._log = log
        self._warm = asyncio.Event()
        self._warm_at: float | None = None
        self.gone = asyncio.Event()
        self._requests: dict[int, asyncio.Future[Leased]] = {}
        self._statuses: dict[int, asyncio.Future[int | None]] = {}
        self._counter = 0
        self._process, self._stream = self._spawn(folder, log, spares)
        self._reader = asyncio.ensure_future(self._read())

    @property
    def pid(self) -> int:
        """The zygote's process."""
        return self._process.pid

    @property
    def was_warm(self) -> bool:
        """Whether it ever was warm."""
        return self._warm_at is not None

    @property
    def was_settled(self) -> bool:
        """Whether it worked well enough to be started again at once."""
        return self._warm_at is not None and (self.used > 0 or time.monotonic() - self._warm_at > SETTLED_SECONDS)

    def _spawn(self, folder: Path, log: Path, spares: int) -> tuple[subprocess.Popen[bytes], PacketStream]:
        path = folder / f"zygote-{os.urandom(4).hex()}.sock"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with listen(path) as listener, open(log, "ab", opener=private) as output:
                # Before the process exists, so that it finds a client however short this daemon lives.
                connection.connect(str(path))
                arguments = ["--engine", self.command.engine, "--spares", str(spares), "--exit-with-client"]
                process = subprocess.Popen(
                    [self.command.python, str(boot.__file__), *arguments, "--listener", str(listener.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=dict(self.command.environment),
                    pass_fds=(listener.fileno(),),
                    # A Ctrl-C at the terminal is for the daemon; it decides what ends.
                    start_new_session=True,
                )
        except (OSError, ValueError):
            connection.close()
            raise
        finally:
            path.unlink(missing_ok=True)
        return process, PacketStream(connection)

    async def _read(self) -> None:
        while (packet := await self._stream.receive()) is not None:
            message, descriptors = packet
            if "event" in message and "id" not in message:
                self._hear(message)
            else:
                self._answer(message, descriptors)
        await self._gone()

    def _answer(self, message: protocol.Message, descriptors: list[int]) -> None:
        """Hand a process to whoever asked for it, and listen for its status from now on."""
        waiting = self._requests.pop(message.get("id", 0), None)
        if "error" in message or len(descriptors) != 2:
            close_all(descriptors)
            missing = "this daemon may open no more files; raise its limit (`ulimit -n`)"
            if waiting is not None and not waiting.done():
                waiting.set_exception(LaunchError(message.get("error", missing)))
            return
        pid, status = message["pid"], asyncio.get_running_loop().create_future()
        channel = PacketStream(socket.socket(fileno=descriptors[0]))
        leased = Leased(pid, descriptors[1], message["how"], message["reason"], channel, status)
        if waiting is None or waiting.done():
            leased.give_back()
            return
        self._statuses[pid] = status
        waiting.set_result(leased)

    def _hear(self, message: protocol.Message) -> None:
        warmth = self.warmth
        if message["event"] == "module":
            warmth.module, warmth.done, warmth.total = message["name"], message["done"], message["total"]
        elif message["event"] == "warm":
            warmth.state, warmth.facts, warmth.failed = "warm", message["facts"], message["failed"]
            warmth.seconds = message["seconds"]
            self._warm_at = time.monotonic()
            self._warm.set()
        elif message["event"] == "broken":
            warmth.state, warmth.error = "broken", message["error"]
            self._warm.set()
        elif message["event"] == "exit":
            status = self._statuses.pop(message["pid"], None)
            if status is not None and not status.done():
                status.set_result(message["status"])

    async def _gone(self) -> None:
        """The connection has ended, so the zygote has or must."""
        self._stream.close()
        code = await asyncio.to_thread(end_process, self._process)
        if self.warmth.state != "broken":
            self.warmth.state = "broken"
            self.warmth.error = f"the zygote ended with status {code}; {self._log} may say why"
        self._warm.set()
        for waiting in self._requests.values():
            if not waiting.done():
                waiting.set_exception(ZygoteEndedError("the zygote ended while a process was asked of it; try again"))
        for status in self._statuses.values():
            if not status.done():
                status.set_result(None)
        self._ended(self)
        self.gone.set()

    async def wait_until_warm(self) -> None:
        """Wait for the engine to be imported.

        Raises:
            LaunchError: it cannot be, or takes too long.
        """
        if not self._warm.is_set():
            try:
                await asyncio.wait_for(self._warm.wait(), WARM_SECONDS)
            except TimeoutError:
                raise LaunchError(
                    f"engine {self.command.engine} is not warm after {WARM_SECONDS:.0f} s;"
                    f" it imports {self.warmth.module}"
                ) from None
        if self.warmth.state == "broken" and self.was_warm:
            raise ZygoteEndedError(f"engine {self.command.engine}: {self.warmth.error}")
        if self.warmth.state == "broken":
            raise LaunchError(f"engine {self.command.engine} cannot be used: {self.warmth.error}")

    async def lease(self) -> Leased:
        """Take a process.

        Raises:
            LaunchError: none can be had.
        """
        self.waiting += 1
        if self.warmth.state == "warming":
            logger.info("a create waits: engine %s is still being imported", self.command.engine)
        try:
            await self.wait_until_warm()
            return await self._lease()
        finally:
            self.waiting -= 1

    async def _lease(self) -> Leased:
        self.used += 1
        self.used_at = time.monotonic()
        self._counter += 1
        answer: asyncio.Future[Leased] = asyncio.get_running_loop().create_future()
        self._requests[self._counter] = answer
        try:
            self._stream.send({"op": "lease", "id": self._counter})
        except OSError as problem:
            raise ZygoteEndedError(f"engine {self.command.engine}: the zygote has ended; try again") from problem
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError as problem:
            self._process.kill()  # it hangs; another one takes its place
            raise LaunchError(
                f"engine {self.command.engine}: the zygote has not answered for {ANSWER_SECONDS:.0f} s and is"
                " replaced; try again"
            ) from problem

    async def close(self) -> None:
        """End the zygote; instances that it forked are untouched."""
        with suppress(ProcessLookupError):
            # One that still imports has forked nothing, and would look at a signal only after the module it is at.
            self._process.send_signal(signal.SIGKILL if self.warmth.state == "warming" else signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self._reader), END_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._reader


def end_process(process: subprocess.Popen[bytes]) -> int | None:
    """Make sure that a zygote has ended and return its status; None where not even SIGKILL ends it."""
    with suppress(ProcessLookupError):
        process.kill()
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return None


@dataclass(frozen=True)
class ZygoteCommand:
    """What makes one zygote different from another."""

    engine: str
    python: str
    environment: Mapping[str, str]
    early: tuple[tuple[str, str], ...] = ()
    """The part of the environment that instances asked for and that only counts at import."""


def private(path: str, flags: int) -> int:
    """Open a file that only its owner may read."""
    return os.open(path, flags, 0o600)
