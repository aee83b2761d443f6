"""The ladder: idle instances step down by time, and sleepers by rank where host memory is short."""

from __future__ import annotations

from bullpen.core import effects as fx
from bullpen.core.instance import Depth, Ladder, State
from bullpen.core.profile import Verdict
from bullpen.core.roster import Limits
from tests.core.scenario import GPUS, LIMITS, Scenario, kinds

ALL_STEPS = Ladder(sleep_after=10.0, discard_after=60.0, stop_after=100.0)
SMALL = Limits(host_mib=30_000, patience=LIMITS.patience)


def idle_timers(effects: list[fx.Effect]) -> list[float]:
    return [one.seconds for one in effects if isinstance(one, fx.SetTimer) and one.name == "idle"]


def steps(effects: list[fx.Effect]) -> list[fx.Effect]:
    return [one for one in effects if isinstance(one, fx.Drain | fx.PutToSleep | fx.KillTree)]


# -- by time ---------------------------------------------------------------------------------------------------


def test_idle_instance_goes_down_step_by_step() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    assert idle_timers(scene.effects) == [10.0]
    assert scene.timer("idle") == [fx.AskActivity("a")]
    assert kinds(scene.activity(0, 12.0)) == ["SetTimer"], "it became ready less than that ago"
    scene.now += 20
    assert "Drain" in kinds(scene.activity(0, 25.0))
    assert "no request for 10 s" in scene.notes()[-1]
    scene.drained()
    (seconds,) = idle_timers(scene.slept())
    assert 30.0 < seconds < 40.0
    assert scene.timer("idle") == [fx.AskActivity("a")]
    held = scene.activity(1, 0.0)
    assert steps(held) == [] and idle_timers(held), "somebody waits at its gate"
    assert "1 requests wait at its gate" in scene.notes()[-1]
    (told,) = steps(scene.activity(0, 60.0))
    assert isinstance(told, fx.PutToSleep) and told.depth is Depth.LEVEL_2
    assert idle_timers(scene.slept(canary=None))
    assert kinds(steps(scene.activity(0, 90.0))) == ["KillTree"]
    scene.exited(-9)
    scene.tree_gone()
    assert (instance.state, instance.depth) == (State.STOPPED, Depth.STOPPED)
    assert instance.error is None


def test_instance_in_use_is_asked_again_when_it_may_be_idle() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    scene.now += 100
    assert idle_timers(scene.activity(1, 90.0)) == [10.0]
    scene.now += 3
    assert idle_timers(scene.activity(0, 4.0)) == [6.0]
    assert idle_timers(scene.activity(None, 0.0)) == [5.0]
    assert scene.instance().state is State.READY


def test_clock_that_is_set_forward_puts_nobody_to_sleep() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    scene.now += 1_000_000
    assert idle_timers(scene.activity(0, 3.0)) == [7.0]


def test_clock_that_is_set_back_breaks_nothing() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    scene.now -= 900
    assert idle_timers(scene.activity(0, 30.0)) == [10.0]


def test_pinned_instance_stays() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=Ladder(sleep_after=10.0, pin=True))
    assert idle_timers(scene.effects) == []
    scene.now += 100
    assert scene.activity(0, 90.0) == []


def test_depth_that_does_not_work_is_skipped() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    broken = Verdict(False, "it answered otherwise", 0.0)
    scene.fleet.roster.judge(instance, Depth.LEVEL_1, broken)
    scene.now += 100
    scene.activity(0, 90.0)
    (told,) = steps(scene.drained())
    assert isinstance(told, fx.PutToSleep) and told.depth is Depth.LEVEL_2
    scene.fleet.roster.judge(instance, Depth.LEVEL_2, broken)
    scene.engine_failed(touched=False)
    scene.now += 100
    scene.activity(0, 90.0)
    assert kinds(steps(scene.drained())) == ["KillTree"]


def test_sleep_that_cannot_be_is_not_tried_all_the_time() -> None:
    scene = Scenario()
    scene.reach(State.READY, gpus=GPUS[:1], ladder=ALL_STEPS)
    scene.now += 100
    scene.activity(0, 90.0)
    assert idle_timers(scene.engine_failed("its gate does not answer", touched=False)) == [5.0]


def test_sleeper_whose_accelerator_is_taken_keeps_its_weights_until_it_is_to_stop() -> None:
    scene = Scenario()
    scene.asleep("a", ladder=ALL_STEPS)
    scene.ready("b")
    scene.now += 61
    effects = scene.activity(0, 90.0, "a")
    assert steps(effects) == [] and idle_timers(effects)
    assert "keeps its weights for now" in scene.notes("a")[-1]
    assert "'b'" in scene.notes("a")[-1]
    scene.now += 100
    assert kinds(steps(scene.activity(0, 190.0, "a"))) == ["KillTree"]


# -- by host memory --------------------------------------------------------------------------------------------


def test_sleepers_step_down_where_together_they_keep_too_much() -> None:
    scene = Scenario(limits=SMALL)
    scene.asleep("a", host=20_000)
    scene.ready("b")
    scene.sleep("b")
    assert steps(scene.drained("b")) == [fx.KillTree("a")], (
        "b has the accelerator that it would need to discard its weights"
    )
    assert "sleepers keep 20000 MiB of host memory and 30000 are allowed" in scene.notes("a")[-1]
    scene.exited(-9, "a")
    (second,) = steps(scene.tree_gone("a"))
    assert isinstance(second, fx.PutToSleep) and second.id == "b"
    assert scene.instance("a").state is State.STOPPED


def test_the_one_that_comes_goes_deeper_itself_where_it_is_first() -> None:
    scene = Scenario(limits=SMALL)
    scene.asleep("a", host=20_000, ladder=Ladder(priority=1))
    scene.ready("b")
    scene.sleep("b")
    (told,) = steps(scene.drained("b"))
    assert isinstance(told, fx.PutToSleep) and (told.id, told.depth) == ("b", Depth.LEVEL_2)
    assert "goes deeper than level 1" in scene.notes("b")[-1]


def test_pinned_sleeper_keeps_its_place() -> None:
    scene = Scenario(limits=SMALL)
    scene.asleep("a", host=20_000, ladder=Ladder(pin=True))
    scene.ready("b")
    scene.sleep("b")
    (told,) = steps(scene.drained("b"))
    assert isinstance(told, fx.PutToSleep) and told.id == "b"
    assert scene.instance("a").depth is Depth.LEVEL_1


def test_sleeper_that_turns_out_too_big_steps_down_at_once() -> None:
    scene = Scenario(limits=SMALL)
    scene.ready("a")
    scene.sleep("a")
    scene.drained("a")
    scene.slept("a")
    (told,) = steps(scene.measured(1_500, 40_000))
    assert isinstance(told, fx.PutToSleep) and told.depth is Depth.LEVEL_2
