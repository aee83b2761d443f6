"""The way down: drain, the engine's own sleep, the emulated one, and what may go wrong on it."""

from __future__ import annotations

import pytest

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, Ladder, Memory, State
from bullpen.errors import ConflictError, EngineError, LaunchError, NotFoundError
from tests.core.scenario import DRAIN, GPUS, Scenario, kinds


def test_sleep_drains_tells_the_engine_and_measures() -> None:
    scene = Scenario()
    instance = scene.ready()
    assert scene.sleep(refuse=True) == [
        fx.ClearTimers("a"),
        fx.Drain("a", scene.number(), DRAIN, True),
        fx.PublishState(instance),
    ]
    effects = scene.drained()
    assert kinds(effects) == ["ClearTimers", "Save", "PutToSleep", "PublishState"]
    assert (instance.state, instance.heading) == (State.READY, Depth.LEVEL_1)
    effects = scene.slept()
    assert kinds(effects) == ["ClearTimers", "Save", "PublishState", "Reply", "Measure"]
    assert (instance.state, instance.depth, instance.heading) == (State.SLEEPING, Depth.LEVEL_1, None)
    assert instance.canary == "one"
    assert scene.answer().status == "sleeping"
    scene.measured(1_500, 20_000)
    assert instance.memory == {0: Memory(60_000, 2_000), 1: Memory(1_500, 20_000)}


def test_sleeper_leaves_its_accelerator_to_others() -> None:
    scene = Scenario()
    scene.asleep("a")
    assert scene.owner("GPU-0") is None
    assert kinds(scene.create("b", GPUS[:1])) == ["Check"]
    assert scene.owner("GPU-0") == "b"


def test_requests_that_were_cut_off_are_counted_in_its_notes() -> None:
    scene = Scenario()
    scene.ready()
    scene.sleep()
    scene.drained(left=3)
    assert "3 requests were cut off after 5 s" in scene.notes()


def test_deeper_sleep_needs_no_drain() -> None:
    scene = Scenario()
    scene.asleep("a")
    assert kinds(scene.sleep("a", Depth.LEVEL_2)) == [
        "ClearTimers",
        "ClearTimers",
        "Save",
        "PutToSleep",
        "PublishState",
    ]
    scene.slept(canary=None)
    assert scene.instance().depth is Depth.LEVEL_2
    assert scene.instance().canary == "one"
    assert scene.answer().status == "sleeping"


def test_as_deep_as_that_already() -> None:
    scene = Scenario()
    scene.asleep("a", Depth.LEVEL_2)
    assert kinds(scene.sleep("a", Depth.LEVEL_1)) == ["Reply"]
    assert scene.answer().status == "sleeping"


def test_discarding_weights_is_refused_where_there_is_no_room() -> None:
    scene = Scenario()
    scene.asleep("a")
    scene.ready("b")
    assert kinds(scene.sleep("a", Depth.LEVEL_2)) == ["Reply"]
    assert "belongs to instance 'b'" in str(scene.error())
    assert scene.instance("a").depth is Depth.LEVEL_1
    assert scene.instance("a").state is State.SLEEPING


def test_second_request_to_sleep_is_answered_with_the_first() -> None:
    scene = Scenario()
    scene.ready()
    scene.sleep()
    assert scene.sleep() == []
    scene.drained()
    scene.slept()
    assert scene.unanswered() == []


def test_emulated_sleep_ends_the_process_and_keeps_the_slot() -> None:
    scene = Scenario()
    instance = scene.ready(port=8000, sleep="emulate")
    scene.sleep()
    assert kinds(scene.drained()) == ["ClearTimers", "Save", "KillTree"]
    assert kinds(scene.exited(-9)) == ["Save", "STOPPED"]
    assert scene.unanswered() == [2]
    effects = scene.tree_gone()
    assert "Reply" in kinds(effects)
    assert (instance.state, instance.depth, instance.tree_gone) == (State.SLEEPING, Depth.STOPPED, True)
    assert scene.owner("GPU-0") is None
    scene.create("b")
    scene.checked("b", port=8000)
    assert "port 8000 belongs to instance 'a'" in str(scene.error())
    scene.stop("a")
    assert scene.answer().status == "not_running"


# -- refusals --------------------------------------------------------------------------------------------------


def test_engine_that_cannot_sleep_says_so_in_its_own_words() -> None:
    scene = Scenario()
    scene.create("a", GPUS[:1])
    scene.checked("a", cannot_sleep="vLLM on the CPU cannot sleep")
    scene.port_ready("a")
    scene.started("a")
    scene.answered("a")
    assert kinds(scene.sleep()) == ["Reply"]
    assert str(scene.error()) == "instance 'a' cannot sleep: vLLM on the CPU cannot sleep"


@pytest.mark.parametrize(("fields", "field"), [({"sleep": "engine"}, "sleep"), ({}, "sleep_after")])
def test_create_that_asks_for_a_sleep_that_there_is_not(fields: dict[str, str], field: str) -> None:
    scene = Scenario()
    scene.create("a", GPUS[:1], ladder=Ladder(sleep_after=5.0), **fields)
    assert kinds(scene.checked("a", cannot_sleep="it cannot")) == ["Discard", "Reply"]
    assert getattr(scene.error(), "field", None) == field


