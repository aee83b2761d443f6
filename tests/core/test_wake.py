"""The way up: its turn, memory, the engine, its canary; and the restart where that does not work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, State
from bullpen.errors import ConflictError
from tests.core.scenario import GPUS, Scenario, kinds


def test_wake_waits_for_memory_then_tells_the_engine() -> None:
    scene = Scenario()
    instance = scene.asleep()
    (_, _, _, awaits, _) = effects = scene.wake()
    assert kinds(effects)[2:] == ["ClearTimers", "AwaitMemory", "PublishState"]
    assert isinstance(awaits, fx.AwaitMemory)
    assert awaits.needs == {"GPU-0": 60_000 - 1_500}
    assert kinds(scene.memory_free()) == ["ClearTimers", "Save", "WakeUp", "PublishState"]
    assert instance.heading is Depth.AWAKE
    scene.woken()
    assert (instance.state, instance.depth, instance.last_used) == (State.READY, Depth.AWAKE, scene.now)
    assert scene.answer().status == "woken"
    verdict = scene.fleet.roster.conduct(instance).verdicts[1]
    assert verdict.works


@pytest.mark.parametrize("depth", [Depth.LEVEL_1, Depth.LEVEL_2])
def test_engine_is_told_from_where_it_wakes(depth: Depth) -> None:
    scene = Scenario()
    scene.asleep(depth=depth)
    scene.wake()
    (told,) = [effect for effect in scene.memory_free() if isinstance(effect, fx.WakeUp)]
    assert told.depth is depth


def test_wake_of_one_that_is_awake() -> None:
    scene = Scenario()
    scene.ready()
    assert kinds(scene.wake()) == ["Reply"]
    assert scene.answer().status == "ready"


def test_second_wake_is_answered_with_the_first() -> None:
    scene = Scenario()
    scene.asleep()
    scene.wake()
    assert scene.wake() == []
    scene.memory_free()
    scene.woken()
    assert scene.unanswered() == []


def test_wake_while_another_has_the_accelerator_names_it() -> None:
    scene = Scenario()
    scene.asleep("a")
    scene.ready("b")
    scene.wake("a")
    assert isinstance(scene.error(), ConflictError)
    assert "GPU GPU-0 belongs to instance 'b'" in str(scene.error())
    assert "asked to wake, refused" in scene.notes("a")[-1]


def test_memory_that_somebody_else_holds_leaves_it_asleep() -> None:
    scene = Scenario()
    instance = scene.asleep()
    scene.wake()
    scene.memory_short("GPU GPU-0 has 20000 MiB free; process 99 (jupyter) holds 50000")
    assert "process 99 (jupyter)" in str(scene.error())
    assert (instance.state, instance.depth) == (State.SLEEPING, Depth.LEVEL_1)
    assert scene.owner("GPU-0") is None
    scene.wake()
    scene.memory_free()
    scene.woken()
    assert instance.state is State.READY


def test_sleepers_that_leave_too_little_are_named() -> None:
    scene = Scenario()
    scene.asleep("a")
    scene.ready("b", mib=60_000)
    scene.sleep("b")
    scene.drained("b")
    scene.slept("b")
    scene.measured(25_000, 1_000, "b")
    scene.wake("a")
    assert "80000 MiB; 60000 are needed and 25000 are kept by 'b'" in str(scene.error())


def test_wake_that_failed_is_a_restart_and_is_remembered() -> None:
    scene = Scenario()
    instance = scene.asleep()
    scene.wake()
    scene.memory_free()
    effects = scene.engine_failed("it does not answer as before its sleep")
    assert kinds(effects) == ["SaveProfile", "ClearTimers", "Save", "PublishState", "KillTree"]
    assert not scene.fleet.roster.conduct(instance).works(Depth.LEVEL_1)
    scene.exited(-9)
    assert kinds(scene.tree_gone())[:3] == ["Prefetch", "Check", "PublishState"]
    assert (instance.state, instance.attempt) == (State.STARTING, 2)
    scene.checked(port=None)
    scene.port_ready(port=20_001)
    scene.memory_free()
    assert "CREATED" in kinds(scene.started())
    scene.answered()
    assert scene.answer().status == "restarted"
    assert scene.unanswered() == []


def test_server_that_ends_while_it_wakes_is_a_restart_too() -> None:
    scene = Scenario()
    scene.asleep()
    scene.wake()
    scene.memory_free()
    effects = scene.exited(1)
    assert kinds(effects) == ["Save", "STOPPED", "SaveProfile", "ClearTimers", "Save", "PublishState", "KillTree"]
    assert kinds(scene.tree_gone())[:2] == ["Prefetch", "Check"]


def test_emulated_sleep_ends_with_a_start_on_the_same_port() -> None:
    scene = Scenario()
    instance = scene.ready(port=None, sleep="emulate")
    assert instance.address is not None
    port = instance.address.port
    scene.sleep()
    scene.drained()
    scene.exited(-9)
    scene.tree_gone()
    assert kinds(scene.wake()) == ["ClearTimers", "Prefetch", "Check", "PublishState"]
    assert scene.checked() == [fx.HoldPort("a", port, frozenset())]


def test_port_that_somebody_took_meanwhile_is_replaced() -> None:
    scene = Scenario()
    scene.ready(sleep="emulate")
    scene.sleep()
    scene.drained()
    scene.exited(-9)
    scene.tree_gone()
    scene.wake()
    scene.checked()
    assert scene.refused(ConflictError("port 20001 is in use")) == [fx.HoldPort("a", None, frozenset())]


def test_emulated_sleeper_that_cannot_have_its_turn_sleeps_on() -> None:
    scene = Scenario()
    instance = scene.ready(sleep="emulate")
    scene.sleep()
    scene.drained()
    scene.exited(-9)
    scene.tree_gone()
    scene.wake()
    scene.checked()
    scene.port_ready()
    scene.memory_short("process 99 (jupyter) holds 50000 MiB")
    assert (instance.state, instance.depth) == (State.SLEEPING, Depth.STOPPED)
    assert "process 99 (jupyter)" in str(scene.error())
    assert "LetGo" in kinds(scene.effects)


def test_stopped_and_failed_ones_are_started_again() -> None:
    scene = Scenario()
    instance = scene.reach(State.FAILED, gpus=GPUS[:1])
    assert "Check" in kinds(scene.wake())
    assert (instance.state, instance.error, instance.attempt) == (State.STARTING, None, 2)


def test_what_cannot_be_ended_cannot_be_started_again() -> None:
    scene = Scenario()
    scene.stick()
    scene.wake()
    assert "delete it first" in str(scene.error())


def test_starts_and_wakes_on_one_accelerator_go_one_after_the_other() -> None:
    scene = Scenario()
    scene.ready("a", gpu_share=0.5, mib=20_000)
    scene.sleep("a")
    scene.drained("a")
    scene.slept("a")
    scene.create("b", GPUS[:1], gpu_share=0.5)
    scene.checked("b")
    scene.port_ready("b")
    assert "AwaitMemory" not in kinds(scene.wake("a"))
    waits = scene.fleet.roster.operation("a")
    assert waits is not None and "for 'b' on GPU GPU-0" in waits.waits_for
    scene.memory_free("b")
    scene.started("b")
    effects = scene.answered("b")
    assert "AwaitMemory" in kinds(effects)
    scene.memory_free("a")
    scene.woken("a")
    assert scene.instance("a").state is scene.instance("b").state is State.READY


# -- after a restart of the daemon -----------------------------------------------------------------------------


@pytest.mark.parametrize("heading", [Depth.AWAKE, Depth.LEVEL_2])
def test_sleeper_that_was_being_told_something_is_woken(heading: Depth) -> None:
    before = Scenario()
    instance = replace(before.asleep(), heading=heading)
    scene = Scenario(revision=1)
    (inspect,) = scene.restore(instance)
    assert isinstance(inspect, fx.Inspect)
    (told,) = [e for e in scene.tell(ev.Inspected("a", inspect.operation, True)) if isinstance(e, fx.WakeUp)]
    assert told.depth is max(heading, Depth.LEVEL_1), "it may have come as far as that"


def test_wake_that_comes_while_an_adopted_engine_is_asked() -> None:
    before = Scenario()
    scene = Scenario(revision=1)
    (inspect,) = scene.restore(replace(before.asleep()))
    assert isinstance(inspect, fx.Inspect)
    assert scene.wake() == []
    effects = scene.tell(ev.Inspected("a", inspect.operation, True))
    assert "AwaitMemory" in kinds(effects)
    scene.memory_free()
    scene.woken()
    assert scene.answer().status == "woken"


def test_adopted_sleeper_that_does_not_answer_sleeps_on() -> None:
    before = Scenario()
    scene = Scenario(revision=1)
    (inspect,) = scene.restore(replace(before.asleep()))
    assert isinstance(inspect, fx.Inspect)
    assert "KillTree" not in kinds(scene.tell(ev.Inspected("a", inspect.operation, None)))
    assert scene.instance().state is State.SLEEPING


def test_start_again_that_the_daemon_did_not_live_to_see() -> None:
    before = Scenario()
    before.asleep()
    before.wake()
    before.memory_free()
    before.engine_failed()
    before.exited(-9)
    scene = Scenario(revision=before.fleet.revision)
    assert kinds(scene.restore(replace(before.instance()), alive=False)) == ["Save", "PublishState", "KillTree"]
    scene.tree_gone()
    assert scene.instance().state is State.FAILED
    assert "wake it, or launch it again" in str(scene.instance().error)
