"""UTF-8: what can be written as such, and where a piece of it may be cut so that no character is."""

from __future__ import annotations

LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""
BEGUN = b"\xf0"
"""The first byte of one so long."""
LEAST_PIECE = 2 * LONGEST_CHARACTER
"""Bytes of a piece that holds a whole character wherever it is cut."""


def check_text(text: str) -> str:
    """Return text that can be written as UTF-8. Python keeps other bytes of the environment as halves of characters.

    Raises:
        ValueError: it cannot be; the message does not quote it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds bytes that are no UTF-8; write it in letters, digits and signs") from None
    return text


def owed(before: bytes, data: bytes) -> int:
    """How many bytes at the head of ``data`` belong to a character that begins in the bytes before it."""
    missing = length_of(before) - (len(before) - start_of(before)) if before else 0
    return next((place for place, byte in enumerate(data[: max(0, missing)]) if not continues(byte)), max(0, missing))


def whole_characters(data: bytes) -> bytes:
    """The data without a character at its end that is not all there."""
    start = start_of(data)
    return data[:start] if data and length_of(data) > len(data) - start else data


def start_of(data: bytes) -> int:
    """Where the last character of some bytes begins."""
    for start in range(len(data) - 1, max(-1, len(data) - LONGEST_CHARACTER), -1):
        if not continues(data[start]):
            return start
    return max(0, len(data) - 1)


def length_of(data: bytes) -> int:
    """How many bytes the last character of some bytes must have; 1 where it is none."""
    first = data[start_of(data)]
    return 1 + (first >= 0xC2) + (first >= 0xE0) + (first >= 0xF0) if first < 0xF5 else 1


def continues(byte: int) -> bool:
    """Whether a byte is inside a character of UTF-8."""
    return byte & 0xC0 == 0x80
