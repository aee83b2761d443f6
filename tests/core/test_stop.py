"""The life of a stop: SIGTERM, SIGKILL at the deadline, removal when no process is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bullpen.core import effects as fx
from bullpen.core.instance import State
from bullpen.engines.crash import CrashClass
from bullpen.errors import ConflictError, EngineError, InvalidRequestError, LaunchError, NotFoundError, StuckError
from tests.core.scenario import Scenario, config, kinds


def test_stop_of_a_server_that_obeys() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=["GPU-0"], port=8000)
    assert scene.stop(timeout=5.0) == [
        fx.ClearTimers("a"),
        fx.Save("a"),
        fx.PublishState(instance),
        fx.Terminate("a"),
        fx.SetTimer("a", "stop", 5.0),
    ]
    assert (instance.state, instance.running) == (State.STOPPING, True)
    assert scene.exited(0) == [fx.ClearTimers("a"), fx.KillTree("a")]
    assert (instance.state, instance.running) == (State.STOPPING, False)
    assert scene.unanswered() == [2]
    assert scene.tree_gone() == [
        fx.ClearTimers("a"),
        fx.Publish("DELETED", instance),
        fx.Forget("a", "key-1"),
        fx.Reply(2, instance, "terminated"),
    ]
    assert (instance.state, instance.revision) == (State.STOPPED, 2)
    assert scene.fleet.instances == {}
    assert scene.owner("GPU-0") is None


def test_stop_of_a_server_that_does_not_obey() -> None:
    scene = Scenario()
    scene.reach(State.STOPPING)
    assert scene.timer("stop") == [fx.KillTree("a")]
    assert scene.exited(-9) == [fx.ClearTimers("a"), fx.KillTree("a")]
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget", "Reply"]


@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.SLEEPING])
def test_stop_in_each_state_that_lives(state: State) -> None:
    scene = Scenario()
    instance = scene.reach(State.STARTING if state is State.STARTING else State.READY)
    if state is State.SLEEPING:
        instance.enter(State.SLEEPING)
    assert "Terminate" in kinds(scene.stop())
    assert scene.timer("start") == scene.answered() == scene.phase("weights") == []
    scene.exited(0)
    scene.tree_gone()
    assert scene.answer().status == "terminated"


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_stop_of_an_ended_instance_removes_it_at_once(state: State) -> None:
    scene = Scenario()
    instance = scene.reach(state)
    effects = scene.stop()
    assert kinds(effects) == ["ClearTimers", "DELETED", "Forget", "Reply"]
    assert effects[-1] == fx.Reply(2, instance, "not_running")
    assert instance.state is state
    assert scene.fleet.instances == {}


def test_stop_of_an_ended_instance_waits_for_the_rest_of_its_tree() -> None:
    scene = Scenario()
    scene.reach(State.READY)
    scene.exited(1)
    assert scene.stop() == [fx.KillTree("a")]
    assert scene.unanswered() == [2]
    scene.tree_gone()
    assert scene.answer().status == "not_running"
    assert scene.published()[-1] == ("DELETED", "a")


@pytest.mark.parametrize("instance_id", ["a", "b"])
def test_stop_of_nobody(instance_id: str) -> None:
    scene = Scenario()
    scene.reach(State.FAILED, "a")
    scene.stop("a")
    assert kinds(scene.stop(instance_id)) == ["Reply"]
    assert isinstance(scene.error(), NotFoundError)


def test_all_who_asked_are_answered_when_it_is_gone() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY)
    scene.stop()
    assert scene.stop() == []
    scene.exited(0)
    assert scene.stop() == []
    assert scene.tree_gone()[-3:] == [fx.Reply(request, instance, "terminated") for request in (2, 3, 4)]
    assert scene.published() == [("CREATED", "a"), ("DELETED", "a")]


def test_second_stop_may_bring_the_kill_forward() -> None:
    scene = Scenario()
    scene.reach(State.READY)
    scene.stop(timeout=600.0)
    assert scene.stop(timeout=700.0) == []
    assert scene.stop(timeout=5.0) == [fx.SetTimer("a", "stop", 5.0)]
    assert scene.stop(timeout=30.0) == []
    scene.timer("stop")
    assert scene.stop(timeout=0.0) == []


def test_stuck_tree_is_reported_and_stays() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=["GPU-0"])
    scene.stop()
    scene.stop()
    scene.timer("stop")
    effects = scene.tree_stuck(detail="100 (python, state D)")
    assert kinds(effects) == ["Save", "PublishState", "Reply", "Reply"]
    for request in (2, 3):
        assert isinstance(scene.error(request), StuckError)
        assert "100 (python, state D)" in str(scene.error(request))
    assert instance.state is State.FAILED
    assert instance.running, "its server process lives, and says so"
    assert instance.error is not None
    assert instance.error.kind is CrashClass.STUCK
    assert scene.owner("GPU-0") == "a"
    assert scene.published() == [("CREATED", "a")]


def test_stuck_tree_is_tried_again_with_the_next_stop() -> None:
    scene = Scenario()
    instance = scene.stick()
    assert scene.stop() == [fx.KillTree("a")]
    scene.tree_stuck(detail="101 (worker, state D)")
    assert isinstance(scene.error(), StuckError)
    assert instance.error is not None
    assert "101" in instance.error.message

    assert scene.stop() == [fx.KillTree("a")]
    assert "KillTree" in kinds(scene.exited(-9))
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget", "Reply"]
    assert scene.answer().status == "terminated"


@pytest.mark.parametrize("code", [0, -9, None])
def test_stuck_server_that_ends_at_last(code: int | None) -> None:
    scene = Scenario()
    instance = scene.stick()
    assert scene.exited(code) == [
        fx.ClearTimers("a"),
        fx.Save("a"),
        fx.Publish("STOPPED", instance),
        fx.PublishState(instance),
        fx.KillTree("a"),
    ]
    assert (instance.state, instance.exit_code) == (State.FAILED, code)
    assert kinds(scene.tree_gone()) == ["Save", "PublishState"]
    assert instance.error is not None
    assert "gone now" in instance.error.message
    assert kinds(scene.stop()) == ["ClearTimers", "DELETED", "Forget", "Reply"]
    assert scene.answer().status == "not_running"


def test_server_that_ends_while_its_children_cannot_be_killed() -> None:
    scene = Scenario()
    instance = scene.reach(State.STOPPING)
    scene.exited(0)
    assert kinds(scene.tree_stuck()) == ["Save", "STOPPED", "PublishState", "Reply"]
    assert not instance.running
    assert scene.published() == [("CREATED", "a"), ("STOPPED", "a")]


def test_kill_that_was_not_asked_for_has_no_outcome() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=["GPU-0"])
    assert scene.tree_gone() == scene.tree_stuck() == []
    assert scene.tree_gone("nobody") == scene.tree_stuck("nobody") == []
    assert instance.state is State.READY
    assert not instance.tree_gone
    scene.stop()
    assert scene.tree_gone() == []
    scene.timer("stop")
    scene.tree_stuck()
    assert scene.tree_gone() == scene.tree_stuck() == []
    assert scene.owner("GPU-0") == "a"


# -- a stop after which it is still listed ---------------------------------------------------------------------


def test_kept_stop_of_a_server_that_obeys() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=["GPU-0"])
    assert kinds(scene.stop(keep=True)) == ["ClearTimers", "Save", "PublishState", "Terminate", "SetTimer"]
    scene.exited(0)
    assert scene.tree_gone() == [
        fx.Save("a"),
        fx.Publish("STOPPED", instance),
        fx.PublishState(instance),
        fx.Reply(2, instance, "terminated"),
    ]
    assert (instance.state, instance.exit_code, instance.error) == (State.STOPPED, 0, None)
    assert scene.fleet.listed() == [instance]
    assert scene.owner("GPU-0") is None
    assert scene.notes()[-1] == "was asked to stop"
    assert kinds(scene.stop()) == ["ClearTimers", "DELETED", "Forget", "Reply"]


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_kept_stop_of_one_that_has_ended_changes_nothing(state: State) -> None:
    scene = Scenario()
    instance = scene.reach(state)
    before = (instance.state, instance.error, instance.ended_at, list(instance.notes))
    assert scene.stop(keep=True) == [fx.Save("a"), fx.Reply(2, instance, "not_running")]
    assert (instance.state, instance.error, instance.ended_at, list(instance.notes)) == before
    assert scene.published()[-1] == ("STOPPED", "a")


def test_kept_stop_of_one_that_sleeps_without_a_process() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, sleep="emulate")
    scene.sleep()
    scene.drained()
    scene.exited(0)
    scene.tree_gone()
    published = scene.published()
    assert kinds(scene.stop(keep=True)) == ["ClearTimers", "Save", "PublishState", "Save", "Reply"]
    assert instance.state is State.STOPPED
    assert scene.published() == published, "its end was told when it went to sleep"


def test_removal_overrules_a_kept_stop_and_not_the_other_way_round() -> None:
    for first, second in ((True, False), (False, True)):
        scene = Scenario()
        scene.reach(State.READY)
        scene.stop(keep=first)
        scene.stop(keep=second)
        scene.exited(0)
        assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget", "Reply", "Reply"]
        assert scene.fleet.instances == {}


def test_kept_stop_that_gets_stuck_is_tried_again() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY)
    scene.stop(keep=True)
    scene.timer("stop")
    scene.tree_stuck()
    assert isinstance(scene.error(), StuckError)
    assert scene.stop(keep=True) == [fx.KillTree("a")]
    scene.exited(-9)
    assert kinds(scene.tree_gone()) == ["Save", "PublishState", "Reply"]
    assert scene.fleet.listed() == [instance]
    assert instance.state is State.FAILED


def test_kept_stop_outlives_the_daemon() -> None:
    before = Scenario()
    before.reach(State.READY)
    before.stop(keep=True)
    scene = Scenario(revision=1)
    assert scene.restore(replace(before.instance())) == [fx.KillTree("a")]
    scene.exited(-9)
    assert kinds(scene.tree_gone()) == ["Save", "STOPPED", "PublishState"]
    assert scene.instance().state is State.STOPPED


def test_kept_stop_before_there_is_a_process() -> None:
    scene = Scenario()
    scene.create_at_once(gpus=["GPU-0"])
    instance = scene.instance()
    assert kinds(scene.stop(keep=True)) == ["ClearTimers", "LetGo", "Save", "STOPPED", "PublishState", "Reply"]
    assert (instance.state, instance.pid, instance.running) == (State.STOPPED, None, False)
    assert scene.checked() == [], "what comes too late changes nothing"
    assert scene.owner("GPU-0") is None


def test_no_swap_brings_back_what_was_to_stay_stopped() -> None:
    scene = Scenario()
    instance = scene.ready()
    scene.swap("b", ("a",), new=config(["GPU-0"]))
    scene.checked("b")
    scene.port_ready("b")
    scene.drained()
    scene.slept()
    scene.measured(1_500, 20_000)
    scene.memory_free("b")
    scene.started("b")
    scene.stop(keep=True)
    scene.exited(0)
    scene.tree_gone()
    assert instance.state is State.STOPPED
    scene.exited(1, "b")
    scene.tree_gone("b")
    assert isinstance(scene.error(2), EngineError | LaunchError)
    assert instance.state is State.STOPPED


# -- one that is listed at once --------------------------------------------------------------------------------


def test_create_that_is_listed_at_once() -> None:
    scene = Scenario()
    effects = scene.create_at_once(gpus=["GPU-0"])
    instance = scene.instance()
    assert effects == [
        fx.Save("a"),
        fx.Publish("CREATED", instance),
        fx.Reply(1, instance, "started"),
        fx.Check("a"),
    ]
    assert scene.fleet.listed() == [instance]
    assert scene.owner("GPU-0") == "a"
    scene.create_at_once("b", gpus=["GPU-0"])
    assert isinstance(scene.error(), ConflictError)
    scene.checked()
    scene.port_ready()
    scene.started()
    scene.answered()
    assert instance.state is State.READY
    assert scene.published() == [("CREATED", "a")]


def test_options_that_are_refused_after_that_make_it_fail() -> None:
    scene = Scenario()
    scene.create_at_once(gpus=["GPU-0"])
    instance = scene.instance()
    scene.refused(InvalidRequestError("--frobnicate is no option"))
    assert instance.state is State.FAILED
    assert instance.error is not None
    assert instance.error.message == "--frobnicate is no option"
    assert scene.published() == [("CREATED", "a"), ("STOPPED", "a")]
    assert scene.owner("GPU-0") is None
