"""All instances of one node, and the only code that changes them.

`Fleet.handle` is a function of its own state, an event and the time: it returns the effects to carry out. The life of
a create: ``Create`` → check the options in a leased process → hold a port → save → start → listed, watched, answered.
The life of a stop: ``Stop`` → SIGTERM → exit, or SIGKILL at the deadline → no process left → removed, answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import ENDED, Address, Instance, State
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError, ConflictError, InvalidRequestError, NotFoundError, StuckError

START_TIMER = "start"
STOP_TIMER = "stop"

TERMINATED = "terminated"
NOT_RUNNING = "not_running"


@dataclass
class Pending:
    """Requests that wait for something to happen to an instance."""

    create: int | None = None
    stops: list[tuple[int, str]] = field(default_factory=list)
    """Request and the word that it will be answered with."""


class Fleet:
    """The instances of a node.

    Args:
        gpus: UUIDs of the accelerators that may be claimed.
        instance_host: where servers listen whose options name no host.
        start_timeout: seconds that one phase of a start may take.
        revision: the counter's value so far.
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
        """Take one event at the time ``now`` (seconds since the epoch); return what must be done, in order."""
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
        """The id of the instance that has claimed an accelerator."""
        for instance in self.instances.values():
            holds = instance.state not in ENDED or not instance.tree_gone
            if holds and uuid in (instance.config.gpu_uuids or ()):
                return instance.id
        return None

    def restore(self, instance: Instance) -> list[fx.Effect]:
        """Take over an instance from the journal, its server process still alive.

        One that was not listed yet never became a server: it is discarded with whatever is left of it.
        """
        self.instances[instance.id] = instance
        self._pending[instance.id] = Pending()
        instance.tree_gone = False
        if instance.address is not None and instance.address.port is not None:
            self._ports[instance.address.port] = instance.id
        if not instance.listed or instance.state in ENDED or instance.state is State.STOPPING:
            return [fx.KillTree(instance.id)]
        if instance.state is State.STARTING:
            return [fx.Watch(instance.id), fx.SetTimer(instance.id, START_TIMER, self._start_timeout)]
        return []

    # -- create ------------------------------------------------------------------------------------------------

    def _create(self, event: ev.Create, now: float) -> list[fx.Effect]:
        error = self._refusal(event)
        if error is not None:
            return [fx.Reply(event.request, error=error)]
        self.instances[event.id] = Instance(event.id, event.key, event.config, created_at=now)
        self._pending[event.id] = Pending(create=event.request)
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

    def _checked(self, event: ev.Checked, now: float) -> list[fx.Effect]:
        instance = self.instances[event.id]
        instance.served, instance.how = event.served, event.how
        instance.pid, instance.start_ticks = event.pid, event.start_ticks
        if event.served.uds is not None:
            instance.address = self._address(instance, None)
            return [fx.Save(event.id), fx.Start(event.id)]
        port = event.served.port or None
        owner = self._ports.get(port) if port is not None else None
        if owner is not None:
            return self._refuse(
                event.id,
                ConflictError(f"port {port} belongs to instance {owner!r}; choose another --port, or leave it out"),
            )
        avoid = frozenset(self._ports)
        if port is not None:
            self._ports[port] = event.id
        return [fx.HoldPort(event.id, port, avoid)]

    def _address(self, instance: Instance, port: int | None) -> Address:
        assert instance.served is not None
        served = instance.served
        return Address(served.host or self._instance_host, port, served.uds, served.tls)

    def _port_ready(self, event: ev.PortReady, now: float) -> list[fx.Effect]:
        instance = self.instances[event.id]
        self._ports[event.port] = event.id
        instance.address = self._address(instance, event.port)
        return [fx.Save(event.id), fx.Start(event.id)]

    def _refused(self, event: ev.Refused, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or instance.listed:
            return []
        return self._refuse(event.id, event.error)

    def _refuse(self, instance_id: str, error: BullpenError) -> list[fx.Effect]:
        request, key = self._pending[instance_id].create, self.instances[instance_id].key
        self._drop(instance_id)
        effects: list[fx.Effect] = [fx.Discard(instance_id, key)]
        return effects if request is None else [*effects, fx.Reply(request, error=error)]

    def _drop(self, instance_id: str) -> None:
        del self.instances[instance_id]
        del self._pending[instance_id]
        self._ports = {port: owner for port, owner in self._ports.items() if owner != instance_id}

    def _started(self, event: ev.Started, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        instance.listed, instance.tree_gone = True, False
        instance.phase_started["start"] = now
        request, self._pending[event.id].create = self._pending[event.id].create, None
        effects = [
            *self._publish("CREATED", instance),
            fx.Watch(event.id),
            fx.SetTimer(event.id, START_TIMER, self._start_timeout),
        ]
        return effects if request is None else [*effects, fx.Reply(request, instance, "started")]

    def _publish(self, kind: str, instance: Instance) -> list[fx.Effect]:
        self.revision += 1
        instance.revision = self.revision
        saved: list[fx.Effect] = [] if kind == "DELETED" else [fx.Save(instance.id)]
        return [*saved, fx.Publish(kind, instance)]

    # -- running -----------------------------------------------------------------------------------------------

    def _phase_seen(self, event: ev.PhaseSeen, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or instance.state is not State.STARTING:
            return []
        effects: list[fx.Effect] = [fx.PublishState(instance)]
        if event.phase != instance.phase:
            instance.phase_started.setdefault(event.phase, now)
            effects.append(fx.SetTimer(event.id, START_TIMER, self._start_timeout))
        instance.phase = event.phase
        instance.progress = max(instance.progress, event.progress)
        return effects

    def _answered(self, event: ev.Answered, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or instance.state is not State.STARTING:
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
        effects: list[fx.Effect] = [fx.ClearTimers(event.id)]
        if instance.state is not State.STOPPING:
            instance.error = event.failure
            # An exit that nobody saw counts as an end, not as a failure: a clean one looks the same.
            instance.enter(State.STOPPED if event.code in (0, None) else State.FAILED)
            effects += self._publish("STOPPED", instance)
            effects.append(fx.PublishState(instance))
        return [*effects, fx.KillTree(event.id)]

    # -- stop --------------------------------------------------------------------------------------------------

    def _stop(self, event: ev.Stop, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None or not instance.listed:
            return [fx.Reply(event.request, error=NotFoundError(f"no instance {event.id!r}"))]
        word = NOT_RUNNING if instance.ended_at is not None and instance.state in ENDED else TERMINATED
        stops = self._pending[event.id].stops
        stops.append((event.request, word))
        if instance.state is State.STOPPING:
            return []
        if instance.state in ENDED:
            if instance.tree_gone:
                return self._remove(instance)
            # The first one to ask starts the kill; a stuck one is tried again with each new request.
            return [fx.KillTree(event.id)] if len(stops) == 1 else []
        instance.enter(State.STOPPING)
        instance.phase = None
        return [
            fx.ClearTimers(event.id),
            fx.Save(event.id),
            fx.PublishState(instance),
            fx.Terminate(event.id),
            fx.SetTimer(event.id, STOP_TIMER, event.timeout),
        ]

    def _timer_fired(self, event: ev.TimerFired, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        if event.name == STOP_TIMER and instance.state is State.STOPPING:
            return [fx.KillTree(event.id)]
        if event.name == START_TIMER and instance.state is State.STARTING:
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
        return [fx.ClearTimers(instance.id), fx.PublishState(instance), fx.KillTree(instance.id)]

    def _tree_gone(self, event: ev.TreeGone, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        instance.tree_gone = True
        self._ports = {port: owner for port, owner in self._ports.items() if owner != event.id}
        if not instance.listed:
            self._drop(event.id)
            return [fx.Forget(event.id, instance.key)]
        if instance.state is State.STOPPING and instance.error is not None and not self._pending[event.id].stops:
            instance.enter(State.FAILED)
            return [*self._publish("STOPPED", instance), fx.PublishState(instance)]
        if instance.state is State.STOPPING or self._pending[event.id].stops:
            return self._remove(instance)
        return [fx.Save(event.id)]

    def _remove(self, instance: Instance) -> list[fx.Effect]:
        if instance.state is State.STOPPING:
            instance.enter(State.STOPPED)
        stops = self._pending[instance.id].stops
        self._drop(instance.id)
        replies = [fx.Reply(request, instance, word) for request, word in stops]
        forget = fx.Forget(instance.id, instance.key)
        return [fx.ClearTimers(instance.id), *self._publish("DELETED", instance), forget, *replies]

    def _tree_stuck(self, event: ev.TreeStuck, now: float) -> list[fx.Effect]:
        instance = self.instances.get(event.id)
        if instance is None:
            return []
        instance.error = Failure(CrashClass.STUCK, f"processes outlive SIGKILL: {event.detail}")
        if instance.state is State.STOPPING:
            instance.enter(State.FAILED)
        stops, self._pending[event.id].stops = self._pending[event.id].stops, []
        error = StuckError(f"instance {event.id!r} cannot be stopped, processes outlive SIGKILL: {event.detail}")
        return [
            fx.Save(event.id),
            fx.PublishState(instance),
            *(fx.Reply(request, error=error) for request, _ in stops),
        ]
