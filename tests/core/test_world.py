"""The fleet in a world where anything may happen at any time, the daemon's own end included."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from bullpen.core.effects import HoldPort
from tests.core.host import Handle, Task, Wish
from tests.core.world import FIRST_PORT, FOREIGN_PORT, GPUS, START_TIMEOUT, DaemonKilledError, World

T = TypeVar("T")

IDS = st.sampled_from("abc")
WISHES = st.builds(
    Wish,
    port=st.sampled_from([None, 0, 8000, 8001, FIRST_PORT, FOREIGN_PORT, 70_000]),
    uds=st.sampled_from([None, None, None, "/run/m.sock"]),
    gpus=st.sampled_from([(), GPUS[:1], GPUS[1:], GPUS]),
)
PLACE = st.integers(0, 5)
"""Which of those outstanding, counted round."""


def of(things: list[T], place: int) -> T:
    return things[place % len(things)]


def outstanding(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule applies while something of that kind is outstanding."""
    found: dict[str, Callable[[World], list[Task] | list[Handle] | list[str]]] = {
        "check": lambda world: world.tasks_of("check"),
        "port": lambda world: world.tasks_of("port"),
        "start": lambda world: world.tasks_of("start"),
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

    def happens(self, what: Callable[[], None]) -> None:
        try:
            what()
        except DaemonKilledError:
            self.world.kill_daemon()

    @rule(instance_id=IDS, wish=WISHES)
    def create(self, instance_id: str, wish: Wish) -> None:
        self.happens(lambda: self.world.create(instance_id, wish))

    @precondition(lambda machine: not machine.world.tasks_of("check"))
    @rule(instance_id=IDS, wish=WISHES)
    def create_and_start(self, instance_id: str, wish: Wish) -> None:
        """Several steps at once, or few would ever get far."""

        def steps() -> None:
            world = self.world
            world.create(instance_id, wish)
            for task in world.tasks_of("check"):
                world.finish_check(task, accepted=True)
            for task in world.tasks_of("port"):
                world.finish_port(task)
            for task in world.tasks_of("start"):
                world.finish_start(task, works=True, survives=True)

        self.happens(steps)

    @rule(instance_id=IDS, timeout=st.sampled_from([0.0, 5.0, 10.0, 600.0]))
    def stop(self, instance_id: str, timeout: float) -> None:
        self.happens(lambda: self.world.stop(instance_id, timeout))

    @outstanding("check")
    @rule(place=PLACE, accepted=st.sampled_from([True, True, True, False]))
    def finish_check(self, place: int, accepted: bool) -> None:
        self.happens(lambda: self.world.finish_check(of(self.world.tasks_of("check"), place), accepted=accepted))

    @outstanding("port")
    @rule(place=PLACE)
    def finish_port(self, place: int) -> None:
        self.happens(lambda: self.world.finish_port(of(self.world.tasks_of("port"), place)))

    @outstanding("start")
    @rule(place=PLACE, works=st.sampled_from([True, True, True, False]), survives=st.booleans())
    def finish_start(self, place: int, works: bool, survives: bool) -> None:
        task = of(self.world.tasks_of("start"), place)
        self.happens(lambda: self.world.finish_start(task, works=works, survives=survives))

    @outstanding("watch")
    @rule(place=PLACE)
    def show_phase(self, place: int) -> None:
        self.happens(lambda: self.world.show_phase(of(self.world.tasks_of("watch"), place)))

    @outstanding("watch")
    @rule(place=PLACE)
    def answer_probe(self, place: int) -> None:
        self.happens(lambda: self.world.answer_probe(of(self.world.tasks_of("watch"), place)))

    @outstanding("server")
    @rule(place=PLACE, children_too=st.booleans())
    def end_server(self, place: int, children_too: bool) -> None:
        self.world.end_server(of(self.world.servers(), place), children_too=children_too)

    @outstanding("exit")
    @rule(place=PLACE, code=st.sampled_from([0, 1, -9, None]))
    def report_exit(self, place: int, code: int | None) -> None:
        self.happens(lambda: self.world.report_exit(of(self.world.unreported(), place), code))

    @outstanding("kill")
    @rule(place=PLACE, stuck=st.sampled_from([None, None, "server", "child"]))
    def finish_kill(self, place: int, stuck: str | None) -> None:
        self.happens(lambda: self.world.finish_kill(of(self.world.kills(), place), stuck=stuck))

    @rule(seconds=st.sampled_from([1.0, 10.0, START_TIMEOUT]))
    def let_time_pass(self, seconds: float) -> None:
        self.happens(lambda: self.world.let_time_pass(seconds))

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.world.disk_full = full
        self.world.save_again()

    @rule()
    def daemon_ends(self) -> None:
        self.happens(self.world.daemon_ends)

    @precondition(lambda machine: not machine.world.disk_full)
    @rule(effects=st.integers(0, 6))
    def kill_daemon(self, effects: int) -> None:
        """Now, or while it carries out what is decided next."""
        if effects:
            self.world.effects_until_death = effects - 1
        else:
            self.world.kill_daemon()

    def teardown(self) -> None:
        world = self.world
        world.effects_until_death, world.disk_full = None, False
        world.save_again()
        settle(world)
        assert world.unanswered == set()
        for instance_id in list(world.fleet.instances):
            world.stop(instance_id)
        settle(world)
        assert_nothing_is_left(world)


def settle(world: World) -> None:
    """Let everything that is outstanding come to something, and time pass."""
    for _ in range(50):
        for task in world.tasks_of("check"):
            world.finish_check(task, accepted=True)
        for task in world.tasks_of("port"):
            world.finish_port(task)
        for task in world.tasks_of("start"):
            world.finish_start(task, works=True, survives=False)
        for instance_id in world.unreported():
            world.report_exit(instance_id, None)
        for instance_id in world.kills():
            world.finish_kill(instance_id)
        world.let_time_pass(2 * START_TIMEOUT)
        tasks = [task for task in world.tasks if task.kind != "watch"]
        timed = any(handle.timers for handle in world.handles.values())
        if not (tasks or timed or world.unreported() or world.kills()):
            return
    raise AssertionError("it goes on and on")


def assert_nothing_is_left(world: World) -> None:
    assert world.unanswered == set()
    left: list[Sized] = [world.fleet.instances, world.handles, world.journal, world.seen, world.unsaved]
    assert not any(left)
    assert not any(tree.alive for tree in world.trees.values())
    world.create("a", Wish(port=8000, gpus=GPUS))
    world.finish_check(world.tasks_of("check")[0], accepted=True)
    assert world.last_hold == HoldPort("a", 8000, frozenset())


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
