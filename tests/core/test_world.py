"""The fleet in a world where anything may happen at any time, the daemon's own end included."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from bullpen.core.effects import HoldPort
from bullpen.core.instance import Depth, Ladder
from tests.core import outcomes, truth
from tests.core.host import FIRST_PORT, FOREIGN_PORT, GPUS, MODELS, START_TIMEOUT, Handle, Task, Wish
from tests.core.world import DaemonKilledError, World

T = TypeVar("T")
LONGEST_WAY_DOWN = 10
WORK = ("check", "port", "start", "warm up", "memory", "drain", "sleep", "wake", "inspect", "measure")
TASKS = (*WORK, "ask")
EXAMPLES = int(os.environ.get("BULLPEN_EXAMPLES", "200"))

IDS = st.sampled_from("abcd")
LADDERS = st.sampled_from(
    [
        Ladder(),
        Ladder(),
        Ladder(priority=1),
        Ladder(pin=True),
        Ladder(sleep_after=30.0, priority=1),
        Ladder(sleep_after=10.0, discard_after=40.0, stop_after=90.0),
        Ladder(discard_after=20.0),
        Ladder(stop_after=20.0),
        Ladder(sleep_after=0.0, stop_after=0.0),
    ]
)
CLAIMS = st.sampled_from(
    [
        {},
        {"gpus": GPUS[:1]},
        {"gpus": GPUS[:1]},
        {"gpus": GPUS[1:]},
        {"gpus": GPUS},
        {"count": 1},
        {"count": 2},
        {"gpus": GPUS[:1], "share": 0.5},
        {"gpus": GPUS[:1], "share": 0.3},
        {"count": 1, "share": 0.5},
    ]
)
PORTS = st.sampled_from([None, None, None, 0, 8000, 8001, FIRST_PORT, FOREIGN_PORT, 70_000])
WISHES = st.builds(
    lambda claim, **fields: Wish(**claim, **fields),
    CLAIMS,
    port=PORTS,
    uds=st.sampled_from([None, None, None, "/run/m.sock"]),
    sleep=st.sampled_from([None, None, "engine", "emulate", "off"]),
    ladder=LADDERS,
    warm_up=st.sampled_from([False, False, True]),
    at_once=st.sampled_from([False, False, True]),
    model=st.sampled_from(MODELS),
)
PLACE = st.integers(0, 5)
"""Which of those outstanding, counted round."""
DEPTHS = st.sampled_from([None, Depth.LEVEL_1, Depth.LEVEL_2])
HOW = st.sampled_from(["works", "works", "works", *outcomes.WAYS])


def of(things: list[T], place: int) -> T:
    return things[place % len(things)]


def outstanding(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule applies while something of that kind is outstanding."""
    found: dict[str, Callable[[World], list[Task] | list[Handle] | list[str]]] = {
        "task": lambda world: world.tasks_of(*TASKS),
        "watch": lambda world: world.tasks_of("watch"),
        "server": World.servers,
        "exit": World.unreported,
        "kill": World.kills,
    }
    return precondition(lambda machine: bool(found[name](machine.world)))


