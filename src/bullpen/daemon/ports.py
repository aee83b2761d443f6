"""The daemon's two ports, taken before anything else starts: who finds one taken should hear of it at once."""

from __future__ import annotations

import socket

from bullpen.errors import StateError
from bullpen.node.settings import Settings

LAST_PORT = 65535
TRIES = 1000
"""So many pairs of ports are looked at where any will do. Linux gives listeners odd ports and callers even ones, and
where many short connections have been made, most of the latter are in use for a minute."""


def take_ports(settings: Settings) -> tuple[socket.socket, socket.socket | None]:
    """Sockets bound to the address of the REST API and to that of gRPC, which is None where that is off.

    gRPC's comes after the other one unless it is given. Its server opens a socket of its own; the one here only keeps
    the address until then.

    Raises:
        StateError: another program has an address, or this host does not, or both are the same.
    """
    if settings.port != 0 and settings.port == settings.grpc_port:
        raise StateError(
            f"the REST API and gRPC cannot share port {settings.port}: choose another --grpc-port (0 for none), or"
            " leave it out and get the one after --port"
        )
    if settings.port == 0 and settings.grpc_port is None:
        return take_any_pair(settings.host)
    http = bind(settings.host, settings.port)
    if settings.grpc_port == 0:
        return http, None
    try:
        return http, bind_grpc(settings.host, settings.grpc_port or settings.port + 1)
    except StateError:
        http.close()
        raise


def take_any_pair(host: str) -> tuple[socket.socket, socket.socket]:
    """A port of the kernel's choice, and the one after it.

    Raises:
        StateError: this host has no such address, or hardly a free port.
    """
    for _ in range(TRIES):
        http = bind(host, 0)
        try:
            return http, bind_grpc(host, http.getsockname()[1] + 1)
        except StateError:
            http.close()
    raise StateError(f"no two free ports in a row on {host}; name one with --port, and another with --grpc-port")


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address.

    Raises:
        StateError: another program has it, or this host does not.
    """
    try:
        return bound(host, port)
    except OSError as problem:
        raise StateError(
            f"cannot listen on {host}:{port}: {problem.strerror};"
            " choose another --host or --port, or end the program there"
        ) from problem


def bind_grpc(host: str, port: int) -> socket.socket:
    """The same for gRPC's address."""
    if port > LAST_PORT:
        raise StateError(f"no port comes after {LAST_PORT} for gRPC: choose a --grpc-port, or another --port")
    try:
        return bound(host, port)
    except OSError as problem:
        raise StateError(
            f"cannot listen on {host}:{port} for gRPC: {problem.strerror};"
            " choose another --grpc-port (0 for none), or end the program there"
        ) from problem


def bound(host: str, port: int) -> socket.socket:
    """A bound socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError:
        taken.close()
        raise
    return taken


def shown(taken: socket.socket) -> str:
    """A socket's address as a caller on this host would write it."""
    host, port = taken.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{name}:{port}"
