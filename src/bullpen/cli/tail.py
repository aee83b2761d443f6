"""Where the last lines of a log begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bullpen.client import BullpenClient

STEP = 64 * 1024
"""Bytes read at a time, from the end backwards."""


def start_of_last_lines(client: BullpenClient, instance_id: str, lines: int) -> int:
    """The place in an instance's log where its last ``lines`` lines begin; a last one without an end counts too."""
    total = client.log_chunk(instance_id, 0, 0).total
    if lines == 0:
        return total
    position, found = total, 0
    while position > 0:
        chunk = client.log_chunk(instance_id, max(0, position - STEP), position)
        if chunk.start >= position:
            return position  # all before is gone
        data = chunk.data
        if position == total and data.endswith(b"\n"):
            found = -1  # that break ends the last line and begins none
        place = len(data)
        while (place := data.rfind(b"\n", 0, place)) >= 0:
            found += 1
            if found == lines:
                return chunk.start + place + 1
        if chunk.start == 0 or chunk.start > position - STEP:
            return chunk.start  # the oldest byte there is
        position = chunk.start
    return position


def last_lines(client: BullpenClient, instance_id: str, lines: int) -> list[str]:
    """The last lines of an instance's log, as text."""
    start = start_of_last_lines(client, instance_id, lines)
    data = b"".join(chunk.data for chunk in client.log_chunks(instance_id, start))
    return data.decode(errors="replace").splitlines()[-lines:]
