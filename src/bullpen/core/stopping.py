"""How an instance ends: asked to, by itself, or to make room; and what is left of it.

SIGTERM → exit, or SIGKILL at the deadline → no process left → removed, or kept where that was asked for; answered.
Where the instance is to go on after that, what follows stands in its `Pending.after`.
"""

from __future__ import annotations

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import ENDED, Depth, Instance, State
from bullpen.core.operation import After
from bullpen.core.roster import Roster, refusal_of
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import ConflictError, LaunchError, NotFoundError, StuckError

STOP_TIMER = "stop"
SHORT_PATIENCE = 0.5
"""Seconds from SIGTERM to SIGKILL, at most, for a server that has nothing to finish: it starts, or it sleeps."""

TERMINATED = "terminated"
NOT_RUNNING = "not_running"


class Stopping:
    """Ends instances."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    # -- asked to ----------------------------------------------------------------------------------------------

    def stop(self, event: ev.Stop, now: float) -> list[fx.Effect]:
        """Stop a listed instance, and remove it unless it is to be kept."""
        instance = self._roster.instances.get(event.id)
        if instance is None:
            return [fx.Reply(event.request, error=NotFoundError(f"no instance {event.id!r}"))]
        pending = self._roster.pending[event.id]
        told = instance.ended_at is not None and instance.state is not State.STOPPING
        over = told and (instance.state in ENDED or instance.state is State.SLEEPING)
        keep = event.keep and not self._removes(instance)
        pending.stops.append((event.request, NOT_RUNNING if over else TERMINATED))
        pending.after = None
        operation = pending.operation
        if operation is not None:
            operation.requests, operation.wakers = operation.requests + operation.wakers, []
            if operation.is_half_told:
                instance.depth = Depth.AWAKE  # nobody will hear how far its engine has come
        deleted = ConflictError(f"instance {event.id!r} was {'stopped' if keep else 'deleted'} meanwhile")
        answers = self._roster.finish(instance, "", deleted)
        pending.awaits = None
        if instance.tree_gone and not instance.ended_at:
            answers = [fx.LetGo(event.id), *answers]
        instance.heading = Depth.STOPPED if keep else None
        if keep:
            answers = [*self._keep(instance, now), *answers]
        if instance.tree_gone:
            return [*answers, *(self._stay(instance) if keep else self._remove(instance))]
        if instance.state in ENDED:
            return [*answers, *self.kill(instance)]
        return [*answers, *self._terminate(instance, event.timeout, now)]

    def _removes(self, instance: Instance) -> bool:
        """Whether an instance is being stopped and will be removed."""
        if instance.heading is Depth.STOPPED:
            return False
        begun = instance.state is State.STOPPING and instance.error is None
        return begun or bool(self._roster.pending[instance.id].stops)

    def _keep(self, instance: Instance, now: float) -> list[fx.Effect]:
        """Begin a stop after which an instance is still listed."""
        if instance.state not in (*ENDED, State.STOPPING):
            instance.note(now, "was asked to stop")
        if instance.tree_gone and not instance.ended_at:
            instance.ended_at, instance.pid = now, None
            return [fx.ClearTimers(instance.id)]
        if instance.ended_at and instance.state not in (*ENDED, State.STOPPING):
            instance.enter(State.STOPPED)  # every watcher knows that its process has ended
            return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance)]
        return []

    def _terminate(self, instance: Instance, timeout: float, now: float) -> list[fx.Effect]:
        # vLLM does not heed SIGTERM until it has started, and one that sleeps has nothing to finish.
        idle = instance.state in (State.STARTING, State.SLEEPING)
        patience = min(timeout, SHORT_PATIENCE) if idle else timeout
        pending = self._roster.pending[instance.id]
        kill_at = now + patience
        timer = fx.SetTimer(instance.id, STOP_TIMER, patience)
        if instance.state is State.STOPPING:
            if pending.kill_at is None or kill_at >= pending.kill_at:
                return []  # it is being killed, or will be earlier
            pending.kill_at = kill_at
            return [timer]
        instance.enter(State.STOPPING)
        instance.phase = None
        begun: list[fx.Effect] = [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance)]
        if pending.killing:
            return begun
        pending.kill_at = kill_at
        return [*begun, fx.Terminate(instance.id), timer]

    def timer_fired(self, instance: Instance) -> list[fx.Effect]:
        """The time from SIGTERM to SIGKILL is over."""
        return self.kill(instance) if instance.state is State.STOPPING else []

    # -- by itself, or at last ---------------------------------------------------------------------------------

    def exited(self, event: ev.Exited, now: float) -> list[fx.Effect]:
        """The server process of an instance has ended while nobody had asked for that, or in the course of a stop."""
        instance = self._roster.instances[event.id]
        instance.exit_code, instance.ended_at = event.code, now
        pending = self._roster.pending[event.id]
        if pending.after is not None:
            return self._roster.publish("STOPPED", instance)
        effects: list[fx.Effect] = [fx.ClearTimers(event.id)]
        if instance.state is not State.STOPPING:
            answers: list[fx.Effect] = []
            if instance.state not in ENDED:  # one that could not be stopped has failed already, and says why
                instance.error = event.failure
                # An exit that nobody saw counts as an end, not as a failure: a clean one looks the same.
                instance.enter(State.STOPPED if event.code in (0, None) else State.FAILED)
                answers = self._roster.finish(instance, "", LaunchError(why_ended(instance)))
            effects += [*self._roster.publish("STOPPED", instance), fx.PublishState(instance), *answers]
        return [*effects, *self.kill(instance)]

    def kill(self, instance: Instance, after: After | None = None) -> list[fx.Effect]:
        """End every process of an instance; ``after`` says what follows where it is to stay."""
        pending = self._roster.pending[instance.id]
        pending.killing, pending.kill_at, pending.after = True, None, after
        return [fx.KillTree(instance.id)]

    def kill_and_keep(self, instance: Instance) -> list[fx.Effect]:
        """End every process of an instance that is to stay: so it sleeps, where that is emulated, or is stopped."""
        return self.kill(instance, After.SLEEP if instance.emulates_sleep else After.STOP)

    def killed(self, instance_id: str) -> Instance | None:
        """The instance whose tree was being killed, that being over now."""
        pending = self._roster.pending.get(instance_id)
        if pending is None or not pending.killing:
            return None
        pending.killing = False
        return self._roster.instances[instance_id]

    def tree_gone(self, instance: Instance, now: float) -> list[fx.Effect]:
        """No process of an instance is left that is not to stay, or that has ended by itself."""
        instance.tree_gone = True
        unseen = instance.running
        if unseen:  # nobody watched its server: an earlier daemon forked it and did not live to tell
            instance.ended_at = now
        if not instance.listed:
            self._roster.release_port(instance)
            return [fx.Forget(instance.id, instance.key), *self._roster.drop(instance)]
        return self._remove(instance) if self._removes(instance) else self._stay(instance, unseen=unseen)

    def _stay(self, instance: Instance, *, unseen: bool = False) -> list[fx.Effect]:
        """What is left of an instance that has ended, maybe ``unseen``, and is not to be removed."""
        self._roster.release_port(instance)
        instance.depth, instance.heading = Depth.STOPPED, None
        pending = self._roster.pending[instance.id]
        answers = [fx.Reply(request, instance, word) for request, word in pending.stops]
        pending.stops = []
        if instance.state not in ENDED:
            instance.phase = None
            instance.enter(State.STOPPED if instance.error is None else State.FAILED)
            told = self._roster.publish("STOPPED", instance)
            return [*told, fx.PublishState(instance), *answers]
        told = self._roster.publish("STOPPED", instance) if unseen else [fx.Save(instance.id)]
        if instance.error is None or instance.error.kind is not CrashClass.STUCK:
            return [*told, *answers]
        instance.error = Failure(CrashClass.STUCK, "its processes outlived SIGKILL for a while; they are gone now")
        return [*told, fx.PublishState(instance), *answers]

    def _remove(self, instance: Instance) -> list[fx.Effect]:
        replies = self._roster.drop(instance)
        forget = fx.Forget(instance.id, instance.key)
        return [fx.ClearTimers(instance.id), *self._roster.publish("DELETED", instance), forget, *replies]

    def tree_stuck(self, event: ev.TreeStuck) -> list[fx.Effect]:
        """End the stop, for now: the next one tries again. What cannot be killed is listed, even if it was not yet,
        because it holds its port and accelerators."""
        instance = self.killed(event.id)
        if instance is None:
            return []
        pending = self._roster.pending[event.id]
        pending.after = None
        problem = f"processes outlive SIGKILL: {event.detail}"
        if instance.error is None or instance.error.kind is CrashClass.STUCK:
            instance.error = Failure(CrashClass.STUCK, problem)
        untold_end = instance.state is State.STOPPING and instance.ended_at is not None
        if instance.state not in ENDED:
            instance.enter(State.FAILED)
        effects: list[fx.Effect] = [fx.Save(event.id)]
        if not instance.listed:
            instance.listed = True
            effects = self._roster.publish("CREATED", instance)
        elif untold_end:
            effects = self._roster.publish("STOPPED", instance)
        refused = refusal_of(pending)
        error = StuckError(f"instance {event.id!r} cannot be stopped, {problem}")
        answers = self._roster.finish(instance, "", error)
        stuck = [fx.Reply(request, error=error) for request, _ in pending.stops]
        pending.stops = []
        return [*effects, fx.PublishState(instance), *refused, *answers, *stuck]


def why_ended(instance: Instance) -> str:
    """A sentence about an instance whose server has ended."""
    if instance.error is not None:
        return f"instance {instance.id!r} ended: {instance.error.message}"
    return f"instance {instance.id!r} ended by itself (exit code {instance.exit_code}); its log may say why"
