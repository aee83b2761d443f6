"""From the start of a server to its end by itself: phases, readiness, deadlines, exits."""

from __future__ import annotations

import pytest

from bullpen.core import effects as fx
from bullpen.core.instance import State
from bullpen.core.launching import START_TIMER
from bullpen.engines.crash import CrashClass
from bullpen.errors import LaunchError
from tests.core.scenario import CRASH, START_TIMEOUT, Scenario, kinds

RESTART_TIMER = fx.SetTimer("a", START_TIMER, START_TIMEOUT)


def test_phases_are_noted_with_their_first_times() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    assert scene.phase("weights", 0.4) == [fx.PublishState(instance), RESTART_TIMER]
    begun = scene.now
    scene.phase("weights", 0.6)
    assert (instance.phase, instance.progress) == ("weights", 0.6)
    assert instance.phase_started["weights"] == begun


def test_whatever_moves_gives_the_start_more_time() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    assert RESTART_TIMER in scene.phase("weights", 0.4)
    assert RESTART_TIMER in scene.phase("weights", 0.5)
    assert scene.phase("weights", 0.5) == [fx.PublishState(instance)]
    assert RESTART_TIMER in scene.phase("kv_cache", 0.5)
    assert scene.phase("kv_cache", 0.1) == [fx.PublishState(instance)]
    assert instance.progress == 0.5


def test_ready_when_the_server_says_so() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    scene.phase("bind", 0.97)
    effects = scene.answered()
    assert effects[:3] == [fx.ClearTimers("a"), fx.Save("a"), fx.PublishState(instance)]
    assert kinds(effects[3:]) == ["SaveProfile", "Measure"]
    assert instance.state is State.READY
    assert (instance.phase, instance.progress, instance.ready_at) == (None, 1.0, scene.now)
    assert scene.fleet.revision == instance.revision == 1
    assert scene.answered() == scene.phase("bind") == []


def test_start_that_does_not_move_is_killed_and_says_where_it_stood() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    scene.phase("weights")
    assert scene.timer("start") == [
        fx.ClearTimers("a"),
        fx.Save("a"),
        fx.PublishState(instance),
        fx.KillTree("a"),
    ]
    assert instance.state is State.STOPPING
    assert scene.answered() == []
    assert kinds(scene.exited(-9)) == ["ClearTimers", "KillTree"]
    assert scene.tree_gone() == [fx.Save("a"), fx.Publish("STOPPED", instance), fx.PublishState(instance)]
    assert (instance.state, instance.exit_code, instance.revision) == (State.FAILED, -9, 2)
    assert instance.error is not None
    assert instance.error.kind is CrashClass.START_TIMEOUT
    assert "60 s in weights" in instance.error.message
    assert scene.fleet.listed() == [instance]


def test_start_that_wrote_nothing_times_out_too() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    scene.timer("start")
    assert instance.error is not None
    assert "in its first step" in instance.error.message


def test_stop_while_a_late_start_is_being_killed_removes_it() -> None:
    scene = Scenario()
    scene.reach(State.STARTING)
    scene.timer("start")
    assert scene.stop() == []
    scene.exited(-9)
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget", "Reply"]
    assert scene.answer().status == "terminated"


def test_late_start_that_cannot_be_killed() -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING)
    scene.timer("start")
    assert kinds(scene.tree_stuck()) == ["Save", "PublishState"]
    assert instance.state is State.FAILED
    assert instance.running
    assert instance.error is not None
    assert instance.error.kind is CrashClass.START_TIMEOUT


@pytest.mark.parametrize("start", [State.STARTING, State.READY, State.SLEEPING])
@pytest.mark.parametrize(
    ("code", "end"),
    [(0, State.STOPPED), (None, State.STOPPED), (1, State.FAILED), (-9, State.FAILED)],
)
def test_server_that_ends_by_itself(start: State, code: int | None, end: State) -> None:
    scene = Scenario()
    instance = scene.reach(State.READY if start is State.SLEEPING else start)
    if start is State.SLEEPING:
        instance.enter(State.SLEEPING)
    assert scene.exited(code) == [
        fx.ClearTimers("a"),
        fx.Save("a"),
        fx.Publish("STOPPED", instance),
        fx.PublishState(instance),
        fx.KillTree("a"),
    ]
    assert (instance.state, instance.exit_code, instance.ended_at) == (end, code, scene.now)
    assert instance.error == (None if code == 0 else CRASH)
    assert instance.revision == scene.fleet.revision == 2
    assert not instance.running

    assert scene.exited(3) == []
    assert scene.tree_gone() == [fx.Save("a")]
    assert scene.fleet.get("a") is instance
    assert instance.exit_code == code


def test_children_of_an_ended_server_that_cannot_be_killed() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=["GPU-0"], port=8000)
    scene.exited(1)
    assert kinds(scene.tree_stuck()) == ["Save", "PublishState"]
    assert instance.state is State.FAILED
    assert instance.error == CRASH  # why it ended matters more
    assert scene.owner("GPU-0") == "a"
    scene.create("b")
    scene.checked("b", port=8000)
    assert "belongs to instance 'a'" in str(scene.error())


def test_port_of_an_ended_instance_is_free_when_no_process_is_left() -> None:
    scene = Scenario()
    scene.reach(State.READY, port=8000)
    scene.exited(0)
    scene.create("early")
    assert kinds(scene.checked("early", port=8000)) == ["Discard", "Reply"]
    scene.tree_gone()
    scene.create("b")
    assert scene.checked("b", port=8000) == [fx.HoldPort("b", 8000, frozenset())]


@pytest.mark.parametrize("name", ["start", "stop", "lunch"])
def test_timer_that_runs_out_too_late_is_nothing(name: str) -> None:
    scene = Scenario()
    scene.reach(State.READY)
    assert scene.timer(name) == []
    assert scene.timer(name, "nobody") == []
    assert scene.instance().state is State.READY


def test_refusal_does_not_touch_a_server_that_runs() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY)
    assert scene.refused(LaunchError("late")) == []
    assert scene.fleet.get("a") is instance


def test_each_change_that_watchers_see_is_one_revision() -> None:
    scene = Scenario(revision=10)
    scene.reach(State.READY, "a")
    scene.reach(State.READY, "b")
    scene.exited(1, "a")
    scene.tree_gone("a")
    scene.stop("b")
    scene.exited(0, "b")
    scene.tree_gone("b")
    scene.stop("a")
    assert scene.published() == [
        ("CREATED", "a"),
        ("CREATED", "b"),
        ("STOPPED", "a"),
        ("DELETED", "b"),
        ("DELETED", "a"),
    ]
    assert scene.fleet.revision == 15
