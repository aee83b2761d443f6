"""The ladder: idle instances step down by time and, where host memory is short, by rank.

What may step down is decided here, by functions of the instances; `sleeping` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bullpen.core import effects as fx
from bullpen.core.instance import Depth, Instance, State
from bullpen.core.roster import Roster

IDLE_TIMER = "idle"
ASK_AGAIN = 5.0
"""Seconds until a server is asked again that did not say how busy it is, or could not step down just now."""

STEPS = (Depth.LEVEL_1, Depth.LEVEL_2, Depth.STOPPED)


def can_reach(roster: Roster, instance: Instance, depth: Depth) -> bool:
    """Whether an instance can be at a depth at all and nothing that was seen speaks against it."""
    if depth is Depth.STOPPED:
        return True
    return instance.can_sleep and roster.conduct(instance).works(depth)


def due(roster: Roster, instance: Instance) -> tuple[Depth, float] | None:
    """The next step down by time: how deep, and after how many seconds without a request; None where there is none.

    A step that does not work is taken to the next depth that does.
    """
    if instance.config.ladder.pin:
        return None
    steps = []
    for depth in STEPS:
        after = instance.config.ladder.after(depth)
        if depth > instance.depth and after is not None:
            steps.append((after, reachable(roster, instance, depth)))
    if not steps:
        return None
    after, depth = min(steps)
    return depth, after


def reachable(roster: Roster, instance: Instance, depth: Depth) -> Depth:
    """The given depth, or the next deeper one that works."""
    return next(deeper for deeper in STEPS if deeper >= depth and can_reach(roster, instance, deeper))


def own_depth(roster: Roster, instance: Instance) -> Depth | None:
    """How deep an instance sleeps where nobody says: the lightest sleep that works; None where it cannot."""
    if instance.emulates_sleep:
        return Depth.STOPPED
    return next((d for d in (Depth.LEVEL_1, Depth.LEVEL_2) if can_reach(roster, instance, d)), None)


def idle_timer(roster: Roster, instance: Instance, now: float, *, at_least: float = 0.0) -> list[fx.Effect]:
    """The timer for the next step down by time, in ``at_least`` seconds."""
    step = due(roster, instance)
    if step is None or instance.state not in (State.READY, State.SLEEPING):
        return []
    idle = max(0.0, now - (instance.last_used or now))
    return [fx.SetTimer(instance.id, IDLE_TIMER, max(at_least, step[1] - idle))]


def rank(instance: Instance) -> tuple[int, float, str]:
    """The order in which instances are chosen to step down for others: lowest priority, then longest unused."""
    return instance.config.ladder.priority, instance.last_used or 0.0, instance.id


def in_order(instances: Iterable[Instance]) -> Sequence[Instance]:
    """Those that may be chosen, the first to go first."""
    return sorted((one for one in instances if not one.config.ladder.pin), key=rank)


def host_used(roster: Roster) -> int:
    """MiB of host memory that sleepers keep, those on their way to sleep included."""
    return sum(kept_mib(roster, instance) for instance in roster.instances.values())


def kept_mib(roster: Roster, instance: Instance) -> int:
    """MiB of host memory that an instance keeps as a sleeper, now or when its way down is done."""
    operation = roster.operation(instance.id)
    going = instance.heading if operation is not None and instance.heading is not None else None
    depth = going if going is not None else (instance.depth if instance.state is State.SLEEPING else Depth.AWAKE)
    if depth in (Depth.AWAKE, Depth.STOPPED):
        return 0
    return roster.host_mib(instance, depth) or 0


def over_budget(roster: Roster, more: int = 0) -> int:
    """MiB by which sleepers would keep more than the operator allows; 0 where they would not."""
    limit = roster.limits.host_mib
    return 0 if limit is None else max(0, host_used(roster) + more - limit)


def victims(roster: Roster) -> Sequence[Instance]:
    """Sleepers that may go deeper to give host memory back, the first to go first."""
    return in_order(
        instance
        for instance in roster.instances.values()
        if instance.state is State.SLEEPING
        and instance.depth in (Depth.LEVEL_1, Depth.LEVEL_2)
        and roster.operation(instance.id) is None
        and not roster.pending[instance.id].killing
        and kept_mib(roster, instance) > 0
    )
