"""Whatever fails on the way of a swap, it ends as it should: done, or as it was before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bullpen.core.instance import Depth, State
from bullpen.errors import InvalidRequestError
from tests.core import outcomes, truth
from tests.core.host import GPUS, MODELS, Wish
from tests.core.test_world import EXAMPLES, TASKS, go_on, settle
from tests.core.world import DaemonKilledError, World

WAYS = st.lists(st.sampled_from(["works", "works", "works", *outcomes.WAYS]), max_size=14)
SLEEPS = st.sampled_from(["engine", "emulate"])
DEPTHS = st.sampled_from([None, Depth.LEVEL_1, Depth.LEVEL_2])


def two_on_one_gpu(out_sleep: str, in_sleep: str) -> World:
    """``b`` sleeps on the accelerator that ``a`` has."""
    world = World()
    for instance_id, sleep in (("b", in_sleep), ("a", out_sleep)):
        world.create(instance_id, Wish(gpus=GPUS[:1], sleep=sleep))
        go_on(world, *TASKS, "start")
        if instance_id == "b":
            world.sleep("b")
            go_on(world, *TASKS)
            end_kills(world)
    assert world.fleet.get("a").state is State.READY
    assert world.fleet.get("b").state is State.SLEEPING
    return world


def end_kills(world: World) -> None:
    for instance_id in world.unreported():
        if instance_id in world.unreported():
            outcomes.report_exit(world, instance_id, 1)
    for instance_id in world.kills():
        if instance_id in world.kills():
            outcomes.finish_kill(world, instance_id)


def play(world: World, ways: list[str]) -> None:
    """Let what is outstanding come to something, one after the other, in these ways; then let all of it work."""
    for how in ways:
        tasks = world.tasks_of(*TASKS)
        if tasks:
            outcomes.come_to(world, tasks[0], how)
        for task in world.tasks_of("watch"):
            if task.tree is not None and task.tree.server and how == "works":
                outcomes.answer_probe(world, task)
        end_kills(world)
    world.obliging = True
    for _ in range(20):
        go_on(world, *TASKS, "start")
        end_kills(world)
    settle(world)
    truth.verify_settled(world)


def assert_one_of_both(world: World, request: int, *, created: bool) -> None:
    """The swap is done, or all is as it was; where a server ended over it, it says so instead."""
    a, b = world.fleet.instances["a"], world.fleet.instances.get("b")
    reply = world.replies[request]
    if reply.error is None:
        assert reply.status == "swapped"
        assert is_ready_or_ended(world, "b")
        assert a.state is not State.READY
        return
    assert b is None if created else b is not None
    assert b is None or b.state is not State.READY, "it holds what it did not hold before"
    assert is_ready_or_ended(world, "a"), f"{a.state}: {[note.text for note in a.notes]}"
    if a.state is State.READY and not isinstance(reply.error, InvalidRequestError):
        assert "'a' is ready" in str(reply.error)


def is_ready_or_ended(world: World, instance_id: str) -> bool:
    """Whether it is ready, or its server ended by itself or did not start, which nobody can help."""
    instance = world.fleet.instances[instance_id]
    if instance.state is State.READY:
        return True
    ended = instance.state in (State.FAILED, State.STOPPED) and instance.error is not None
    return ended and "GPU" not in str(instance.error)


@settings(max_examples=EXAMPLES, deadline=None)
@given(out_sleep=SLEEPS, in_sleep=SLEEPS, depth=DEPTHS, ways=WAYS)
def test_swap_of_two_that_are_there(out_sleep: str, in_sleep: str, depth: Depth | None, ways: list[str]) -> None:
    world = two_on_one_gpu(out_sleep, in_sleep)
    request = world.swap("b", ("a",), depth)
    play(world, ways)
    assert_one_of_both(world, request, created=False)


@settings(max_examples=EXAMPLES, deadline=None)
@given(out_sleep=SLEEPS, depth=DEPTHS, ways=WAYS)
def test_swap_for_a_new_one(out_sleep: str, depth: Depth | None, ways: list[str]) -> None:
    world = World()
    world.create("a", Wish(gpus=GPUS[:1], sleep=out_sleep))
    go_on(world, *TASKS, "start")
    request = world.swap("b", None, depth, Wish(gpus=GPUS[:1], model=MODELS[1]))
    play(world, ways)
    assert_one_of_both(world, request, created=True)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    out_sleep=SLEEPS,
    in_sleep=SLEEPS,
    ways=st.lists(st.just("works"), max_size=8),
    effects=st.integers(0, 12),
    fate=st.sampled_from(outcomes.WAYS),
)
def test_daemon_is_killed_in_the_middle(
    out_sleep: str, in_sleep: str, ways: list[str], effects: int, fate: str
) -> None:
    world = two_on_one_gpu(out_sleep, in_sleep)
    request: int | None = None
    try:
        request = world.swap("b", ("a",))
        for how in ways:
            if world.tasks_of(*TASKS):
                outcomes.come_to(world, world.tasks_of(*TASKS)[0], how)
            end_kills(world)
        world.effects_until_death = effects
        go_on(world, *TASKS, "start")
        end_kills(world)
        world.effects_until_death = None
    except DaemonKilledError:
        pass
    world.kill_daemon(fate)
    play(world, [])
    awake = [one for one in world.fleet.listed() if one.state is State.READY]
    assert len(awake) <= 1
    a, b = world.fleet.get("a"), world.fleet.get("b")
    assert awake or a.error or b.error, "nobody is awake, and nobody says why"
    assert request is None or request not in world.unanswered
