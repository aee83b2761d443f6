"""Logs of any size and content are read in pieces that cost no more than themselves and cut no character."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bullpen.core.instance import State
from bullpen.node.launches import Launches
from bullpen.node.logs import Logs
from tests.e2e.launches.calls import launch, log_file, reach, stop
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call

MIB = 1 << 20
BIG = 100 * MIB
READS = 20
OTHER_READING = 4 * MIB
"""What the daemon may read for other reasons while a test asks for a few pieces."""
MOST_GROWTH = 48 * MIB
"""Of its memory while it answers with pieces of 1 MiB: each is there as bytes, text and JSON. The log is twice that."""
REPLACEMENT = "\ufffd"


def lines(dice: random.Random, size: int) -> bytes:
    """Text of characters of one to four bytes."""
    characters = "".join(dice.choices("ab \u00e4\u00df\u20ac\u4e16\U0001f600\U00010348", k=size // 2))
    return "\n".join(characters[place : place + 99] for place in range(0, len(characters), 99)).encode()


def piece_at(daemon: Daemon, launch_id: str, offset: int) -> dict[str, Any]:
    """A piece of a launch's log."""
    code, piece = call(f"{daemon.url}/logs/{launch_id}?offset={offset}")
    assert code == 200, piece
    return dict(piece)


def pieces(daemon: Daemon, launch_id: str, offset: int = 0) -> Iterator[dict[str, Any]]:
    """All pieces of a launch's log."""
    while (piece := piece_at(daemon, launch_id, offset))["content"]:
        assert piece["next_offset"] > piece["offset"] >= offset
        assert len(piece["content"].encode()) == piece["next_offset"] - piece["offset"] <= MIB
        yield piece
        offset = piece["next_offset"]


def bytes_read(pid: int) -> int:
    """How many bytes a process has read, from files or the page cache."""
    return number_in(Path(f"/proc/{pid}/io"), "rchar:")


def memory(pid: int, field: str) -> int:
    """A process's memory in bytes: `VmRSS` now, `VmHWM` at most."""
    return number_in(Path(f"/proc/{pid}/status"), f"{field}:") * 1024


def number_in(file: Path, name: str) -> int:
    """The number after a name."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


def write(daemon: Daemon, launch_id: str, blocks: Iterator[bytes]) -> Path:
    """Have a launch's server write to its log; where that is."""
    path = log_file(reach(daemon, launch_id, "ready")["pid"])
    with path.open("ab") as file:
        file.writelines(blocks)
    return path


