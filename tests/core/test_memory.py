"""What is measured: free memory before, what is held after, and what of that may be worked out from the difference."""

from __future__ import annotations

from dataclasses import replace

from bullpen.core import effects as fx
from bullpen.core.instance import Depth, Memory, State
from bullpen.core.public import public
from tests.core.scenario import GPUS, Scenario

EMPTY, FULL = 79_500, 70_000


def start(scene: Scenario, instance_id: str = "a", free: int = EMPTY, **fields: float) -> fx.Measure:
    """Start one on the first accelerator that had so much free; how it is to be measured then."""
    scene.create(instance_id, GPUS[:1], **fields)
    scene.checked(instance_id, utilization=0.4)
    scene.port_ready(instance_id)
    scene.memory_free(instance_id, free)
    scene.started(instance_id)
    (measure,) = [effect for effect in scene.answered(instance_id) if isinstance(effect, fx.Measure)]
    return measure


def test_memory_before_a_start_is_kept_and_shown() -> None:
    scene = Scenario()
    start(scene, free=FULL)
    instance = scene.instance()
    assert instance.free_before == {"GPU-0": FULL}
    assert public(instance)["free_before_mib"] == {"GPU-0": FULL}
    assert "free_before_mib" not in public(replace(instance, free_before={}))


def test_memory_before_a_wake_takes_the_place_of_that_before_the_start() -> None:
    scene = Scenario()
    instance = scene.asleep()
    scene.wake()
    scene.memory_free(mib=FULL)
    assert instance.free_before == {"GPU-0": FULL}
    effects = scene.woken()
    assert fx.Measure("a") in effects, "what it held asleep was not free before"


def test_what_it_holds_after_its_load_is_what_it_holds_awake_and_remembered_for_its_kind() -> None:
    scene = Scenario()
    instance = scene.reach(State.READY, gpus=GPUS[:1])
    (save, remember) = scene.measured(60_000, 2_000)
    assert save == fx.Save("a")
    assert isinstance(remember, fx.SaveProfile)
    assert instance.memory == remember.profile.memory == {Depth.AWAKE: Memory(60_000, 2_000)}
    scene.stop()
    scene.exited(0)
    scene.tree_gone()
    again = scene.reach(State.STARTING, "b", GPUS[:1])
    assert scene.fleet.roster.memory(again, Depth.AWAKE) == 60_000


def test_what_is_missing_on_an_empty_accelerator_is_its_own() -> None:
    assert start(Scenario()).before == {"GPU-0": EMPTY}


def test_what_is_missing_where_strangers_were_is_not() -> None:
    assert start(Scenario(), free=FULL).before == {}


def test_nor_where_another_instance_sleeps_or_has_ended() -> None:
    scene = Scenario()
    scene.asleep("b")
    assert start(scene).before == {}
    scene = Scenario()
    scene.reach(State.FAILED, "b", GPUS[:1])
    assert start(scene).before == {}
    scene = Scenario()
    scene.reach(State.READY, "b", GPUS[1:])
    assert start(scene).before == {"GPU-0": EMPTY}


def test_somebody_who_comes_meanwhile_is_seen() -> None:
    scene = Scenario()
    assert start(scene, gpu_share=0.4).before == {"GPU-0": EMPTY}
    instance = scene.instance()
    assert scene.fleet.roster.is_alone(instance, "GPU-0")
    scene.create("b", GPUS[:1], gpu_share=0.4)
    assert not scene.fleet.roster.is_alone(instance, "GPU-0")


def test_a_start_that_a_new_daemon_goes_on_with_has_no_memory_before_to_compare_with() -> None:
    before = Scenario()
    before.create("a", GPUS[:1])
    before.checked(utilization=0.4)
    before.port_ready()
    before.memory_free()
    before.started()
    scene = Scenario(revision=1)
    scene.restore(replace(before.instance()))
    effects = scene.answered()
    assert fx.Measure("a") in effects
    assert scene.instance().free_before == {"GPU-0": EMPTY}, "it is shown all the same"
