"""A new daemon takes over what the journal knows: each saved state, its process alive or gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, Instance, State
from tests.core.scenario import START_TIMEOUT, Scenario, kinds


def saved(state: State, *, listed: bool = True) -> Instance:
    """An instance as the journal has it."""
    scene = Scenario()
    if not listed:
        scene.create(gpus=["GPU-0"])
        scene.checked(port=8000)
        scene.port_ready(port=8000)
    else:
        scene.reach(State.READY if state is State.SLEEPING else state, gpus=["GPU-0"], port=8000)
    if state is State.SLEEPING:
        scene.instance().enter(State.SLEEPING)
        scene.instance().depth = Depth.LEVEL_1
    return replace(scene.instance())


def test_server_that_starts_is_watched_on() -> None:
    scene = Scenario(revision=1)
    instance = saved(State.STARTING)
    assert scene.restore(instance) == [fx.Watch("a"), fx.SetTimer("a", "start", START_TIMEOUT)]
    scene.answered()
    assert scene.fleet.get("a").state is State.READY
    assert scene.fleet.revision == 1


def test_start_for_which_there_was_no_process_yet() -> None:
    """What to do is said for both who call it an instance and who call it a launch."""
    scene = Scenario()
    instance = saved(State.STARTING)
    instance.tree_gone = True
    scene.restore(instance, alive=False)
    assert scene.instance().state is State.FAILED
    assert "before it was started; wake it, or launch it again" in str(scene.instance().error)


def test_server_that_cannot_sleep_goes_on_without_a_question() -> None:
    scene = Scenario(revision=1)
    instance = replace(saved(State.READY), can_sleep=False)
    assert scene.restore(instance) == [fx.OpenGate("a")]
    assert scene.fleet.get("a") is instance
    assert instance.running
    assert scene.owner("GPU-0") == "a"


@pytest.mark.parametrize("state", [State.READY, State.SLEEPING])
def test_server_that_runs_goes_on(state: State) -> None:
    scene = Scenario(revision=1)
    instance = saved(state)
    (inspect,) = scene.restore(instance)
    assert isinstance(inspect, fx.Inspect)
    asleep = state is State.SLEEPING
    effects = scene.tell(ev.Inspected("a", inspect.operation, asleep))
    assert kinds(effects) == [*([] if asleep else ["OpenGate"]), "Save", "PublishState"]
    assert scene.fleet.get("a") is instance
    assert (instance.running, instance.state) == (True, state)
    assert scene.owner("GPU-0") == (None if asleep else "a")
    scene.create("b")
    scene.checked("b", port=8000)
    assert "belongs to instance 'a'" in str(scene.error())
    assert "Terminate" in kinds(scene.stop())


def test_stop_that_was_under_way_is_finished() -> None:
    scene = Scenario(revision=1)
    assert scene.restore(saved(State.STOPPING)) == [fx.KillTree("a")]
    assert kinds(scene.exited(-9)) == ["ClearTimers", "KillTree"]
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget"]
    assert scene.fleet.revision == 2


def test_late_start_that_was_being_killed_has_failed() -> None:
    before = Scenario()
    before.reach(State.STARTING)
    before.timer("start")
    scene = Scenario(revision=1)
    assert scene.restore(replace(before.instance())) == [fx.KillTree("a")]
    scene.exited(-9)
    assert kinds(scene.tree_gone()) == ["Save", "STOPPED", "PublishState"]
    assert scene.instance().state is State.FAILED


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_ended_instance_is_kept_and_holds_nothing(state: State) -> None:
    scene = Scenario(revision=2)
    instance = saved(state)
    assert scene.restore(instance) == []
    assert scene.fleet.get("a") is instance
    assert scene.owner("GPU-0") is None
    scene.create("b", gpus=["GPU-0"])
    assert scene.checked("b", port=8000) == [fx.HoldPort("b", 8000, frozenset())]
    assert kinds(scene.stop()) == ["ClearTimers", "DELETED", "Forget", "Reply"]


def test_ended_instance_whose_tree_was_not_seen_gone_is_looked_at_again() -> None:
    before = Scenario()
    before.reach(State.READY, gpus=["GPU-0"])
    before.exited(1)
    scene = Scenario(revision=2)
    assert scene.restore(replace(before.instance())) == [fx.KillTree("a")]
    assert scene.owner("GPU-0") == "a"
    assert scene.tree_gone() == [fx.Save("a")]
    assert scene.owner("GPU-0") is None


def test_stuck_instance_is_tried_again() -> None:
    before = Scenario()
    instance = replace(before.stick())
    scene = Scenario(revision=1)
    assert scene.restore(instance) == [fx.KillTree("a")]
    assert "STOPPED" in kinds(scene.exited(-9))
    assert kinds(scene.tree_gone()) == ["Save", "PublishState"]
    assert scene.instance().state is State.FAILED


def test_create_that_nobody_was_told_of_is_undone() -> None:
    scene = Scenario(revision=7)
    instance = saved(State.STARTING, listed=False)
    assert scene.restore(instance) == [fx.KillTree("a")]
    assert scene.fleet.listed() == []
    assert scene.owner("GPU-0") == "a"
    assert scene.tree_gone() == [fx.Forget("a", "key-1")]
    assert scene.fleet.instances == {}
    assert scene.fleet.revision == 7
    assert kinds(scene.create("a", gpus=["GPU-0"])) == ["Check"]


def test_stop_of_a_create_that_is_being_undone_waits_for_it() -> None:
    scene = Scenario()
    scene.restore(saved(State.STARTING, listed=False), alive=False)
    assert scene.stop() == []
    assert kinds(scene.tree_gone()) == ["Forget", "Reply"]
    assert scene.answer().status == "terminated"


def test_create_that_cannot_be_undone_becomes_visible() -> None:
    scene = Scenario(revision=7)
    scene.restore(saved(State.STARTING, listed=False), alive=False)
    assert kinds(scene.tree_stuck()) == ["Save", "CREATED", "PublishState"]
    assert scene.fleet.get("a").state is State.FAILED
    assert scene.stop() == [fx.KillTree("a")]
    scene.tree_gone()
    assert scene.published() == [("CREATED", "a"), ("DELETED", "a")]


@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.SLEEPING])
def test_server_that_ended_unseen_is_stopped_with_its_exit_unknown(state: State) -> None:
    scene = Scenario(revision=1)
    instance = saved(state)
    effects = scene.restore(instance, alive=False)
    assert kinds(effects) == ["ClearTimers", "Save", "STOPPED", "PublishState", "KillTree"]
    assert (instance.state, instance.exit_code, instance.ended_at) == (State.STOPPED, None, scene.now)
    assert instance.error is not None
    assert "while no daemon was watching" in instance.error.message
    assert scene.tree_gone() == [fx.Save("a")]


def test_stop_under_way_of_a_server_that_ended_unseen() -> None:
    scene = Scenario(revision=1)
    assert scene.restore(saved(State.STOPPING), alive=False) == [
        fx.KillTree("a"),
        fx.ClearTimers("a"),
        fx.KillTree("a"),
    ]
    assert kinds(scene.tree_gone()) == ["ClearTimers", "DELETED", "Forget"]


def test_stuck_server_that_ended_unseen() -> None:
    before = Scenario()
    instance = replace(before.stick())
    scene = Scenario(revision=1)
    effects = scene.restore(instance, alive=False)
    assert kinds(effects) == ["KillTree", "ClearTimers", "Save", "STOPPED", "PublishState", "KillTree"]
    assert instance.state is State.FAILED
    assert instance.ended_at is not None