def test_instance_that_was_started_without_sleep() -> None:
    scene = Scenario()
    scene.ready(sleep="off")
    scene.sleep()
    assert "`sleep: emulate`" in str(scene.error())


@pytest.mark.parametrize("state", [State.STARTING, State.STOPPING, State.FAILED])
def test_only_what_is_ready_can_sleep(state: State) -> None:
    scene = Scenario()
    scene.reach(state, gpus=GPUS[:1])
    scene.sleep()
    assert isinstance(scene.error(), ConflictError)
    assert "it can sleep when it is ready" in str(scene.error())


def test_nobody_cannot_sleep() -> None:
    scene = Scenario()
    scene.sleep("nobody")
    assert isinstance(scene.error(), NotFoundError)


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_engine_that_was_not_touched_stays_awake() -> None:
    scene = Scenario()
    instance = scene.ready()
    scene.sleep()
    scene.engine_failed("its gate does not answer", touched=False, verdict=False)
    assert instance.state is State.READY
    assert isinstance(scene.error(), EngineError)
    assert "its gate does not answer" in str(scene.error())
    assert "OpenGate" not in kinds(scene.effects), "whoever reports that has opened it"


def test_sleep_that_failed_half_way_is_woken_and_remembered() -> None:
    scene = Scenario()
    instance = scene.ready()
    scene.sleep()
    scene.drained()
    effects = scene.engine_failed("CUDA error")
    assert kinds(effects) == ["SaveProfile", "ClearTimers", "Save", "WakeUp", "PublishState"]
    assert scene.unanswered() == [2]
    scene.woken()
    assert instance.state is State.READY
    assert "could not be put to sleep: CUDA error" in str(scene.error())
    verdict = scene.fleet.roster.conduct(instance).verdicts[1]
    assert (verdict.works, verdict.why) == (False, "CUDA error")


def test_server_that_ends_while_it_goes_to_sleep() -> None:
    scene = Scenario()
    scene.ready()
    scene.sleep()
    scene.drained()
    scene.exited(1)
    assert scene.instance().state is State.FAILED
    assert isinstance(scene.error(), LaunchError)
    assert scene.owner("GPU-0") == "a", "its other processes may hold it still"
    scene.tree_gone()
    assert scene.owner("GPU-0") is None


def test_delete_while_it_goes_to_sleep() -> None:
    scene = Scenario()
    scene.ready()
    scene.sleep()
    scene.drained()
    number = scene.number()
    assert "Terminate" in kinds(scene.stop())
    assert "deleted meanwhile" in str(scene.error(2))
    assert scene.owner("GPU-0") == "a", "its engine may not be asleep"
    assert scene.tell(ev.Slept("a", number, None)) == []


def test_wake_while_requests_end_calls_the_sleep_off() -> None:
    scene = Scenario()
    instance = scene.ready()
    scene.sleep()
    effects = scene.wake()
    assert effects[0] == fx.OpenGate("a")
    assert scene.answer().status == "ready"
    assert "woken before it slept" in str(scene.error(2))
    assert instance.state is State.READY


def test_wake_while_the_engine_is_told_follows_at_once() -> None:
    scene = Scenario()
    scene.ready()
    scene.sleep()
    scene.drained()
    assert scene.wake() == []
    effects = scene.slept()
    assert scene.answer(2).status == "sleeping"
    assert "AwaitMemory" in kinds(effects) or "WakeUp" in kinds(effects)
    assert scene.unanswered() == [3]


def test_what_was_measured_before_the_next_move_is_no_matter() -> None:
    scene = Scenario()
    instance = scene.ready("a")
    before = instance.moves
    scene.sleep("a")
    scene.drained("a")
    scene.slept("a")
    scene.wake("a")
    scene.woken("a")
    assert scene.tell(ev.Measured("a", before, Depth.AWAKE, Memory(64, 10))) == []
    assert instance.memory.get(0) != Memory(64, 10)


def test_canary_that_could_not_be_asked_is_not_claimed() -> None:
    scene = Scenario()
    instance = scene.ready("a")
    scene.sleep("a")
    scene.drained("a")
    scene.slept("a", canary="none: it was not answered")
    assert not instance.has_canary, "it is asked again before the next sleep"
    scene.wake("a")
    scene.memory_free("a")
    scene.woken("a")
    assert "could not be asked" in scene.fleet.roster.conduct(instance).verdicts[1].why


def test_last_use_is_known_when_it_sleeps() -> None:
    scene = Scenario()
    instance = scene.ready("a")
    scene.now += 100
    scene.sleep("a")
    scene.drained("a", idle=3.0)
    assert instance.last_used == scene.now - 3.0


@pytest.mark.parametrize(("code", "blamed"), [(-9, False), (-15, False), (-11, True), (1, True)])
def test_one_that_somebody_kills_while_it_wakes_does_not_condemn_its_sleep(code: int, blamed: bool) -> None:
    scene = Scenario()
    instance = scene.asleep("a")
    scene.wake("a")
    scene.memory_free("a")
    scene.exited(code, "a")
    assert scene.fleet.roster.conduct(instance).works(Depth.LEVEL_1) is not blamed
