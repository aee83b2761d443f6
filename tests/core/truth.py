"""What must be true of a world, whatever happened: the fleet's book beside the trees, its answers beside what is."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from bullpen.core import effects as fx
from bullpen.core.book import Hold
from bullpen.core.instance import ENDED, Config, Depth, Instance, State
from bullpen.core.operation import Doing, Operation, Stage
from bullpen.core.swapping import SwapState
from bullpen.engines.crash import CrashClass
from bullpen.errors import BullpenError, ConflictError, EngineError, NotFoundError, StuckError
from tests.core.host import CAPACITY, DEVICES, GPUS, Request, Tree, known
from tests.core.policy import right_choice

if TYPE_CHECKING:
    from tests.core.world import World

SLEEP_LEVELS = (Depth.LEVEL_1, Depth.LEVEL_2)


# -- accelerators ----------------------------------------------------------------------------------------------


def check_owners(world: World) -> None:
    """At most one awake exclusive owner of an accelerator, or shares of it that fit."""
    for uuid in GPUS:
        awake = [tree for tree in world.trees if tree.awake and uuid in tree.gpus]
        shares = [tree.wish.share for tree in awake]
        if None in shares:
            assert len(awake) == 1, f"{uuid} is used by {[tree.key for tree in awake]}"
        assert sum(share or 0.0 for share in shares) <= 1 + 1e-9, "shares above a whole"


def check_fits(world: World, instance: Instance, tree: Tree) -> None:
    """What is about to be in use on an accelerator fits beside what is known of the others there."""
    check_owners(world)
    for uuid in instance.gpus:
        sums = 0
        for other in world.fleet.instances.values():
            trees = [one for one in world.trees if one.key == other.key and one.alive and one.told]
            if other is instance:
                sums += world.fleet.roster.memory(instance, Depth.AWAKE) or 0
            elif uuid in other.gpus and trees:
                depth = Depth.AWAKE if trees[-1].awake else trees[-1].depth
                sums += world.fleet.roster.memory(other, depth) or 0
        assert sums <= CAPACITY, f"{sums} MiB on {uuid}"


def check_turns(world: World) -> None:
    """Operations that change what an accelerator holds go one after the other."""
    running = [one for one in world.fleet.roster.operations() if one[1].holds_turn]
    holders = [one for one in running if one[1].doing is not Doing.INSPECT]  # which only looks
    for (one, _), (other, _) in itertools.combinations(holders, 2):
        assert not set(one.gpus) & set(other.gpus), f"{one.id} and {other.id} disturb each other"
    for uuid in GPUS:
        moving = [tree for tree in world.trees if tree.moving and tree.alive and uuid in tree.gpus]
        assert len(moving) <= 1 or not all(_is_current(world, tree) for tree in moving), "two engines told at once"


def _is_current(world: World, tree: Tree) -> bool:
    return any(task.tree is tree and _is_under_way(world, task.instance) for task in world.tasks_of("sleep", "wake"))


def _is_under_way(world: World, instance: Instance) -> bool:
    operation = world.operations().get(instance.id)
    return operation is not None and operation.stage is Stage.ENGINE


def check_budget(world: World) -> None:
    """Sleepers keep no more host memory than allowed, or one of them is on its way deeper, or none may go."""
    roster, limit = world.fleet.roster, world.limits.host_mib
    kept, movable, under_way = 0, [], False
    for instance in world.fleet.instances.values():
        operation = roster.operation(instance.id)
        under_way = under_way or (operation is not None and operation.doing is Doing.SLEEP)
        if instance.state is not State.SLEEPING or instance.depth not in SLEEP_LEVELS:
            continue
        mib = roster.host_mib(instance, instance.depth) or 0
        kept += mib
        busy = operation is not None or roster.pending[instance.id].killing
        if mib and not busy and not instance.config.ladder.pin:
            movable.append(instance.id)
        under_way = under_way or busy
    assert limit is None or kept <= limit or under_way or not movable, f"{kept} MiB kept, {movable} may go deeper"


# -- decisions -------------------------------------------------------------------------------------------------


def check_begun(world: World, instance: Instance, operation: Operation) -> None:
    """Something was begun just now: was it right?"""
    if operation.doing is not Doing.SLEEP:
        return
    by_time, by_budget = operation.reason.startswith("no request"), operation.reason.startswith("sleepers keep")
    if not by_time and not by_budget:
        return
    assert not instance.config.ladder.pin, "a pinned one steps down by itself"
    assert operation.depth > instance.depth, "a step down leads down"
    if operation.depth in SLEEP_LEVELS:
        assert world.fleet.roster.conduct(instance).works(operation.depth), "a depth that does not work"
    if by_time:
        _check_idle(world, instance, operation)
    else:
        _check_victim(world, instance)


def _check_idle(world: World, instance: Instance, operation: Operation) -> None:
    ladder = instance.config.ladder
    steps = {depth: ladder.after(depth) for depth in (*SLEEP_LEVELS, Depth.STOPPED)}
    times = [after for depth, after in steps.items() if depth > instance.depth and after is not None]
    assert times, "no step down was asked for"
    if instance.state is State.READY:
        tree = world.handles[instance.id].tree
        assert tree is not None
        assert world.clock - tree.used >= min(times) - 1e-6, "it was in use"


def _check_victim(world: World, instance: Instance) -> None:
    roster = world.fleet.roster
    others = [
        other
        for other in world.fleet.instances.values()
        if other.state is State.SLEEPING
        and other.depth in SLEEP_LEVELS
        and not other.config.ladder.pin
        and not roster.pending[other.id].killing
        and roster.operation(other.id) is None
        and (roster.host_mib(other, other.depth) or 0) > 0
    ]
    for other in others:
        assert rank(instance) < rank(other), f"{other.id} should have gone deeper"


def rank(instance: Instance) -> tuple[int, float, str]:
    """Lowest priority first, then longest unused."""
    return instance.config.ladder.priority, instance.last_used or 0.0, instance.id


class Auto:
    """A swap that leaves the choice of who goes to the policy: what it must be, worked out before it is made."""

    def __init__(self, world: World, incoming: str, config: Config | None) -> None:
        instance = world.fleet.instances.get(incoming)
        given = config or (instance.config if instance is not None else None)
        self.known = given is not None and (config is not None or (instance is not None and instance.listed))
        self.expected: tuple[str, ...] | None = None
        if given is None:
            return
        self._world, self._share, self._incoming = world, given.gpu_share, incoming
        chooses = given.gpus and (instance is None or instance.tree_gone)
        self._uuids: tuple[str, ...] = () if chooses else _named(given, instance)
        self._count = given.gpus if chooses else None
        ready = [one for one in world.fleet.instances.values() if one.id != incoming and self._may_go(one)]
        ranked = [one.id for one in sorted(ready, key=rank)]
        self.expected = right_choice(ranked, self._fits)

    def _may_go(self, instance: Instance) -> bool:
        idle = self._world.fleet.roster.operation(instance.id) is None and instance.state is State.READY
        busy = self._world.fleet.roster.pending[instance.id].killing
        able = instance.can_sleep or instance.config.sleep == "emulate"
        return idle and not busy and able and not instance.config.ladder.pin

    def _fits(self, gone: tuple[str, ...]) -> bool:
        clear = [gpu.uuid for gpu in DEVICES if self._is_clear(gpu.uuid, gone)]
        return len(clear) >= self._count if self._count else set(self._uuids) <= set(clear)

    def _is_clear(self, uuid: str, gone: tuple[str, ...]) -> bool:
        others = [
            one.config.gpu_share
            for one in self._world.fleet.instances.values()
            if uuid in one.gpus and one.id not in (*gone, self._incoming) and _is_awake_or_coming(self._world, one)
        ]
        if self._share is None or None in others:
            return not others
        return self._share + sum(share or 0.0 for share in others) <= 1 + 1e-9

    def check(self, begun: SwapState | None, reply: fx.Reply | None) -> None:
        """What was chosen is what had to be."""
        if begun is not None:
            assert self.expected is not None, "they were to stay"
            assert set(begun.outgoing) == set(self.expected), f"{begun.outgoing} went, not {self.expected}"
        elif reply is not None and reply.error is not None and self.known and self.expected is None:
            assert isinstance(reply.error, ConflictError)
            assert re.search(r"'[a-z]'|GPU", str(reply.error)), f"it names nobody: {reply.error}"


def _named(config: Config, instance: Instance | None) -> tuple[str, ...]:
    return instance.gpus if instance is not None else config.gpu_uuids or ()


def _is_awake_or_coming(world: World, instance: Instance) -> bool:
    operation = world.fleet.roster.operation(instance.id)
    if operation is not None and operation.doing in (Doing.START, Doing.WAKE):
        return True
    living = any(tree.key == instance.key and tree.alive and tree.told for tree in world.trees)
    if operation is None:
        asleep = instance.depth in SLEEP_LEVELS and instance.state not in ENDED
        return (not instance.tree_gone or living) and not asleep
    ending = operation.depth is Depth.STOPPED and instance.depth in SLEEP_LEVELS
    return not ending or operation.doing is not Doing.SLEEP


def swap_of(world: World, request: int) -> SwapState | None:
    """The swap that a request has begun."""
    swaps = world.fleet._swapping.swaps.values()
    return next((swap for swap in swaps if swap.request == request), None)


# -- answers ---------------------------------------------------------------------------------------------------


def check_reply(world: World, reply: fx.Reply, request: Request) -> None:
    """An answer says what is."""
    assert (reply.instance is None) is (reply.error is not None)
    if reply.error is not None:
        _check_refusal(world, reply.request, reply.error, request)
        return
    instance = reply.instance
    assert instance is not None and instance.id == request.id
    trees = [tree for tree in world.trees if tree.key == instance.key]
    if request.kind == "stop":
        assert reply.status == ("not_running" if request.over else "terminated")
        assert request.exists
        assert world.fleet.instances.get(request.id) is not instance
        assert not any(tree.alive for tree in trees), "a stop was answered and the tree lives"
        return
    if request.kind == "end":
        assert not any(tree.alive for tree in trees), "a stop was answered and the tree lives"
        stays = world.fleet.instances.get(request.id) is instance
        assert not stays or (instance.state in ENDED and instance.tree_gone)
        return
    assert world.fleet.get(request.id) is instance
    if request.kind == "create":
        assert reply.status == "started"
    elif request.kind == "sleep":
        assert reply.status == "sleeping"
        assert not any(tree.awake for tree in trees), "it sleeps, and its engine is awake"
    else:
        assert reply.status in (("swapped",) if request.kind == "swap" else ("woken", "ready", "started", "restarted"))
        assert instance.state is State.READY
        assert trees[-1].awake or not trees[-1].server, "it is ready, and its engine is not awake"


def _check_refusal(world: World, number: int, error: BullpenError, request: Request) -> None:
    assert str(error) and str(error) != "None"
    if request.kind == "create":
        living = any(tree.key == f"key-{number}" and tree.alive for tree in world.trees)
        assert not living or world.fleet.get(request.id).key == f"key-{number}"
    if request.kind in ("stop", "end"):
        assert isinstance(error, StuckError if request.exists else NotFoundError)
    if request.kind in ("sleep", "wake", "swap") and not request.exists and isinstance(error, NotFoundError):
        assert f"'{request.id}'" in str(error) or request.kind == "swap"
    owner = re.search(r"GPU (GPU-\d) belongs to instance '(\w+)'", str(error))
    if owner is not None and owner[2] in world.fleet.instances:
        assert owner[1] in world.fleet.instances[owner[2]].gpus, f"it is not there: {error}"
    if isinstance(error, EngineError | ConflictError):
        assert len(str(error)) > 15, f"no reason: {error}"


def check_published(world: World, effect: fx.Publish, *, adopting: bool) -> None:
    """Watchers hear of each change once, in order."""
    instance = effect.instance
    assert instance.listed
    assert instance.key not in world.deleted
    assert instance.revision == world.seen_revision + 1 <= world.fleet.revision
    world.seen_revision = instance.revision
    if effect.kind == "DELETED":
        current = world.fleet.instances.get(instance.id)
        assert current is None or current.key != instance.key
        assert not any(tree.alive for tree in world.trees if tree.key == instance.key), "said to be gone, and is not"
        world.deleted.add(instance.key)
    before = world.seen.pop(instance.id, None)
    if not adopting:
        again = instance.attempt > 1 or (instance.error is not None and instance.error.kind is CrashClass.STUCK)
        follows = {
            "CREATED": (None,) if instance.attempt == 1 else ("STOPPED",),
            "STOPPED": ("CREATED", "STOPPED") if again else ("CREATED",),
            "DELETED": ("CREATED", "STOPPED"),
        }
        assert before in follows[effect.kind], f"{effect.kind} after {before}"
    if effect.kind != "DELETED":
        world.seen[instance.id] = known(instance)
        assert effect.kind == "CREATED" or world.seen[instance.id] == "STOPPED"
    if not world.disk_full:
        world.logged_revision = instance.revision


# -- what must always hold -------------------------------------------------------------------------------------


def verify(world: World) -> None:
    """Everything that must hold between two events."""
    if not world.settled:
        return
    instances = list(world.fleet.instances.values())
    for instance in instances:
        _verify_instance(world, instance)
    check_owners(world)
    check_turns(world)
    check_budget(world)
    for uuid in GPUS:
        owners = [one.id for one in instances if uuid in one.gpus and _is_awake_or_coming(world, one)]
        claimed = [claim.id for claim in world.fleet.roster.book().on(uuid, Hold.AWAKE, Hold.COMING)]
        assert sorted(claimed) == sorted(owners)
    holders = [instance for instance in instances if not instance.tree_gone]
    ports = [instance.address.port for instance in holders if instance.address and instance.address.port]
    assert len(ports) == len(set(ports))
    keys = {instance.key for instance in instances}
    assert all(tree.key in keys for tree in world.trees if tree.told and tree.alive), "a tree without owner"
    listed = {instance.id: instance for instance in world.fleet.listed()}
    assert set(world.seen) == set(listed), "a watcher knows other instances than the list has"
    for instance_id, instance in listed.items():
        over = instance.state is State.STOPPING and not instance.running  # its end may have been told before or not
        assert world.seen[instance_id] == known(instance) or over


def _verify_instance(world: World, instance: Instance) -> None:
    handle = world.handles.get(instance.id)
    timers = set(handle.timers) if handle is not None else set()
    killing = handle is not None and handle.killing
    operation = world.fleet.roster.operation(instance.id)
    if instance.state in (State.STARTING, State.STOPPING) or operation is not None:
        begun = any(_leads_on(world, one.kind, one.instance, one.effect, instance, operation) for one in world.tasks)
        assert begun or killing or timers & {"start", "stop", "operation"}, f"{instance.id} waits for nothing"
    else:
        assert timers <= {"idle"}, "a timer for nothing"
        _verify_ladder(world, instance, timers)
    if instance.state is State.STARTING and "start" in instance.phase_started and not killing:
        assert "start" in timers
    if instance.listed and handle is not None and handle.tree is not None and handle.tree.told:
        assert instance.running is not handle.reported
    if instance.tree_gone:
        living = [tree for tree in world.trees if tree.key == instance.key and tree.alive]
        assert not any(tree.told for tree in living)


def _leads_on(
    world: World, kind: str, of: Instance, effect: object, instance: Instance, operation: Operation | None
) -> bool:
    """Whether what is outstanding will take an instance on."""
    if of is not instance:
        return False
    if kind in ("check", "port", "start"):
        return True
    return operation is not None and getattr(effect, "operation", None) == operation.number


def _verify_ladder(world: World, instance: Instance, timers: set[str]) -> None:
    """An instance that would step down by time has a timer for it, or is being asked how busy it is."""
    ladder = instance.config.ladder
    steps = [depth for depth in (*SLEEP_LEVELS, Depth.STOPPED) if ladder.after(depth) is not None]
    awaited = instance.state in (State.READY, State.SLEEPING) and any(depth > instance.depth for depth in steps)
    if awaited and not ladder.pin and not world.fleet.roster.pending[instance.id].killing:
        asked = any(task.instance is instance for task in world.tasks_of("ask"))
        assert "idle" in timers or asked, f"{instance.id} would never step down"


def verify_settled(world: World) -> None:
    """What must hold when nothing is outstanding any more: the book is what is, and everyone has an answer."""
    assert world.unanswered == set()
    assert not world.fleet._swapping.swaps
    assert world.swaps == []
    for instance in world.fleet.instances.values():
        trees = [tree for tree in world.trees if tree.key == instance.key and tree.alive]
        assert world.fleet.roster.operation(instance.id) is None
        if instance.state is State.READY:
            (tree,) = trees
            assert tree.server and tree.awake and not tree.half, "not ready"
            assert tree.gate_open, "it is ready, and nobody gets through to it"
            assert tree.gpus == set(instance.gpus)
        elif instance.state is State.SLEEPING and instance.depth in SLEEP_LEVELS:
            (tree,) = trees
            assert tree.server and (tree.half or tree.depth is instance.depth), "asleep elsewhere"
        else:
            assert instance.state in ENDED or instance.state is State.SLEEPING
            assert trees == [] or not instance.tree_gone, "said to be gone, and is not"
            assert not instance.running or trees, "said to run, and does not"
