"""What all parts of the fleet share: the instances, what each waits for, the ports, the book and the counter.

Each part (`launching`, `stopping`, `sleeping`, `swapping`, `laddering`) decides about one thing, and changes instances
through here alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bullpen.core import effects as fx
from bullpen.core.book import Book, Claim, Hold
from bullpen.core.devices import Gpu
from bullpen.core.instance import ENDED, Depth, Instance, Memory, State
from bullpen.core.operation import Doing, Operation, Pending, Stage
from bullpen.core.profile import Profile, Verdict, conduct_key, profile_key
from bullpen.errors import BullpenError, ConflictError, NotFoundError

OPERATION_TIMER = "operation"
CONTEXT_MIB = 1024
"""What a server keeps on an accelerator beside weights and KV cache: CUDA's context, kernels, graphs. For estimates."""


@dataclass(frozen=True)
class Patience:
    """How long things may take, in seconds.

    Attributes:
        start: a start without any progress.
        sleep: each step of a way down.
        wake: each step of a way up.
        memory: until memory on an accelerator is free.
        turn: until others have left an accelerator alone.
        drain: requests in flight, where nobody says.
    """

    start: float = 1800.0
    sleep: float = 120.0
    wake: float = 300.0
    memory: float = 30.0
    turn: float = 3600.0
    drain: float = 60.0


@dataclass(frozen=True)
class Limits:
    """What the operator allows.

    Attributes:
        host_mib: host memory that sleepers may keep altogether; None: as much as there is.
    """

    instance_host: str = "127.0.0.1"
    host_mib: int | None = None
    patience: Patience = field(default_factory=Patience)


