"""How an instance comes to be ready: a create, a start after an emulated sleep, a restart. One way for all.

``Check`` the options in a leased process → hold a port → wait for its turn and for memory → save → ``Start`` → watch →
ready. Until a create's process has become the server it is not listed, and whatever goes wrong is its answer; but
where it is to be listed at once, that makes it fail.
"""

from __future__ import annotations

from collections.abc import Collection

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.book import ROUNDING
from bullpen.core.devices import resolve, select
from bullpen.core.instance import Address, Config, Depth, Instance, State
from bullpen.core.laddering import idle_timer
from bullpen.core.operation import Doing, Operation, Pending, Stage
from bullpen.core.roster import OPERATION_TIMER, Roster
from bullpen.core.stopping import Stopping
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError, ConflictError, EngineError, InvalidRequestError, LaunchError

START_TIMER = "start"
PCI_ORDER = "PCI_BUS_ID"
LAST_PORT = 65_535
WARM_UP_PHASE = "first request"
WAITING_PHASE = "waiting"


class Launching:
    """Creates and starts."""

    def __init__(self, roster: Roster, stopping: Stopping) -> None:
        self._roster = roster
        self._stopping = stopping

    # -- create ------------------------------------------------------------------------------------------------

    def create(
        self, event: ev.Create, now: float, *, swap: int | None = None, but: Collection[str] = ()
    ) -> list[fx.Effect]:
        """Begin a create; as part of a swap, those in ``but`` do not stand in its way."""
        roster = self._roster
        taken = self.taken(event.id)
        if taken is not None:
            return [fx.Reply(event.request, error=taken)]
        gpus = self.claim(event.config, but)
        if isinstance(gpus, BullpenError):
            return [fx.Reply(event.request, error=gpus)]
        instance = Instance(event.id, event.key, event.config, created_at=now, gpus=gpus)
        roster.instances[event.id] = instance
        roster.pending[event.id] = Pending(awaits=ev.Checked, create=event.request)
        roster.begin(instance, Doing.START, Stage.PREPARING, now, depth=Depth.AWAKE, reason="created", swap=swap)
        return [*(self._list(instance) if event.at_once else []), fx.Check(event.id)]

    def taken(self, instance_id: str) -> ConflictError | None:
        """Why nobody can be created under an id; None where it is free."""
        if instance_id not in self._roster.instances:
            return None
        return ConflictError(f"instance {instance_id!r} exists already; delete it first, or choose another id")

    def claim(self, config: Config, but: Collection[str]) -> tuple[str, ...] | BullpenError:
        """The accelerators of a create, where those in ``but`` do not stand in its way, or why it cannot have them."""
        book = self._roster.book()
        if config.gpus and "CUDA_VISIBLE_DEVICES" in (config.env_vars or {}):
            return other_gpus("gpus leaves the choice to Bullpen")
        if config.gpus:
            return book.place(config.gpus, config.gpu_share, but)
        try:
            uuids = tuple(resolve(self._roster.gpus, word).uuid for word in config.gpu_uuids or ())
        except InvalidRequestError as problem:
            return problem
        if len(set(uuids)) != len(uuids):
            return InvalidRequestError("a GPU is named twice", field="gpu_uuids")
        if uuids and (config.env_vars or {}).get("CUDA_DEVICE_ORDER", PCI_ORDER) != PCI_ORDER:
            return InvalidRequestError(
                f"env_vars set CUDA_DEVICE_ORDER; leave it out, GPUs are counted by {PCI_ORDER}", field="env_vars"
            )
        parts = [gpu for gpu in self._roster.gpus if gpu.uuid in uuids and gpu.parent is not None]
        if parts and len(uuids) > 1:
            return InvalidRequestError(
                f"CUDA shows a server one MIG device at most; name {parts[0].uuid} alone", field="gpu_uuids"
            )
        visible = (config.env_vars or {}).get("CUDA_VISIBLE_DEVICES")
        if uuids and visible is not None and {gpu.uuid for gpu in select(self._roster.gpus, visible)} != set(uuids):
            return other_gpus("gpu_uuids names others")
        return book.refusal(uuids, config.gpu_share, but) or uuids

    def again(self, instance: Instance, now: float) -> list[fx.Effect]:
        """Start an instance that has no process, as its operation wants it."""
        operation = self._roster.operation(instance.id)
        assert operation is not None and instance.tree_gone
        operation.stage = Stage.PREPARING
        if instance.state is not State.STARTING:
            instance.enter(State.STARTING)
        instance.attempt += 1
        instance.pid = instance.start_ticks = instance.ended_at = instance.exit_code = instance.error = None
        instance.phase, instance.progress, instance.phase_started = None, 0.0, {}
        instance.ready_at = instance.expected_ready_at = instance.canary = instance.heading = None
        self._roster.pending[instance.id].awaits = ev.Checked
        return [fx.Prefetch(instance.id), fx.Check(instance.id), fx.PublishState(instance)]

    def _awaiting(self, event: ev.Checked | ev.PortReady | ev.Started) -> Instance | None:
        """The instance whose start waits for this very outcome."""
        pending = self._roster.pending.get(event.id)
        if pending is None or pending.awaits is not type(event):
            return None
        return self._roster.instances[event.id]

    def checked(self, event: ev.Checked, now: float) -> list[fx.Effect]:
        """The options are right; hold a port."""
        instance = self._awaiting(event)
        if instance is None:
            return []
        instance.served, instance.how = event.served, event.how
        instance.pid, instance.start_ticks = event.pid, event.start_ticks
        problem = sleep_refusal(instance) or size_refusal(instance)
        if problem is not None:
            return self.fail(instance, problem, now)
        if event.served.uds is not None:
            return self._prepared(instance, None)
        port = event.served.port or self._earlier_port(instance)
        error = None if port is None else self._port_refusal(instance, port)
        if error is not None:
            return self.fail(instance, error, now)
        avoid = frozenset(self._roster.ports)
        if port is not None:
            self._roster.ports[port] = event.id
            avoid -= {port}
        self._roster.pending[event.id].awaits = ev.PortReady
        return [fx.HoldPort(event.id, port, avoid)]

    def _earlier_port(self, instance: Instance) -> int | None:
        """The port that it had before, where nobody else has it by now."""
        port = instance.address.port if instance.address is not None else None
        return port if port is None or self._roster.ports.get(port, instance.id) == instance.id else None

    def _port_refusal(self, instance: Instance, port: int) -> BullpenError | None:
        if not 0 < port <= LAST_PORT:
            return InvalidRequestError(
                f"--port {port} is no port; ports go from 1 to {LAST_PORT}, leave it out for any"
            )
        owner = self._roster.ports.get(port)
        if owner in (None, instance.id):
            return None
        return ConflictError(f"port {port} belongs to instance {owner!r}; choose another --port, or leave it out")

    def port_ready(self, event: ev.PortReady, now: float) -> list[fx.Effect]:
        """The port is held; what is left is its turn."""
        instance = self._awaiting(event)
        if instance is None:
            return []
        self._roster.ports[event.port] = event.id
        return self._prepared(instance, event.port)

    def _prepared(self, instance: Instance, port: int | None) -> list[fx.Effect]:
        served, operation = instance.served, self._roster.operation(instance.id)
        assert served is not None and operation is not None
        host = served.host or self._roster.limits.instance_host
        instance.address = Address(host, port, served.uds, served.tls)
        instance.can_sleep = may_sleep(instance)
        self._roster.pending[instance.id].awaits = None
        operation.stage = Stage.QUEUED
        return []

    def wait(self, instance: Instance) -> list[fx.Effect]:
        """It is not its turn yet: show it, so that its caller need not wait as well."""
        instance.phase = WAITING_PHASE
        return [*self._list(instance), fx.SetTimer(instance.id, OPERATION_TIMER, self._roster.patience.turn)]

    def _list(self, instance: Instance) -> list[fx.Effect]:
        """Let everyone see an instance, and answer its create."""
        pending = self._roster.pending[instance.id]
        request, pending.create = pending.create, None
        if instance.listed:
            return [fx.Save(instance.id)]
        instance.listed = True
        created = self._roster.publish("CREATED", instance)
        return created if request is None else [*created, fx.Reply(request, instance, "started")]

    def go(self, instance: Instance, operation: Operation, now: float) -> list[fx.Effect]:
        """Its turn has come: see to the memory first."""
        roster = self._roster
        mib = roster.start_mib(instance)
        crowded = roster.book().crowding(instance.gpus, mib, but=(instance.id,))
        if crowded is not None:
            return self.fail(instance, crowded, now)
        if not instance.gpus or mib is None:
            return self.start(instance, operation)
        operation.stage = Stage.MEMORY
        needs = dict.fromkeys(instance.gpus, mib)
        return [fx.AwaitMemory(instance.id, operation.number, needs, roster.patience.memory)]

    def start(self, instance: Instance, operation: Operation) -> list[fx.Effect]:
        """Have the process become the server. From here on there may be a tree of it."""
        instance.tree_gone, instance.phase = False, None
        instance.depth = Depth.AWAKE
        operation.stage = Stage.STARTING
        self._roster.pending[instance.id].awaits = ev.Started
        return [fx.Save(instance.id), fx.Start(instance.id)]

    def started(self, event: ev.Started, now: float) -> list[fx.Effect]:
        """The process has become the server."""
        instance = self._awaiting(event)
        if instance is None:
            return []
        instance.phase_started["start"] = now
        self._expect(instance, now)
        pending = self._roster.pending[event.id]
        pending.awaits = None
        told = self._roster.publish("CREATED", instance) if instance.attempt > 1 else self._list(instance)
        replies = [effect for effect in told if isinstance(effect, fx.Reply)]
        return [
            *(effect for effect in told if not isinstance(effect, fx.Reply)),
            fx.Watch(event.id),
            fx.SetTimer(event.id, START_TIMER, self._roster.patience.start),
            *replies,
        ]

    def follow(self, instance: Instance, now: float) -> list[fx.Effect]:
        """Go on with a start that an earlier daemon began, and may not have told of."""
        told: list[fx.Effect] = []
        if "start" not in instance.phase_started:
            instance.phase_started["start"] = now
            told = self._roster.publish("CREATED", instance) if instance.attempt > 1 else [fx.Save(instance.id)]
        return [*told, fx.Watch(instance.id), fx.SetTimer(instance.id, START_TIMER, self._roster.patience.start)]

    def call_off(self, instance: Instance, now: float) -> list[fx.Effect]:
        """End a start for which the earlier daemon had no process yet."""
        doing = Doing.START if instance.attempt == 1 else Doing.WAKE
        self._roster.begin(instance, doing, Stage.PREPARING, now, depth=instance.depth, reason="it was on its way")
        why = "the daemon ended before it was started; wake it, or launch it again"
        return self.fail(instance, ConflictError(why), now)

    # -- until it is ready -------------------------------------------------------------------------------------

    def starting(self, instance_id: str) -> Instance | None:
        """The instance of that id, where it has become a server that is not ready yet."""
        instance = self._roster.instances.get(instance_id)
        if instance is None or instance.state is not State.STARTING or instance.tree_gone or not instance.listed:
            return None
        return instance if self._roster.pending[instance_id].awaits is None else None

    def _expect(self, instance: Instance, now: float) -> None:
        begun = instance.phase_started
        in_phase = now - begun.get(instance.phase or "start", now)
        left = self._roster.profile(instance).expected_ready_in(
            instance.phase or "start", now - begun.get("start", now), in_phase
        )
        instance.expected_ready_at = None if left is None else now + left

    def phase_seen(self, event: ev.PhaseSeen, now: float) -> list[fx.Effect]:
        """The log shows how far it is."""
        instance = self.starting(event.id)
        if instance is None:
            return []
        effects: list[fx.Effect] = [fx.PublishState(instance)]
        if event.phase != instance.phase or event.progress > instance.progress:
            effects.append(fx.SetTimer(event.id, START_TIMER, self._roster.patience.start))
        instance.phase_started.setdefault(event.phase, now)
        instance.phase = event.phase
        instance.progress = max(instance.progress, event.progress)
        self._expect(instance, now)
        return effects

    def answered(self, event: ev.Answered, now: float) -> list[fx.Effect]:
        """It answers; what is left is the warm-up request, where there is one."""
        instance = self.starting(event.id)
        if instance is None:
            return []
        if instance.config.warm_up is None:
            return self._ready(instance, now)
        instance.phase = WARM_UP_PHASE
        instance.phase_started[WARM_UP_PHASE] = now
        seconds = self._roster.patience.wake
        return [
            fx.SetTimer(event.id, START_TIMER, self._roster.patience.start + seconds),
            fx.SendWarmUp(event.id, seconds),
            fx.PublishState(instance),
        ]

    def warmed_up(self, event: ev.WarmedUp, now: float) -> list[fx.Effect]:
        """The warm-up request is over; one that failed does not make the instance useless."""
        instance = self.starting(event.id)
        if instance is None or instance.attempt != event.attempt:
            return []
        if event.problem is not None:
            instance.note(now, f"the warm-up request failed: {event.problem}")
        return self._ready(instance, now)

    def _ready(self, instance: Instance, now: float) -> list[fx.Effect]:
        roster = self._roster
        operation = roster.operation(instance.id)
        instance.enter(State.READY)
        instance.phase, instance.progress, instance.ready_at = None, 1.0, now
        instance.expected_ready_at, instance.last_used = None, now
        instance.phase_started["ready"] = now
        profile, saved = roster.remember(instance)
        begun = instance.phase_started["start"]
        profile.phases = {phase: at - begun for phase, at in instance.phase_started.items()}
        word = "restarted" if operation is not None and operation.restarted else "started"
        error = EngineError(operation.error) if operation is not None and operation.error is not None else None
        since = operation.since if operation is not None else instance.created_at
        before = operation.found_empty if operation is not None else {}
        instance.note(now, f"{word} in {now - since:.2f} s")
        answers = roster.finish(instance, word, error)
        return [
            fx.ClearTimers(instance.id),
            fx.Save(instance.id),
            fx.PublishState(instance),
            saved,
            fx.Measure(instance.id, before),
            *idle_timer(roster, instance, now),
            *answers,
        ]

    def measured(self, event: ev.Measured, now: float) -> list[fx.Effect]:
        """What it holds at the depth that it has come to; remembered for the next of its kind."""
        instance = self._roster.instances.get(event.id)
        settled = instance is not None and instance.state in (State.READY, State.SLEEPING)
        # What was begun meanwhile, even if it has come to the same depth again, may have been measured half-way.
        if instance is None or not settled or (instance.moves, instance.depth) != (event.moves, event.depth):
            return []
        return [fx.Save(event.id), self._roster.note_memory(instance, event.memory)]

    def timed_out(self, instance: Instance, now: float) -> list[fx.Effect]:
        """Nothing has moved for too long."""
        doing = instance.phase or "its first step"
        seconds = self._roster.patience.start
        instance.error = Failure(
            CrashClass.START_TIMEOUT,
            f"nothing moved for {seconds:.0f} s in {doing}; look at the log, or give it longer with --start-timeout",
        )
        answers = self._roster.finish(instance, "", LaunchError(instance.error.message))
        instance.enter(State.STOPPING)
        kill = self._stopping.kill(instance)
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *answers, *kill]

    # -- when it comes to nothing ------------------------------------------------------------------------------

    def refused(self, event: ev.Refused, now: float) -> list[fx.Effect]:
        """A step of it did not work."""
        pending = self._roster.pending.get(event.id)
        if pending is None or (pending.awaits is None and not self._waits_unlisted(event.id)):
            return []
        instance = self._roster.instances[event.id]
        served = instance.served
        if pending.awaits is ev.PortReady and instance.listed and served is not None and not served.port:
            # Its port was let go while it had no process; any other will do.
            self._roster.release_port(instance)
            return [fx.HoldPort(event.id, None, frozenset(self._roster.ports))]
        return self.fail(instance, event.error, now)

    def _waits_unlisted(self, instance_id: str) -> bool:
        """Whether a create has come as far as waiting for memory, so that nobody knows of it yet."""
        operation, instance = self._roster.operation(instance_id), self._roster.instances[instance_id]
        waits = operation is not None and operation.stage in (Stage.QUEUED, Stage.MEMORY)
        return waits and not instance.listed

    def fail(self, instance: Instance, error: BullpenError, now: float) -> list[fx.Effect]:
        """End a start that is not decided yet. One whose process may have become the server is killed like any other
        and keeps port and accelerators until then, so that trying again after the answer can work."""
        if instance.listed:
            return self._fail_listed(instance, error, now)
        pending = self._roster.pending[instance.id]
        if pending.operation is not None and pending.operation.swap is not None:
            self._roster.refusals[pending.operation.swap] = error
        pending.awaits, pending.refusal, pending.operation = None, error, None
        if instance.tree_gone:
            return [fx.Discard(instance.id, instance.key), *self._roster.drop(instance)]
        instance.enter(State.STOPPING)
        return self._stopping.kill(instance)

    def _fail_listed(self, instance: Instance, error: BullpenError, now: float) -> list[fx.Effect]:
        """The same for one that users know: it stays, and says why it has no process."""
        pending = self._roster.pending[instance.id]
        operation = pending.operation
        pending.awaits = None
        answers = self._roster.finish(instance, "", error)
        instance.phase = None
        instance.note(now, f"could not be started: {error}")
        told: list[fx.Effect]
        if instance.tree_gone:
            self._roster.release_port(instance)
            instance.ended_at, instance.pid = instance.ended_at or now, None
            instance.depth = Depth.STOPPED
            asleep = operation is not None and operation.doing is Doing.WAKE and instance.emulates_sleep
            if asleep and not isinstance(error, InvalidRequestError | LaunchError):
                instance.enter(State.SLEEPING)  # nothing is wrong with it, it just could not have its turn
                told = [fx.Save(instance.id)]
            else:
                instance.error = Failure(CrashClass.ERROR, str(error))
                instance.enter(State.FAILED)
                told = self._roster.publish("STOPPED", instance)
            return [fx.LetGo(instance.id), fx.ClearTimers(instance.id), *told, fx.PublishState(instance), *answers]
        instance.error = Failure(CrashClass.ERROR, str(error))
        instance.enter(State.STOPPING)
        kill = self._stopping.kill(instance)
        return [fx.ClearTimers(instance.id), fx.Save(instance.id), fx.PublishState(instance), *answers, *kill]


