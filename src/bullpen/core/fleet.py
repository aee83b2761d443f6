"""All instances of one node, and the only code that changes them.

`Fleet.handle` is a function of its own state, an event and the time: it returns the effects to carry out. What an event
means is decided by the part that it is about: `launching`, `stopping`, `sleeping`, `swapping`. After each event the
fleet looks for what can go on now: an operation whose turn has come, a swap, a sleeper that must make room.

Whatever an instance is doing, something is under way that ends it: a step of a start has an outcome, an engine that is
told something answers or is given up, a turn and a SIGTERM have a timer, a kill ends with a scan. Only an instance that
is ready, sleeping or ended waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.book import Hold
from bullpen.core.devices import Gpu
from bullpen.core.instance import ENDED, Depth, Instance, State
from bullpen.core.judging import judge
from bullpen.core.laddering import IDLE_TIMER, idle_timer
from bullpen.core.launching import START_TIMER, Launching
from bullpen.core.operation import Doing, Operation, Stage
from bullpen.core.profile import Profile
from bullpen.core.roster import OPERATION_TIMER, Limits, Roster
from bullpen.core.sleeping import Sleeping
from bullpen.core.stepping import Stepping
from bullpen.core.stopping import STOP_TIMER, Stopping
from bullpen.core.swapping import Swapping
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError, ConflictError, LaunchError


class Fleet:
    """The instances of a node.

    Args:
        gpus: the accelerators that may be claimed.
        limits: what the operator allows.
        profiles: what is remembered of models.
        revision: the counter's value so far, not below that of any instance to be restored.
    """

    def __init__(
        self,
        *,
        gpus: Iterable[Gpu] = (),
        limits: Limits | None = None,
        profiles: Mapping[str, Profile] | None = None,
        revision: int = 0,
    ) -> None:
        self.roster = Roster(gpus=gpus, limits=limits, profiles=profiles, revision=revision)
        self._stopping = Stopping(self.roster)
        self._launching = Launching(self.roster, self._stopping)
        self._sleeping = Sleeping(self.roster, self._launching, self._stopping)
        self._stepping = Stepping(self.roster, self._sleeping)
        self._swapping = Swapping(self.roster, self._sleeping, self._launching, self._stopping)
        launching, sleeping = self._launching, self._sleeping
        self._handlers: dict[type, Callable[[Any, float], list[fx.Effect]]] = {
            ev.Create: launching.create,
            ev.Checked: launching.checked,
            ev.PortReady: launching.port_ready,
            ev.Refused: launching.refused,
            ev.Started: launching.started,
            ev.PhaseSeen: launching.phase_seen,
            ev.Answered: launching.answered,
            ev.WarmedUp: launching.warmed_up,
            ev.Measured: launching.measured,
            ev.Exited: self._exited,
            ev.TreeGone: self._tree_gone,
            ev.TreeStuck: lambda event, now: self._stopping.tree_stuck(event),
            ev.Stop: self._stop,
            ev.Sleep: sleeping.sleep,
            ev.Wake: sleeping.wake,
            ev.Swap: self._swapping.swap,
            ev.Judge: lambda event, now: judge(self.roster, event, now),
            ev.Drained: sleeping.drained,
            ev.Slept: sleeping.slept,
            ev.Woken: sleeping.woken,
            ev.EngineFailed: sleeping.engine_failed,
            ev.MemoryFree: self._memory_free,
            ev.MemoryShort: self._memory_short,
            ev.Inspected: self._inspected,
            ev.Activity: self._stepping.activity,
            ev.TimerFired: self._timer_fired,
        }

    @property
    def instances(self) -> Mapping[str, Instance]:
        """All instances by id, those that are not listed yet included."""
        return self.roster.instances

    @property
    def revision(self) -> int:
        """The counter of changes that every watcher sees."""
        return self.roster.revision

    def listed(self) -> list[Instance]:
        """The instances that users see, oldest first."""
        return self.roster.listed()

    def get(self, instance_id: str) -> Instance:
        """A listed instance.

        Raises:
            NotFoundError: there is none of that id.
        """
        return self.roster.get(instance_id)

    def awaits(self, instance_id: str, outcome: type[ev.Event]) -> bool:
        """Whether a start waits for this very outcome."""
        pending = self.roster.pending.get(instance_id)
        return pending is not None and pending.awaits is outcome

    # -- events ------------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Take one event at the time ``now`` (seconds since the epoch); return what must be done, in order.

        An event that comes too late, a second time or for nobody changes nothing. Never raises.
        """
        try:
            effects = self._handlers[type(event)](event, now)
        except BullpenError as problem:
            effects = [fx.Reply(getattr(event, "request", ev.NOBODY), error=problem)]
        return self._settle(effects, now)

    def _settle(self, effects: list[fx.Effect], now: float) -> list[fx.Effect]:
        """Add what follows until nothing can go on, and leave out the answers that nobody waits for."""
        while more := self._advance(now):
            effects = [*effects, *more]
        return [one for one in effects if not (isinstance(one, fx.Reply) and one.request == ev.NOBODY)]

    def _advance(self, now: float) -> list[fx.Effect]:
        """Let go on what can go on now."""
        return self._swapping.advance(now) or self._give_turns(now) or self._stepping.make_room(now)

    def _give_turns(self, now: float) -> list[fx.Effect]:
        """Let those go on whose turn has come; what came first goes first on each accelerator."""
        effects: list[fx.Effect] = []
        ahead: set[str] = set()
        for instance, operation in self.roster.operations():
            if operation.stage is not Stage.QUEUED:
                continue
            reason = self._waits(instance, operation, ahead)
            if reason is None:
                operation.waits_for = ""
                effects += self._go(instance, operation, now)
                continue
            ahead |= set(instance.gpus)
            if not operation.waits_for:
                effects += self._begin_to_wait(instance, operation, reason, now)
            operation.waits_for = reason
        return effects

    def _waits(self, instance: Instance, operation: Operation, ahead: set[str]) -> str | None:
        """What keeps an operation from its turn, in words; None where nothing does."""
        if (reason := self._swapping.waits(instance, operation.swap)) is not None:
            return reason
        if self._stepping.lacks_room(instance, operation):
            return "until sleepers keep less host memory"
        for other, running in self.roster.operations():
            shared = set(instance.gpus) & set(other.gpus)
            if other.id != instance.id and running.holds_turn and shared:
                return f"for {other.id!r} on GPU {min(shared)} ({running.doing}, {running.stage})"
        if operation.doing is Doing.SLEEP and (instance.state is State.READY or operation.depth is Depth.STOPPED):
            return None  # who goes down makes room for those who wait, so it does not wait behind them
        if ahead & set(instance.gpus):
            return f"behind others for GPU {min(ahead & set(instance.gpus))}"
        book = self.roster.book()
        for uuid in instance.gpus:
            rivals = book.rivals(uuid, instance.config.gpu_share, but=(instance.id,), holds=(Hold.AWAKE,))
            if rivals:
                return f"until {rivals[0].id!r} leaves GPU {uuid}"
        return None

    def _begin_to_wait(self, instance: Instance, operation: Operation, reason: str, now: float) -> list[fx.Effect]:
        instance.note(now, f"waits {reason}")
        if operation.doing is Doing.START or instance.tree_gone:
            return [*self._launching.wait(instance), fx.PublishState(instance)]
        patience = self.roster.patience.turn
        return [fx.SetTimer(instance.id, OPERATION_TIMER, patience), fx.PublishState(instance)]

    def _go(self, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        if operation.doing is Doing.SLEEP:
            return self._sleeping.go_down(instance, operation, now)
        if operation.doing is Doing.START or instance.tree_gone:
            return self._launching.go(instance, operation, now)
        return self._sleeping.go_up(instance, operation, now)

    def _memory_free(self, event: ev.MemoryFree, now: float) -> list[fx.Effect]:
        found = self.roster.current(event.id, event.operation, Stage.MEMORY)
        if found is None:
            return []
        instance, operation = found
        instance.free_before = dict(event.free)
        if instance.tree_gone:
            operation.found_empty = self.roster.found_empty(instance)
            return self._launching.start(instance, operation)
        return self._sleeping.tell_awake(instance, operation)

    def _memory_short(self, event: ev.MemoryShort, now: float) -> list[fx.Effect]:
        found = self.roster.current(event.id, event.operation, Stage.MEMORY)
        if found is None:
            return []
        return self._sleeping.cannot_have(found[0], ConflictError(event.sentence), now)

    def _exited(self, event: ev.Exited, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or instance.ended_at is not None:
            return []
        pending = self.roster.pending[event.id]
        operation = pending.operation
        if pending.awaits is not None or instance.tree_gone:
            instance.exit_code, instance.ended_at = event.code, now
            ended = LaunchError("the process that was to become the server has ended; try again")
            return self._launching.fail(instance, ended, now)
        waking = operation is not None and operation.doing is Doing.WAKE and operation.stage is Stage.ENGINE
        if operation is not None and waking and pending.after is None:
            return self._sleeping.exited(event, instance, operation, now)
        return self._stopping.exited(event, now)

    def _tree_gone(self, event: ev.TreeGone, now: float) -> list[fx.Effect]:
        instance = self._stopping.killed(event.id)
        if instance is None:
            return []
        pending = self.roster.pending[event.id]
        after, pending.after = pending.after, None
        if after is not None:
            return self._sleeping.ended(instance, after, now)
        return self._stopping.tree_gone(instance, now)

    def _stop(self, event: ev.Stop, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is not None and not instance.listed:
            pending = self.roster.pending[event.id]
            pending.stops.append((event.request, "terminated"))
            deleted = ConflictError(f"instance {event.id!r} was deleted before it had started")
            return [] if pending.killing else self._launching.fail(instance, deleted, now)
        left = self._swapping.leave_stopped(event.id) if event.keep else []
        return [*left, *self._stopping.stop(event, now)]

    # -- time --------------------------------------------------------------------------------------------------

    def _timer_fired(self, event: ev.TimerFired, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        if event.name == STOP_TIMER:
            return self._stopping.timer_fired(instance)
        if event.name == START_TIMER and self._launching.starting(event.id) is not None:
            return self._launching.timed_out(instance, now)
        if event.name == OPERATION_TIMER:
            return self._turn_timed_out(instance, now)
        if event.name == IDLE_TIMER:
            return self._stepping.idle(instance, now)
        return []

    def _turn_timed_out(self, instance: Instance, now: float) -> list[fx.Effect]:
        operation = self.roster.operation(instance.id)
        if operation is None or operation.stage is not Stage.QUEUED:
            return []
        seconds = self.roster.patience.turn
        error = ConflictError(f"instance {instance.id!r} waited {seconds:.0f} s {operation.waits_for}; try again later")
        return self._sleeping.cannot_have(instance, error, now)

    # -- after a restart of the daemon -------------------------------------------------------------------------

    def restore(self, instance: Instance, now: float, *, alive: bool) -> list[fx.Effect]:
        """Take over an instance from the journal; ``alive``: its server process is that very one and lives.

        An instance that was not listed yet never became a server that anyone knows of: what is left of it is killed.
        """
        self.roster.adopt(instance)
        effects = self._resume(instance, now, alive=alive)
        if not alive and instance.listed and instance.ended_at is None:
            failure = Failure(CrashClass.UNKNOWN, "it ended while no daemon was watching; its log may say why")
            effects = [*effects, *self._exited(ev.Exited(instance.id, None, failure), now)]
        return effects

    def _resume(self, instance: Instance, now: float, *, alive: bool) -> list[fx.Effect]:
        ending = instance.heading is Depth.STOPPED
        if instance.state in (*ENDED, State.SLEEPING) and instance.tree_gone:
            return idle_timer(self.roster, instance, now)
        if instance.state is State.STARTING and instance.listed and instance.tree_gone:
            return self._launching.call_off(instance, now)
        instance.tree_gone = False
        if not instance.listed and instance.state is State.STARTING:
            instance.enter(State.STOPPING)
        if instance.state is State.STOPPING or instance.state in ENDED:
            return self._stopping.kill(instance)
        if ending:
            self.roster.begin(instance, Doing.SLEEP, Stage.ENDING, now, depth=Depth.STOPPED, reason="it was on its way")
            return self._stopping.kill_and_keep(instance)
        if not alive and instance.ended_at is not None:  # as every watcher knows: it was to be started again
            why = "the daemon ended before it could start it again; wake it, or launch it again"
            instance.error = Failure(CrashClass.ERROR, why)
            instance.enter(State.FAILED)
            return [fx.Save(instance.id), fx.PublishState(instance), *self._stopping.kill(instance)]
        if not alive:
            return []
        if instance.state is State.STARTING:
            self.roster.begin(instance, Doing.START, Stage.STARTING, now, depth=Depth.AWAKE, reason="adopted")
            return self._launching.follow(instance, now)
        if not instance.can_sleep:
            return [fx.OpenGate(instance.id), *idle_timer(self.roster, instance, now)]
        operation = self.roster.begin(
            instance, Doing.INSPECT, Stage.ENGINE, now, depth=instance.depth, reason="adopted"
        )
        return [fx.Inspect(instance.id, operation.number, self.roster.patience.sleep)]

    def _inspected(self, event: ev.Inspected, now: float) -> list[fx.Effect]:
        """What an adopted engine does, held against what was written down before the old daemon ended."""
        found = self.roster.current(event.id, event.operation, Stage.ENGINE, Doing.INSPECT)
        if found is None:
            return []
        instance, operation = found
        asleep = instance.state is State.SLEEPING if event.asleep is None else event.asleep
        if instance.heading is not None and (event.asleep is None or asleep or instance.state is State.SLEEPING):
            # It was being told something and may have come as far as that, or half the way: awake is what is sure.
            operation.doing, operation.depth = Doing.WAKE, max(instance.depth, instance.heading)
            if instance.state is State.SLEEPING:
                instance.depth = operation.depth
            if event.asleep is None:
                return self._sleeping.restart(instance, operation, "its engine does not say whether it sleeps", now)
            return self._sleeping.tell_awake(instance, operation)
        if instance.state is State.SLEEPING and not asleep:
            operation.doing = Doing.WAKE
            return self._sleeping.tell_awake(instance, operation)
        if asleep and instance.state is State.READY:
            instance.enter(State.SLEEPING)
            instance.depth = Depth.LEVEL_1
        wakers, operation.requests = operation.requests, []
        self.roster.finish(instance, "")
        gate = [fx.OpenGate(event.id)] if instance.state is State.READY else []
        timers = idle_timer(self.roster, instance, now)
        woken = self._sleeping.wake_for(wakers, instance, now)
        return [*gate, fx.Save(event.id), fx.PublishState(instance), *timers, *woken]

    def restore_swap(self, saved: Mapping[str, Any], now: float) -> list[fx.Effect]:
        """Take back a swap that an earlier daemon did not bring to its end; after all instances were restored."""
        return self._settle(self._swapping.restore(saved, now), now)
