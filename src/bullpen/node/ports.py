"""TCP ports on this host: is one free, pick one, hold it until the server has bound it."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from bullpen.errors import ConflictError, LaunchError

FIRST, LAST = 20_000, 29_999
"""Ports to pick from: below the range that the kernel hands to outgoing connections (32768 on)."""


class Ports:
    """Held ports.

    A held port is bound, not listening, with SO_REUSEADDR: the kernel gives it to nobody by itself, and lets a
    server that sets the same option (vLLM does) bind it all the same.
    """

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def hold(self, owner: str, port: int | None, host: str, avoid: frozenset[int]) -> int:
        """Hold ``port``, or any free one outside ``avoid`` where it is None; return it.

        Raises:
            ConflictError: another program uses the port.
            LaunchError: no port is free, or the address is not this host's.
        """
        if port is not None:
            self._held[owner] = bind(host, port)
            return port
        for candidate in random.sample(range(FIRST, LAST + 1), k=1000):
            if candidate not in avoid:
                with suppress(ConflictError):
                    self._held[owner] = bind(host, candidate)
                    return candidate
        raise LaunchError(f"no free port between {FIRST} and {LAST}; give one with --port")

    def release(self, owner: str) -> None:
        """Let go of an owner's port, once its server has it or is gone."""
        held = self._held.pop(owner, None)
        if held is not None:
            held.close()


def bind(host: str, port: int) -> socket.socket:
    """Bind a port without listening.

    Raises:
        ConflictError: another program uses it.
        LaunchError: the address is not this host's, or the port may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as problem:
        held.close()
        if problem.errno == 98:  # EADDRINUSE
            raise ConflictError(
                f"port {port} is in use by another program on this host; choose another --port, or leave it out"
            ) from problem
        raise LaunchError(f"port {port} on {host!r} cannot be bound: {problem.strerror or problem}") from problem
    except OverflowError as problem:
        held.close()
        raise LaunchError(f"port {port} is none; ports go from 1 to 65535") from problem
    return held
