"""A small blocking client of the zygote: for scripts and tests, and to see the protocol used in one place.

``python -m bullpen.zygote.client SOCKET -- OPTIONS`` starts one server, prints its log and stops it at Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bullpen.zygote import protocol

TIMEOUT = 600.0
"""Seconds that a client waits for an answer at most; importing an engine may take minutes on a cold disk."""


class ZygoteError(Exception):
    """The zygote, or a process that it gave, refused or went away."""


@dataclass
class Process:
    """A leased process before it has become a server."""

    pid: int
    pidfd: int
    how: str
    reason: str | None
    channel: socket.socket

    def check(self, argv: Sequence[str]) -> protocol.Message:
        """Have the engine read a command line; ``ok`` is False where it refuses, ``error`` says why."""
        return _ask(self.channel, {"op": "check", "argv": list(argv)})

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: int, cwd: str = "/", title: str = "") -> None:
        """Make the process the server that ``argv`` describes.

        Raises:
            ZygoteError: it cannot become the server, or has ended.
        """
        message = {"op": "start", "argv": list(argv), "env": dict(env), "cwd": cwd, "title": title or shlex.join(argv)}
        protocol.send(self.channel, {**message, "user_env": dict(env)}, (log,))
        received = protocol.receive(self.channel)
        self.channel.close()
        if received is None:
            raise ZygoteError(f"process {self.pid} ended before it became a server")
        if not received[0].get("ok"):
            raise ZygoteError(f"process {self.pid} cannot become the server: {received[0].get('error')}")


class ZygoteClient:
    """A connection to a zygote.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(str(path))
        self._requests = 0

    def status(self) -> protocol.Message:
        """What is imported, and how long that took; waits until the zygote is warm."""
        return self._request("status")[0]

    def lease(self) -> Process:
        """Take a process."""
        answer, descriptors = self._request("lease")
        if "error" in answer:
            raise ZygoteError(answer["error"])
        channel = socket.socket(fileno=descriptors[0])
        channel.settimeout(TIMEOUT)
        return Process(answer["pid"], descriptors[1], answer["how"], answer["reason"], channel)

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def _request(self, operation: str) -> tuple[protocol.Message, list[int]]:
        self._requests += 1
        protocol.send(self.socket, {"op": operation, "id": self._requests})
        while True:
            received = protocol.receive(self.socket)
            if received is None:
                raise ZygoteError("the zygote has ended")
            message, descriptors = received
            if message.get("event") == "broken":
                raise ZygoteError(message["error"])
            if message.get("id") == self._requests:
                return message, descriptors


def _ask(channel: socket.socket, message: protocol.Message) -> protocol.Message:
    protocol.send(channel, message)
    received = protocol.receive(channel)
    if received is None:
        raise ZygoteError("the process ended")
    return received[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Start one server from a zygote and stay with it."""
    parser = argparse.ArgumentParser(prog="python -m bullpen.zygote.client", description=__doc__)
    parser.add_argument("socket", type=Path)
    parser.add_argument("options", nargs="+", help="the engine's command line")
    options = parser.parse_args(arguments)
    process = ZygoteClient(options.socket).lease()
    answer = process.check(options.options)
    if not answer["ok"]:
        print(answer["error"], file=sys.stderr)
        return 2
    process.start(options.options, {}, os.dup(1), cwd=str(Path.cwd()))
    print(f"pid {process.pid} ({process.how}); Ctrl-C stops it", file=sys.stderr)
    try:
        # A pidfd becomes readable when its process ends.
        import select

        select.select([process.pidfd], [], [])
    except KeyboardInterrupt:
        signal.pidfd_send_signal(process.pidfd, signal.SIGTERM)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