class Roster:
    """The instances of a node and what is known of them."""

    def __init__(
        self,
        *,
        gpus: Iterable[Gpu] = (),
        limits: Limits | None = None,
        profiles: Mapping[str, Profile] | None = None,
        revision: int = 0,
    ) -> None:
        self.instances: dict[str, Instance] = {}
        self.pending: dict[str, Pending] = {}
        self.ports: dict[int, str] = {}
        self.revision = revision
        self.gpus = tuple(gpus)
        self.limits = limits or Limits()
        self.profiles = dict(profiles or {})
        self.refusals: dict[int, BullpenError] = {}
        """By the number of a swap: why the instance that it was to create came to nothing."""
        self._numbers = itertools.count(1)

    @property
    def patience(self) -> Patience:
        """How long things may take."""
        return self.limits.patience

    # -- reading -----------------------------------------------------------------------------------------------

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

    def operation(self, instance_id: str) -> Operation | None:
        """What is being done with an instance."""
        pending = self.pending.get(instance_id)
        return None if pending is None else pending.operation

    def current(self, instance_id: str, number: int, stage: Stage, *doing: Doing) -> tuple[Instance, Operation] | None:
        """An instance and its operation, where that is still the one of this number and at this stage; and, where
        given, does one of these."""
        operation = self.operation(instance_id)
        if operation is None or (operation.number, operation.stage) != (number, stage):
            return None
        return None if doing and operation.doing not in doing else (self.instances[instance_id], operation)

    def operations(self) -> list[tuple[Instance, Operation]]:
        """All that is being done, in the order in which it was begun."""
        found = [
            (self.instances[instance_id], pending.operation)
            for instance_id, pending in self.pending.items()
            if pending.operation is not None
        ]
        return sorted(found, key=lambda pair: pair[1].number)

    def next_number(self) -> int:
        """A number for an operation or a swap."""
        return next(self._numbers)

    # -- the book ----------------------------------------------------------------------------------------------

    def hold(self, instance: Instance) -> Hold | None:
        """How an instance has its accelerators now; None where it has none of their memory and is not to get any."""
        sleeps = instance.depth in (Depth.LEVEL_1, Depth.LEVEL_2)
        operation = self.operation(instance.id)
        if operation is not None:
            deepens = instance.state is State.SLEEPING and operation.depth is not Depth.STOPPED
            upward = operation.doing in (Doing.START, Doing.WAKE) or deepens
            if operation.stage in (Stage.PREPARING, Stage.QUEUED) and upward:
                return Hold.COMING
            ends = operation.doing is Doing.SLEEP and operation.depth is Depth.STOPPED
            return Hold.ASLEEP if ends and sleeps else Hold.AWAKE
        if instance.state in ENDED:
            return None if instance.tree_gone else Hold.AWAKE  # what is left of it may hold anything
        if instance.depth is Depth.STOPPED and instance.tree_gone:
            return None
        return Hold.ASLEEP if sleeps else Hold.AWAKE

    def book(self) -> Book:
        """The claims as they are now."""
        claims = [
            Claim(instance.id, instance.gpus, hold, instance.config.gpu_share, self.held_mib(instance, hold))
            for instance in self.instances.values()
            if instance.gpus and (hold := self.hold(instance)) is not None
        ]
        return Book(self.gpus, claims)

    def held_mib(self, instance: Instance, hold: Hold) -> int | None:
        """What an instance holds of each accelerator, or needs there."""
        if hold is Hold.ASLEEP:
            return self.memory(instance, instance.depth)
        return self.needed_mib(instance)

    def memory(self, instance: Instance, depth: Depth) -> int | None:
        """What an instance was measured to hold of an accelerator at a depth, or another of its kind was."""
        own = instance.memory.get(int(depth))
        known = own or self.profile(instance).memory.get(int(depth))
        return known.gpu if known else None

    def host_mib(self, instance: Instance, depth: Depth) -> int | None:
        """The same for host memory; before it was ever measured, level 1 keeps the weights there."""
        own = instance.memory.get(int(depth))
        known = own or self.profile(instance).memory.get(int(depth))
        if known is not None and known.host is not None:
            return known.host
        return instance.served.weights_mib if depth is Depth.LEVEL_1 and instance.served else None

    def needed_mib(self, instance: Instance) -> int | None:
        """What an instance needs of each accelerator when it is awake: as measured; before that as its options say:
        the share that it takes, or weights and KV cache."""
        measured = self.memory(instance, Depth.AWAKE)
        gpu = next((gpu for gpu in self.gpus if gpu.uuid in instance.gpus), None)
        served = instance.served
        if measured is not None or gpu is None or served is None:
            return measured
        if served.kv_mib is not None and served.weights_mib is not None:
            return served.weights_mib // len(instance.gpus) + served.kv_mib + CONTEXT_MIB
        share = served.utilization or instance.config.gpu_share
        return None if share is None else int(share * gpu.memory_mib)

    def start_mib(self, instance: Instance) -> int | None:
        """What must be free on each accelerator before an instance starts: vLLM does not start where less is free than
        the share of the memory that its options name, whatever it uses then."""
        needed = self.needed_mib(instance)
        gpu = next((gpu for gpu in self.gpus if gpu.uuid in instance.gpus), None)
        share = instance.served.utilization if instance.served else None
        asked = None if gpu is None or share is None else int(share * gpu.memory_mib)
        return max((mib for mib in (needed, asked) if mib is not None), default=None)

    def is_alone(self, instance: Instance, uuid: str) -> bool:
        """Whether no other instance has anything to do with an accelerator, not even one that sleeps there or has
        ended: what changes on it is this one's doing."""
        return not any(uuid in other.gpus for other in self.instances.values() if other is not instance)

    def found_empty(self, instance: Instance) -> dict[str, int]:
        """What was free before a start on those accelerators of an instance that nobody used, strangers included."""
        return {
            gpu.uuid: free
            for gpu in self.gpus
            if (free := instance.free_before.get(gpu.uuid)) is not None
            and gpu.memory_mib - free <= CONTEXT_MIB  # the driver keeps some for itself
            and self.is_alone(instance, gpu.uuid)
        }

    def profile_key(self, instance: Instance) -> str:
        """The key under which things are remembered for an instance."""
        return profile_key(instance, self._gpu_name(instance))

    def _gpu_name(self, instance: Instance) -> str | None:
        return next((gpu.name for gpu in self.gpus if gpu.uuid in instance.gpus), None)

    def profile(self, instance: Instance) -> Profile:
        """What is remembered of others of its kind."""
        return self.profiles.get(self.profile_key(instance)) or Profile()

    def conduct(self, instance: Instance) -> Profile:
        """What is remembered of how sleep works for others of its model, engine and accelerator."""
        return self.profiles.get(self._conduct_key(instance)) or Profile()

    def _conduct_key(self, instance: Instance) -> str:
        return conduct_key(instance, self._gpu_name(instance))

    def judge(self, instance: Instance, depth: Depth, verdict: Verdict) -> fx.SaveProfile:
        """Remember whether a depth of sleep works."""
        key = self._conduct_key(instance)
        profile = self.profiles.setdefault(key, Profile())
        profile.verdicts[int(depth)] = verdict
        return fx.SaveProfile(key, profile)

    def remember(self, instance: Instance) -> tuple[Profile, fx.SaveProfile]:
        """The profile to change, and the effect that writes it down."""
        key = self.profile_key(instance)
        profile = self.profiles.setdefault(key, Profile())
        return profile, fx.SaveProfile(key, profile)

    def adopt(self, instance: Instance) -> None:
        """Take an instance over from the journal."""
        self.instances[instance.id] = instance
        self.pending[instance.id] = Pending()
        if instance.address is None or instance.address.port is None:
            return
        if not instance.tree_gone or instance.state is State.SLEEPING:
            self.ports[instance.address.port] = instance.id

    def note_memory(self, instance: Instance, memory: Memory) -> fx.SaveProfile:
        """Keep what an instance was measured to hold at its depth, for itself and for others of its kind."""
        profile, saved = self.remember(instance)
        before = instance.memory.get(int(instance.depth)) or profile.memory.get(int(instance.depth)) or Memory()
        gpu = before.gpu if memory.gpu is None else memory.gpu
        host = before.host if memory.host is None else memory.host
        instance.memory[int(instance.depth)] = profile.memory[int(instance.depth)] = Memory(gpu, host)
        return saved

    # -- changing ----------------------------------------------------------------------------------------------

    def begin(self, instance: Instance, doing: Doing, stage: Stage, now: float, **fields: Any) -> Operation:
        """Begin to do something with an instance with which nothing is being done."""
        pending = self.pending[instance.id]
        assert pending.operation is None
        instance.moves += 1
        operation = Operation(self.next_number(), doing, stage, since=now, **fields)
        pending.operation = operation
        return operation

    def finish(
        self, instance: Instance, word: str, error: BullpenError | None = None, **details: Any
    ) -> list[fx.Effect]:
        """End what is being done with an instance, and answer those who asked for it."""
        pending = self.pending[instance.id]
        operation, pending.operation = pending.operation, None
        instance.heading = None
        if operation is None:
            return []
        answers = [
            fx.Reply(request, error=error) if error else fx.Reply(request, instance, word, details=details)
            for request in operation.requests
        ]
        if instance.state is State.READY:
            return [*answers, *(fx.Reply(request, instance, "ready") for request in operation.wakers)]
        problem = error or ConflictError(f"instance {instance.id!r} is {instance.state}")
        return [*answers, *(fx.Reply(request, error=problem) for request in operation.wakers)]

    def publish(self, kind: str, instance: Instance) -> list[fx.Effect]:
        """Count a change that every watcher sees, write it down and tell it."""
        self.revision += 1
        instance.revision = self.revision
        saved: list[fx.Effect] = [] if kind == "DELETED" else [fx.Save(instance.id)]
        # As it is now: what is decided next may change it once more before this is told.
        return [*saved, fx.Publish(kind, replace(instance))]

    def release_port(self, instance: Instance) -> None:
        """Let others have its port."""
        self.ports = {port: owner for port, owner in self.ports.items() if owner != instance.id}

    def drop(self, instance: Instance) -> list[fx.Effect]:
        """Let go of an instance of which no process is left; return the answers to all who waited for that."""
        pending = self.pending.pop(instance.id)
        del self.instances[instance.id]
        self.release_port(instance)
        if instance.state not in ENDED:
            instance.enter(State.STOPPED)
        stopped = [fx.Reply(request, instance, word) for request, word in pending.stops]
        return [*refusal_of(pending), *stopped]


def refusal_of(pending: Pending) -> list[fx.Effect]:
    """The answer to a create that came to nothing, where it is still owed."""
    request, pending.create = pending.create, None
    return [] if request is None else [fx.Reply(request, error=pending.refusal)]
