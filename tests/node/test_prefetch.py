"""Files come into the page cache ahead of time, as far as the memory allows and nobody says stop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.node import host_memory
from bullpen.node import prefetch as module
from bullpen.node.prefetch import advise, prefetch
from tests.node.conftest import SECONDS
from tests.node.page_cache import resident_share

MIB = 1 << 20
Dropped = Callable[[str, int], Path]


@pytest.fixture
def dropped(tmp_path: Path) -> Dropped:
    """Makes a file that is on the disk alone."""

    def make(name: str, mib: int) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_share(path) > 0.1:
            pytest.skip(f"what lies in {tmp_path} cannot be dropped from the page cache")
        return path

    return make


async def wait_resident(path: Path, share: float) -> None:
    end = time.monotonic() + SECONDS
    while (seen := resident_share(path)) < share:
        assert time.monotonic() < end, f"only {seen:.2f} of {path.name} came into the page cache"
        await asyncio.sleep(0.01)


async def test_files_come_into_the_page_cache(dropped: Dropped) -> None:
    files = [dropped("a", 40), dropped("b", 3)]
    assert await prefetch(files) == 43
    for file in files:
        await wait_resident(file, 1.0)


async def test_no_more_than_the_memory_allows(dropped: Dropped, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [dropped("a", 20), dropped("b", 20), dropped("c", 20)]
    monkeypatch.setattr(host_memory, "available_mib", lambda: 40)
    assert await prefetch(files) == 30
    await wait_resident(files[0], 1.0)
    await wait_resident(files[1], 0.5)
    assert resident_share(files[1]) < 0.9, "the window of readahead may go a little further"
    assert resident_share(files[2]) < 0.1


async def test_stop_is_heeded(dropped: Dropped, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = asyncio.Event()
    calls = []

    def count(file: Path, offset: int, length: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            loop.call_soon_threadsafe(stop.set)
        return advise(file, offset, length)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(module, "advise", count)
    file = dropped("a", 64)
    assert await prefetch([file, file], stop) == 32
    assert calls == [0, 16 * MIB]
    assert await prefetch([file], stop) == 0


async def test_files_that_cannot_be_read_are_passed_over(dropped: Dropped, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    file = dropped("a", 2)
    others = [tmp_path / "absent", tmp_path / "pipe", tmp_path / "empty", tmp_path]
    assert await asyncio.wait_for(prefetch([*others, file]), SECONDS) == 2
    await wait_resident(file, 1.0)


def test_resident_share(dropped: Dropped, tmp_path: Path) -> None:
    file = dropped("a", 4)
    assert resident_share(file) < 0.1
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        opened.read(MIB)
    assert 0.25 <= resident_share(file) < 0.5
    file.read_bytes()
    assert resident_share(file) == 1.0
    with pytest.raises(FileNotFoundError):
        resident_share(tmp_path / "absent")
