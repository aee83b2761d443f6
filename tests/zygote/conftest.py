"""Zygotes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.zygote.running import SCRIPTED, RunningZygote


@pytest.fixture
def start_zygote(tmp_path: Path) -> Iterator[Callable[..., RunningZygote]]:
    """Start zygotes on the simulator that end with the test."""
    started: list[RunningZygote] = []

    def start(*arguments: str, **settings: object) -> RunningZygote:
        folder = tmp_path / f"zygote-{len(started)}"
        folder.mkdir()
        started.append(RunningZygote(folder, *arguments, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for zygote in started:
        zygote.__exit__(None, None, None)


@pytest.fixture
def start_scripted(start_zygote: Callable[..., RunningZygote]) -> Callable[..., RunningZygote]:
    """Start zygotes whose servers run the code that they are given."""
    return lambda *arguments, **settings: start_zygote(*arguments, program=SCRIPTED, **settings)
