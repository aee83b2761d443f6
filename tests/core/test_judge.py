"""Verdicts about sleep that others bring: they count like the fleet's own."""

from __future__ import annotations

import pytest

from bullpen.core import effects as fx
from bullpen.core.explain import verdicts
from bullpen.core.instance import Depth, Ladder, State
from bullpen.core.laddering import due, own_depth
from bullpen.errors import ConflictError, NotFoundError
from tests.core.scenario import GPUS, Scenario, served

LADDER = Ladder(sleep_after=10.0)


def goes_to(scene: Scenario) -> Depth:
    """How deep the instance goes now, by the ladder."""
    scene.now += 100
    scene.activity(0, 90.0)
    (told,) = [one for one in scene.drained() if isinstance(one, fx.PutToSleep | fx.KillTree)]
    return told.depth if isinstance(told, fx.PutToSleep) else Depth.STOPPED


def test_verdict_is_kept_like_the_fleets_own() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=GPUS[:1])
    saved, reply = scene.judge()
    assert isinstance(saved, fx.SaveProfile) and isinstance(reply, fx.Reply)
    assert (reply.instance, reply.error) == (instance, None)
    own = scene.fleet.roster.judge(instance, Depth.LEVEL_2, saved.profile.verdicts[1])
    assert (saved.key, saved.profile) == (own.key, own.profile)
    told = verdicts(scene.fleet.roster, instance)["level_1"]
    assert (told["works"], told["why"]) == (False, "somebody tried it")


@pytest.mark.parametrize(
    ("broken", "depth"),
    [
        ([], Depth.LEVEL_1),
        ([Depth.LEVEL_1], Depth.LEVEL_2),
        ([Depth.LEVEL_2], Depth.LEVEL_1),
        ([Depth.LEVEL_1, Depth.LEVEL_2], Depth.STOPPED),
    ],
)
def test_ladder_leaves_out_what_somebody_found_broken(broken: list[Depth], depth: Depth) -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=LADDER)
    for one in broken:
        scene.judge(depth=one)
    assert goes_to(scene) is depth


def test_another_instance_of_the_model_is_judged_too() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1])
    other = scene.reach(State.READY, "b", GPUS[1:], ladder=LADDER)
    scene.judge("a")
    assert due(scene.fleet.roster, other) == (Depth.LEVEL_2, 10.0)
    assert own_depth(scene.fleet.roster, other) is Depth.LEVEL_2


def test_the_last_word_counts_whoever_has_it() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=LADDER)
    scene.judge()
    scene.judge(works=True)
    assert goes_to(scene) is Depth.LEVEL_1
    scene.slept()
    scene.judge()
    scene.wake()
    scene.woken()
    assert goes_to(scene) is Depth.LEVEL_1, "it woke and answered as before"


def test_nobody_can_have_tried_what_an_instance_cannot_do() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], sleep="emulate")
    assert scene.judge() == [scene.answer()]
    assert isinstance(scene.error(), ConflictError)
    assert "level 1" in str(scene.error()) and "started without the engine's sleep" in str(scene.error())


def test_why_an_instance_cannot_sleep_is_the_engines_word() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY)
    instance.served = served(cannot_sleep="not on this platform")
    scene.judge(depth=Depth.LEVEL_2)
    assert "level 2" in str(scene.error()) and "not on this platform" in str(scene.error())


def test_nobody_of_that_id() -> None:
    scene = Scenario()
    scene.judge("nobody")
    assert isinstance(scene.error(), NotFoundError)
