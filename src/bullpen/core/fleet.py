"""All instances of one node, and the only code that changes them.

`Fleet.handle` is a function of its own state, an event and the time: it returns the effects to carry out. The life of
a create: ``Create`` → check the options in a leased process → hold a port → save → start → listed, watched, answered.
The life of a stop: ``Stop`` → SIGTERM → exit, or SIGKILL at the deadline → no process left → removed, answered.

Whatever an instance is doing, something is under way that ends it: a step of its create has an outcome, a start and a
SIGTERM have a timer, a kill ends with a scan. Only an instance that is ready, sleeping or ended waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import ENDED, Address, Instance, State
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError, ConflictError, InvalidRequestError, LaunchError, NotFoundError, StuckError

START_TIMER = "start"
STOP_TIMER = "stop"
STARTING_PATIENCE = 0.5
"""Seconds from SIGTERM to SIGKILL, at most, for a server that has not started yet."""

TERMINATED = "terminated"
NOT_RUNNING = "not_running"

LAST_PORT = 65_535


@dataclass
class Pending:
    """What an instance waits for, and the requests that wait with it.

    Attributes:
        awaits: the outcome that takes its create one step further; None once the create is decided.
        create: the create's request, until it is answered.
        refusal: what the create will be answered with when no process of it is left.
        stops: requests to remove it, each with the word that it will be answered with.
        kill_at: when the SIGKILL of a stop is due; None where nothing is timed.
        killing: whether its tree is being killed.
    """

    awaits: type[ev.Event] | None = None
    create: int | None = None
    refusal: BullpenError | None = None
    stops: list[tuple[int, str]] = field(default_factory=list)
    kill_at: float | None = None
    killing: bool = False


class Fleet:
    """The instances of a node.

    Args:
        gpus: UUIDs of the accelerators that may be claimed.
        instance_host: where servers listen whose options name no host.
        start_timeout: seconds that a start may go without any progress.
        revision: the counter's value so far, not below that of any instance to be restored.
    """

    def __init__(
        self,
        *,
        gpus: Iterable[str] = (),
        instance_host: str = "127.0.0.1",
        start_timeout: float = 1800.0,
        revision: int = 0,
    ) -> None:
        self.instances: dict[str, Instance] = {}
        self.revision = revision
        self._gpus = tuple(gpus)
        self._instance_host = instance_host
        self._start_timeout = start_timeout
        self._pending: dict[str, Pending] = {}
        self._ports: dict[int, str] = {}
        self._handlers: dict[type, Callable[[Any, float], list[fx.Effect]]] = {
            ev.Create: self._create,
            ev.Checked: self._checked,
            ev.PortReady: self._port_ready,
            ev.Refused: self._refused,
            ev.Started: self._started,
            ev.PhaseSeen: self._phase_seen,
            ev.Answered: self._answered,
            ev.Exited: self._exited,
            ev.TreeGone: self._tree_gone,
            ev.TreeStuck: self._tree_stuck,
            ev.Stop: self._stop,
            ev.TimerFired: self._timer_fired,
        }

    def handle(self, event: ev.Event, now: float) -> list[fx.Effect]:
        """Take one event at the time ``now`` (seconds since the epoch); return what must be done, in order.

        An event that comes too late, a second time or for nobody changes nothing. Never raises.
        """
        return self._handlers[type(event)](event, now)

    def listed(self) -> list[Instance]:
        """The instances that users see, oldest first."""
        return [instance for instance in self.instances.values() if instance.listed]

    def get(self, instance_id: str) -> Instance:
        """A listed instance.

        Raises:
            NotFoundError: there is none of that id.
        """
        instance = self.instances.get(instance_id)
        if instance is None or not instance.listed:
            raise NotFoundError(f"no instance {instance_id!r}")
        return instance

    def gpu_owner(self, uuid: str) -> str | None:
        """The id of the instance that has claimed an accelerator, until no process of it is left."""
        for instance in self.instances.values():
            holds = instance.state not in ENDED or not instance.tree_gone
            if holds and uuid in (instance.config.gpu_uuids or ()):
                return instance.id
        return None

    def restore(self, instance: Instance) -> list[fx.Effect]:
        """Take over an instance from the journal, its server process still alive.

        Where the process is gone, leave undone what this returns and handle an ``Exited`` instead. An instance that
        was not listed yet never became a server that anyone knows of: what is left of it is killed.
        """
        self.instances[instance.id] = instance
        self._pending[instance.id] = Pending()
        if instance.state in ENDED and instance.tree_gone:
            return []
        instance.tree_gone = False
        if instance.address is not None and instance.address.port is not None:
            self._ports[instance.address.port] = instance.id
        if not instance.listed and instance.state is State.STARTING:
            instance.enter(State.STOPPING)
        if instance.state is State.STOPPING or instance.state in ENDED:
            return self._kill(instance)
        if instance.state is State.STARTING:
            return [fx.Watch(instance.id), fx.SetTimer(instance.id, START_TIMER, self._start_timeout)]
        return []

    # -- create ------------------------------------------------------------------------------------------------

    def _create(self, event: ev.Create, now: float) -> list[fx.Effect]:
        error = self._refusal(event)
        if error is not None:
            return [fx.Reply(event.request, error=error)]
        self.instances[event.id] = Instance(event.id, event.key, event.config, created_at=now)
        self._pending[event.id] = Pending(awaits=ev.Checked, create=event.request)
        return [fx.Check(event.id)]

    def _refusal(self, event: ev.Create) -> BullpenError | None:
        if event.id in self.instances:
            return ConflictError(f"instance {event.id!r} exists already; delete it first, or choose another id")
        for uuid in event.config.gpu_uuids or ():
            if uuid not in self._gpus:
                known = ", ".join(self._gpus) or "none"
                return InvalidRequestError(f"no GPU {uuid!r} on this host; there are: {known}", field="gpu_uuids")
            owner = self.gpu_owner(uuid)
            if owner is not None:
                return ConflictError(
                    f"GPU {uuid} belongs to instance {owner!r}; delete that one, or choose another GPU"
                )
        return None

    def _awaiting(self, event: ev.Checked | ev.PortReady | ev.Started) -> Instance | None:
        """The instance whose create waits for this very outcome."""
        pending = self._pending.get(event.id)
        if pending is None or pending.awaits is not type(event):
            return None
        return self.instances[event.id]

    def _checked(self, event: ev.Checked, now: float) -> list[fx.Effect]:
        instance = self._awaiting(event)
        if instance is None:
            return []
        instance.served, instance.how = event.served, event.how
        instance.pid, instance.start_ticks = event.pid, event.start_ticks
        if event.served.uds is not None:
            return self._begin(instance, None)
        port = event.served.port or None
        error = None if port is None else self._port_refusal(port)
        if error is not None:
            return self._give_up(instance, error)
        avoid = frozenset(self._ports)
        if port is not None:
            self._ports[port] = event.id
        self._pending[event.id].awaits = ev.PortReady
        return [fx.HoldPort(event.id, port, avoid)]

    def _port_refusal(self, port: int) -> BullpenError | None:
        if not 0 < port <= LAST_PORT:
            return InvalidRequestError(
                f"--port {port} is no port; ports go from 1 to {LAST_PORT}, leave it out for any"
            )
        owner = self._ports.get(port)
        if owner is None:
            return None
        return ConflictError(f"port {port} belongs to instance {owner!r}; choose another --port, or leave it out")

    def _port_ready(self, event: ev.PortReady, now: float) -> list[fx.Effect]:
        instance = self._awaiting(event)
        if instance is None:
            return []
        self._ports[event.port] = event.id
        return self._begin(instance, event.port)

    def _begin(self, instance: Instance, port: int | None) -> list[fx.Effect]:
        """Have the process become the server. From here on there may be a tree of it."""
        served = instance.served
        assert served is not None
        instance.address = Address(served.host or self._instance_host, port, served.uds, served.tls)
        instance.tree_gone = False
        self._pending[instance.id].awaits = ev.Started
        return [fx.Save(instance.id), fx.Start(instance.id)]

    def _started(self, event: ev.Started, now: float) -> list[fx.Effect]:
        instance = self._awaiting(event)
        if instance is None:
            return []
        pending = self._pending[event.id]
        request, pending.awaits, pending.create = pending.create, None, None
        instance.listed = True
        instance.phase_started["start"] = now
        effects = [
            *self._publish("CREATED", instance),
            fx.Watch(event.id),
            fx.SetTimer(event.id, START_TIMER, self._start_timeout),
        ]
        return effects if request is None else [*effects, fx.Reply(request, instance, "started")]

    def _refused(self, event: ev.Refused, now: float) -> list[fx.Effect]:
        pending = self._pending.get(event.id)
        if pending is None or pending.awaits is None:
            return []
        return self._give_up(self.instances[event.id], event.error)

    def _give_up(self, instance: Instance, error: BullpenError) -> list[fx.Effect]:
        """End a create that is not decided yet. One whose process may have become the server is killed like any other
        and keeps port and accelerators until then, so that trying again after the answer can work."""
        pending = self._pending[instance.id]
        pending.awaits, pending.refusal = None, error
        if instance.tree_gone:
            return [fx.Discard(instance.id, instance.key), *self._drop(instance)]
        instance.enter(State.STOPPING)
        return self._kill(instance)

    def _drop(self, instance: Instance) -> list[fx.Effect]:
        """Let go of an instance of which no process is left; return the answers to all who waited for that."""
        pending = self._pending.pop(instance.id)
        del self.instances[instance.id]
        self._release_port(instance)
        if instance.state not in ENDED:
            instance.enter(State.STOPPED)
        stopped = [fx.Reply(request, instance, word) for request, word in pending.stops]
        return [*refusal_of(pending), *stopped]

    def _release_port(self, instance: Instance) -> None:
        self._ports = {port: owner for port, owner in self._ports.items() if owner != instance.id}

    def _publish(self, kind: str, instance: Instance) -> list[fx.Effect]:
        self.revision += 1
        instance.revision = self.revision
        saved: list[fx.Effect] = [] if kind == "DELETED" else [fx.Save(instance.id)]
        return [*saved, fx.Publish(kind, instance)]

    # -- running -----------------------------------------------------------------------------------------------

    def _starting(self, instance_id: str) -> Instance | None:
        """The instance of that id, where it has become a server that is not ready yet."""
        instance = self.instances.get(instance_id)
        if instance is None or not instance.listed or instance.state is not State.STARTING:
            return None
        return instance

    def _phase_seen(self, event: ev.PhaseSeen, now: float) -> list[fx.Effect]:
        instance = self._starting(event.id)
        if instance is None:
            return []
        effects: list[fx.Effect] = [fx.PublishState(instance)]
        if event.phase != instance.phase or event.progress > instance.progress:
            effects.append(fx.SetTimer(event.id, START_TIMER, self._start_timeout))
        instance.phase_started.setdefault(event.phase, now)
        instance.phase = event.phase
        instance.progress = max(instance.progress, event.progress)
        return effects

    def _answered(self, event: ev.Answered, now: float) -> list[fx.Effect]:
        instance = self._starting(event.id)
        if instance is None:
            return []
        instance.enter(State.READY)
        instance.phase, instance.progress, instance.ready_at = None, 1.0, now
        instance.phase_started["ready"] = now
        return [fx.ClearTimers(event.id), fx.Save(event.id), fx.PublishState(instance)]

    def _exited(self, event: ev.Exited, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or instance.ended_at is not None:
            return []
        instance.exit_code, instance.ended_at = event.code, now
        if self._pending[event.id].awaits is not None:
            return self._give_up(
                instance, LaunchError("the process that was to become the server has ended; try again")
            )
        effects: list[fx.Effect] = [fx.ClearTimers(event.id)]
        if instance.state is not State.STOPPING:
            if instance.state not in ENDED:  # one that could not be stopped has failed already, and says why
                instance.error = event.failure
                # An exit that nobody saw counts as an end, not as a failure: a clean one looks the same.
                instance.enter(State.STOPPED if event.code in (0, None) else State.FAILED)
            effects += [*self._publish("STOPPED", instance), fx.PublishState(instance)]
        return [*effects, *self._kill(instance)]

    # -- stop --------------------------------------------------------------------------------------------------

    def _stop(self, event: ev.Stop, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return [fx.Reply(event.request, error=NotFoundError(f"no instance {event.id!r}"))]
        pending = self._pending[event.id]
        over = instance.state in ENDED and instance.ended_at is not None
        pending.stops.append((event.request, NOT_RUNNING if over else TERMINATED))
        if pending.awaits is not None:
            return self._give_up(instance, ConflictError(f"instance {event.id!r} was deleted before it had started"))
        if instance.state in ENDED:
            return self._remove(instance) if instance.tree_gone else self._kill(instance)
        # A server that still starts has nothing to finish, and vLLM does not heed SIGTERM until it has started.
        patience = min(event.timeout, STARTING_PATIENCE) if instance.state is State.STARTING else event.timeout
        kill_at = now + patience
        timer = fx.SetTimer(event.id, STOP_TIMER, patience)
        if instance.state is State.STOPPING:
            if pending.kill_at is None or kill_at >= pending.kill_at:
                return []  # it is being killed, or will be earlier
            pending.kill_at = kill_at
            return [timer]
        pending.kill_at = kill_at
        instance.enter(State.STOPPING)
        instance.phase = None
        return [
            fx.ClearTimers(event.id),
            fx.Save(event.id),
            fx.PublishState(instance),
            fx.Terminate(event.id),
            timer,
        ]

    def _timer_fired(self, event: ev.TimerFired, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        if event.name == STOP_TIMER and instance.state is State.STOPPING:
            return self._kill(instance)
        if event.name == START_TIMER and self._starting(event.id) is not None:
            return self._start_timed_out(instance)
        return []

    def _start_timed_out(self, instance: Instance) -> list[fx.Effect]:
        doing = instance.phase or "its first step"
        instance.error = Failure(
            CrashClass.START_TIMEOUT,
            f"nothing moved for {self._start_timeout:.0f} s in {doing}; look at the log, or give it longer with"
            " --start-timeout",
        )
        instance.enter(State.STOPPING)
        kill = self._kill(instance)
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *kill]

    def _kill(self, instance: Instance) -> list[fx.Effect]:
        pending = self._pending[instance.id]
        pending.killing, pending.kill_at = True, None
        return [fx.KillTree(instance.id)]

    def _killed(self, instance_id: str) -> Instance | None:
        """The instance whose tree was being killed, that being over now."""
        pending = self._pending.get(instance_id)
        if pending is None or not pending.killing:
            return None
        pending.killing = False
        return self.instances[instance_id]

    def _tree_gone(self, event: ev.TreeGone, now: float) -> list[fx.Effect]:
        instance = self._killed(event.id)
        if instance is None:
            return []
        instance.tree_gone = True
        self._release_port(instance)
        if not instance.listed:
            return [fx.Forget(event.id, instance.key), *self._drop(instance)]
        if self._pending[event.id].stops or (instance.state is State.STOPPING and instance.error is None):
            return self._remove(instance)
        if instance.state is State.STOPPING:
            instance.enter(State.FAILED)
            return [*self._publish("STOPPED", instance), fx.PublishState(instance)]
        if instance.error is None or instance.error.kind is not CrashClass.STUCK:
            return [fx.Save(event.id)]
        instance.error = Failure(CrashClass.STUCK, "its processes outlived SIGKILL for a while; they are gone now")
        return [fx.Save(event.id), fx.PublishState(instance)]

    def _remove(self, instance: Instance) -> list[fx.Effect]:
        replies = self._drop(instance)
        forget = fx.Forget(instance.id, instance.key)
        return [fx.ClearTimers(instance.id), *self._publish("DELETED", instance), forget, *replies]

    def _tree_stuck(self, event: ev.TreeStuck, now: float) -> list[fx.Effect]:
        """End the stop, for now: the next one tries again. What cannot be killed is listed, even if it was not yet,
        because it holds its port and accelerators."""
        instance = self._killed(event.id)
        if instance is None:
            return []
        pending = self._pending[event.id]
        problem = f"processes outlive SIGKILL: {event.detail}"
        if instance.error is None or instance.error.kind is CrashClass.STUCK:
            instance.error = Failure(CrashClass.STUCK, problem)
        untold_end = instance.state is State.STOPPING and instance.ended_at is not None
        if instance.state is State.STOPPING:
            instance.enter(State.FAILED)
        effects: list[fx.Effect] = [fx.Save(event.id)]
        if not instance.listed:
            instance.listed = True
            effects = self._publish("CREATED", instance)
        elif untold_end:
            effects = self._publish("STOPPED", instance)
        refused = refusal_of(pending)
        error = StuckError(f"instance {event.id!r} cannot be stopped, {problem}")
        stuck = [fx.Reply(request, error=error) for request, _ in pending.stops]
        pending.stops = []
        return [*effects, fx.PublishState(instance), *refused, *stuck]


def refusal_of(pending: Pending) -> list[fx.Effect]:
    """The answer to a create that came to nothing, where it is still owed."""
    request, pending.create = pending.create, None
    return [] if request is None else [fx.Reply(request, error=pending.refusal)]
