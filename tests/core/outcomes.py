"""What may come of the things that a daemon has begun: they work, fail in several ways, or hang.

``how`` says which: "works"; "fails", which leaves everything as it was; "half", which leaves an engine between awake
and asleep; "exits", with the process ending over it; "wrong", a canary that is answered otherwise than before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, Memory
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import ConflictError, InvalidRequestError, LaunchError
from tests.core.host import FIRST_PORT, FOREIGN_PORT, Handle, Task, Tree

if TYPE_CHECKING:
    from tests.core.world import World

WAYS = ("works", "fails", "half", "exits", "wrong")


def come_to(world: World, task: Task, how: str = "works") -> None:
    """Let a task come to something; memory that is not there yet is waited for further."""
    if task.kind == "memory" and not has_memory(world, task):
        return
    world.tasks.remove(task)
    _OUTCOMES[task.kind](world, task, how)


def run_out(world: World, task: Task) -> None:
    """The deadline of a task has come."""
    world.tasks.remove(task)
    if world.obliging:
        _OUTCOMES[task.kind](world, task, "works")
        return
    _OUTCOMES[task.kind](world, task, "half" if task.kind in ("sleep", "wake") else "fails")


def tell(world: World, task: Task, event: ev.Event) -> None:
    """Report an outcome, as the daemon does: only while the fleet still has that very instance."""
    if world.is_current(task):
        world.submit(event)


# -- starts ----------------------------------------------------------------------------------------------------


def _check(world: World, task: Task, how: str) -> None:
    instance = task.instance
    if not world.is_current(task) or instance.attempt != task.attempt:
        return  # a leased process ends with its channel
    if not world.fleet.awaits(instance.id, ev.Checked):
        return
    if how != "works":
        world.submit(ev.Refused(instance.id, InvalidRequestError("--frobnicate is no option")))
        return
    wish = world.wishes[instance.key]
    tree = Tree(instance.key, wish, frozenset(instance.gpus), used=world.clock)
    world.trees.append(tree)
    world.handles[instance.id] = Handle(tree)
    world.submit(ev.Checked(instance.id, wish.served(), pid=100, start_ticks=7, how="fork"))


def _port(world: World, task: Task, how: str) -> None:
    instance, hold = task.instance, task.effect
    assert isinstance(hold, fx.HoldPort)
    if not world.is_current(task) or instance.attempt != task.attempt:
        return
    taken = {handle.held_port for i, handle in world.handles.items() if i != instance.id}
    taken |= {tree.port for tree in world.trees if tree.alive} | {FOREIGN_PORT}
    port = hold.port
    if port is None:
        port = next(number for number in range(FIRST_PORT, 30_000) if number not in hold.avoid | taken)
    if port in taken or (how != "works" and hold.port is not None):
        world.submit(ev.Refused(instance.id, ConflictError(f"port {port} is in use by another program")))
    else:
        world.handles[instance.id].held_port = port
        world.submit(ev.PortReady(instance.id, port))


def _start(world: World, task: Task, how: str) -> None:
    """The answer of a process that was told to become the server; without one, it may live on all the same."""
    tree = task.tree
    assert tree is not None
    works = how == "works" and tree.server
    tree.children = works
    if not works and how != "half":
        tree.server = False
    tree.used = world.clock
    if works:
        tell(world, task, ev.Started(task.instance.id))
    elif task.instance.attempt == task.attempt:
        tell(world, task, ev.Refused(task.instance.id, LaunchError("the process does not answer")))


def show_phase(world: World, task: Task) -> None:
    """The log of a server that starts shows something."""
    task.phase += 1
    world.submit(ev.PhaseSeen(task.instance.id, f"phase {task.phase // 2}", task.phase / 100))


def answer_probe(world: World, task: Task) -> None:
    """A server answers for the first time."""
    world.tasks.remove(task)
    world.handles[task.instance.id].held_port = None
    assert task.tree is not None
    task.tree.used = world.clock
    world.submit(ev.Answered(task.instance.id))


def _warm_up(world: World, task: Task, how: str) -> None:
    tell(world, task, ev.WarmedUp(task.instance.id, task.attempt, None if how == "works" else "HTTP 500"))


# -- ends ------------------------------------------------------------------------------------------------------


def report_exit(world: World, instance_id: str, code: int | None) -> None:
    """The daemon has heard of the end of a server process."""
    handle = world.handles[instance_id]
    assert handle.tree is not None and not handle.tree.server
    failure = None if code == 0 else Failure(CrashClass.KILLED, "it was killed")
    handle.reported, handle.held_port = True, None
    world.submit(ev.Exited(instance_id, code, failure))


def finish_kill(world: World, instance_id: str, *, stuck: str | None = None) -> None:
    """A kill is over: nobody is left, or the "server" or a "child" is."""
    handle = world.handles[instance_id]
    key = world.fleet.instances[instance_id].key
    trees = [tree for tree in world.trees if tree.key == key]
    living = [tree for tree in trees if tree.told and tree.alive]
    if stuck is not None and living:
        for tree in living:
            tree.server, tree.children = tree.server and stuck == "server", True
        _end_kill(world, handle, ev.TreeStuck(instance_id, f"the {stuck}"))
        return
    for tree in trees:
        tree.server = tree.children = False
    if handle.tree is not None and not handle.reported:
        report_exit(world, instance_id, -9)
    _end_kill(world, handle, ev.TreeGone(instance_id))


def _end_kill(world: World, handle: Handle, outcome: ev.Event) -> None:
    # While its outcome is handled the kill is not over yet: one asked for in answer to it would be lost.
    world.submit(outcome)
    handle.killing = False


# -- sleep and wake --------------------------------------------------------------------------------------------


def has_memory(world: World, task: Task) -> bool:
    """Whether the accelerators have what a task waits for."""
    return all(world.free(uuid) >= mib for uuid, mib in task.effect.needs.items())


def _memory(world: World, task: Task, how: str) -> None:
    number = task.effect.operation
    if has_memory(world, task):
        free = {uuid: world.free(uuid) for uuid in task.effect.needs}
        tell(world, task, ev.MemoryFree(task.instance.id, number, free))
    else:
        tell(world, task, ev.MemoryShort(task.instance.id, number, "GPU-0 lacks memory; process 99 (jupyter) holds it"))


def _drain(world: World, task: Task, how: str) -> None:
    tree, number = task.tree, task.effect.operation
    assert tree is not None
    operation = world.operations().get(task.instance.id)
    if how in ("works", "half") and tree.server:
        tell(world, task, ev.Drained(task.instance.id, number, 2 if how == "half" else 0))
    else:
        if operation is not None and operation.number == number:
            tree.gate_open = True
        problem = "its gate does not answer"
        tell(world, task, ev.EngineFailed(task.instance.id, number, problem, touched=False))


def _sleep(world: World, task: Task, how: str) -> None:
    tree, instance, effect = task.tree, task.instance, task.effect
    assert tree is not None
    works = leave(task, how)
    if works:
        canary = "one" if instance.canary is None else None
        tell(world, task, ev.Slept(instance.id, effect.operation, canary))
        return
    if how == "fails" and tree.depth is Depth.AWAKE:
        tree.gate_open = True
    touched, verdict = how != "fails", how in ("half", "wrong")
    failed = ev.EngineFailed(
        instance.id, effect.operation, f"it did not sleep as it was told ({how})", touched, verdict
    )
    tell(world, task, failed)


def _wake(world: World, task: Task, how: str) -> None:
    tree, instance, effect = task.tree, task.instance, task.effect
    assert tree is not None
    if leave(task, how):
        tree.used = world.clock
        tell(world, task, ev.Woken(instance.id, effect.operation))
    else:
        verdict = how in ("half", "wrong")
        tell(
            world,
            task,
            ev.EngineFailed(instance.id, effect.operation, f"it did not wake as it was told ({how})", True, verdict),
        )


def leave(task: Task, how: str) -> bool:
    """What a call to an engine leaves behind, whoever hears of it; whether it worked."""
    tree, effect = task.tree, task.effect
    assert tree is not None
    tree.moving = False
    if not tree.server or how == "exits":
        tree.server = False
        return False
    if how == "half":
        tree.half = True
    if how in ("half", "fails"):
        return False
    if task.kind == "sleep":
        if how == "works":
            tree.depth, tree.half = effect.depth, False
        return how == "works"
    # Weights that were discarded are there again only if the engine is told to read them.
    right = how == "works" and (tree.depth <= effect.depth or tree.half)
    tree.depth, tree.half = Depth.AWAKE, False
    tree.gate_open = right
    return right


def _inspect(world: World, task: Task, how: str) -> None:
    tree = task.tree
    assert tree is not None
    asleep = None if how != "works" or not tree.server else tree.half or tree.depth > 0
    tell(world, task, ev.Inspected(task.instance.id, task.effect.operation, asleep))


def _measure(world: World, task: Task, how: str) -> None:
    tree = task.tree
    if tree is None or not tree.server:
        return
    roster, current = world.fleet.roster, world.is_current(task) and task.moves == task.instance.moves
    for uuid in task.effect.before:
        if current and roster.is_alone(task.instance, uuid):
            others = [one.key for one in world.trees if one is not tree and one.holds(uuid)]
            assert others == [], "what is missing on the accelerator would be taken for its own"
    held = tree.wish.model.holds(task.depth, tree.wish.share)
    memory = {"works": held, "half": Memory(None, held.host)}.get(how)
    if memory is not None:
        tell(world, task, ev.Measured(task.instance.id, task.moves, task.depth, memory))


def _ask(world: World, task: Task, how: str) -> None:
    tree = task.tree
    assert tree is not None
    if how == "half":
        tree.used = world.clock
    busy = {"works": 0, "half": 2}.get(how) if tree.server else None
    tell(world, task, ev.Activity(task.instance.id, busy, world.clock - tree.used))


_OUTCOMES: dict[str, Callable[[World, Task, str], None]] = {
    "check": _check,
    "port": _port,
    "start": _start,
    "warm up": _warm_up,
    "memory": _memory,
    "drain": _drain,
    "sleep": _sleep,
    "wake": _wake,
    "inspect": _inspect,
    "measure": _measure,
    "ask": _ask,
}
"""``watch`` has its own: `show_phase`, `answer_probe`."""
