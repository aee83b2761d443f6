"""The server's side of the engine child: fork it, call it, notice its death."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections import deque
from typing import NoReturn

from bullpen.sim.engine_child import MAX_PACKET, READY, EngineChild
from bullpen.sim.options import SimOptions
from bullpen.sim.requests import ApiError
from bullpen.sim.scheduler import EngineDeadError, Scheduler
from bullpen.sim.settings import Settings


class EngineLink:
    """The engine child's process and the socket to it; calls are answered in the order in which they are made."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        self.pid = pid
        self._link = link
        self._replies: deque[asyncio.Future[dict[str, object]]] = deque()
        self._dead = False

    @classmethod
    def fork(cls, options: SimOptions, settings: Settings, started: float) -> "EngineLink":
        """Fork the engine child; to be called while the process has one thread and no event loop.

        The child keeps the server's bound socket open, as the children of vLLM's server do.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A signal between the fork and the child's own handlers would run the server's handler in the child.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        pid = os.fork()
        if pid == 0:
            _run_child(options, settings, ours, theirs, started)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return cls(pid, ours)

    def wait_ready(self) -> None:
        """Block until the child has started up. Raises RuntimeError when it ends before."""
        with contextlib.suppress(ConnectionError):
            if self._link.recv(MAX_PACKET) == READY:
                return
        code = self._reap()
        raise RuntimeError(
            f"Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': {code}}}"
        )

    async def listen(self) -> int | None:
        """Hand out replies until the child has ended; return its exit code, negative for a signal."""
        loop = asyncio.get_running_loop()
        self._link.setblocking(False)
        with contextlib.suppress(ConnectionError):
            while packet := await loop.sock_recv(self._link, MAX_PACKET):
                reply = self._replies.popleft()
                if not reply.done():
                    reply.set_result(json.loads(packet))
        self._dead = True
        while self._replies:
            reply = self._replies.popleft()
            if not reply.done():
                reply.set_exception(EngineDeadError())
        return self._reap()

    async def call(self, operation: str, **details: object) -> dict[str, object]:
        """Let the child do an operation. Raises EngineDeadError."""
        packet = json.dumps({"operation": operation, **details}).encode()
        if len(packet) > MAX_PACKET:
            raise ApiError(400, "The tags are too long.", parameter="tags")
        if self._dead:
            raise EngineDeadError
        reply: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        try:
            self._link.send(packet)
        except OSError:
            self._replies.remove(reply)
            raise EngineDeadError from None
        return await reply

    def terminate(self) -> None:
        """Send SIGTERM to the child, unless it is known to have ended."""
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)

    def _reap(self) -> int | None:
        """Collect the exit code of the child, which has closed its socket and so is at its end."""
        pid, self.pid = self.pid, 0
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None  # whoever called this process lets the kernel collect its children


class Engine:
    """The engine as the routes see it: alive or not, awake or asleep; sleep and wake go one after the other."""

    def __init__(self, link: EngineLink, scheduler: Scheduler, settings: Settings) -> None:
        self.sleep_level: int | None = None  # as the metrics show it: None is awake
        self._link = link
        self._scheduler = scheduler
        self._settings = settings
        self._memory_asleep = False
        self._weights_lost = False
        self._has_woken = False
        self._lock = asyncio.Lock()

    @property
    def is_wrong(self) -> bool:
        """Whether answers are wrong: the weights are lost and were not loaded again, or BULLPEN_SIM_FAIL says so."""
        return self._weights_lost or (self._has_woken and self._settings.fails("answer"))

    async def is_sleeping(self) -> bool:
        """Whether requests have to wait, or memory is asleep; the engine child tells, once it has time.

        Raises EngineDeadError.
        """
        await self._call("look")
        return self._scheduler.paused or self._memory_asleep

    async def watch(self) -> int | None:
        """Serve calls until the engine child ends, then let every request fail; return the child's exit code."""
        code = await self._link.listen()
        self._scheduler.fail()
        return code

    async def sleep(self, level: int, mode: str) -> None:
        """Pause requests and, from level 1 on, free memory.

        Where that fails the engine stays paused, as vLLM's does. Raises EngineDeadError, RuntimeError.
        """
        async with self._lock:
            await self._scheduler.pause(mode)
            if level >= 1:
                await self._call("sleep", level=level)
            self.sleep_level = level

    async def wake(self, tags: list[str] | None) -> bool:
        """Give memory back and, once all of it is back, let requests run; says whether it is.

        Raises EngineDeadError, RuntimeError.
        """
        async with self._lock:
            memory_tags = None if tags is None else [tag for tag in tags if tag != "scheduling"]
            if memory_tags or tags is None:
                await self._call("wake", tags=memory_tags)
                self._has_woken = True
            if self._scheduler.dead:
                raise EngineDeadError
            if not self._memory_asleep:
                self.sleep_level = None
                self._scheduler.resume()
            return not self._memory_asleep

    async def reload_weights(self) -> None:
        """Read the weights again, as after a sleep at level 2. Raises EngineDeadError, RuntimeError."""
        await self._call("reload_weights")

    async def _call(self, operation: str, **details: object) -> None:
        reply = await self._link.call(operation, **details)
        if "error" in reply:
            raise RuntimeError(f"Call to {operation} method failed: {reply['error']}")
        self._memory_asleep, self._weights_lost = bool(reply["asleep"]), bool(reply["weights_lost"])


def _run_child(
    options: SimOptions, settings: Settings, ours: socket.socket, theirs: socket.socket, started: float
) -> NoReturn:
    # Whatever happens, this process must never go on with the server's code.
    try:
        ours.close()
        EngineChild(options, settings, theirs, started).run()
    finally:
        os._exit(1)
