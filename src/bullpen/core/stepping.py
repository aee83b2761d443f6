"""Steps down the ladder that nobody asks for: one was idle for long enough, or sleepers keep too much host memory."""

from __future__ import annotations

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Depth, Instance, State
from bullpen.core.laddering import (
    ASK_AGAIN,
    IDLE_TIMER,
    due,
    host_used,
    in_order,
    over_budget,
    reachable,
    victims,
)
from bullpen.core.operation import Doing, Operation, Stage
from bullpen.core.roster import Roster
from bullpen.core.sleeping import Sleeping, words


class Stepping:
    """Takes instances down by time and by host memory."""

    def __init__(self, roster: Roster, sleeping: Sleeping) -> None:
        self._roster = roster
        self._sleeping = sleeping

    # -- by time -----------------------------------------------------------------------------------------------

    def idle(self, instance: Instance, now: float) -> list[fx.Effect]:
        """It may be time for a step down the ladder; who is awake is asked first."""
        if self._roster.operation(instance.id) is not None or self._roster.pending[instance.id].killing:
            return []
        asleep = instance.state is State.SLEEPING
        if instance.state is State.READY or (asleep and not instance.tree_gone):
            return [fx.AskActivity(instance.id)]
        if not asleep:
            return []
        step = due(self._roster, instance)
        return [] if step is None else self._step_down(instance, step, now)

    def activity(self, event: ev.Activity, now: float) -> list[fx.Effect]:
        """A server has said how busy it is: take the step, or look again when it may be due."""
        instance = self._roster.instances.get(event.id)
        if instance is None or self._roster.operation(event.id) is not None:
            return []
        if instance.state is State.SLEEPING:
            return self._still_asleep(instance, event, now)
        if instance.state is not State.READY:
            return []
        step = due(self._roster, instance)
        if event.in_flight is None:
            return [] if step is None else [fx.SetTimer(event.id, IDLE_TIMER, ASK_AGAIN)]
        # The server counts by a clock that nobody sets; after a wake it does not know that it was away.
        known = now - instance.last_used if instance.last_used is not None else event.idle_seconds
        idle = 0.0 if event.in_flight else min(event.idle_seconds, max(0.0, known))
        instance.last_used = now - idle
        if step is None:
            return []
        if idle < step[1]:
            return [fx.SetTimer(event.id, IDLE_TIMER, step[1] - idle)]
        return self._step_down(instance, step, now)

    def _still_asleep(self, instance: Instance, event: ev.Activity, now: float) -> list[fx.Effect]:
        """A sleeper goes deeper, unless somebody waits at its gate for it to wake."""
        step = due(self._roster, instance)
        if step is None:
            return []
        if event.in_flight == 0:
            return self._step_down(instance, step, now)
        unknown = "its server does not say whether requests wait"
        held = unknown if event.in_flight is None else f"{event.in_flight} requests wait at its gate"
        why = f"goes no deeper for now: {held}"
        if instance.reason != why:
            instance.note(now, why)
        return [fx.SetTimer(instance.id, IDLE_TIMER, ASK_AGAIN), fx.PublishState(instance)]

    def _step_down(self, instance: Instance, step: tuple[Depth, float], now: float) -> list[fx.Effect]:
        depth, after = step
        awake = instance.state is State.READY
        others = self._sleeping.keeps_weights(instance)
        if not awake and depth is not Depth.STOPPED and others is not None:
            stop_after = instance.config.ladder.stop_after
            idle = now - (instance.last_used or now)
            if stop_after is None or idle < stop_after:
                instance.note(now, f"keeps its weights for now: to discard them it needs its GPU; {others}")
                again = max(ASK_AGAIN, after)
                left = again if stop_after is None else stop_after - idle
                return [fx.SetTimer(instance.id, IDLE_TIMER, min(again, left))]
            depth, after = Depth.STOPPED, stop_after
        reason = f"no request for {after:g} s"
        return self._sleeping.begin(instance, depth, now, reason=reason, drain=self._roster.patience.drain)

    # -- by host memory ----------------------------------------------------------------------------------------

    def make_room(self, now: float) -> list[fx.Effect]:
        """Take sleepers deeper until they, and the next one to come, keep no more host memory than allowed.

        One after the other, in the order of `laddering.rank`; where the next one to come is first in that order, it
        goes deeper itself.
        """
        roster = self._roster
        coming = next((pair for pair in roster.operations() if self.lacks_room(*pair)), None)
        # Until those that were adopted have been asked, it is not known who is the right one.
        going = [
            one
            for one, operation in roster.operations()
            if operation.doing is Doing.INSPECT or (operation.doing is Doing.SLEEP and one.depth > 0)
        ]
        if going or (coming is None and not over_budget(roster)):
            return []
        candidates = victims(roster) if coming is None else in_order([*victims(roster), coming[0]])
        first = candidates[0] if candidates else (coming[0] if coming else None)
        if first is None:
            return []
        rank = "it has the lowest priority and was unused for longest" if len(candidates) > 1 else "it is the only one"
        reason = (
            f"sleepers keep {host_used(roster)} MiB of host memory and {roster.limits.host_mib} are allowed;"
            f" of those that may go deeper {rank}"
        )
        if coming is not None and first is coming[0]:
            deeper = Depth(coming[1].depth + 1)
            coming[1].depth = reachable(roster, first, deeper)
            first.note(now, f"goes deeper than {words(Depth(deeper - 1), first)}: {reason}")
            return [fx.PublishState(first)]
        return self._sleeping.begin(first, self._deeper(first), now, reason=reason, drain=0.0)

    def lacks_room(self, instance: Instance, operation: Operation) -> bool:
        """Whether a sleep whose turn it could be would keep more host memory than there is room for."""
        if operation.doing is not Doing.SLEEP or operation.stage is not Stage.QUEUED:
            return False
        if instance.state is State.SLEEPING:
            return False  # who sleeps already gives memory back by going deeper
        more = self._roster.host_mib(instance, operation.depth) or 0
        return operation.depth is not Depth.STOPPED and over_budget(self._roster, more) > 0

    def _deeper(self, instance: Instance) -> Depth:
        """The next depth that gives host memory back; to discard its weights a sleeper needs its accelerators."""
        if instance.depth is Depth.LEVEL_1 and self._sleeping.keeps_weights(instance) is None:
            return reachable(self._roster, instance, Depth.LEVEL_2)
        return Depth.STOPPED
