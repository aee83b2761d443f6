"""The zygote itself: one thread that listens, warms, forks and reaps."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bullpen.zygote import child, guards, protocol
from bullpen.zygote.preload import ModuleReport, PreloadReport
from bullpen.zygote.worlds import World

REFILL_SECONDS = 0.5
"""How long after a lease the next spare is forked, so that the fork does not slow the server that just started."""


@dataclass
class Lease:
    """A process that was forked and not yet given away, or is just being given away."""

    pid: int
    channel: socket.socket
    how: str
    reason: str | None = None


class Zygote:
    """A warm parent for one engine.

    Args:
        name: the engine's name, for titles and messages.
        world: the engine's world.
        listener: a listening Unix socket of type SOCK_SEQPACKET.
        spares: how many processes to keep forked ahead.
        exit_with_client: end when the last client has hung up.
        spawn_command: the command that starts a fresh interpreter as a leased process; ``--channel N`` is added.
    """

    def __init__(
        self,
        name: str,
        world: World,
        listener: socket.socket,
        *,
        spares: int,
        exit_with_client: bool,
        spawn_command: list[str],
    ) -> None:
        self.name = name
        self.world = world
        self.report = PreloadReport()
        self.facts: dict[str, Any] = {}
        self._listener = listener
        self._wanted_spares = spares
        self._exit_with_client = exit_with_client
        self._spawn_command = spawn_command
        self._spares: deque[Lease] = deque()
        self._clients: dict[socket.socket, set[int]] = {}
        self._had_client = False
        self._refill_at: float | None = None
        self._ending = False
        self._selector = selectors.DefaultSelector()
        self._wakeup, wakeup = socket.socketpair()
        for end in (self._wakeup, wakeup):
            end.setblocking(False)
        self._wakeup_writer = wakeup

    def run(self) -> int:
        """Warm, then serve until told to end; return the exit code."""
        self._listener.setblocking(False)
        signal.signal(signal.SIGTERM, self._note_end)
        signal.signal(signal.SIGINT, self._note_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        child.set_title(f"bullpen: zygote {self.name}")
        try:
            self._warm()
        except Exception as problem:
            print(f"bullpen zygote: {problem}", file=sys.stderr, flush=True)
            self._tell_all({"event": "broken", "error": str(problem)})
            return 3
        self._serve()
        return 0

    def _note_end(self, *_: object) -> None:
        self._ending = True

    # -- warming ---------------------------------------------------------------------------------------------------

    def _warm(self) -> None:
        started = time.monotonic()
        for name, value in self.world.early_environment.items():
            os.environ.setdefault(name, value)
        self.facts = self.world.preload(self.report, self._module_done)
        self.report.seconds = time.monotonic() - started
        self._tell_all(self._warm_message())

    def _module_done(self, module: ModuleReport, done: int, total: int) -> None:
        """Tell the clients of a module; accept new ones meanwhile, since nothing else runs while modules import."""
        self._accept()
        if self._ending or self._is_orphaned():
            raise SystemExit(0)
        self._tell_all(
            {
                "event": "module",
                "name": module.name,
                "seconds": round(module.seconds, 4),
                "error": module.error,
                "done": done,
                "total": total,
            }
        )

    def _warm_message(self) -> protocol.Message:
        failed = {module.name: module.error or module.side_effect for module in self.report.failed}
        return {
            "event": "warm",
            "pid": os.getpid(),
            "seconds": round(self.report.seconds, 3),
            "modules": len(self.report.modules),
            "failed": failed,
            "facts": self.facts,
        }

    def _is_orphaned(self) -> bool:
        """Whether the client that this zygote lives for has hung up while it warmed."""
        for client in list(self._clients):
            with suppress(BlockingIOError, OSError):
                if client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    self._forget_client(client)
        return self._exit_with_client and self._had_client and not self._clients

    # -- serving ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        for client in self._clients:
            self._selector.register(client, selectors.EVENT_READ)
        self._refill_at = time.monotonic()
        while not self._ending and not (self._exit_with_client and self._had_client and not self._clients):
            self._refill()
            timeout = None if self._refill_at is None else max(0.0, self._refill_at - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wakeup:
                    with suppress(BlockingIOError):
                        self._wakeup.recv(4096)
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]
            self._reap()

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                client, _ = self._listener.accept()
                if protocol.peer_uid(client) not in (os.getuid(), 0):
                    client.close()
                    continue
                self._clients[client] = set()
                self._had_client = True
                if self.facts:
                    self._tell(client, self._warm_message())
                    self._selector.register(client, selectors.EVENT_READ)

    def _hear(self, client: socket.socket) -> None:
        try:
            received = protocol.receive(client)
        except (protocol.ProtocolError, OSError):
            received = None
        if received is None:
            self._selector.unregister(client)
            self._forget_client(client)
            return
        message, descriptors = received
        for descriptor in descriptors:
            os.close(descriptor)
        if message.get("op") == "lease":
            self._lease(client, message.get("id"))
        elif message.get("op") == "status":
            self._tell(client, {"id": message.get("id"), "warm": True, **self._warm_message()})
        else:
            self._tell(client, {"id": message.get("id"), "error": f"unknown request {message.get('op')!r}"})

    def _forget_client(self, client: socket.socket) -> None:
        self._clients.pop(client, None)
        client.close()

    def _tell(self, client: socket.socket, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> None:
        # A client that does not read, or has gone, must not hold up the others: it is found gone at the next read.
        with suppress(OSError):
            protocol.send(client, message, descriptors)

    def _tell_all(self, message: protocol.Message) -> None:
        for client in self._clients:
            self._tell(client, message)

    # -- processes -------------------------------------------------------------------------------------------------

    def _lease(self, client: socket.socket, request: Any) -> None:
        try:
            lease = self._spares.popleft() if self._spares else self._new_process("fork")
        except OSError as problem:
            self._tell(client, {"id": request, "error": f"the fork failed: {problem.strerror}"})
            return
        answer = {"id": request, "pid": lease.pid, "how": lease.how, "reason": lease.reason}
        pidfd = os.pidfd_open(lease.pid)
        self._clients[client].add(lease.pid)
        self._tell(client, answer, (lease.channel.fileno(), pidfd))
        os.close(pidfd)
        lease.channel.close()
        if self._wanted_spares:
            self._refill_at = time.monotonic() + REFILL_SECONDS

    def _refill(self) -> None:
        if self._refill_at is None or time.monotonic() < self._refill_at:
            return
        self._refill_at = None
        while len(self._spares) < self._wanted_spares:
            if guards.reason_not_to_fork():
                return  # a fresh interpreter is started when one is asked for, not ahead
            try:
                self._spares.append(self._new_process("spare"))
            except OSError as problem:
                print(f"bullpen zygote: no spare: {problem}", file=sys.stderr, flush=True)
                return

    def _new_process(self, how: str) -> Lease:
        """Fork a process, or start a fresh interpreter where a fork would be broken.

        Raises:
            OSError: neither is possible.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reason = guards.reason_not_to_fork()
        if reason is not None:
            return Lease(self._spawn(theirs), ours, "spawn", reason)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._live(theirs)
        theirs.close()
        return Lease(pid, ours, how)

    def _live(self, channel: socket.socket) -> NoReturn:
        """Run in the child. This frame never returns, so the zygote's objects above it are never finalised here."""
        try:
            child.detach(channel)
            child.set_title(f"bullpen: spare {self.name}")
            child.live(self.world, channel)
        finally:
            os._exit(1)

    def _spawn(self, channel: socket.socket) -> int:
        os.set_inheritable(channel.fileno(), True)
        command = [*self._spawn_command, "--channel", str(channel.fileno())]
        pid = os.posix_spawn(command[0], command, os.environ)
        channel.close()
        return pid

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, status: int) -> None:
        for spare in list(self._spares):
            if spare.pid == pid:
                self._spares.remove(spare)
                spare.channel.close()
                self._refill_at = time.monotonic() + REFILL_SECONDS
        for client, leased in self._clients.items():
            if pid in leased:
                leased.discard(pid)
                self._tell(client, {"event": "exit", "pid": pid, "status": status})


def listen(path: Path) -> socket.socket:
    """Listen on a Unix socket in a directory that only its owner may enter.

    Raises:
        PermissionError: the directory lets others in, or is someone else's.
        OSError: the address is taken, or too long (107 bytes).
    """
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(
            f"{folder} must belong to you and have mode 0700, for whoever enters it may start programs"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with suppress(FileNotFoundError):
        path.unlink()
    listener.bind(str(path))
    listener.listen(8)
    return listener
