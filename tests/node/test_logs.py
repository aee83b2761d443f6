"""Logs: byte ranges, the cap that never loses what is newest, and following."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.errors import LaunchError
from bullpen.node import logs as logs_module
from bullpen.node.logs import HOLE_BLOCK, MAX_CHUNK, Chunk, Logs

MIB = 1024 * 1024


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path / "logs", 0)


def write(logs: Logs, key: str, data: bytes) -> None:
    descriptor = logs.create(key, "name")
    os.write(descriptor, data)
    os.close(descriptor)


def numbered(first: int, count: int) -> bytes:
    """Lines of 16 bytes that say where they stand."""
    return b"".join(b"%015d\n" % number for number in range(first, first + count))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_log_is_appended_to_and_is_its_owners_alone(logs: Logs) -> None:
    write(logs, "a", b"one ")
    write(logs, "a", b"two")
    assert logs.read("a") == Chunk(b"one two", 0, 7)
    assert logs.path("a").stat().st_mode & 0o777 == 0o600
    assert logs.path("a").parent.stat().st_mode & 0o777 == 0o700


def test_a_log_is_not_inherited(logs: Logs) -> None:
    descriptor = logs.create("a", "name")
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


@settings(max_examples=60)
@given(size=st.integers(0, 40), start=st.integers(0, 60), end=st.none() | st.integers(0, 60))
def test_ranges_are_those_of_a_slice(tmp_path_factory: pytest.TempPathFactory, size: int, start: int, end: int) -> None:
    logs = Logs(tmp_path_factory.mktemp("logs"), 0)
    data = bytes(range(size))
    write(logs, "a", data)
    chunk = logs.read("a", start, end)
    assert chunk == Chunk(data[start:end], min(start, size), size)


def test_a_reply_has_an_upper_limit(logs: Logs) -> None:
    data = os.urandom(MAX_CHUNK + 100)
    write(logs, "a", data)
    assert logs.read("a") == Chunk(data[:MAX_CHUNK], 0, len(data))
    assert logs.read("a", 0, len(data)).data == data[:MAX_CHUNK]
    assert logs.read("a", 50).data == data[50 : MAX_CHUNK + 50]
    assert logs.read("a", MAX_CHUNK) == Chunk(data[MAX_CHUNK:], MAX_CHUNK, len(data))


def test_the_tail(logs: Logs) -> None:
    assert logs.tail("none", 10) == b""
    write(logs, "a", b"0123456789")
    assert logs.tail("a", 4) == b"6789"
    assert logs.tail("a", 40) == b"0123456789"


def test_a_log_that_is_not_there_is_empty(logs: Logs) -> None:
    assert logs.read("none") == Chunk(b"", 0, 0)
    logs.enforce_cap("none")
    logs.remove("none")


def test_a_log_goes_when_it_is_removed(logs: Logs) -> None:
    write(logs, "a", b"one")
    logs.remove("a")
    assert logs.read("a") == Chunk(b"", 0, 0)
    assert not logs.path("a").exists()


def test_a_folder_that_cannot_be_written_is_said_to_be(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs", 0)
    (tmp_path / "logs").rmdir()
    with pytest.raises(LaunchError, match=r"no log can be written below .*logs: No such file .*make room there"):
        logs.create("a", "name")


def test_the_path_is_as_the_kernel_names_it(tmp_path: Path) -> None:
    """Processes that write there are told by that name."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    logs = Logs(tmp_path / "link" / "logs", 0)
    descriptor = logs.create("a", "name")
    assert os.readlink(f"/proc/self/fd/{descriptor}") == str(logs.path("a"))
    os.close(descriptor)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_logs_are_put_elsewhere_and_found_by_whoever_comes_later(tmp_path: Path) -> None:
    """A later daemon may be told of another place, or of none."""
    home, one, other = (tmp_path / name for name in ("home", "one", "other"))
    one.mkdir()
    other.mkdir()
    write(Logs(home, 0), "a", b"a")
    first = Logs(home, 0, one)
    write(first, "b", b"b")
    second = Logs(home, 0, other)
    write(second, "a", b"A")
    write(second, "b", b"B")
    write(second, "c", b"c")
    last = Logs(home, 0)
    write(last, "c", b"C")
    for logs in (first, second, last):
        assert {key: logs.read(key).data for key in "abc"} == {"a": b"aA", "b": b"bB", "c": b"cC"}
        assert [logs.path(key) for key in "abc"] == [home / "a.log", one / "name-b.log", other / "name-c.log"]
    for key in "abc":
        last.remove(key)
    assert [list(folder.iterdir()) for folder in (home, one, other)] == [[], [], []]