def other_gpus(why: str) -> InvalidRequestError:
    """The refusal of a claim whose variables would put the server on other accelerators than the book says."""
    return InvalidRequestError(
        f"env_vars set CUDA_VISIBLE_DEVICES and {why}; leave the variable out, Bullpen sets it", field="env_vars"
    )


def may_sleep(instance: Instance) -> bool:
    """Whether its server is to be started so that it can sleep."""
    served, config = instance.served, instance.config
    if served is None or served.cannot_sleep is not None or config.sleep in ("off", "emulate"):
        return False
    steps = config.ladder.sleep_after is not None or config.ladder.discard_after is not None
    return config.sleep == "engine" or served.sleep_enabled or bool(instance.gpus) or steps


def size_refusal(instance: Instance) -> InvalidRequestError | None:
    """Why an instance's options ask for more than it claims."""
    served, config = instance.served, instance.config
    if served is None or not instance.gpus:
        return None
    if served.devices > len(instance.gpus):
        return InvalidRequestError(
            f"its options need {served.devices} GPUs and it claims {len(instance.gpus)}; claim more, or lower"
            " --tensor-parallel-size"
        )
    if config.gpu_share is not None and (served.utilization or 0.0) > config.gpu_share + ROUNDING:
        return InvalidRequestError(
            f"--gpu-memory-utilization {served.utilization:g} is more than its gpu_share of {config.gpu_share:g}; leave"
            " the option out, the share sets it",
            field="gpu_share",
        )
    return None


def sleep_refusal(instance: Instance) -> InvalidRequestError | None:
    """Why an instance cannot have the sleep that it asks for."""
    served, config = instance.served, instance.config
    if served is None or served.cannot_sleep is None or config.sleep == "emulate":
        return None
    if config.sleep == "engine":
        return InvalidRequestError(served.cannot_sleep, field="sleep")
    if config.sleep is None and config.ladder.sleep_after is not None:
        return InvalidRequestError(served.cannot_sleep, field="sleep_after")
    if config.sleep is None and config.ladder.discard_after is not None:
        return InvalidRequestError(served.cannot_sleep, field="discard_after")
    return None
