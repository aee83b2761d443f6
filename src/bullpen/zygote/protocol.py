"""What is said over the zygote's sockets: one JSON object a packet, file descriptors beside it.

Client to zygote (each with an ``id`` that the answer repeats):

========== ======================== ==========================================================================
``op``     further fields           answer
========== ======================== ==========================================================================
``status``                          ``warm``, ``facts``, ``modules`` (count), ``failed``, ``seconds``, ``pid``
``lease``                           ``pid``, ``how`` (``spare``, ``fork``, ``spawn``), ``reason``; descriptors: the
                                    process's channel and its pidfd
========== ======================== ==========================================================================

Zygote to client, unasked: ``{"event": "module", "name", "seconds", "error", "side_effect", "done", "total"}`` while it
warms,
``{"event": "warm", "seconds", "facts", "failed"}`` or ``{"event": "broken", "error"}`` after, and
``{"event": "exit", "pid", "status"}`` when a process ends (``status`` as ``os.waitstatus_to_exitcode`` gives it).

Client to a leased process, over its own channel:

========== ================================================ ==================================================
``op``     further fields                                   answer
========== ================================================ ==================================================
``check``  ``argv``                                         ``ok`` with what the engine's parser read, or
                                                            ``error``: one sentence
``start``  ``argv``, ``env``, ``user_env``, ``cwd``,        ``ok``, then the channel closes and the process is
           ``title``, ``cgroup``, ``oom_score_adj``;        the server; or ``error``: one sentence, then the
           descriptor: log                                  process ends
========== ================================================ ==================================================
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

MAX_MESSAGE = 160 * 1024
"""Bytes of one packet at most: what the kernel's default socket buffer takes for certain."""
MAX_DESCRIPTORS = 4

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side said something that is no message of this protocol."""


class MessageTooLargeError(ProtocolError):
    """A message does not fit one packet; options and environment together are too long."""


def send(sock: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message.

    Raises:
        MessageTooLargeError: it does not fit.
        OSError: the connection is gone.
    """
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise MessageTooLargeError(f"{len(data)} bytes of options and environment; at most {MAX_MESSAGE} fit")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([data], ancillary)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Receive one message and the descriptors sent with it (close-on-exec); None at the end of the stream.

    Descriptors are missing where this process may have no more of them: count them.

    Raises:
        ProtocolError: the packet is no JSON object.
        BlockingIOError: the socket does not block and nothing is there.
    """
    size = array.array("i").itemsize
    limits = MAX_MESSAGE, socket.CMSG_LEN(MAX_DESCRIPTORS * size), socket.MSG_CMSG_CLOEXEC
    try:
        data, ancillary, flags, _ = sock.recvmsg(*limits)
    except ConnectionResetError:
        # The other side ended and left something of ours unread. What it had said before can still be read.
        data, ancillary, flags, _ = sock.recvmsg(*limits)
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % size])
    if not data and not descriptors:
        return None
    try:
        message = json.loads(data) if not flags & socket.MSG_TRUNC else None
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ProtocolError("a packet is no JSON object")
    return message, list(descriptors)


def peer_uid(sock: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel knows it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
