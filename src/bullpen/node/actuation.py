"""The steps of sleep and wake that may wait: drain, tell the engine, ask the canary, wait for memory, measure.

Each step ends with its outcome as an event, whatever happens; the calls to the server have their deadlines in
`engine_control`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import NO_CANARY, Instance, Memory, State
from bullpen.engines.registry import ENGINES
from bullpen.engines.weights import weight_files
from bullpen.errors import BullpenError, StateError
from bullpen.node.engine_control import EngineCallError, EngineControl
from bullpen.node.gpus import wait_for_memory
from bullpen.node.host_memory import tree_mib
from bullpen.node.http import NoAnswerError
from bullpen.node.prefetch import prefetch
from bullpen.node.resources import Resources
from bullpen.node.trees import Tree

logger = logging.getLogger("bullpen")

LAST_WORD_SECONDS = 0.5
"""How long a server that is about to be killed may take to send away those whom it holds."""
LAST_WORD_TICK = 0.002

Step = Callable[[Instance, Any], Coroutine[Any, Any, ev.Event | None]]


class Actuation:
    """Carries out the steps of sleep and wake.

    Args:
        fleet: read for what an effect is about.
        submit: takes the next event.
    """

    def __init__(self, fleet: Fleet, resources: Resources, submit: Callable[[ev.Event], None]) -> None:
        self._fleet = fleet
        self._resources = resources
        self._submit = submit
        self._control = EngineControl()
        self.steps: Mapping[type, Step] = {
            fx.Drain: self._drain,
            fx.PutToSleep: self._put_to_sleep,
            fx.WakeUp: self._wake_up,
            fx.OpenGate: self._open_gate,
            fx.Inspect: self._inspect,
            fx.AwaitMemory: self._await_memory,
            fx.Measure: self._measure,
            fx.SendWarmUp: self._send_warm_up,
            fx.AskActivity: self._ask_activity,
            fx.Prefetch: self._prefetch,
        }

    async def step(self, effect: Any) -> None:
        """Do one step and submit what it has come to, unless the instance is gone by then."""
        instance = self._fleet.instances.get(effect.id)
        if instance is None:
            return
        try:
            outcome = await self.steps[type(effect)](instance, effect)
        except Exception as problem:
            if not isinstance(problem, BullpenError):
                logger.exception("%s of %s failed; this is a bug in Bullpen", type(effect).__name__, effect.id)
            outcome = failed(effect, instance, problem)
        if outcome is not None and self._fleet.instances.get(effect.id) is instance:
            self._submit(outcome)

    # -- down --------------------------------------------------------------------------------------------------

    async def _drain(self, instance: Instance, effect: fx.Drain) -> ev.Event:
        try:
            seen = await self._control.drain(instance, effect.seconds, "refuse" if effect.refuse else "hold")
        except EngineCallError:
            with suppress(EngineCallError):
                await self._control.set_gate(instance, "open")
            raise
        return ev.Drained(effect.id, effect.operation, seen.in_flight, seen.idle_seconds)

    async def send_away(self, instance: Instance) -> None:
        """Have a server that is about to be killed refuse those whom its gate holds: a 503 says more than a connection
        that breaks. One that cannot do it in time is killed all the same."""
        with suppress(EngineCallError, TimeoutError):
            async with asyncio.timeout(LAST_WORD_SECONDS):
                seen = await self._control.set_gate(instance, "refuse")
                while seen.held:
                    await asyncio.sleep(LAST_WORD_TICK)
                    seen = await self._control.activity(instance)

    async def _put_to_sleep(self, instance: Instance, effect: fx.PutToSleep) -> ev.Event:
        deepen = instance.state is State.SLEEPING
        canary = None
        if not instance.has_canary and not deepen:
            canary = await self._ask_canary(instance, effect.seconds)
        await self._control.sleep(instance, int(effect.depth), effect.seconds, deepen=deepen)
        return ev.Slept(effect.id, effect.operation, canary)

    async def _ask_canary(self, instance: Instance, seconds: float) -> str:
        """What it answers now; a server that cannot answer one (it may only transcribe) may sleep all the same."""
        try:
            return await self._control.canary(instance, seconds)
        except EngineCallError as problem:
            return f"{NO_CANARY}{problem}"

    # -- up ----------------------------------------------------------------------------------------------------

    async def _wake_up(self, instance: Instance, effect: fx.WakeUp) -> ev.Event:
        await self._control.wake(instance, int(effect.depth), effect.seconds)
        before = instance.canary
        if before is not None and instance.has_canary:
            answer = await self._control.canary(instance, effect.seconds)
            if not ENGINES[instance.config.engine].same_answer(before, answer):
                raise EngineCallError(f"it does not answer as before its sleep: {answer[:80]!r}, not {before[:80]!r}")
        await self._control.set_gate(instance, "open")
        return ev.Woken(effect.id, effect.operation)

    async def _open_gate(self, instance: Instance, effect: fx.OpenGate) -> None:
        try:
            await self._control.set_gate(instance, "open")
        except EngineCallError as problem:
            logger.warning("the gate of %s cannot be opened: %s", instance.id, problem)

    async def _inspect(self, instance: Instance, effect: fx.Inspect) -> ev.Event:
        return ev.Inspected(effect.id, effect.operation, await self._control.is_sleeping(instance))

    async def _send_warm_up(self, instance: Instance, effect: fx.SendWarmUp) -> ev.Event:
        attempt, warm_up = instance.attempt, instance.config.warm_up
        assert warm_up is not None
        try:
            await self._control.warm_up(instance, warm_up.path, warm_up.body, effect.seconds)
        except EngineCallError as problem:
            return ev.WarmedUp(effect.id, attempt, str(problem))
        return ev.WarmedUp(effect.id, attempt, None)

    async def _ask_activity(self, instance: Instance, effect: fx.AskActivity) -> ev.Event:
        seen = await self._control.activity(instance)
        return ev.Activity(effect.id, seen.in_flight + seen.held, seen.idle_seconds)

    # -- memory ------------------------------------------------------------------------------------------------

    async def _await_memory(self, instance: Instance, effect: fx.AwaitMemory) -> ev.Event:
        found = await wait_for_memory(self._resources.gpus, effect.needs, effect.seconds, self.owners)
        if isinstance(found, str):
            return ev.MemoryShort(effect.id, effect.operation, found)
        return ev.MemoryFree(effect.id, effect.operation, found)

    async def owners(self) -> Mapping[int, str]:
        """Which process belongs to which instance, by pid and id."""
        running = [instance for instance in self._fleet.instances.values() if instance.running]
        return {pid: instance.id for instance in running for pid in await self._pids(instance)}

    async def _pids(self, instance: Instance) -> list[int]:
        if instance.pid is None or instance.start_ticks is None:
            return []
        known = self._resources.cgroups.pids(instance.key)
        if known:
            return known
        tree = Tree(instance.key, instance.pid, instance.start_ticks, self._resources.logs.path(instance.key))
        return [process.pid for process in await self._resources.trees.members(tree)]

    async def _measure(self, instance: Instance, effect: fx.Measure) -> ev.Event:
        moves, depth = instance.moves, instance.depth
        pids = set(await self._pids(instance))
        host = await asyncio.to_thread(tree_mib, pids)
        return ev.Measured(effect.id, moves, depth, Memory(await self._gpu_mib(instance, pids, effect.before), host))

    async def _gpu_mib(self, instance: Instance, pids: set[int], before: Mapping[str, int]) -> int | None:
        """What an instance holds on each of its accelerators, the most of them; None where nobody can tell."""
        held = [await self._held_on(uuid, instance, pids, before.get(uuid)) for uuid in instance.gpus]
        return max((mib for mib in held if mib is not None), default=None)

    async def _held_on(self, uuid: str, instance: Instance, pids: set[int], before: int | None) -> int | None:
        try:
            use = await self._resources.gpus.memory(uuid)
        except StateError:
            return None
        if not use.processes:
            # In a container the driver may show nobody. Whether somebody has come meanwhile is known only now.
            if before is None or not self._fleet.roster.is_alone(instance, uuid):
                return None
            return before - use.free_mib if use.free_mib < before else None
        ours = [process.mib for process in use.processes if process.pid in pids]
        known = [mib for mib in ours if mib is not None]
        if len(known) == len(ours) and ours:
            return sum(known)
        alone = all(process.pid in pids for process in use.processes)
        return use.total_mib - use.free_mib if alone else None

    async def _prefetch(self, instance: Instance, effect: fx.Prefetch) -> None:
        if instance.served is None:
            return
        environment = {**os.environ, **(instance.config.env_vars or {})}
        with suppress(OSError):
            files = await asyncio.to_thread(weight_files, instance.served.model, environment)
            await prefetch(files)


def failed(effect: Any, instance: Instance, problem: Exception) -> ev.Event | None:
    """The outcome of a step that did not work."""
    sentence = str(problem) if isinstance(problem, BullpenError) else f"{type(problem).__name__}: {problem}"
    match effect:
        case fx.Drain():
            return ev.EngineFailed(effect.id, effect.operation, sentence, touched=False)
        case fx.PutToSleep() | fx.WakeUp():
            return ev.EngineFailed(effect.id, effect.operation, sentence, touched=True, verdict=not is_lost(problem))
        case fx.Inspect():
            return ev.Inspected(effect.id, effect.operation, None)
        case fx.AwaitMemory():
            return ev.MemoryShort(effect.id, effect.operation, sentence)
        case fx.SendWarmUp():
            return ev.WarmedUp(effect.id, instance.attempt, sentence)
        case fx.AskActivity():
            return ev.Activity(effect.id, None, 0.0)
    return None


def is_lost(problem: Exception) -> bool:
    """Whether a server went away in the middle of a call, which says nothing about what it was told."""
    cause = problem.__cause__
    return isinstance(cause, NoAnswerError) and cause.__cause__ is not None
