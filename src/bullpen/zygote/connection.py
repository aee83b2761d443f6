"""A client as the zygote sees it. What the client has not read yet waits here, so that nobody waits for the client."""

from __future__ import annotations

import os
import socket
from collections import deque

from bullpen.zygote import protocol

MOST_UNREAD = 10_000
"""Messages that a client may leave unread before it counts as gone."""


class Connection:
    """One client: its socket, and the processes that it has leased."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.leased: set[int] = set()
        self._socket = sock
        self._unread: deque[tuple[protocol.Message, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        """The socket's descriptor, as selectors want it."""
        return self._socket.fileno()

    def is_behind(self) -> bool:
        """Whether messages wait until the client reads."""
        return bool(self._unread)

    def tell(self, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message now, or when the client reads again. The caller keeps its descriptors.

        Raises:
            OSError: the client has gone, or is hopelessly behind.
        """
        if self._unread:
            self._keep(message, descriptors)
            return
        try:
            protocol.send(self._socket, message, descriptors)
        except BlockingIOError:
            self._keep(message, descriptors)

    def _keep(self, message: protocol.Message, descriptors: tuple[int, ...]) -> None:
        if len(self._unread) >= MOST_UNREAD:
            raise ConnectionAbortedError(f"the client has left {MOST_UNREAD} messages unread")
        self._unread.append((message, tuple(os.dup(descriptor) for descriptor in descriptors)))

    def flush(self) -> None:
        """Send what waits, as far as the client reads.

        Raises:
            OSError: the client has gone.
        """
        while self._unread:
            message, descriptors = self._unread[0]
            try:
                protocol.send(self._socket, message, descriptors)
            except BlockingIOError:
                return
            self._unread.popleft()
            close_all(descriptors)

    def receive(self) -> tuple[protocol.Message, list[int]] | None:
        """The client's next message; None where it has hung up or says what is none.

        Raises:
            BlockingIOError: there is none yet.
        """
        try:
            return protocol.receive(self._socket)
        except BlockingIOError:
            raise
        except (protocol.ProtocolError, OSError):
            return None

    def has_hung_up(self) -> bool:
        """Whether the client is gone, as far as can be seen without reading its messages."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Hang up."""
        for _, descriptors in self._unread:
            close_all(descriptors)
        self._unread.clear()
        self._socket.close()


def close_all(descriptors: tuple[int, ...] | list[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
