"""Sleep and wake: of the engine's own kind, or emulated by a stop that keeps the slot.

Down: drain → its turn → tell the engine, confirmed and measured (emulated: end the process) → asleep.
Up: its turn → memory free → tell the engine, confirmed and compared with its canary → ready. Without a process, or
where that failed: a start like any other (`launching`).
"""

from __future__ import annotations

from collections.abc import Iterable

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import ENDED, Depth, Instance, State
from bullpen.core.laddering import (
    ASK_AGAIN,
    idle_timer,
    own_depth,
)
from bullpen.core.launching import Launching
from bullpen.core.operation import After, Doing, Operation, Stage
from bullpen.core.profile import Verdict
from bullpen.core.roster import Roster
from bullpen.core.stopping import Stopping
from bullpen.errors import BullpenError, ConflictError, EngineError

SLEEPING = "sleeping"
WOKEN = "woken"
READY = "ready"
KILLED = (-9, -15)
"""Exit codes of a server that somebody has ended, which says nothing about its sleep."""


class Sleeping:
    """Takes instances down the ladder and up again."""

    def __init__(self, roster: Roster, launching: Launching, stopping: Stopping) -> None:
        self._roster = roster
        self._launching = launching
        self._stopping = stopping

    # -- down --------------------------------------------------------------------------------------------------

    def sleep(self, event: ev.Sleep, now: float) -> list[fx.Effect]:
        """Somebody asks an instance to sleep."""
        instance = self._roster.get(event.id)
        operation = self._roster.operation(event.id)
        if operation is not None and operation.doing is Doing.SLEEP and (event.depth or 0) <= operation.depth:
            operation.requests.append(event.request)
            return []
        error = self.refusal(instance)
        if error is None and instance.depth is Depth.LEVEL_1 and event.depth is Depth.LEVEL_2:
            error = self.keeps_weights(instance)
        if error is not None:
            instance.note(now, f"asked to sleep, refused: {error}", refusal=True)
            return [fx.Reply(event.request, error=error)]
        depth = self.depth_for(instance, event.depth)
        if instance.state is State.SLEEPING and instance.depth >= depth:
            return [fx.Reply(event.request, instance, SLEEPING)]
        return self.begin(
            instance, depth, now, reason="asked to", drain=event.drain, refuse=event.refuse, request=event.request
        )

    def refusal(self, instance: Instance) -> BullpenError | None:
        """Why an instance cannot begin to go down now."""
        operation = self._roster.operation(instance.id)
        if operation is not None or instance.state not in (State.READY, State.SLEEPING):
            doing = f"is {instance.state}" if operation is None else f"is busy ({operation.doing}, {operation.stage})"
            return ConflictError(f"instance {instance.id!r} {doing}; it can sleep when it is ready")
        if self._roster.pending[instance.id].killing:
            return ConflictError(f"instance {instance.id!r} is ending")
        if instance.can_sleep or instance.emulates_sleep:
            return None
        why = instance.served.cannot_sleep if instance.served else None
        return ConflictError(
            f"instance {instance.id!r} cannot sleep: {why}"
            if why
            else f"instance {instance.id!r} was started without sleep; start it with `sleep: engine`, or with"
            " `sleep: emulate` for a stop that keeps its slot"
        )

    def depth_for(self, instance: Instance, asked: Depth | None) -> Depth:
        """How deep an instance goes where ``asked`` is what somebody said."""
        if instance.emulates_sleep:
            return Depth.STOPPED
        return asked or own_depth(self._roster, instance) or Depth.LEVEL_1

    def begin(
        self,
        instance: Instance,
        depth: Depth,
        now: float,
        *,
        reason: str,
        drain: float,
        refuse: bool = False,
        request: int | None = None,
        swap: int | None = None,
    ) -> list[fx.Effect]:
        """Begin the way down of an instance that may go."""
        fields = {"depth": depth, "reason": reason, "drain": drain, "swap": swap}
        operation = self._roster.begin(instance, Doing.SLEEP, Stage.DRAINING, now, **fields)
        if request is not None:
            operation.requests.append(request)
        instance.note(now, f"goes to sleep ({words(depth, instance)}): {reason}")
        if instance.state is State.SLEEPING:  # nothing is in flight
            operation.stage = Stage.QUEUED
            return [fx.ClearTimers(instance.id)]
        return [
            fx.ClearTimers(instance.id),
            fx.Drain(instance.id, operation.number, drain, refuse),
            fx.PublishState(instance),
        ]

    def drained(self, event: ev.Drained, now: float) -> list[fx.Effect]:
        """Requests in flight have ended, or had their time."""
        found = self._roster.current(event.id, event.operation, Stage.DRAINING)
        if found is None:
            return []
        instance, operation = found
        if event.left:
            instance.note(now, f"{event.left} requests were cut off after {operation.drain:g} s")
        instance.last_used = max(instance.last_used or 0.0, now if event.left else now - event.idle_seconds)
        operation.stage = Stage.QUEUED
        return []

    def go_down(self, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        """Its turn has come: tell the engine, or end the process."""
        if operation.depth is Depth.STOPPED:
            return self._end(instance, operation)
        kept = self.keeps_weights(instance) if instance.state is State.SLEEPING else None
        if kept is not None:
            return self.cannot_have(instance, kept, now)
        operation.stage = Stage.ENGINE
        instance.heading = operation.depth
        seconds = self._roster.patience.sleep
        return [
            fx.ClearTimers(instance.id),
            fx.Save(instance.id),
            fx.PutToSleep(instance.id, operation.number, operation.depth, seconds),
            fx.PublishState(instance),
        ]

    def _end(self, instance: Instance, operation: Operation) -> list[fx.Effect]:
        operation.stage = Stage.ENDING
        instance.heading = Depth.STOPPED
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), *self._stopping.kill_and_keep(instance)]

    def slept(self, event: ev.Slept, now: float) -> list[fx.Effect]:
        """The engine sleeps."""
        found = self._roster.current(event.id, event.operation, Stage.ENGINE, Doing.SLEEP)
        if found is None:
            return []
        instance, operation = found
        instance.canary = event.canary if event.canary is not None else instance.canary
        return [*self._asleep(instance, operation, now), fx.Measure(instance.id)]

    def _asleep(self, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        if instance.state is not State.SLEEPING:
            instance.enter(State.SLEEPING)
        instance.depth = operation.depth
        seconds = now - operation.since
        wakers, operation.wakers = operation.wakers, []
        answers = self._roster.finish(instance, SLEEPING, seconds=seconds)
        instance.note(now, f"fell asleep in {seconds:.2f} s ({words(operation.depth, instance)}): {operation.reason}")
        return [
            fx.ClearTimers(instance.id),
            fx.Save(instance.id),
            fx.PublishState(instance),
            *idle_timer(self._roster, instance, now),
            *answers,
            *self.wake_for(wakers, instance, now),
        ]

    def ended(self, instance: Instance, after: After, now: float) -> list[fx.Effect]:
        """No process is left of an instance that was to end and stay: it sleeps so, is stopped, or is started again."""
        instance.tree_gone = True
        operation = self._roster.operation(instance.id)
        assert operation is not None
        if after is After.START:
            return self._launching.again(instance, now)
        operation.depth = Depth.STOPPED
        instance.exit_code = None  # it was told to end: the signal says nothing
        if after is After.SLEEP:
            return self._asleep(instance, operation, now)
        instance.enter(State.STOPPED)
        instance.depth = Depth.STOPPED
        instance.note(now, "stopped; a wake starts it again")
        wakers, operation.wakers = operation.wakers, []
        answers = self._roster.finish(instance, SLEEPING)
        told = [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *answers]
        return [*told, *self.wake_for(wakers, instance, now)]

    # -- up ----------------------------------------------------------------------------------------------------

    def wake(self, event: ev.Wake, now: float) -> list[fx.Effect]:
        """Somebody asks for an instance to be ready."""
        instance = self._roster.get(event.id)
        operation = self._roster.operation(event.id)
        if operation is not None and operation.doing is Doing.SLEEP:
            operation.wakers.append(event.request)
            return self._turn_back(instance, now) if operation.stage is Stage.DRAINING else []
        if operation is not None:
            operation.requests.append(event.request)
            return []
        if instance.state is State.READY:
            return [fx.Reply(event.request, instance, READY)]
        error = self.wake_refusal(instance)
        if error is not None:
            instance.note(now, f"asked to wake, refused: {error}", refusal=True)
            return [fx.Reply(event.request, error=error)]
        return self.begin_wake(instance, now, reason="asked to", request=event.request)

    def wake_for(self, requests: Iterable[int], instance: Instance, now: float) -> list[fx.Effect]:
        """Wake an instance for those who asked while that had to wait."""
        return [effect for request in requests for effect in self.wake(ev.Wake(request, instance.id), now)]

    def _turn_back(self, instance: Instance, now: float) -> list[fx.Effect]:
        """Call a way down off that has not come to the engine yet."""
        error = ConflictError(f"instance {instance.id!r} was woken before it slept")
        answers = self._roster.finish(instance, "", error)
        instance.note(now, "stays awake: asked to wake while its requests were ending")
        opened = [fx.OpenGate(instance.id), fx.PublishState(instance), *idle_timer(self._roster, instance, now)]
        return [*opened, *answers]

    def wake_refusal(self, instance: Instance, but: tuple[str, ...] = ()) -> BullpenError | None:
        """Why an instance cannot come up now; those in ``but`` do not stand in its way."""
        if instance.state is State.STOPPING or self._roster.pending[instance.id].killing:
            return ConflictError(f"instance {instance.id!r} is ending; wait until it is gone, then start it anew")
        if instance.state in ENDED and not instance.tree_gone:
            return ConflictError(f"processes of instance {instance.id!r} are left and cannot be ended; delete it first")
        place = self._place(instance, but)
        return place if isinstance(place, BullpenError) else None

    def _place(self, instance: Instance, but: tuple[str, ...]) -> tuple[str, ...] | BullpenError:
        """The accelerators that an instance comes up on, or why it cannot: its own, but one without a process, whose
        accelerators were Bullpen's choice, may come up on others."""
        config, book, but = instance.config, self._roster.book(), (*but, instance.id)
        if config.gpus and instance.tree_gone:
            return book.place(config.gpus, config.gpu_share, but)
        return book.refusal(instance.gpus, config.gpu_share, but) or instance.gpus

    def begin_wake(
        self,
        instance: Instance,
        now: float,
        *,
        reason: str,
        request: int | None = None,
        swap: int | None = None,
        but: tuple[str, ...] = (),
    ) -> list[fx.Effect]:
        """Begin the way up of an instance that may come where those in ``but`` do not stand in its way."""
        place = self._place(instance, but)
        instance.gpus = instance.gpus if isinstance(place, BullpenError) else place
        lives = not instance.tree_gone
        stage = Stage.QUEUED if lives else Stage.PREPARING
        operation = self._roster.begin(instance, Doing.WAKE, stage, now, depth=instance.depth, reason=reason, swap=swap)
        if request is not None:
            operation.requests.append(request)
        instance.note(now, f"wakes: {reason}")
        if lives:
            return [fx.ClearTimers(instance.id), fx.PublishState(instance)]
        return [fx.ClearTimers(instance.id), *self._launching.again(instance, now)]

    def go_up(self, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        """Its turn has come: see to the memory first."""
        roster = self._roster
        awake = roster.needed_mib(instance)
        kept = roster.memory(instance, instance.depth) or 0
        crowded = roster.book().crowding(instance.gpus, awake, but=(instance.id,))
        if crowded is not None:
            return self.cannot_have(instance, crowded, now)
        if awake is None or awake <= kept or not instance.gpus:
            return self.tell_awake(instance, operation)
        operation.stage = Stage.MEMORY
        needs = dict.fromkeys(instance.gpus, awake - kept)
        return [
            fx.ClearTimers(instance.id),
            fx.AwaitMemory(instance.id, operation.number, needs, roster.patience.memory),
            fx.PublishState(instance),
        ]

    def tell_awake(self, instance: Instance, operation: Operation) -> list[fx.Effect]:
        """Tell the engine to wake: from the depth at which it sleeps, or to which it may have come."""
        operation.stage = Stage.ENGINE
        instance.heading = Depth.AWAKE
        depth = instance.depth if instance.state is State.SLEEPING else operation.depth
        seconds = self._roster.patience.wake
        return [
            fx.ClearTimers(instance.id),
            fx.Save(instance.id),
            fx.WakeUp(instance.id, operation.number, depth, seconds),
            fx.PublishState(instance),
        ]

    def woken(self, event: ev.Woken, now: float) -> list[fx.Effect]:
        """The engine is awake and answers as before."""
        found = self._roster.current(event.id, event.operation, Stage.ENGINE, Doing.WAKE)
        if found is None:
            return []
        instance, operation = found
        verdicts: list[fx.Effect] = []
        if operation.error is None and operation.depth in (Depth.LEVEL_1, Depth.LEVEL_2):
            how = "woke and answered as before" if instance.has_canary else "woke; it could not be asked anything"
            verdicts.append(self._roster.judge(instance, operation.depth, Verdict(True, how, now)))
        if instance.state is not State.READY:
            instance.enter(State.READY)
        instance.depth, instance.last_used = Depth.AWAKE, now
        instance.note(now, f"woke in {now - operation.since:.2f} s: {operation.error or operation.reason}")
        error = EngineError(operation.error) if operation.error is not None else None
        answers = self._roster.finish(instance, WOKEN, error, seconds=now - operation.since)
        return [
            fx.ClearTimers(event.id),
            fx.Save(event.id),
            fx.PublishState(instance),
            *verdicts,
            *idle_timer(self._roster, instance, now),
            *answers,
            fx.Measure(event.id),
        ]

    # -- when it does not work ---------------------------------------------------------------------------------

    def engine_failed(self, event: ev.EngineFailed, now: float) -> list[fx.Effect]:
        """A sleep that failed half-way is woken, a wake that failed is a restart; both are remembered."""
        current = self._roster.current
        found = current(event.id, event.operation, Stage.DRAINING) or current(
            event.id, event.operation, Stage.ENGINE, Doing.SLEEP, Doing.WAKE
        )
        if found is None:
            return []
        instance, operation = found
        effects = self._blame(instance, operation, event, now) if event.verdict else []
        if operation.doing is Doing.SLEEP and not event.touched:
            return [*effects, *self._stays(instance, event.sentence, now)]
        if operation.doing is Doing.SLEEP:
            instance.note(now, f"the sleep failed: {event.sentence}; it is being woken")
            asleep = operation.depth
            operation.doing, operation.error = Doing.WAKE, f"it could not be put to sleep: {event.sentence}"
            operation.number, operation.depth = self._roster.next_number(), asleep
            return [*effects, *self.tell_awake(instance, operation)]
        return [*effects, *self.restart(instance, operation, event.sentence, now)]

    def _blame(self, instance: Instance, operation: Operation, event: ev.EngineFailed, now: float) -> list[fx.Effect]:
        if operation.depth not in (Depth.LEVEL_1, Depth.LEVEL_2):
            return []
        return [self._roster.judge(instance, operation.depth, Verdict(False, event.sentence, now))]

    def _stays(self, instance: Instance, sentence: str, now: float) -> list[fx.Effect]:
        """It is as it was before the way down."""
        instance.note(now, f"stays {instance.state}: {sentence}")
        answers = self._roster.finish(instance, "", EngineError(sentence))
        again = idle_timer(self._roster, instance, now, at_least=ASK_AGAIN)
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *again, *answers]

    def restart(self, instance: Instance, operation: Operation, sentence: str, now: float) -> list[fx.Effect]:
        """End the process and start another in its place, for the same requests."""
        instance.note(now, f"is restarted: {sentence}")
        operation.restarted = True
        operation.stage, operation.number = Stage.ENDING, self._roster.next_number()
        instance.heading = Depth.AWAKE
        kill = self._stopping.kill(instance, After.START)
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *kill]

    def exited(self, event: ev.Exited, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        """The server has ended while its engine was being told to wake: that is a wake that failed."""
        instance.exit_code, instance.ended_at = event.code, now
        told = self._roster.publish("STOPPED", instance)
        why = event.failure.message if event.failure is not None else "it ended by itself"
        failed = ev.EngineFailed(instance.id, operation.number, why, touched=True, verdict=event.code not in KILLED)
        blamed = self._blame(instance, operation, failed, now) if failed.verdict else []
        return [*told, *blamed, *self.restart(instance, operation, why, now)]

    def cannot_have(self, instance: Instance, error: BullpenError, now: float) -> list[fx.Effect]:
        """What an instance waited for cannot be had: it stays as it is."""
        operation = self._roster.operation(instance.id)
        assert operation is not None
        if operation.doing is Doing.START or instance.tree_gone:
            return self._launching.fail(instance, error, now)
        instance.note(now, f"cannot {operation.doing}: {error}")
        gate = [fx.OpenGate(instance.id)] if instance.state is State.READY else []
        answers = self._roster.finish(instance, "", error)
        timers = [fx.ClearTimers(instance.id), *idle_timer(self._roster, instance, now, at_least=ASK_AGAIN)]
        return [*gate, *timers, fx.Save(instance.id), fx.PublishState(instance), *answers]

    def keeps_weights(self, instance: Instance) -> ConflictError | None:
        """Why a sleeper cannot discard its weights now: it is awake for a moment on the way, where there must be room
        for it. None where it can."""
        book = self._roster.book()
        return book.refusal(instance.gpus, instance.config.gpu_share, but=(instance.id,)) or book.crowding(
            instance.gpus, self._roster.needed_mib(instance), but=(instance.id,)
        )


def words(depth: Depth, instance: Instance) -> str:
    """A depth, for people."""
    if depth is Depth.STOPPED:
        return "emulated: no process, its slot stays" if instance.emulates_sleep else "no process"
    return {1: "level 1", 2: "level 2"}.get(depth, "awake")
