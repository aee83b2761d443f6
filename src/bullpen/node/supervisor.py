"""The supervisor: the one way in. Requests become events, the fleet decides, the executor carries out.

Everything here runs on one event loop, so an event is handled whole before the next one; that is what makes the fleet
the only writer. Callers await the answer to their request; reads of the fleet need no waiting.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core import request
from bullpen.core.explain import explain, verdicts
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Depth, Instance
from bullpen.engines.registry import ENGINES
from bullpen.errors import LaunchError, NotFoundError, StateError, StuckError
from bullpen.node.adoption import adopt_all
from bullpen.node.bus import Bus, encode
from bullpen.node.executor import Executor
from bullpen.node.gpu_report import gpu_report
from bullpen.node.housekeeping import Housekeeping
from bullpen.node.journal import Journal
from bullpen.node.logs import Chunk
from bullpen.node.resources import Resources, open_resources
from bullpen.node.settings import Settings
from bullpen.node.statedir import StateDir, make_log_dir
from bullpen.node.zygotes import Zygotes

logger = logging.getLogger("bullpen")

PR_SET_CHILD_SUBREAPER = 36
KEY_VARIABLES = ("BULLPEN_ACCESS_KEY", "VLLM_ACCESS_KEY")
"""Never inherited by an engine."""
ENDING = "this daemon is ending; ask again when it is back"
THREADS = 4
"""For short work that would hold up the event loop: scans, kills, names. Each thread costs memory for good."""


class Supervisor:
    """All instances of this node.

    Args:
        settings: what the operator wants.

    Raises:
        StateError: the engine is missing, or the state directory cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = choose_engine(settings)
        self._log_dir = make_log_dir(settings.log_dir) if settings.log_dir is not None else None
        self._state = StateDir(settings.state_dir)
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._requests = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[fx.Reply]] = {}
        self._closing = False
        self._housekeeping: Housekeeping | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._end_first: list[Callable[[], Awaitable[None]]] = []
        self.fleet: Fleet
        self.resources: Resources
        self._executor: Executor

    @property
    def bus(self) -> Bus:
        """The events."""
        return self.resources.bus

    @property
    def is_closing(self) -> bool:
        """Whether the end has begun."""
        return self._closing

    async def start(self) -> None:
        """Warm the engine in the background, and adopt what an earlier daemon left running.

        Raises:
            StateError: the state directory or the accelerators cannot be used.
        """
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "bullpen"))
        self._state.leave_key(self.settings.access_key)
        zygotes = self._make_zygotes()
        journal = Journal(self._state.journal)
        events = journal.events()
        saved = journal.instances()
        # The old daemon may have ended, or found the disk full, after it saved a change and before it kept the event.
        revision = max([revision for revision, _ in events[-1:]] + [instance.revision for instance in saved], default=0)
        bus = Bus(revision, events)
        self.resources = await open_resources(self.settings, self._state, journal, bus, zygotes, self._log_dir)
        self.fleet = Fleet(
            gpus=self.resources.gpus.list(),
            limits=self.settings.limits(),
            profiles=journal.profiles(),
            revision=revision,
        )
        self._executor = Executor(self.fleet, self.resources, self.submit, self._answer)
        adopt_all(saved, journal, self.fleet, self._executor)
        # Not earlier: an import takes all the processor time there is, and what lives must be known first.
        with suppress(LaunchError):
            zygotes.get(self.engine, {})
        self._housekeeping = Housekeeping(self.fleet, self.resources, self._executor)

    def _make_zygotes(self) -> Zygotes:
        environment = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
        pythons = {name: self.settings.engine_python for name in ENGINES}
        return Zygotes(pythons, environment, self._state.sockets, self._state.logs, self.settings.spares)

    # -- events ------------------------------------------------------------------------------------------------

    def submit(self, event: ev.Event) -> None:
        """Let the fleet handle an event; those that effects bring about at once come after it, in order."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._handling = False

    def _handle(self, event: ev.Event) -> None:
        try:
            self._executor.carry_out(self.fleet.handle(event, time.time()))
        except Exception as problem:
            # The event's own effects may be half done; the others must go on, and the caller must hear something.
            logger.exception("handling %s failed; this is a bug in Bullpen", type(event).__name__)
            if isinstance(event, ev.Request):
                error = LaunchError(f"this failed inside Bullpen ({type(problem).__name__}); its log has more")
                self._answer(fx.Reply(event.request, error=error))

    def _answer(self, reply: fx.Reply) -> None:
        waiting = self._waiting.pop(reply.request, None)
        if waiting is None or waiting.done():
            return
        if reply.error is not None:
            waiting.set_exception(reply.error)
        else:
            waiting.set_result(reply)

    async def _ask(self, event: ev.Request) -> fx.Reply:
        """Submit a request and wait for its answer. Raises the error that it is answered with."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[event.request] = waiting
        self.submit(event)
        reply: fx.Reply = await waiting
        return reply

    async def _ask_of(self, event: ev.Request) -> Instance:
        """The same, for answers that are about one instance."""
        reply = await self._ask(event)
        assert reply.instance is not None
        return reply.instance

    # -- what callers do ---------------------------------------------------------------------------------------

    def read_config(self, options: str, engine: str | None = None, **fields: Any) -> Config:
        """A configuration from a request's fields; see `request.read_config`.

        Raises:
            InvalidRequestError: a field can never work.
        """
        allowed = self.settings.allow_env
        return request.read_config(options, engine=engine or self.engine, allowed=allowed, **fields)

    async def check(self, config: Config) -> None:
        """Have the engine's own parser read the options, and start nothing.

        Raises:
            InvalidRequestError: it refuses them.
            LaunchError: no process could be made to ask it.
        """
        await self._executor.check(config)

    async def create(self, config: Config, instance_id: str | None = None, *, at_once: bool = False) -> Instance:
        """Create an instance; it has been started, and is seen by watchers, when this returns.

        Args:
            config: what to run.
            instance_id: its id; one of Bullpen's choice where None.
            at_once: return as soon as the id and the GPUs are its own. It is seen from then on, and fails where
                something else is wrong.

        Raises:
            InvalidRequestError: the id, or the options by the engine's own word, can never work.
            ConflictError: the id, a port or a GPU is another's.
            LaunchError: no process could be made, or the daemon is ending.
        """
        instance_id = str(uuid.uuid4()) if instance_id is None else request.check_id(instance_id)
        self._refuse_if_closing()
        return await self._ask_of(
            ev.Create(next(self._requests), instance_id, uuid.uuid4().hex, config, at_once=at_once)
        )

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise LaunchError(ENDING)

    async def stop(self, instance_id: str, timeout: float | None = None) -> tuple[Instance, str]:
        """Stop and remove an instance; no process of it lives when this returns.

        Args:
            instance_id: which one.
            timeout: seconds from SIGTERM to SIGKILL; the daemon's setting where None.

        Returns:
            The instance as it was, and ``terminated`` or ``not_running``.

        Raises:
            NotFoundError: there is none of that id.
            StuckError: processes outlive SIGKILL.
        """
        seconds = self.settings.stop_timeout if timeout is None else timeout
        reply = await self._ask(ev.Stop(next(self._requests), instance_id, seconds))
        assert reply.instance is not None
        return reply.instance, reply.status

    async def end(self, instance_id: str, timeout: float) -> Instance:
        """Stop an instance that stays listed, with its log; no process of it lives when this returns.

        Args:
            instance_id: which one; one that has ended stays as it is.
            timeout: seconds from SIGTERM to SIGKILL.

        Raises:
            NotFoundError: there is none of that id.
            StuckError: processes outlive SIGKILL.
        """
        return await self._ask_of(ev.Stop(next(self._requests), instance_id, timeout, keep=True))

    async def stop_all(self, timeout: float | None = None) -> list[tuple[Instance, str]]:
        """Stop and remove all instances, side by side; one that another caller removes meanwhile is left out.

        Raises:
            StuckError: processes of one outlive SIGKILL; the others are stopped all the same.
        """
        ids = [instance.id for instance in self.fleet.listed()]
        outcomes = await asyncio.gather(
            *(self.stop(instance_id, timeout) for instance_id in ids), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, NotFoundError):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    async def sleep(
        self, instance_id: str, level: int | None = None, drain: float | None = None, refuse: bool = False
    ) -> Instance:
        """Put an instance to sleep; it sleeps when this returns.

        Args:
            instance_id: which one.
            level: 1 (weights in host memory) or 2 (weights discarded); the lightest that works where None.
            drain: seconds that requests in flight may take to end; the daemon's setting where None.
            refuse: whether new requests are refused meanwhile; else they are held until it is awake.

        Raises:
            NotFoundError: there is none of that id.
            ConflictError: it is busy, or cannot sleep; the text says how it could.
            EngineError: the engine did not sleep; it is awake again.
        """
        self._refuse_if_closing()
        depth = None if level is None else Depth(level)
        return await self._ask_of(ev.Sleep(next(self._requests), instance_id, depth, self._drain(drain), refuse))

    async def wake(self, instance_id: str) -> Instance:
        """Have an instance ready, whatever it is: asleep, stopped or failed; it is ready when this returns.

        Raises:
            NotFoundError: there is none of that id.
            ConflictError: a GPU is another's, or memory is not free.
            EngineError, LaunchError: it did not wake, and could not be started again either.
        """
        self._refuse_if_closing()
        return await self._ask_of(ev.Wake(next(self._requests), instance_id))

    async def swap(
        self,
        incoming: str | Config,
        outgoing: Sequence[str] | None,
        *,
        instance_id: str | None = None,
        level: int | None = None,
        drain: float | None = None,
        refuse: bool = False,
    ) -> tuple[Instance, Mapping[str, Any]]:
        """Have one instance ready in the place of others, or, where that fails, all as it was.

        Args:
            incoming: an id, or the configuration of a new one.
            outgoing: ids of those that go to sleep; None leaves the choice to Bullpen.
            instance_id: the id of a new one.
            level, drain, refuse: as for `sleep`.

        Returns:
            What came in, and the swap: its number, who came and went, when each stage began.

        Raises:
            InvalidRequestError, NotFoundError, ConflictError: it was refused and nothing was changed.
            BullpenError: it was taken back; the text says why and how things are now.
        """
        self._refuse_if_closing()
        depth = None if level is None else Depth(level)
        new = isinstance(incoming, Config)
        name = (instance_id or str(uuid.uuid4())) if new else str(incoming)
        event = ev.Swap(
            next(self._requests),
            request.check_id(name) if new else name,
            None if outgoing is None else tuple(outgoing),
            depth,
            self._drain(drain),
            refuse,
            key=uuid.uuid4().hex if new else None,
            config=incoming if isinstance(incoming, Config) else None,
        )
        if outgoing is None:
            await self._executor.refresh_activity()
        reply = await self._ask(event)
        assert reply.instance is not None
        return reply.instance, reply.details

    def _drain(self, seconds: float | None) -> float:
        return self.settings.drain if seconds is None else seconds

    def describe(self, instance: Instance, word: str | None = None) -> dict[str, Any]:
        """An instance as JSON data; ``word`` replaces ``status`` where a reply says what was done."""
        return self._executor.describe(instance, word)

    def explain(self, instance_id: str) -> dict[str, Any]:
        """Why an instance is as it is and what comes next, as JSON data.

        Raises:
            NotFoundError: there is none of that id.
        """
        return explain(self.fleet.roster, self.fleet.get(instance_id), time.time())

    async def judge(self, instance_id: str, level: int, *, works: bool, why: str) -> dict[str, Any]:
        """Remember for an instance's model, engine and GPU whether a level of sleep works, which decides whether the
        ladder uses it.

        Returns:
            What is remembered of each level now, as JSON data.

        Raises:
            NotFoundError: there is none of that id.
            ConflictError: it was started without the engine's sleep.
        """
        self._refuse_if_closing()
        instance = await self._ask_of(ev.Judge(next(self._requests), instance_id, Depth(level), works, why))
        return verdicts(self.fleet.roster, instance)

    async def gpu_report(self) -> dict[str, Any]:
        """The accelerators, who has them and what memory is held there, as JSON data."""
        return await gpu_report(self.fleet, self.resources, self._executor.actuation.owners)

    def read_log(self, instance_id: str, start: int = 0, end: int | None = None) -> Chunk:
        """Bytes of an instance's log.

        Raises:
            NotFoundError: there is none of that id.
        """
        return self.resources.logs.read(self.fleet.get(instance_id).key, start, end)

    def follow_log(self, instance_id: str, start: int = 0) -> AsyncIterator[bytes]:
        """An instance's log as it grows, to the end of its server process.

        Raises:
            NotFoundError: there is none of that id.
        """
        instance = self.fleet.get(instance_id)
        return self.resources.logs.follow(
            instance.key, start, lambda: self._closing or self._executor.has_ended(instance_id)
        )

    def watch(self, since: int | None, *, fine: bool) -> AsyncIterator[str]:
        """Events: those after ``since``, or what exists now as CREATED lines, and then what happens.

        Raises:
            RevisionGoneError: the events after ``since`` cannot be given.
        """
        if since is not None:
            first = self.bus.missed(since)
        else:
            first = [encode("CREATED", self.describe(instance)) for instance in self.fleet.listed()]
        return self.bus.subscribe(first, fine=fine)

    def readiness(self) -> dict[str, Any]:
        """Whether instances can be forked: ``ready``, and each zygote's state."""
        waiting = sum(not instance.listed for instance in self.fleet.instances.values())
        readiness = self.resources.zygotes.readiness(self.engine)
        return {**readiness, "ready": readiness["ready"] and not self._closing, "waiting": waiting}

    # -- life --------------------------------------------------------------------------------------------------

    def begin_shutdown(self) -> None:
        """Take no new instances, refuse those that wait, end every stream, and begin to stop what runs (or leave it,
        where so set). `close` sees it through. May be called more than once."""
        if self._stopping is not None:
            return
        self._closing = True
        self.bus.close()
        for instance in list(self.fleet.instances.values()):
            if not instance.listed:
                self.submit(ev.Refused(instance.id, LaunchError(ENDING)))
        self._stopping = asyncio.ensure_future(self._stop_for_exit())

    def end_first(self, end: Callable[[], Awaitable[None]]) -> None:
        """At the daemon's end, have something else ended before any instance is stopped."""
        self._end_first.append(end)

    async def _stop_for_exit(self) -> None:
        for end in self._end_first:
            try:
                await end()
            except Exception:
                logger.exception("ending %s failed; this is a bug in Bullpen", end)
        # Creates that were refused just now may have processes still to be killed.
        unfinished = [instance.id for instance in self.fleet.instances.values() if not instance.listed]
        await asyncio.gather(*(self.stop(instance_id) for instance_id in unfinished), return_exceptions=True)
        if self.settings.on_exit == "keep":
            return
        try:
            await self.stop_all()
        except StuckError as problem:
            logger.error("%s", problem)

    async def close(self) -> None:
        """Stop everything (or leave the instances, where so set) and let go of the state directory. Once is enough."""
        self.begin_shutdown()
        if self._housekeeping is None:
            return
        self._housekeeping.end()
        self._housekeeping = None
        assert self._stopping is not None
        await self._stopping
        await self.resources.zygotes.close()
        await self._executor.close()
        self.resources.close()


def choose_engine(settings: Settings) -> str:
    """The default engine.

    Raises:
        StateError: none was chosen and vLLM is missing; the text says how to install it.
    """
    if settings.engine is not None:
        return settings.engine
    missing = ENGINES["vllm"].missing(settings.engine_python)
    if missing:
        raise StateError(missing)
    return "vllm"
