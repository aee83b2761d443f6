"""TCP ports on this host: is one free, pick one, hold it until the server has bound it."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import random
import socket
from contextlib import suppress

from bullpen.errors import ConflictError, InvalidRequestError, LaunchError

FIRST, LAST = 20_000, 29_999
"""Ports to pick from: below the range that the kernel hands to outgoing connections (32768 on)."""
PICKS = 1000
"""Ports that are tried at random before none counts as free."""


class Ports:
    """Held ports.

    A held port is bound, not listening, with SO_REUSEADDR: the kernel gives it to nobody by itself, and lets a
    server that sets the same option (vLLM does) bind it all the same.
    """

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def hold(self, owner: str, port: int | None, host: str, avoid: frozenset[int]) -> int:
        """Hold ``port``, or any free one outside ``avoid`` where it is None; return it.

        Args:
            owner: who lets go of it by `release`.
            port: the port, or None.
            host: an address of this host (see `resolve`).
            avoid: ports that are not to be picked.

        Raises:
            ConflictError: another program, or another owner, has the port.
            InvalidRequestError: the address is not this host's, or the port may not be used.
            LaunchError: no port is free.
        """
        held = {sock.getsockname()[1] for other, sock in self._held.items() if other != owner}
        self.release(owner)
        if port is not None:
            if port in held:
                raise ConflictError(f"port {port} is held for another instance; choose another --port, or leave it out")
            self._held[owner] = bind(host, port)
            return port
        for candidate in random.sample(range(FIRST, LAST + 1), k=PICKS):
            if candidate not in avoid and candidate not in held:
                with suppress(ConflictError):
                    self._held[owner] = bind(host, candidate)
                    return candidate
        raise LaunchError(f"no free port between {FIRST} and {LAST}; give one with --port")

    def release(self, owner: str) -> None:
        """Let go of an owner's port, once its server has it or is gone."""
        held = self._held.pop(owner, None)
        if held is not None:
            held.close()


async def resolve(host: str) -> str:
    """The address that a name stands for; an address stands for itself.

    Raises:
        InvalidRequestError: nobody knows the name.
    """
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return host
    if not host:
        return "0.0.0.0"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as problem:
        raise InvalidRequestError(f"--host {host}: no address is known for that name; give one as numbers") from problem
    # vLLM binds IPv4 unless the host is an IPv6 address itself.
    ordered = sorted(found, key=lambda info: info[0] != socket.AF_INET)
    return str(ordered[0][4][0])


def bind(host: str, port: int) -> socket.socket:
    """Bind a port without listening.

    Raises:
        ConflictError: another program uses it.
        InvalidRequestError: the address is not this host's, or the port may not be used.
        LaunchError: this process may open no more files.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        held = socket.socket(family, socket.SOCK_STREAM)
    except OSError as problem:
        raise LaunchError(f"no socket can be made for port {port}: {problem.strerror}") from problem
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as problem:
        held.close()
        if problem.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"port {port} is in use by another program on this host; choose another --port, or leave it out"
            ) from problem
        raise InvalidRequestError(
            f"port {port} on {host!r} cannot be bound: {(problem.strerror or str(problem)).lower()};"
            " choose another --host or --port"
        ) from problem
    except OverflowError as problem:
        held.close()
        raise InvalidRequestError(f"port {port} is none; ports go from 1 to 65535") from problem
    return held
