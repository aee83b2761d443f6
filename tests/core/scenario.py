"""A fleet, a clock, and short ways to tell it what happens: for tests that read like a story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.book import Hold
from bullpen.core.devices import Gpu
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Depth, Instance, Memory, Served, State
from bullpen.core.roster import Limits, Patience
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError

START_TIMEOUT = 60.0
DRAIN = 5.0
GPUS = ("GPU-0", "GPU-1")
DEVICES = tuple(Gpu(index, uuid, "H100", 80_000) for index, uuid in enumerate(GPUS))
LIMITS = Limits(patience=Patience(start=START_TIMEOUT))
CRASH = Failure(CrashClass.ERROR, "it fell over")


def config(gpus: Sequence[str] | None = None, **fields: Any) -> Config:
    """A configuration that the fleet never looks into, but for its accelerators."""
    return Config("--model m", ("--model", "m"), gpu_uuids=None if gpus is None else tuple(gpus), **fields)


def served(
    port: int | None = None, host: str | None = None, uds: str | None = None, tls: bool = False, **fields: Any
) -> Served:
    """What the engine's parser may have read."""
    return Served("m", ("m",), port, host, uds, tls, **fields)


def kinds(effects: Sequence[fx.Effect]) -> list[str]:
    """The effects' names; what is published is named too."""
    return [effect.kind if isinstance(effect, fx.Publish) else type(effect).__name__ for effect in effects]


