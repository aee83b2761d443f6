"""The daemon's side of the zygotes: start them, wait until they are warm, lease processes, replace dead ones."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bullpen.errors import LaunchError
from bullpen.zygote import boot, protocol
from bullpen.zygote.server import listen

WARM_SECONDS = 900.0
"""How long a create waits for its engine to be imported; a cold disk and a big image take minutes."""
ANSWER_SECONDS = 60.0
"""How long a zygote or a leased process may take to answer."""
END_SECONDS = 3.0
RETRY_SECONDS = (0.2, 1.0, 5.0, 15.0, 60.0)
"""Pauses before a zygote that died is started again; the last one repeats."""


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


class PacketStream:
    """Messages over a Unix packet socket, for asyncio (which has no such thing)."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._packets: asyncio.Queue[tuple[protocol.Message, list[int]] | None] = asyncio.Queue()
        self._open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            packet = protocol.receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, protocol.ProtocolError):
            packet = None
        self._packets.put_nowait(packet)
        if packet is None:
            self.close()

    def send(self, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message.

        Raises:
            OSError: the other side is gone.
            MessageTooLargeError: it does not fit.
        """
        protocol.send(self._socket, message, descriptors)

    async def receive(self) -> tuple[protocol.Message, list[int]] | None:
        """The next message with its descriptors; None at the end."""
        return await self._packets.get()

    async def ask(self, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> protocol.Message:
        """Send one message and return the answer.

        Raises:
            LaunchError: the other side is gone, or does not answer in time.
        """
        try:
            self.send(message, descriptors)
            packet = await asyncio.wait_for(self.receive(), ANSWER_SECONDS)
        except protocol.MessageTooLargeError as problem:
            raise LaunchError(f"options and environment are too long: {problem}") from problem
        except (OSError, TimeoutError) as problem:
            raise LaunchError(f"the process that was to become the server does not answer: {problem!r}") from problem
        if packet is None:
            raise LaunchError("the process that was to become the server ended; the zygote's log may say why")
        return packet[0]

    def close(self) -> None:
        """Hang up."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()


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


class Zygote:
    """One zygote process and the connection to it.

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
        self._ended = ended
        self._warm = asyncio.Event()
        self._requests: dict[int, asyncio.Future[tuple[protocol.Message, list[int]]]] = {}
        self._statuses: dict[int, asyncio.Future[int | None]] = {}
        self._counter = 0
        self._process, self._stream = self._spawn(folder, log, spares)
        self._reader = asyncio.ensure_future(self._read())

    @property
    def pid(self) -> int:
        """The zygote's process."""
        return self._process.pid

    def _spawn(self, folder: Path, log: Path, spares: int) -> tuple[subprocess.Popen[bytes], PacketStream]:
        path = folder / f"zygote-{os.urandom(4).hex()}.sock"
        listener = listen(path)
        arguments = ["--engine", self.command.engine, "--listener", str(listener.fileno()), "--spares", str(spares)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [self.command.python, str(boot.__file__), *arguments, "--exit-with-client"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(self.command.environment),
                pass_fds=(listener.fileno(),),
                # A Ctrl-C at the terminal is for the daemon; it decides what ends.
                start_new_session=True,
            )
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(path))
        listener.close()
        path.unlink()
        return process, PacketStream(connection)

    async def _read(self) -> None:
        while (packet := await self._stream.receive()) is not None:
            message, descriptors = packet
            if "event" in message and "id" not in message:
                self._hear(message)
            elif (waiting := self._requests.pop(message.get("id", 0), None)) is not None and not waiting.done():
                waiting.set_result((message, descriptors))
            else:
                for descriptor in descriptors:
                    os.close(descriptor)
        await self._gone()

    def _hear(self, message: protocol.Message) -> None:
        warmth = self.warmth
        if message["event"] == "module":
            warmth.module, warmth.done, warmth.total = message["name"], message["done"], message["total"]
        elif message["event"] == "warm":
            warmth.state, warmth.facts, warmth.failed = "warm", message["facts"], message["failed"]
            warmth.seconds = message["seconds"]
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
        with suppress(ProcessLookupError):
            self._process.kill()
        code = await asyncio.to_thread(self._process.wait)
        if self.warmth.state != "broken":
            self.warmth.state, self.warmth.error = "broken", f"the zygote ended with status {code}"
        self._warm.set()
        for waiting in self._requests.values():
            if not waiting.done():
                waiting.set_exception(ZygoteEndedError("the zygote ended while a process was asked of it; try again"))
        for status in self._statuses.values():
            if not status.done():
                status.set_result(None)
        self._ended(self)

    async def wait_until_warm(self) -> None:
        """Wait for the engine to be imported.

        Raises:
            LaunchError: it cannot be, or takes too long.
        """
        try:
            await asyncio.wait_for(self._warm.wait(), WARM_SECONDS)
        except TimeoutError:
            raise LaunchError(
                f"engine {self.command.engine} is not warm after {WARM_SECONDS:.0f} s; it imports {self.warmth.module}"
            ) from None
        if self.warmth.state == "broken" and self.warmth.facts:
            raise ZygoteEndedError(f"engine {self.command.engine}: {self.warmth.error}")
        if self.warmth.state == "broken":
            raise LaunchError(f"engine {self.command.engine} cannot be used: {self.warmth.error}")

    async def lease(self) -> Leased:
        """Take a process.

        Raises:
            LaunchError: none can be had.
        """
        await self.wait_until_warm()
        self.used += 1
        self._counter += 1
        answer: asyncio.Future[tuple[protocol.Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._requests[self._counter] = answer
        try:
            self._stream.send({"op": "lease", "id": self._counter})
            message, descriptors = await asyncio.wait_for(answer, ANSWER_SECONDS)
        except (OSError, TimeoutError) as problem:
            raise LaunchError(f"the zygote does not answer: {problem!r}") from problem
        if "error" in message:
            raise LaunchError(message["error"])
        status: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._statuses[message["pid"]] = status
        channel = PacketStream(socket.socket(fileno=descriptors[0]))
        return Leased(message["pid"], descriptors[1], message["how"], message["reason"], channel, status)

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


@dataclass(frozen=True)
class ZygoteCommand:
    """What makes one zygote different from another."""

    engine: str
    python: str
    environment: Mapping[str, str]
    early: tuple[tuple[str, str], ...] = ()
    """The part of the environment that instances asked for and that only counts at import."""


class Zygotes:
    """The zygotes of a daemon: one for each engine and set of import-time variables, replaced when they die.

    Args:
        pythons: the interpreter of each engine.
        environment: what every zygote gets.
        folder: where sockets go.
        logs: where output goes.
        spares: processes that each keeps forked ahead.
        limit: how many extra ones, beside one for each engine, are kept warm.
    """

    def __init__(
        self,
        pythons: Mapping[str, str],
        environment: Mapping[str, str],
        folder: Path,
        logs: Path,
        spares: int,
        limit: int = 3,
    ) -> None:
        self._pythons = pythons
        self._environment = environment
        self._folder = folder
        self._logs = logs
        self._spares = spares
        self._limit = limit
        self._zygotes: dict[tuple[str, tuple[tuple[str, str], ...]], Zygote] = {}
        self._failures: dict[str, int] = {}
        self._closing = False
        self._restarts: set[asyncio.Task[None]] = set()

    def all(self) -> Sequence[Zygote]:
        """The zygotes there are now."""
        return list(self._zygotes.values())

    def get(self, engine: str, early: Mapping[str, str]) -> Zygote:
        """The zygote for an engine with these import-time variables; it is started where there is none.

        Raises:
            LaunchError: it cannot be started.
        """
        wanted = {name: value for name, value in early.items() if self._environment.get(name) != value}
        key = (engine, tuple(sorted(wanted.items())))
        zygote = self._zygotes.get(key)
        if zygote is None:
            self._make_room()
            zygote = self._zygotes[key] = self._start(key)
        return zygote

    def _start(self, key: tuple[str, tuple[tuple[str, str], ...]]) -> Zygote:
        engine, early = key
        if engine not in self._pythons:
            raise LaunchError(f"no engine {engine!r} is set up here; there are: {', '.join(self._pythons)}")
        command = ZygoteCommand(engine, self._pythons[engine], {**self._environment, **dict(early)}, early)
        try:
            # A spare of a rarely used environment is memory for nothing.
            spares = 0 if early else self._spares
            return Zygote(command, self._folder, self._logs / f"zygote-{engine}.log", spares, self._zygote_ended)
        except OSError as problem:
            raise LaunchError(
                f"engine {engine}: its zygote cannot be started with {command.python}: {problem}"
            ) from problem

    def _make_room(self) -> None:
        extra = [key for key in self._zygotes if key[1]]
        if len(extra) >= self._limit:
            retired = self._zygotes.pop(extra[0])
            self._keep(asyncio.ensure_future(retired.close()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    def _zygote_ended(self, zygote: Zygote) -> None:
        key = (zygote.command.engine, zygote.command.early)
        if self._closing or self._zygotes.get(key) is not zygote:
            return
        # An extra zygote comes back when it is asked for again. The engine's own comes back by itself; until then it
        # stays, broken, so that a create is answered with the reason at once.
        if zygote.command.early:
            del self._zygotes[key]
        else:
            self._keep(asyncio.ensure_future(self._restart(key, zygote)))

    async def _restart(self, key: tuple[str, tuple[tuple[str, str], ...]], dead: Zygote) -> None:
        engine = key[0]
        attempt = 0 if dead.used else self._failures.get(engine, 0)
        self._failures[engine] = attempt + 1
        was_warm = bool(dead.warmth.facts)
        if was_warm:
            # It worked and was killed: creates may wait for the next one instead of being refused.
            del self._zygotes[key]
            self._failures[engine] = attempt = 0
        await asyncio.sleep(0 if was_warm else RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
        if self._closing or self._zygotes.get(key) not in (None, dead):
            return
        with suppress(LaunchError):
            self._zygotes[key] = self._start(key)

    async def close(self) -> None:
        """End all zygotes."""
        self._closing = True
        for task in list(self._restarts):
            task.cancel()
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes.values()), return_exceptions=True)