@pytest.mark.slow
def test_a_big_log(start_here: Callable[..., Daemon]) -> None:
    """100 MiB: a piece costs a piece, wherever it lies; read whole, it is what was written."""
    daemon = start_here().wait_warm()
    name = launch(daemon)["launch_id"]
    dice = random.Random(1)
    block = lines(dice, MIB)
    path = write(daemon, name, (block for _ in range(BIG // len(block) + 1)))
    size = path.stat().st_size
    assert size >= BIG
    piece_at(daemon, name, 0)
    most = memory(daemon.pid, "VmHWM")
    for first in (0, size // 2, size - MIB // 2):
        before = bytes_read(daemon.pid)
        for _ in range(READS):
            piece = piece_at(daemon, name, first + dice.randrange(1000))
            assert REPLACEMENT not in piece["content"]
            assert piece["content"] == path_part(path, piece["offset"], piece["next_offset"])
        assert bytes_read(daemon.pid) - before < READS * MIB + OTHER_READING
    before = bytes_read(daemon.pid)
    stop(daemon, name)
    assert bytes_read(daemon.pid) - before < OTHER_READING, "how it ended is looked for at its end"
    offset = 0
    for piece in pieces(daemon, name):
        assert piece["offset"] == offset, "nothing is passed over"
        assert piece["content"] == path_part(path, offset, piece["next_offset"])
        offset = piece["next_offset"]
    assert offset == path.stat().st_size > size
    assert memory(daemon.pid, "VmHWM") - most < MOST_GROWTH


def path_part(path: Path, start: int, end: int) -> str:
    """A part of a file, which must be whole characters."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), end - start, start).decode()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_log_of_which_the_head_was_dropped(start_here: Callable[..., Daemon], seed: int) -> None:
    """What the cap has left begins with a whole character, and all pieces are what was written from there on."""
    daemon = start_here(log_cap=2 * MIB).wait_warm()
    name = launch(daemon)["launch_id"]
    path = write(daemon, name, iter([lines(random.Random(seed), 5 * MIB)]))
    size = path.stat().st_size
    wait_until(lambda: piece_at(daemon, name, 0)["offset"] > size - 4 * MIB)
    stop(daemon, name)
    found = list(pieces(daemon, name))
    first, end = found[0]["offset"], found[-1]["next_offset"]
    assert end == path.stat().st_size
    assert "".join(piece["content"] for piece in found) == path_part(path, first, end)
    assert not any(piece_at(daemon, name, first - less)["content"].startswith(REPLACEMENT) for less in range(5))


# -- any content -----------------------------------------------------------------------------------------------------


class OneLog:
    """A supervisor with one instance, whose log a test writes."""

    def __init__(self, folder: Path) -> None:
        self.logs = Logs(folder, cap=0)
        self.instance = SimpleNamespace(id="a", key="key", state=State.STOPPED)
        self.fleet = SimpleNamespace(get=lambda launch_id: self.instance)

    def read_log(self, launch_id: str, start: int, end: int | None) -> Any:
        return self.logs.read("key", start, end)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> OneLog:
    return OneLog(tmp_path_factory.mktemp("logs"))


def joined(log: OneLog, data: bytes, chunk: int, offset: int = 0) -> str:
    """The pieces of a log, put together."""
    log.logs.path("key").write_bytes(data)
    launches = Launches(cast(Any, log), log_chunk=chunk)
    text = ""
    while (piece := launches.read_log("a", offset)).content:
        assert 0 < piece.next_offset - piece.offset <= chunk
        text, offset = text + piece.content, piece.next_offset
    assert piece.next_offset == len(data), "all of it was read"
    return text


CHARACTERS = st.sampled_from([character.encode() for character in "a\n\u00e4\u20ac\U0001f600"])
GARBAGE = st.sampled_from(
    [b"\xff", b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0", b"\xf0\x9f\x98", b"\x80", b"\xbf\x80", b"\xc0"]
)
DATA = st.lists(CHARACTERS | GARBAGE, max_size=30).map(b"".join)


@given(data=DATA, chunk=st.integers(4, 12))
@example(data=b"\xe2\x82" + "\U0001f600".encode() * 3, chunk=5)
def test_pieces_put_together_are_the_whole(log: OneLog, data: bytes, chunk: int) -> None:
    """Bytes that are no text in between change nothing: put together, the pieces are what one reading gives."""
    assert joined(log, data, chunk) == data.decode(errors="replace")


@given(before=DATA, after=DATA, chunk=st.integers(4, 12))
def test_any_offset_between_characters_will_do(log: OneLog, before: bytes, after: bytes, chunk: int) -> None:
    """From where a character begins, the text is the same as that of the part alone."""
    data = before + b"\n" + after
    assert joined(log, data, chunk, len(before) + 1) == after.decode(errors="replace")


@given(data=st.lists(CHARACTERS, min_size=1, max_size=30).map(b"".join), chunk=st.integers(7, 14), at=st.data())
def test_any_offset_inside_a_character_too(log: OneLog, data: bytes, chunk: int, at: st.DataObject) -> None:
    """It is passed over: the text begins with the next one, which has room in the same piece."""
    offset = at.draw(st.integers(0, len(data)))
    assert joined(log, data, chunk, offset) == data[offset:].decode(errors="ignore")