class Scenario:
    """One fleet in virtual time. Every call but ``instance`` and ``answer`` returns the effects of what it tells."""

    def __init__(self, revision: int = 0, limits: Limits = LIMITS) -> None:
        self.fleet = Fleet(gpus=DEVICES, limits=limits, revision=revision)
        self.now = 1000.0
        self.effects: list[fx.Effect] = []
        self._requests = 0
        self._picked = 20_000

    def tell(self, event: ev.Event) -> list[fx.Effect]:
        self.now += 1.0
        effects = self.fleet.handle(event, self.now)
        self.effects += effects
        return effects

    def instance(self, instance_id: str = "a") -> Instance:
        return self.fleet.instances[instance_id]

    def answer(self, request: int | None = None) -> fx.Reply:
        """The one reply to a request, the latest by default."""
        number = self._requests if request is None else request
        (reply,) = [effect for effect in self.effects if isinstance(effect, fx.Reply) and effect.request == number]
        return reply

    def error(self, request: int | None = None) -> BullpenError:
        """The error that a request was answered with."""
        error = self.answer(request).error
        assert error is not None
        return error

    def unanswered(self) -> list[int]:
        answered = {effect.request for effect in self.effects if isinstance(effect, fx.Reply)}
        return [request for request in range(1, self._requests + 1) if request not in answered]

    def published(self) -> list[tuple[str, str]]:
        return [(effect.kind, effect.instance.id) for effect in self.effects if isinstance(effect, fx.Publish)]

    def restore(self, instance: Instance, *, alive: bool = True) -> list[fx.Effect]:
        """Have the fleet take an instance over from the journal."""
        effects = self.fleet.restore(instance, self.now, alive=alive)
        self.effects += effects
        return effects

    def owner(self, uuid: str) -> str | None:
        """Who has an accelerator by the book, or is on the way there."""
        book = self.fleet.roster.book()
        claims = book.on(uuid, Hold.AWAKE) or book.on(uuid, Hold.COMING)
        return claims[0].id if claims else None

    # -- requests ----------------------------------------------------------------------------------------------

    def create(self, instance_id: str = "a", gpus: Sequence[str] | None = None, **fields: Any) -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Create(self._requests, instance_id, f"key-{self._requests}", config(gpus, **fields)))

    def create_at_once(self, instance_id: str = "a", gpus: Sequence[str] | None = None) -> list[fx.Effect]:
        self._requests += 1
        event = ev.Create(self._requests, instance_id, f"key-{self._requests}", config(gpus), at_once=True)
        return self.tell(event)

    def stop(self, instance_id: str = "a", timeout: float = 10.0, *, keep: bool = False) -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Stop(self._requests, instance_id, timeout, keep=keep))

    def sleep(self, instance_id: str = "a", depth: Depth | None = None, refuse: bool = False) -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Sleep(self._requests, instance_id, depth, DRAIN, refuse))

    def wake(self, instance_id: str = "a") -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Wake(self._requests, instance_id))

    def swap(
        self, incoming: str = "b", outgoing: tuple[str, ...] | None = ("a",), new: Config | None = None
    ) -> list[fx.Effect]:
        self._requests += 1
        key = None if new is None else f"key-{self._requests}"
        return self.tell(ev.Swap(self._requests, incoming, outgoing, None, DRAIN, False, key, new))

    def judge(self, instance_id: str = "a", depth: Depth = Depth.LEVEL_1, *, works: bool = False) -> list[fx.Effect]:
        """Somebody tells whether a depth works."""
        self._requests += 1
        return self.tell(ev.Judge(self._requests, instance_id, depth, works, "somebody tried it"))

    # -- outcomes ----------------------------------------------------------------------------------------------

    def checked(self, instance_id: str = "a", **options: Any) -> list[fx.Effect]:
        return self.tell(ev.Checked(instance_id, served(**options), pid=100, start_ticks=7, how="fork"))

    def port_ready(self, instance_id: str = "a", port: int | None = None) -> list[fx.Effect]:
        self._picked += 1
        return self.tell(ev.PortReady(instance_id, port or self._picked))

    def refused(self, error: BullpenError, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Refused(instance_id, error))

    def started(self, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Started(instance_id))

    def phase(self, phase: str, progress: float = 0.5, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.PhaseSeen(instance_id, phase, progress))

    def answered(self, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Answered(instance_id))

    def exited(self, code: int | None, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Exited(instance_id, code, None if code == 0 else CRASH))

    def tree_gone(self, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.TreeGone(instance_id))

    def tree_stuck(self, instance_id: str = "a", detail: str = "100 (python, state D)") -> list[fx.Effect]:
        return self.tell(ev.TreeStuck(instance_id, detail))

    def timer(self, name: str, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.TimerFired(instance_id, name))

    def drained(self, instance_id: str = "a", left: int = 0, idle: float = 1000.0) -> list[fx.Effect]:
        return self.tell(ev.Drained(instance_id, self.number(instance_id), left, idle))

    def slept(self, instance_id: str = "a", canary: str | None = "one") -> list[fx.Effect]:
        return self.tell(ev.Slept(instance_id, self.number(instance_id), canary))

    def woken(self, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Woken(instance_id, self.number(instance_id)))

    def engine_failed(
        self, sentence: str = "it did not do it", instance_id: str = "a", touched: bool = True, verdict: bool = True
    ) -> list[fx.Effect]:
        return self.tell(ev.EngineFailed(instance_id, self.number(instance_id), sentence, touched, verdict))

    def memory_free(self, instance_id: str = "a", mib: int = 79_500) -> list[fx.Effect]:
        free = dict.fromkeys(self.instance(instance_id).gpus, mib)
        return self.tell(ev.MemoryFree(instance_id, self.number(instance_id), free))

    def memory_short(self, sentence: str, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.MemoryShort(instance_id, self.number(instance_id), sentence))

    def measured(self, gpu: int | None, host: int | None, instance_id: str = "a") -> list[fx.Effect]:
        instance = self.instance(instance_id)
        return self.tell(ev.Measured(instance_id, instance.moves, instance.depth, Memory(gpu, host)))

    def activity(self, in_flight: int | None, idle: float, instance_id: str = "a") -> list[fx.Effect]:
        return self.tell(ev.Activity(instance_id, in_flight, idle))

    def number(self, instance_id: str = "a") -> int:
        """The number of what is being done with an instance."""
        operation = self.fleet.roster.operation(instance_id)
        assert operation is not None
        return operation.number

    # -- shortcuts ---------------------------------------------------------------------------------------------

    def reach(
        self,
        state: State,
        instance_id: str = "a",
        gpus: Sequence[str] | None = None,
        port: int | None = None,
        **fields: Any,
    ) -> Instance:
        """Create an instance and bring it to a state, through everything that comes before it."""
        self.create(instance_id, gpus, **fields)
        self.checked(instance_id, port=port)
        if "AwaitMemory" in kinds(self.port_ready(instance_id, port)):
            self.memory_free(instance_id)
        self.started(instance_id)
        if state is not State.STARTING:
            self.answered(instance_id)
        if state is State.STOPPING:
            self.stop(instance_id)
        if state in (State.STOPPED, State.FAILED):
            self.exited(0 if state is State.STOPPED else 1, instance_id)
            self.tree_gone(instance_id)
        instance = self.instance(instance_id)
        assert instance.state is state
        return instance

    def ready(self, instance_id: str = "a", mib: int | None = 60_000, **fields: Any) -> Instance:
        """An instance that is ready on the first accelerator, and measured."""
        instance = self.reach(State.READY, instance_id, GPUS[:1], **fields)
        self.measured(mib, 2_000, instance_id)
        return instance

    def asleep(
        self, instance_id: str = "a", depth: Depth = Depth.LEVEL_1, host: int = 20_000, **fields: Any
    ) -> Instance:
        """One that sleeps on the first accelerator by its engine's own sleep, and is measured."""
        instance = self.ready(instance_id, **fields)
        self.sleep(instance_id, depth)
        self.drained(instance_id)
        self.slept(instance_id)
        self.measured(1_500, host, instance_id)
        return instance

    def notes(self, instance_id: str = "a") -> list[str]:
        """What was decided about an instance."""
        return [note.text for note in self.instance(instance_id).notes]

    def stick(self, instance_id: str = "a") -> Instance:
        """Create an instance and fail to stop it, its server process included."""
        instance = self.reach(State.STOPPING, instance_id)
        self.timer("stop", instance_id)
        self.tree_stuck(instance_id)
        assert instance.state is State.FAILED
        return instance
