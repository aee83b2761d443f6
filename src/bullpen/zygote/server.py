"""The zygote itself: one thread that listens, warms, forks and reaps."""

from __future__ import annotations

import errno
import gc
import os
import selectors
import signal
import socket
import stat
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bullpen.zygote import child, guards, protocol
from bullpen.zygote.connection import Connection, close_all
from bullpen.zygote.preload import ModuleReport, PreloadReport
from bullpen.zygote.worlds import World

BACKLOG = 16
"""Clients that may wait to be accepted while one module is being imported."""
PR_SET_PDEATHSIG = 1
REFILL_SECONDS = 0.5
"""How long after a lease the next spare is forked, so that the fork does not slow the server that just started."""


@dataclass
class Lease:
    """A process that was forked and not yet given away, or is just being given away."""

    pid: int
    channel: socket.socket
    how: str
    reason: str | None = None


class Abandoned(BaseException):
    """Nobody waits any more for what is being imported."""


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
        self._clients: set[Connection] = set()
        self._had_client = False
        self._is_warm = False
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
        except Abandoned:
            return 0
        except (Exception, SystemExit) as problem:
            traceback.print_exc()
            self._accept()
            self._tell_all({"event": "broken", "error": str(problem) or type(problem).__name__})
            return 3
        try:
            self._serve()
        finally:
            for spare in self._spares:  # each would see its channel close, a moment later
                with suppress(ProcessLookupError):
                    os.kill(spare.pid, signal.SIGKILL)
        return 0

    def _note_end(self, *_: object) -> None:
        self._ending = True

    # -- warming ---------------------------------------------------------------------------------------------------

    def _warm(self) -> None:
        started = time.monotonic()
        if self._exit_with_client:
            end_with_parent(signal.SIGKILL)  # an import may take seconds, and nobody would look at the client
        for name, value in self.world.early_environment.items():
            os.environ.setdefault(name, value)
        self.facts = self.world.preload(self.report, self._module_done)
        # What is here now stays shared with every fork: no collection may touch it again.
        gc.collect()
        gc.freeze()
        self.report.seconds = time.monotonic() - started
        self._is_warm = True
        end_with_parent(None)
        self._tell_all(self._warm_message())

    def _module_done(self, module: ModuleReport, done: int, total: int) -> None:
        """Tell the clients of a module; accept new ones meanwhile, since nothing else runs while modules import."""
        self._accept()
        if self._ending or self._is_orphaned():
            raise Abandoned
        self._tell_all(
            {
                "event": "module",
                "name": module.name,
                "seconds": round(module.seconds, 4),
                "error": module.error,
                "side_effect": module.side_effect,
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
            if client.has_hung_up():
                self._forget_client(client)
        return self._exit_with_client and self._had_client and not self._clients

    # -- serving ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._refill_at = time.monotonic()
        while not self._ending and not (self._exit_with_client and self._had_client and not self._clients):
            self._refill()
            timeout = None if self._refill_at is None else max(0.0, self._refill_at - time.monotonic())
            for key, events in self._selector.select(timeout):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wakeup:
                    with suppress(BlockingIOError):
                        self._wakeup.recv(4096)
                else:
                    self._attend(key.fileobj, events)  # type: ignore[arg-type]
            self._reap()

    def _accept(self) -> None:
        with suppress(OSError):  # BlockingIOError: no more of them
            while True:
                sock, _ = self._listener.accept()
                if protocol.peer_uid(sock) not in (os.getuid(), 0):
                    sock.close()
                    continue
                client = Connection(sock)
                self._clients.add(client)
                self._had_client = True
                self._selector.register(client, selectors.EVENT_READ)
                if self._is_warm:
                    self._tell(client, self._warm_message())

    def _attend(self, client: Connection, events: int) -> None:
        """Send what a client could not take before, and hear what it says."""
        if client not in self._clients:
            return  # it went while others were attended to
        if events & selectors.EVENT_WRITE:
            self._flush(client)
        if events & selectors.EVENT_READ and client in self._clients:
            self._hear(client)

    def _hear(self, client: Connection) -> None:
        try:
            received = client.receive()
        except BlockingIOError:
            return
        if received is None:
            self._forget_client(client)
            return
        message, descriptors = received
        close_all(descriptors)
        if message.get("op") == "lease":
            self._lease(client, message.get("id"))
        elif message.get("op") == "status":
            self._tell(client, {"id": message.get("id"), "warm": True, **self._warm_message()})
        else:
            self._tell(client, {"id": message.get("id"), "error": f"unknown request {message.get('op')!r}"})

    def _forget_client(self, client: Connection) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._selector.unregister(client)
            client.close()

    def _tell(self, client: Connection, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> None:
        try:
            client.tell(message, descriptors)
        except OSError:
            self._forget_client(client)
        else:
            self._watch_writing(client)

    def _flush(self, client: Connection) -> None:
        try:
            client.flush()
        except OSError:
            self._forget_client(client)
        else:
            self._watch_writing(client)

    def _watch_writing(self, client: Connection) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.is_behind() else 0)
        if self._selector.get_key(client).events != events:
            self._selector.modify(client, events)

    def _tell_all(self, message: protocol.Message) -> None:
        for client in list(self._clients):
            self._tell(client, message)

    # -- processes -------------------------------------------------------------------------------------------------

    def _lease(self, client: Connection, request: Any) -> None:
        self._reap()  # so that no spare is given away that has ended
        try:
            lease = self._spares.popleft() if self._spares else self._new_process("fork")
            pidfd = os.pidfd_open(lease.pid)
        except OSError as problem:
            self._tell(client, {"id": request, "error": f"the fork failed: {problem.strerror}"})
            return
        client.leased.add(lease.pid)
        answer = {"id": request, "pid": lease.pid, "how": lease.how, "reason": lease.reason}
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
        child.flush_output()
        # A signal that reached the child before it has handlers of its own would wake this process instead.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._live(theirs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
        for client in list(self._clients):
            if pid in client.leased:
                client.leased.discard(pid)
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
    if is_abandoned(path):
        path.unlink()
    try:
        listener.bind(str(path))
    except OSError as problem:
        listener.close()
        # Python's own error for a path that is too long has no number.
        raise OSError(problem.errno or errno.ENAMETOOLONG, problem.strerror or str(problem)) from problem
    listener.listen(BACKLOG)
    return listener


def is_abandoned(path: Path) -> bool:
    """Whether a path is that of a socket on which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def end_with_parent(number: signal.Signals | None) -> None:
    """Have the kernel send this process a signal when its parent ends; None: no more."""
    child.LIBC.prctl(PR_SET_PDEATHSIG, int(number or 0), 0, 0, 0)
