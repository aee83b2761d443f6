"""What is remembered of a model: how long a start should still take, and under which names things are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bullpen.core.instance import Instance
from bullpen.core.profile import Profile, conduct_key, profile_key
from tests.core.scenario import config, served

LAST = Profile(phases={"start": 0.0, "weights": 2.0, "kv_cache": 8.0, "ready": 10.0})


@pytest.mark.parametrize(
    ("phase", "elapsed", "in_phase", "left"),
    [
        ("start", 0.0, 0.0, 10.0),
        ("weights", 2.0, 0.0, 8.0),
        ("weights", 5.0, 3.0, 5.0),
        ("weights", 30.0, 28.0, 2.0),
        ("kv_cache", 8.0, 0.0, 2.0),
        ("download", 4.0, 1.0, 6.0),
        ("download", 40.0, 1.0, 0.0),
    ],
    ids=["begins", "phase begins", "in it", "longer than ever", "last phase", "new phase", "new and late"],
)
def test_what_is_left_goes_by_the_last_start(phase: str, elapsed: float, in_phase: float, left: float) -> None:
    assert LAST.expected_ready_in(phase, elapsed, in_phase) == left


def test_nothing_is_expected_of_a_first_start() -> None:
    assert Profile().expected_ready_in("weights", 1.0, 1.0) is None


def test_memory_depends_on_more_than_conduct() -> None:
    instance = Instance("a", "key", config(), created_at=0.0, served=served(utilization=0.9))
    small = replace(instance, served=served(kv_mib=1024))
    shared = replace(instance, config=config(["GPU-0"], gpu_share=0.5))
    assert len({profile_key(one, "H100") for one in (instance, small, shared)}) == 3
    assert len({conduct_key(one, "H100") for one in (instance, small, shared)}) == 1
    assert conduct_key(instance, "H100") != conduct_key(instance, "A100")
