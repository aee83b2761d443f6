"""How a world carries out each effect: at once, or as a task that is outstanding until it comes to something."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from bullpen.core import effects as fx
from bullpen.core.instance import Depth
from tests.core import truth
from tests.core.host import PATIENCE, Handle, Task

if TYPE_CHECKING:
    from tests.core.world import World

STEPS = 6
"""An engine that is told something goes through so many steps at most, each with its deadline."""


# -- effects: starts ---------------------------------------------------------------------------------------


def do_Check(world: World, effect: fx.Check) -> None:
    world.begin("check", effect)


def do_HoldPort(world: World, effect: fx.HoldPort) -> None:
    world.last_hold = effect
    taken = {tree.port for tree in world.trees if tree.alive} - {None}
    assert effect.port not in taken, "the fleet gave the port of a living tree to another instance"
    assert taken <= effect.avoid
    world.begin("port", effect)


def do_Start(world: World, effect: fx.Start) -> None:
    instance = world.fleet.instances[effect.id]
    tree = world.handles[effect.id].tree
    assert tree is not None and instance.address is not None
    saved = world.journal.get(effect.id)
    assert (saved and saved.key == instance.key) or effect.id in world.unsaved, "not saved before its start"
    tree.told, tree.port, tree.gpus = True, instance.address.port, frozenset(instance.gpus)
    for other in world.trees:
        same = other is not tree and other.alive and other.port is not None
        assert not same or other.port != instance.address.port, "two trees, one port"
    truth.check_fits(world, instance, tree)
    world.begin("start", effect)


def do_Discard(world: World, effect: fx.Discard) -> None:
    _give_back(world, effect.id)
    _remove_files(world, effect.id, effect.key)


def do_LetGo(world: World, effect: fx.LetGo) -> None:
    _give_back(world, effect.id)
    world.tasks = [one for one in world.tasks if one.kind not in ("check", "port") or one.instance.id != effect.id]


def _give_back(world: World, instance_id: str) -> None:
    handle = world.handles.pop(instance_id, None)
    if handle is not None and handle.tree is not None:
        assert not handle.tree.told or not handle.tree.alive, "it may be a server by now"
        handle.tree.server = False


def do_Watch(world: World, effect: fx.Watch) -> None:
    world.begin("watch", effect)


def do_SendWarmUp(world: World, effect: fx.SendWarmUp) -> None:
    world.begin("warm up", effect, effect.seconds)


def do_Prefetch(world: World, effect: fx.Prefetch) -> None:
    assert effect.id in world.fleet.instances


# -- effects: ends -----------------------------------------------------------------------------------------


def do_Terminate(world: World, effect: fx.Terminate) -> None:
    assert not world.handles[effect.id].reported, "a signal to nobody"


def do_KillTree(world: World, effect: fx.KillTree) -> None:
    assert effect.id in world.fleet.instances
    world.handles.setdefault(effect.id, Handle()).killing = True


def do_SetTimer(world: World, effect: fx.SetTimer) -> None:
    assert effect.seconds >= 0
    world.handles.setdefault(effect.id, Handle()).timers[effect.name] = world.clock + effect.seconds


def do_ClearTimers(world: World, effect: fx.ClearTimers) -> None:
    if effect.id in world.handles:
        world.handles[effect.id].timers.clear()


def do_Forget(world: World, effect: fx.Forget) -> None:
    world.handles.pop(effect.id, None)
    world.unsaved.discard(effect.id)
    _remove_files(world, effect.id, effect.key)


def _remove_files(world: World, instance_id: str, key: str) -> None:
    assert instance_id not in world.fleet.instances
    assert not any(tree.alive for tree in world.trees if tree.key == key)
    world.journal.pop(instance_id, None)


# -- effects: sleep and wake -------------------------------------------------------------------------------


def do_AwaitMemory(world: World, effect: fx.AwaitMemory) -> None:
    assert all(mib >= 0 for mib in effect.needs.values())
    world.begin("memory", effect, effect.seconds)


def do_Drain(world: World, effect: fx.Drain) -> None:
    task = world.begin("drain", effect, effect.seconds)
    assert task.tree is not None and task.tree.depth is Depth.AWAKE
    task.tree.gate_open = False


def do_PutToSleep(world: World, effect: fx.PutToSleep) -> None:
    _tell(world, world.begin("sleep", effect, STEPS * effect.seconds))


def do_WakeUp(world: World, effect: fx.WakeUp) -> None:
    _tell(world, world.begin("wake", effect, STEPS * effect.seconds))


def _tell(world: World, task: Task) -> None:
    tree = task.tree
    assert tree is not None
    assert not tree.moving, "an engine is told two things at once"
    tree.moving = True
    assert task.kind == "wake" or tree.depth is not Depth.AWAKE or not tree.gate_open, "requests get cut off"
    saved = world.journal.get(task.instance.id)
    known = saved is not None and saved.heading == task.instance.heading
    assert known or task.instance.id in world.unsaved, "not saved before the engine is told"
    truth.check_fits(world, task.instance, tree)


def do_OpenGate(world: World, effect: fx.OpenGate) -> None:
    tree = world.handles[effect.id].tree
    assert tree is not None
    tree.gate_open = True


def do_Inspect(world: World, effect: fx.Inspect) -> None:
    world.begin("inspect", effect, effect.seconds)


def do_Measure(world: World, effect: fx.Measure) -> None:
    world.begin("measure", effect, PATIENCE.start)


def do_AskActivity(world: World, effect: fx.AskActivity) -> None:
    world.begin("ask", effect, PATIENCE.start)


def do_SaveProfile(world: World, effect: fx.SaveProfile) -> None:
    world.profiles[effect.key] = copy.deepcopy(effect.profile)


def do_SaveSwap(world: World, effect: fx.SaveSwap) -> None:
    if effect.swap is None:
        del world.running_swaps[effect.number]
    else:
        world.running_swaps[effect.number] = dict(effect.swap)
    world.swaps = list(world.running_swaps.values())


# -- effects: what is told ---------------------------------------------------------------------------------


def do_PublishSwap(world: World, effect: fx.PublishSwap) -> None:
    assert effect.document["stage"] in ("out", "in", "back", "done")


def do_Publish(world: World, effect: fx.Publish) -> None:
    truth.check_published(world, effect, adopting=world.adopting)


def do_PublishState(world: World, effect: fx.PublishState) -> None:
    assert effect.instance.listed
    assert effect.instance.key not in world.deleted


def do_Reply(world: World, effect: fx.Reply) -> None:
    world.unanswered.remove(effect.request)  # a KeyError is a second answer
    world.replies[effect.request] = effect
    truth.check_reply(world, effect, world.requests[effect.request])