def test_the_path_elsewhere_is_as_the_kernel_names_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    logs = Logs(tmp_path / "home", 0, tmp_path / "link")
    descriptor = logs.create("a", "name")
    assert os.readlink(f"/proc/self/fd/{descriptor}") == str(logs.path("a")) == str(tmp_path / "real" / "name-a.log")
    os.close(descriptor)


def test_a_place_elsewhere_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    logs = Logs(tmp_path / "home", 0, tmp_path / "place")
    write(logs, "a", b"a")
    logs.path("a").unlink()
    assert logs.read("a") == Chunk(b"", 0, 0)
    (tmp_path / "place").rmdir()
    for key in "ab":
        with pytest.raises(LaunchError, match=r"no log can be written below .*place: No such file .*make room there"):
            logs.create(key, "name")
        logs.enforce_cap(key)
        logs.remove(key)
    assert list((tmp_path / "home").iterdir()) == []


def test_the_cap_holds_elsewhere_too(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    logs = Logs(tmp_path / "home", MIB, tmp_path / "place")
    write(logs, "a", os.urandom(4 * MIB))
    logs.enforce_cap("a")
    if logs.read("a").start == 0:
        pytest.skip("this file system cannot punch holes")
    assert allocated(tmp_path / "place" / "name-a.log") <= MIB + HOLE_BLOCK


def test_a_log_elsewhere_is_found_by_its_instances_id(tmp_path: Path) -> None:
    """The part of the key tells two of one id apart, of which the first may still be ending."""
    (tmp_path / "place").mkdir()
    logs = Logs(tmp_path / "home", 0, tmp_path / "place")
    longest, keys = "x" * 128, [letter * 32 for letter in "abc"]
    for key, name in zip(keys, ("my.model-1", "my.model-1", longest), strict=True):
        os.close(logs.create(key, name))
    names = ["my.model-1-aaaaaaaa.log", "my.model-1-bbbbbbbb.log", f"{longest}-cccccccc.log"]
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == names
    logs.remove(keys[0])
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == names[1:]


# -- the cap -----------------------------------------------------------------------------------------------------------


def test_the_cap_frees_the_oldest_and_keeps_offsets(tmp_path: Path) -> None:
    cap = 2 * MIB
    logs = Logs(tmp_path / "logs", cap)
    descriptor = logs.create("a", "name")
    lines = MIB // 16
    written = 0
    for _ in range(8):
        os.write(descriptor, numbered(written, lines))
        written += lines
        logs.enforce_cap("a")
        total = written * 16
        assert logs.tail("a", 1600) == numbered(written - 100, 100), "what is newest is there"
        assert logs.read("a", 0, 0).total == total
    kept = logs.read("a", 0)
    if kept.start == 0:
        pytest.skip("this file system cannot punch holes")
    assert total - cap - HOLE_BLOCK <= kept.start <= total - cap
    assert kept.data[:16] == numbered(kept.start // 16, 1), "reading begins with the first line that is kept"
    assert allocated(logs.path("a")) <= cap + HOLE_BLOCK
    assert logs.path("a").stat().st_size == total
    middle = total - MIB
    assert logs.read("a", middle, middle + 16).data == numbered(middle // 16, 1), "offsets are what they were"
    os.close(descriptor)
    again = Logs(tmp_path / "logs", cap)
    assert again.read("a", 0) == kept, "the next daemon reads no hole as text"
    again.enforce_cap("a")
    assert again.read("a", 0).start == kept.start


def test_below_the_cap_nothing_is_dropped(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs", 3 * MIB)
    data = os.urandom(3 * MIB + HOLE_BLOCK - 1)
    write(logs, "a", data)
    logs.enforce_cap("a")
    assert logs.read("a").data == data[:MAX_CHUNK]


def test_a_cap_of_nothing_keeps_all(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs", 0)
    write(logs, "a", b"x" * 5 * MIB)
    logs.enforce_cap("a")
    assert logs.read("a", 0, 1) == Chunk(b"x", 0, 5 * MIB)


def test_zeros_that_were_written_are_no_hole(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs", MIB)
    write(logs, "a", b"\0" * 8192 + b"text")
    assert logs.read("a").data == b"\0" * 8192 + b"text"


def test_where_holes_cannot_be_made_all_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "punch_hole", lambda descriptor, length: False)
    logs = Logs(tmp_path / "logs", MIB)
    write(logs, "a", b"x" * 4 * MIB)
    logs.enforce_cap("a")
    assert logs.read("a", 0, 1) == Chunk(b"x", 0, 4 * MIB)


# -- following ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs_module, "FOLLOW_SECONDS", 0.005)


async def collect(logs: Logs, start: int, ended: asyncio.Event, into: list[bytes]) -> None:
    async for data in logs.follow("a", start, ended.is_set):
        into.append(data)


@pytest.mark.usefixtures("quick")
async def test_a_follower_gets_everything_once_and_ends_with_the_server(logs: Logs) -> None:
    write(logs, "a", b"before ")
    ended, seen = asyncio.Event(), []  # type: asyncio.Event, list[bytes]
    following = asyncio.create_task(collect(logs, 3, ended, seen))
    for number in range(20):
        write(logs, "a", b"%d " % number)
        await asyncio.sleep(0.003)
    write(logs, "a", b"last words")
    ended.set()
    await asyncio.wait_for(following, 10)
    assert b"".join(seen) == b"ore " + b"".join(b"%d " % number for number in range(20)) + b"last words"


@pytest.mark.usefixtures("quick")
async def test_a_follower_of_a_big_log_gets_it_in_pieces(logs: Logs) -> None:
    data = os.urandom(2 * MAX_CHUNK + 7)
    write(logs, "a", data)
    ended, seen = asyncio.Event(), []  # type: asyncio.Event, list[bytes]
    ended.set()
    await asyncio.wait_for(collect(logs, 0, ended, seen), 10)
    assert [len(piece) for piece in seen] == [MAX_CHUNK, MAX_CHUNK, 7]
    assert b"".join(seen) == data


@pytest.mark.usefixtures("quick")
async def test_a_follower_ahead_of_the_log_waits_for_it(logs: Logs) -> None:
    write(logs, "a", b"12345")
    ended, seen = asyncio.Event(), []  # type: asyncio.Event, list[bytes]
    following = asyncio.create_task(collect(logs, 8, ended, seen))
    await asyncio.sleep(0.02)
    write(logs, "a", b"6789")
    ended.set()
    await asyncio.wait_for(following, 10)
    assert seen == [b"9"]


@pytest.mark.usefixtures("quick")
async def test_a_follower_of_a_removed_log_ends(logs: Logs) -> None:
    write(logs, "a", b"text")
    ended, seen = asyncio.Event(), []  # type: asyncio.Event, list[bytes]
    following = asyncio.create_task(collect(logs, 0, ended, seen))
    await asyncio.sleep(0.02)
    logs.remove("a")
    ended.set()
    await asyncio.wait_for(following, 10)
    assert seen == [b"text"]
