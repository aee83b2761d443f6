"""Swap: one call that puts some to sleep and has another one ready in their place, or leaves all as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, Ladder, State
from bullpen.errors import BullpenError, ConflictError, InvalidRequestError, LaunchError, NotFoundError
from tests.core.scenario import GPUS, Scenario, config, kinds


def two(**fields: Any) -> Scenario:
    """``b`` sleeps on the accelerator that ``a`` has."""
    scene = Scenario()
    scene.asleep("b")
    scene.ready("a", **fields)
    return scene


def stages(scene: Scenario) -> list[str]:
    return [effect.document["stage"] for effect in scene.effects if isinstance(effect, fx.PublishSwap)]


def saved(scene: Scenario) -> object:
    """What the journal knows of swaps at the end."""
    return [effect.swap for effect in scene.effects if isinstance(effect, fx.SaveSwap)][-1]


def test_swap_puts_one_to_sleep_then_wakes_the_other() -> None:
    scene = two()
    effects = scene.swap("b", ("a",))
    assert kinds(effects)[:2] == ["SaveSwap", "PublishSwap"]
    assert "Drain" in kinds(effects) and "AwaitMemory" not in kinds(effects)
    assert saved(scene) == {"incoming": "b", "created": False, "outgoing": ["a"]}
    scene.drained("a")
    assert "AwaitMemory" in kinds(scene.slept("a"))
    scene.memory_free("b")
    assert scene.unanswered() == [4]
    scene.woken("b")
    answer = scene.answer()
    assert (answer.status, answer.instance) == ("swapped", scene.instance("b"))
    assert (answer.details["in"], answer.details["out"], answer.details["stage"]) == ("b", ["a"], "done")
    assert list(answer.details["stages"]) == ["out", "in", "done"]
    assert stages(scene) == ["out", "in", "done"]
    assert saved(scene) is None
    assert scene.instance("a").state is State.SLEEPING


def test_what_is_new_is_ready_to_start_before_the_other_goes() -> None:
    scene = Scenario()
    scene.ready("a")
    assert "Drain" not in kinds(scene.swap("b", ("a",), config(GPUS[:1])))
    scene.checked("b")
    assert "Drain" in kinds(scene.port_ready("b")), "not before what comes in is known to be right"
    assert scene.instance("b").listed, "its caller can see what it waits for"
    scene.drained("a")
    scene.slept("a")
    scene.memory_free("b")
    scene.started("b")
    scene.answered("b")
    assert scene.answer().status == "swapped"


@pytest.mark.parametrize("end", ["deleted", "exited"])
def test_one_that_is_deleted_is_out_and_one_that_ends_is_started_again(end: str) -> None:
    scene = two()
    scene.swap("b", ("a",))
    request = 4
    if end == "deleted":
        scene.stop("a")
        scene.exited(0, "a")
        scene.tree_gone("a")
        scene.memory_free("b")
        scene.woken("b")
        assert scene.answer(request).status == "swapped"
    else:
        scene.exited(1, "a")
        scene.tree_gone("a")
        scene.checked("a")
        scene.port_ready("a")
        scene.memory_free("a")
        scene.started("a")
        scene.answered("a")
        assert scene.instance("a").state is State.READY
        assert "the swap was taken back" in str(scene.error(request))


# -- the choice ------------------------------------------------------------------------------------------------


def going(scene: Scenario) -> set[str]:
    """Who was told to drain for a swap."""
    begun = [number for number, effect in enumerate(scene.effects) if isinstance(effect, fx.SaveSwap)]
    return {effect.id for effect in scene.effects[begun[0] :] if isinstance(effect, fx.Drain)}


def test_auto_sends_away_whoever_has_the_accelerator() -> None:
    scene = two()
    scene.swap("b", None)
    assert going(scene) == {"a"}


def test_auto_takes_lower_priority_then_longest_unused() -> None:
    scene = Scenario()
    for name, priority in (("x", 1), ("y", 0), ("z", 0)):
        gpus = GPUS[:1]
        scene.reach(State.READY, name, gpus, gpu_share=0.3, ladder=Ladder(priority=priority))
    scene.swap("new", None, config(GPUS[:1], gpu_share=0.3))
    scene.checked("new")
    scene.port_ready("new")
    assert going(scene) == {"y"}


def test_auto_sends_no_more_away_than_it_must() -> None:
    scene = Scenario()
    scene.reach(State.READY, "small", GPUS[:1], gpu_share=0.2)
    scene.reach(State.READY, "big", GPUS[:1], gpu_share=0.8, ladder=Ladder(priority=1))
    scene.swap("new", None, config(GPUS[:1], gpu_share=0.8))
    scene.checked("new")
    scene.port_ready("new")
    assert going(scene) == {"big"}, "the small one may stay: without the big one there is room"


def test_auto_for_a_number_of_accelerators_looks_at_all_of_them() -> None:
    scene = Scenario()
    scene.reach(State.READY, "both", GPUS, gpu_share=0.5)
    scene.reach(State.READY, "one", GPUS[:1], gpu_share=0.5, ladder=Ladder(priority=1))
    scene.swap("new", None, replace(config(), gpus=1))
    scene.checked("new")
    scene.port_ready("new")
    assert going(scene) == {"both"}


def test_auto_never_sends_a_pinned_one_away() -> None:
    scene = two(ladder=Ladder(pin=True))
    assert kinds(scene.swap("b", None)) == ["Reply"]
    assert "'a' is pinned: name it in `out`" in str(scene.error())
    scene.swap("b", ("a",))
    assert going(scene) == {"a"}


def test_auto_names_who_is_busy() -> None:
    scene = Scenario()
    scene.asleep("b")
    scene.reach(State.STARTING, "a", GPUS[:1])
    scene.swap("b", None)
    assert "'a' cannot go: instance 'a' is busy (start, starting)" in str(scene.error())


# -- refusals change nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("incoming", "outgoing", "error", "words"),
    [
        ("nobody", ("a",), NotFoundError, "no instance 'nobody'"),
        ("nobody", None, NotFoundError, "no instance 'nobody'"),
        ("b", ("nobody",), NotFoundError, "no instance 'nobody'"),
        ("b", ("b",), InvalidRequestError, "cannot both come in and go out"),
        ("b", (), ConflictError, "GPU GPU-0 belongs to instance 'a'"),
    ],
)
def test_swap_that_cannot_be(
    incoming: str, outgoing: tuple[str, ...] | None, error: type[BullpenError], words: str
) -> None:
    scene = two()
    assert kinds(scene.swap(incoming, outgoing)) == ["Reply"]
    assert isinstance(scene.error(), error)
    assert words in str(scene.error())
    assert [scene.instance(name).state for name in "ab"] == [State.READY, State.SLEEPING]


@pytest.mark.parametrize("outgoing", [None, (), ("a",)])
def test_swap_for_a_new_one_whose_id_is_taken_leaves_its_owner_alone(outgoing: tuple[str, ...] | None) -> None:
    scene = two()
    assert kinds(scene.swap("b", outgoing, config(GPUS[:1]))) == ["Reply"]
    assert "instance 'b' exists already" in str(scene.error())
    assert scene.instance("b").state is State.SLEEPING


# -- back ------------------------------------------------------------------------------------------------------


def test_one_that_does_not_go_to_sleep_ends_the_swap() -> None:
    scene = two()
    scene.swap("b", ("a",))
    scene.drained("a")
    scene.engine_failed("CUDA error", "a")
    assert stages(scene) == ["out", "back"]
    scene.woken("a")
    assert "now 'a' is ready" in str(scene.error())
    assert "CUDA error" in str(scene.error())
    assert scene.instance("b").state is State.SLEEPING
    assert saved(scene) is None


def test_one_whose_restart_is_needed_does_not_wait_behind_what_was_to_come() -> None:
    scene = two()
    scene.swap("b", ("a",))
    scene.drained("a")
    scene.engine_failed("CUDA error", "a")
    scene.engine_failed("CUDA error", "a")
    scene.exited(-9, "a")
    scene.tree_gone("a")
    scene.checked("a")
    assert "AwaitMemory" in kinds(scene.port_ready("a"))


def test_memory_that_does_not_come_free_brings_the_other_back() -> None:
    scene = two()
    scene.swap("b", ("a",))
    scene.drained("a")
    scene.slept("a")
    scene.memory_short("process 99 (jupyter) holds it", "b")
    assert scene.instance("b").state is State.SLEEPING
    scene.memory_free("a")
    scene.woken("a")
    assert scene.instance("a").state is State.READY
    assert "process 99 (jupyter)" in str(scene.error())
    assert "now 'a' is ready" in str(scene.error())


def test_new_one_that_cannot_start_is_removed_and_the_other_comes_back() -> None:
    scene = Scenario()
    scene.ready("a")
    scene.swap("b", ("a",), config(GPUS[:1]))
    scene.checked("b")
    scene.port_ready("b")
    scene.drained("a")
    scene.slept("a")
    scene.memory_free("b")
    scene.refused(LaunchError("the process does not answer"), "b")
    scene.tree_gone("b")
    assert "b" not in scene.fleet.instances
    scene.memory_free("a")
    scene.woken("a")
    assert "the process does not answer" in str(scene.error())
    assert "now 'a' is ready" in str(scene.error())


def test_options_that_the_engine_refuses_are_the_callers_fault() -> None:
    scene = Scenario()
    scene.ready("a")
    scene.swap("b", ("a",), config(GPUS[:1]))
    scene.refused(InvalidRequestError("--frobnicate is no option"), "b")
    scene.wake("a")
    assert str(scene.error(2)) == "--frobnicate is no option"


def test_daemon_that_ended_in_the_middle_takes_the_swap_back() -> None:
    before = two()
    before.swap("b", ("a",))
    before.drained("a")
    before.slept("a")
    scene = Scenario(revision=before.fleet.revision)
    for name in "ba":
        scene.restore(before.instance(name))
    document = [effect.swap for effect in before.effects if isinstance(effect, fx.SaveSwap) and effect.swap][-1]
    assert document is not None
    scene.effects += scene.fleet.restore_swap(document, scene.now)
    for name in "ba":
        scene.tell(ev.Inspected(name, scene.number(name), True))
    assert saved(scene) == document
    scene.memory_free("a")
    scene.woken("a")
    assert (scene.instance("a").state, scene.instance("b").state) == (State.READY, State.SLEEPING)
    assert scene.instance("b").depth is Depth.LEVEL_1
    assert saved(scene) is None
