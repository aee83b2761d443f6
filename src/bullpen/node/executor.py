"""Carries out what the fleet decides, and turns each outcome into the next event.

Short effects are done at once; those that wait become tasks, each with a deadline in what it calls. No effect raises:
what goes wrong is an event.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Instance, Note, State
from bullpen.core.public import public
from bullpen.engines.base import Known
from bullpen.engines.crash import CrashClass, Failure
from bullpen.engines.registry import ENGINES
from bullpen.errors import LaunchError, StateError
from bullpen.node import probe
from bullpen.node.actuation import Actuation
from bullpen.node.creation import Creation
from bullpen.node.handle import Handle, exit_status
from bullpen.node.resources import Resources
from bullpen.node.trees import Tree

logger = logging.getLogger("bullpen")

TAIL_BYTES = 64 * 1024
SWAPS = "swaps"
"""The fact under which the journal keeps swaps that are under way."""
FIRST_TICK, LONGEST_TICK = 0.015, 0.25
"""Seconds between two looks at log and health of a server that starts; they grow with the time it takes."""
PROBE_EVERY = 0.25


class Executor:
    """The hands of the fleet.

    Args:
        fleet: read for what an effect is about; changed only through ``submit``.
        submit: takes the next event.
        reply: takes an answer to a request.
    """

    def __init__(
        self,
        fleet: Fleet,
        resources: Resources,
        submit: Callable[[ev.Event], None],
        reply: Callable[[fx.Reply], None],
    ) -> None:
        self._fleet = fleet
        self._resources = resources
        self._submit = submit
        self._reply = reply
        self._handles: dict[str, Handle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsaved: set[str] = set()
        self._swaps: dict[int, Mapping[str, Any]] = {}
        self._logged: dict[str, Note] = {}
        self._timers: dict[str, dict[str, asyncio.TimerHandle]] = {}
        self._creation = Creation(fleet, resources, self._handles, submit, self.follow_exit)
        self.actuation = Actuation(fleet, resources, submit)
        self._carriers: dict[type, Callable[[Any], object]] = {
            fx.Check: lambda effect: self._spawn(self._creation.step(effect)),
            fx.HoldPort: lambda effect: self._spawn(self._creation.step(effect)),
            fx.Start: lambda effect: self._spawn(self._creation.step(effect)),
            **dict.fromkeys(self.actuation.steps, lambda effect: self._spawn(self.actuation.step(effect))),
            fx.Discard: self._discard,
            fx.LetGo: self._let_go,
            fx.Watch: lambda effect: self._spawn(self._watch(effect.id)),
            fx.Terminate: self._terminate,
            fx.KillTree: self._kill_tree,
            fx.SetTimer: self._set_timer,
            fx.ClearTimers: self._clear_timers,
            fx.Publish: self._publish,
            fx.PublishState: self._publish_state,
            fx.PublishSwap: self._publish_swap,
            fx.SaveProfile: self._save_profile,
            fx.SaveSwap: self._save_swap,
            fx.Forget: self._forget,
            fx.Reply: reply,
        }

    def carry_out(self, effects: list[fx.Effect]) -> None:
        """Carry out effects in order; what follows a save that a new instance could not get is left undone."""
        for effect in effects:
            if isinstance(effect, fx.Save):
                if not self._save(effect.id):
                    return
            else:
                self._carriers[type(effect)](effect)

    async def check(self, config: Config) -> None:
        """Have the engine read options. Raises InvalidRequestError where it refuses, LaunchError where it cannot."""
        await self._creation.check(config)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.error("a task of the supervisor failed; this is a bug in Bullpen", exc_info=problem)

    def _instance(self, instance_id: str) -> Instance | None:
        return self._fleet.instances.get(instance_id)

    def _report(self, instance: Instance, event: ev.Event) -> None:
        """Submit what an effect has come to, unless the instance is gone: another one may have its id by now."""
        if self._instance(instance.id) is instance:
            self._submit(event)

    def _discard(self, effect: fx.Discard) -> None:
        self._give_back(effect.id)
        self._remove_files(effect.id, effect.key)

    def _let_go(self, effect: fx.LetGo) -> None:
        self._give_back(effect.id)
        instance = self._instance(effect.id)
        if instance is not None:
            self._resources.ports.release(instance.key)

    def _give_back(self, instance_id: str) -> None:
        """Let go of a process that was leased and not told to start."""
        handle = self._handles.pop(instance_id, None)
        if handle is not None and handle.leased is not None and handle.pidfd >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(handle.pidfd, signal.SIGKILL)
            handle.leased.give_back()

    def _tree(self, instance: Instance) -> Tree:
        assert instance.pid is not None and instance.start_ticks is not None
        return Tree(instance.key, instance.pid, instance.start_ticks, self._resources.logs.path(instance.key))

    # -- running -----------------------------------------------------------------------------------------------

    def adopt(self, instance: Instance, pidfd: int) -> None:
        """Take over a server process that an earlier daemon started."""
        handle = self._handles[instance.id] = Handle(pidfd=pidfd)
        self._resources.cgroups.confirm(instance.key, instance.pid)
        self.follow_exit(instance.id, handle)
        if instance.state is not State.STARTING:
            self._spawn(self._note_shared_memory(instance, handle))

    async def _note_shared_memory(self, instance: Instance, handle: Handle) -> None:
        """Remember what the tree maps, for a server that ends without removing it."""
        handle.shared |= await self._resources.trees.shared_memory(self._tree(instance))

    def follow_exit(self, instance_id: str, handle: Handle) -> None:
        """Report the end of the server process, which makes its pidfd readable. Once is enough."""
        if handle.followed:
            return
        handle.followed = True
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(handle.pidfd)
            self._spawn(self._report_exit(instance_id, handle))

        loop.add_reader(handle.pidfd, ended)

    async def _report_exit(self, instance_id: str, handle: Handle) -> None:
        code = await exit_status(handle)
        try:
            instance = self._instance(instance_id)
            if instance is not None:
                self._resources.ports.release(instance.key)
                self._report(instance, ev.Exited(instance_id, code, await self._why(instance, handle, code)))
        finally:
            # Not before: until the fleet knows of the end, it may ask for a signal to this descriptor.
            os.close(handle.pidfd)
            handle.pidfd = -1
            handle.ended.set()

    async def _why(self, instance: Instance, handle: Handle, code: int | None) -> Failure | None:
        """Why a server ended, from its exit code and its log."""
        try:
            tail = await asyncio.to_thread(self._resources.logs.tail, instance.key, TAIL_BYTES, handle.log_start)
            model = instance.served.model if instance.served else None
            port = instance.address.port if instance.address else None
            known = Known(model, port, handle.oom_kills())
            return ENGINES[instance.config.engine].failure(code, tail, known)
        except Exception:
            logger.exception("reading why %s ended failed; this is a bug in Bullpen", instance.id)
            return Failure(CrashClass.UNKNOWN, f"it ended with exit code {code}; its log may say why")

    async def _watch(self, instance_id: str) -> None:
        """Follow the log, and ask the server whether it is ready, until it is or is gone."""
        instance, handle = self._fleet.instances[instance_id], self._handles[instance_id]
        assert instance.address is not None
        engine = ENGINES[instance.config.engine]
        reader, position, attempt = engine.phases(), handle.log_start, instance.attempt
        loop = asyncio.get_running_loop()
        begun = probed = loop.time()
        binding = False
        while self._is_starting(instance, attempt):
            with suppress(OSError):  # no file may be opened now, say: the probe goes on
                chunk = self._resources.logs.read(instance.key, position)
                position = chunk.start + len(chunk.data)
                for seen in reader.feed(chunk.data):
                    self._submit(ev.PhaseSeen(instance_id, str(seen.phase), reader.progress))
                    binding = seen.phase in ("bind", "ready")
            if binding or loop.time() - probed > PROBE_EVERY:
                probed = loop.time()
                if await probe.answers(instance.address, engine.health_path) and self._is_starting(instance, attempt):
                    self._resources.ports.release(instance.key)
                    self._submit(ev.Answered(instance_id))
                    await self._note_shared_memory(instance, handle)
                    return
            await asyncio.sleep(min(max(FIRST_TICK, (loop.time() - begun) / 20), LONGEST_TICK))

    def _is_starting(self, instance: Instance, attempt: int) -> bool:
        current = self._instance(instance.id) is instance and instance.attempt == attempt
        return current and instance.state is State.STARTING

    # -- stop --------------------------------------------------------------------------------------------------

    def _terminate(self, effect: fx.Terminate) -> None:
        with suppress(OSError):
            signal.pidfd_send_signal(self._handles[effect.id].pidfd, signal.SIGTERM)

    def _kill_tree(self, effect: fx.KillTree) -> None:
        handle = self._handles.setdefault(effect.id, Handle())
        if handle.pidfd >= 0:
            self.follow_exit(effect.id, handle)
        if handle.kill is None or handle.kill.done():
            handle.kill = self._spawn(self._kill(self._fleet.instances[effect.id], handle))

    async def _kill(self, instance: Instance, handle: Handle) -> None:
        if instance.pid is not None and instance.start_ticks is not None:
            pending = self._fleet.roster.pending.get(instance.id)
            if pending is not None and pending.after is not None and not self.has_ended(instance.id):
                await self.actuation.send_away(instance)
            try:
                left = await self._resources.trees.kill(self._tree(instance), shared=handle.shared)
            except OSError as problem:
                self._submit(ev.TreeStuck(instance.id, f"unknown, for they cannot be listed: {problem}"))
                return
            if left:
                detail = ", ".join(f"{process.pid} ({process.name}, state {process.state})" for process in left)
                self._submit(ev.TreeStuck(instance.id, detail))
                return
            if handle.pidfd >= 0:
                # The process is gone, so its end is about to be reported; what follows builds on that.
                await handle.ended.wait()
        self._submit(ev.TreeGone(instance.id))

    def _set_timer(self, effect: fx.SetTimer) -> None:
        timers = self._timers.setdefault(effect.id, {})
        if effect.name in timers:
            timers[effect.name].cancel()
        event = ev.TimerFired(effect.id, effect.name)
        timers[effect.name] = asyncio.get_running_loop().call_later(effect.seconds, self._submit, event)

    def _clear_timers(self, effect: fx.ClearTimers) -> None:
        for timer in self._timers.pop(effect.id, {}).values():
            timer.cancel()

    # -- telling and keeping -----------------------------------------------------------------------------------

    def _save(self, instance_id: str) -> bool:
        """Write an instance down; False where that failed and the instance may not go on without."""
        instance = self._instance(instance_id)
        if instance is None:
            return True
        try:
            self._resources.journal.save(instance)
        except StateError as problem:
            if not instance.listed:
                self._submit(ev.Refused(instance_id, LaunchError(str(problem))))
                return False
            if instance_id not in self._unsaved:
                logger.error("%s (tried again until it works)", problem)
            self._unsaved.add(instance_id)
        else:
            self._unsaved.discard(instance_id)
        return True

    def save_again(self) -> None:
        """Try once more what could not be written, or not be removed."""
        for instance_id in list(self._unsaved):
            self._unsaved.discard(instance_id)
            if self._instance(instance_id) is None:
                self._forget_in_journal(instance_id)
            else:
                self._save(instance_id)

    def _forget_in_journal(self, instance_id: str) -> None:
        try:
            self._resources.journal.forget(instance_id)
        except StateError as problem:
            logger.error("%s (tried again until it works)", problem)
            self._unsaved.add(instance_id)
        else:
            self._unsaved.discard(instance_id)

    def _remove_files(self, instance_id: str, key: str) -> None:
        self._resources.remove_files(key)
        self._forget_in_journal(instance_id)

    def _publish(self, effect: fx.Publish) -> None:
        instance = effect.instance
        line = self._resources.bus.publish(effect.kind, self.describe(instance), instance.revision)
        try:
            self._resources.journal.append_event(instance.revision, line)
        except StateError as problem:
            logger.error("%s", problem)
        logger.info(
            "%s %s%s", effect.kind.lower(), instance.id, f": {instance.error.message}" if instance.error else ""
        )

    def _publish_state(self, effect: fx.PublishState) -> None:
        self._log_note(effect.instance)
        if self._resources.bus.watchers:
            document = {**self.describe(effect.instance), "revision": self._fleet.revision}
            self._resources.bus.publish_fine("STATE", document)

    def _log_note(self, instance: Instance) -> None:
        """Write the newest thing that was decided about an instance into the daemon's log, once."""
        note = instance.notes[-1] if instance.notes else None
        if note is not None and self._logged.get(instance.id) is not note:
            self._logged[instance.id] = note
            logger.info("%s: %s", instance.id, note.text)

    def _publish_swap(self, effect: fx.PublishSwap) -> None:
        document = {"revision": self._fleet.revision, **effect.document}
        if self._resources.bus.watchers:
            self._resources.bus.publish_fine("SWAP", document)
        names = f"{document['in']} in, {', '.join(document['out']) or 'nobody'} out"
        problem = f": {document['error']}" if document["error"] else ""
        logger.info("swap %s (%s): %s%s", document["swap"], names, document["stage"], problem)

    def _save_profile(self, effect: fx.SaveProfile) -> None:
        try:
            self._resources.journal.save_profile(effect.key, effect.profile)
        except StateError as problem:
            logger.error("%s", problem)

    def adopt_swaps(self, saved: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], fx.SaveSwap]]:
        """Keep swaps that an earlier daemon left in the journal, each until its own effect forgets it: by then the
        fleet has written it down anew."""
        numbered = {-number: swap for number, swap in enumerate(saved, 1)}
        self._swaps |= numbered
        return [(swap, fx.SaveSwap(number, None)) for number, swap in numbered.items()]

    def _save_swap(self, effect: fx.SaveSwap) -> None:
        if effect.swap is None:
            self._swaps.pop(effect.number, None)
        else:
            self._swaps[effect.number] = effect.swap
        try:
            self._resources.journal.set_fact(SWAPS, list(self._swaps.values()))
        except StateError as problem:
            logger.error("%s", problem)

    def describe(self, instance: Instance, word: str | None = None) -> dict[str, Any]:
        """The instance as JSON data, with what is being done with it."""
        return public(instance, word, self._fleet.roster.operation(instance.id), time.time())

    def _forget(self, effect: fx.Forget) -> None:
        self._logged.pop(effect.id, None)
        self._handles.pop(effect.id, None)
        self._remove_files(effect.id, effect.key)

    async def refresh_activity(self) -> None:
        """Ask every ready server how busy it is; the outcomes are events."""
        ready = [one.id for one in self._fleet.listed() if one.state is State.READY and one.tree_gone is False]
        await asyncio.gather(*(self.actuation.step(fx.AskActivity(one)) for one in ready))

    def has_ended(self, instance_id: str) -> bool:
        """Whether the server process has ended, or there is none."""
        handle = self._handles.get(instance_id)
        return handle is None or handle.pidfd < 0 or handle.ended.is_set()

    def children(self) -> set[int]:
        """Server processes whose end is still to be read."""
        return {
            instance.pid
            for instance in self._fleet.instances.values()
            if instance.pid is not None and not self.has_ended(instance.id)
        }

    async def close(self) -> None:
        """Let go of everything; processes are left as they are."""
        loop = asyncio.get_running_loop()
        for instance_id in list(self._timers):
            self._clear_timers(fx.ClearTimers(instance_id))
        for handle in self._handles.values():
            if handle.pidfd >= 0 and not handle.ended.is_set():
                with suppress(OSError, ValueError):
                    loop.remove_reader(handle.pidfd)
                    os.close(handle.pidfd)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
