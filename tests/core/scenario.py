"""A fleet, a clock, and short ways to tell it what happens: for tests that read like a story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Instance, Served, State
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import BullpenError

START_TIMEOUT = 60.0
GPUS = ("GPU-0", "GPU-1")
CRASH = Failure(CrashClass.ERROR, "it fell over")


def config(gpus: Sequence[str] | None = None, **fields: Any) -> Config:
    """A configuration that the fleet never looks into, but for its accelerators."""
    return Config("--model m", ("--model", "m"), gpu_uuids=None if gpus is None else tuple(gpus), **fields)


def served(port: int | None = None, host: str | None = None, uds: str | None = None, tls: bool = False) -> Served:
    """What the engine's parser may have read."""
    return Served("m", ("m",), port, host, uds, tls)


def kinds(effects: Sequence[fx.Effect]) -> list[str]:
    """The effects' names; what is published is named too."""
    return [effect.kind if isinstance(effect, fx.Publish) else type(effect).__name__ for effect in effects]


class Scenario:
    """One fleet in virtual time. Every call but ``instance`` and ``answer`` returns the effects of what it tells."""

    def __init__(self, revision: int = 0) -> None:
        self.fleet = Fleet(gpus=GPUS, instance_host="127.0.0.1", start_timeout=START_TIMEOUT, revision=revision)
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

    # -- requests ----------------------------------------------------------------------------------------------

    def create(self, instance_id: str = "a", gpus: Sequence[str] | None = None) -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Create(self._requests, instance_id, f"key-{self._requests}", config(gpus)))

    def stop(self, instance_id: str = "a", timeout: float = 10.0) -> list[fx.Effect]:
        self._requests += 1
        return self.tell(ev.Stop(self._requests, instance_id, timeout))

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

    # -- shortcuts ---------------------------------------------------------------------------------------------

    def reach(
        self, state: State, instance_id: str = "a", gpus: Sequence[str] | None = None, port: int | None = None
    ) -> Instance:
        """Create an instance and bring it to a state, through everything that comes before it."""
        self.create(instance_id, gpus)
        self.checked(instance_id, port=port)
        self.port_ready(instance_id, port)
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

    def stick(self, instance_id: str = "a") -> Instance:
        """Create an instance and fail to stop it, its server process included."""
        instance = self.reach(State.STOPPING, instance_id)
        self.timer("stop", instance_id)
        self.tree_stuck(instance_id)
        assert instance.state is State.FAILED
        return instance
