"""Messages over a Unix packet socket, for asyncio (which has no such thing)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque

from bullpen.errors import LaunchError
from bullpen.zygote import protocol

ANSWER_SECONDS = 60.0
"""How long a zygote or a leased process may take to answer."""

Packet = tuple[protocol.Message, list[int]]


class ProcessEndedError(LaunchError):
    """A leased process has ended before it became a server; the next one may do better."""


class PacketStream:
    """One connection. Nothing is lost and nothing blocks: what the other side does not take yet waits here."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._packets: asyncio.Queue[Packet | None] = asyncio.Queue()
        self._unsent: deque[Packet] = deque()
        self._open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            packet = protocol.receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, protocol.ProtocolError):
            packet = None
        if packet is None:
            self._hang_up()
        else:
            self._packets.put_nowait(packet)

    def send(self, message: protocol.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, now or when the other side takes it. The caller keeps its descriptors.

        Raises:
            OSError: the other side is gone.
            MessageTooLargeError: it does not fit.
        """
        if not self._open:
            raise BrokenPipeError("the connection is closed")
        if not self._unsent:
            try:
                protocol.send(self._socket, message, descriptors)
                return
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
        self._unsent.append((message, [os.dup(descriptor) for descriptor in descriptors]))

    def _writable(self) -> None:
        while self._unsent:
            message, descriptors = self._unsent[0]
            try:
                protocol.send(self._socket, message, tuple(descriptors))
            except BlockingIOError:
                return
            except (OSError, protocol.MessageTooLargeError):
                self._hang_up()
                return
            self._unsent.popleft()
            close_all(descriptors)
        self._loop.remove_writer(self._socket.fileno())

    async def receive(self) -> Packet | None:
        """The next message with its descriptors; None at the end."""
        packet = await self._packets.get()
        if packet is None:
            self._packets.put_nowait(None)  # the end stays the end
        return packet

    async def ask(
        self, message: protocol.Message, descriptors: tuple[int, ...] = (), *, seconds: float = ANSWER_SECONDS
    ) -> protocol.Message:
        """Send one message and return the answer.

        Raises:
            ProcessEndedError: the other side is gone.
            LaunchError: it does not answer in time, or the message is too long for it.
        """
        try:
            self.send(message, descriptors)
            packet = await asyncio.wait_for(self.receive(), seconds)
        except protocol.MessageTooLargeError as problem:
            raise LaunchError(f"options and environment are too long: {problem}") from problem
        except TimeoutError as problem:
            raise LaunchError(
                f"the process that was to become the server has not answered for {seconds:.0f} s; try again"
            ) from problem
        except OSError:
            packet = None
        if packet is None:
            raise ProcessEndedError("the process that was to become the server ended; the zygote's log may say why")
        answer, unexpected = packet
        close_all(unexpected)
        return answer

    def close(self) -> None:
        """Hang up, and drop what was not read."""
        self._hang_up()
        while not self._packets.empty():
            packet = self._packets.get_nowait()
            if packet is not None:
                close_all(packet[1])
        self._packets.put_nowait(None)

    def _hang_up(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for _, descriptors in self._unsent:
            close_all(descriptors)
        self._unsent.clear()
        self._packets.put_nowait(None)


def close_all(descriptors: list[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