class AnythingHappens(RuleBasedStateMachine):
    """Requests, outcomes, ends and time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def happens(self, what: Callable[[], object], fate: str = "works") -> None:
        try:
            what()
        except DaemonKilledError:
            self.world.kill_daemon(fate)

    # -- requests ----------------------------------------------------------------------------------------------

    @rule(instance_id=IDS, wish=WISHES)
    def create(self, instance_id: str, wish: Wish) -> None:
        self.happens(lambda: self.world.create(instance_id, wish))

    @rule(instance_id=IDS, wish=WISHES)
    def create_and_start(self, instance_id: str, wish: Wish) -> None:
        """Several steps at once, or few would ever get far."""

        def steps() -> None:
            self.world.create(instance_id, wish)
            go_on(self.world, "check", "port", "memory", "start", "warm up", "measure")

        self.happens(steps)

    @rule(instance_id=IDS, timeout=st.sampled_from([0.0, 5.0, 10.0, 600.0]), keep=st.booleans())
    def stop(self, instance_id: str, timeout: float, keep: bool) -> None:
        self.happens(lambda: self.world.stop(instance_id, timeout, keep=keep))

    @rule(instance_id=IDS, depth=DEPTHS, refuse=st.booleans())
    def sleep(self, instance_id: str, depth: Depth | None, refuse: bool) -> None:
        self.happens(lambda: self.world.sleep(instance_id, depth, refuse=refuse))

    @rule(instance_id=IDS, depth=DEPTHS)
    def sleep_well(self, instance_id: str, depth: Depth | None) -> None:
        def steps() -> None:
            self.world.sleep(instance_id, depth)
            go_on(self.world, "drain", "sleep", "measure")

        self.happens(steps)

    @rule(instance_id=IDS)
    def wake(self, instance_id: str) -> None:
        self.happens(lambda: self.world.wake(instance_id))

    @rule(incoming=IDS, outgoing=st.one_of(st.none(), st.lists(IDS, max_size=2).map(tuple)), depth=DEPTHS)
    def swap(self, incoming: str, outgoing: tuple[str, ...] | None, depth: Depth | None) -> None:
        self.happens(lambda: self.world.swap(incoming, outgoing, depth))

    @rule(incoming=IDS, outgoing=st.one_of(st.none(), st.lists(IDS, max_size=2).map(tuple)), wish=WISHES)
    def swap_in_a_new_one(self, incoming: str, outgoing: tuple[str, ...] | None, wish: Wish) -> None:
        self.happens(lambda: self.world.swap(incoming, outgoing, None, wish))

    # -- outcomes ----------------------------------------------------------------------------------------------

    @outstanding("task")
    @rule(place=PLACE, how=HOW)
    def come_to(self, place: int, how: str) -> None:
        self.happens(lambda: outcomes.come_to(self.world, of(self.world.tasks_of(*TASKS), place), how))

    @outstanding("task")
    @rule()
    def go_on(self) -> None:
        self.happens(lambda: go_on(self.world, *TASKS))

    @outstanding("watch")
    @rule(place=PLACE)
    def show_phase(self, place: int) -> None:
        self.happens(lambda: outcomes.show_phase(self.world, of(self.world.tasks_of("watch"), place)))

    @outstanding("watch")
    @rule(place=PLACE)
    def answer_probe(self, place: int) -> None:
        self.happens(lambda: outcomes.answer_probe(self.world, of(self.world.tasks_of("watch"), place)))

    @outstanding("server")
    @rule(place=PLACE, children_too=st.booleans())
    def end_server(self, place: int, children_too: bool) -> None:
        self.world.end_server(of(self.world.servers(), place), children_too=children_too)

    @outstanding("exit")
    @rule(place=PLACE, code=st.sampled_from([0, 1, -9, None]))
    def report_exit(self, place: int, code: int | None) -> None:
        self.happens(lambda: outcomes.report_exit(self.world, of(self.world.unreported(), place), code))

    @outstanding("kill")
    @rule(place=PLACE, stuck=st.sampled_from([None, None, None, "server", "child"]))
    def finish_kill(self, place: int, stuck: str | None) -> None:
        self.happens(lambda: outcomes.finish_kill(self.world, of(self.world.kills(), place), stuck=stuck))

    # -- the host ----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, 10.0, START_TIMEOUT, 400.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.happens(lambda: self.world.let_time_pass(seconds))

    @rule(seconds=st.sampled_from([-100.0, 100_000.0]))
    def set_the_clock(self, seconds: float) -> None:
        self.world.offset += seconds

    @rule(uuid=st.sampled_from(GPUS), mib=st.sampled_from([0, 0, 30_000]))
    def somebody_else_takes_memory(self, uuid: str, mib: int) -> None:
        self.world.foreign[uuid] = mib

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.world.disk_full = full
        self.world.effects_until_death = None
        self.world.save_again()

    @rule()
    def daemon_ends(self) -> None:
        self.happens(self.world.daemon_ends)

    @precondition(lambda machine: not machine.world.disk_full)
    @rule(effects=st.integers(0, 9), fate=st.sampled_from(outcomes.WAYS))
    def kill_daemon(self, effects: int, fate: str) -> None:
        """Now, or while it carries out what is decided next."""
        if effects:
            self.world.effects_until_death = effects - 1
        else:
            self.world.kill_daemon(fate)

    def teardown(self) -> None:
        world = self.world
        world.effects_until_death, world.disk_full, world.obliging = None, False, True
        world.foreign = dict.fromkeys(GPUS, 0)
        world.save_again()
        settle(world)
        truth.verify_settled(world)
        for instance_id in list(world.fleet.instances):
            world.stop(instance_id)
        settle(world)
        assert_nothing_is_left(world)


def go_on(world: World, *kinds: str) -> None:
    """Let what is outstanding of these kinds work, and what follows from it."""
    for _ in range(20):
        tasks = [task for task in world.tasks_of(*kinds) if task.kind != "memory" or outcomes.has_memory(world, task)]
        if not tasks and not ("start" in kinds and world.tasks_of("watch")):
            return
        for task in tasks:
            if task in world.tasks:
                outcomes.come_to(world, task)
        if "start" in kinds:
            for task in world.tasks_of("watch"):
                if task.tree is not None and task.tree.server:
                    outcomes.answer_probe(world, task)


def settle(world: World) -> None:
    """Let everything that is outstanding come to something, and time pass."""
    for turn in range(80):
        for task in world.tasks_of(*TASKS):
            if task in world.tasks:
                outcomes.come_to(world, task)
        for instance_id in world.unreported():
            if instance_id in world.unreported():
                outcomes.report_exit(world, instance_id, None)
        for instance_id in world.kills():
            if instance_id in world.kills():
                outcomes.finish_kill(world, instance_id)
        world.let_time_pass(2 * START_TIMEOUT)
        timed = any(set(handle.timers) - {"idle"} for handle in world.handles.values())
        if world.tasks_of(*WORK) or timed or world.unreported() or world.kills():
            continue
        if turn > LONGEST_WAY_DOWN or is_down(world):
            return
    raise AssertionError("it goes on and on")


def is_down(world: World) -> bool:
    """Whether nobody would step down any more. One that needs its accelerator for that may ask and try for ever."""
    return not world.tasks_of("ask") and not any("idle" in handle.timers for handle in world.handles.values())


def assert_nothing_is_left(world: World) -> None:
    assert world.unanswered == set()
    left: list[Sized] = [world.fleet.instances, world.handles, world.journal, world.seen, world.unsaved]
    assert not any(left)
    assert not any(tree.alive for tree in world.trees)
    world.create("a", Wish(port=8000, gpus=GPUS))
    outcomes.come_to(world, world.tasks_of("check")[0])
    assert world.last_hold == HoldPort("a", 8000, frozenset())


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(max_examples=EXAMPLES, stateful_step_count=60, deadline=None)
