"""Requests read from bytes, large ones in steps.

Of a message that is cut between two fields, the parts read one after the other are the message: that is the format's
rule. So reading a message makes the event loop wait no longer than its longest field takes. gRPC itself hands a message
over as one copy, before this: that is in nobody's hands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import Message

from bullpen.rpc.turns import LARGE, Turns

MOST_FIELDS = 1024
"""In one part."""

_VARINT_BYTES = 10
_FIXED_BYTES = {1: 8, 5: 4}

M = TypeVar("M", bound=Message)


async def parsed(kind: type[M], data: bytes, turns: Turns) -> M:
    """The message that some bytes are.

    Raises:
        DecodeError: they are none of this kind.
    """
    if len(data) <= LARGE:
        return kind.FromString(data)
    message = kind()
    for part in parts(data):
        await turns.take()
        message.MergeFromString(part)
    return message


def parts(data: bytes) -> Iterator[bytes]:
    """Cut a message between its fields, into parts about as long as `LARGE`. What is none is left to its reader."""
    start = place = fields = 0
    try:
        while place < len(data):
            place = _field_end(data, place)
            fields += 1
            if place - start >= LARGE or fields == MOST_FIELDS:
                yield data[start:place]
                start, fields = place, 0
    except (IndexError, ValueError):
        pass
    if start < len(data):
        yield data[start:]


def _field_end(data: bytes, place: int) -> int:
    """Where the field that begins here ends. Raises IndexError or ValueError where none does."""
    tag, place = _varint(data, place)
    kind = tag & 7
    if kind == 2:
        length, place = _varint(data, place)
        return place + length
    if kind == 0:
        return _varint(data, place)[1]
    if kind in _FIXED_BYTES:
        return place + _FIXED_BYTES[kind]
    raise ValueError("a group, which no message of ours has")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number written here, and the place after it."""
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("no number is so long")
