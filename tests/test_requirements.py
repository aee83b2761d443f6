"""The pinned sets fit together, since one environment holds several of them."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
INSTALLED_TOGETHER = [
    ("engine-cpu.txt", "bullpen.txt", "dev.txt"),
    ("engine-cuda.txt", "bullpen.txt", "dev.txt"),
]


def pins(file: str) -> Iterator[tuple[str, str]]:
    for line in (REQUIREMENTS / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; .+)?", line)
            assert pin, f"{file}: not an exact pin: {line}"
            yield pin[1], pin[2]


@pytest.mark.parametrize("sets", INSTALLED_TOGETHER)
def test_sets_installed_together_agree(sets: tuple[str, ...]) -> None:
    for one, other in itertools.combinations(sets, 2):
        versions: dict[str, set[str]] = {}
        for name, version in pins(one):
            versions.setdefault(name, set()).add(version)
        for name, version in pins(other):
            assert version in versions.get(name, {version}), f"{name} {version} in {other}, but not in {one}"
