"""Launches: instances as callers see them who name a model and GPUs, and whose launch outlives its process as a record.

A launch is an instance. What is said here beside that is how one is asked for, and by which words it is told of.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bullpen.core.devices import Gpu
from bullpen.core.instance import ENDED, Config, Instance, State
from bullpen.core.operation import Doing, Stage
from bullpen.core.public import phase_seconds, remaining_seconds
from bullpen.core.request import split_options
from bullpen.errors import ConflictError, InvalidRequestError, LaunchRefusedError, NotFoundError, StuckError
from bullpen.node.launch_options import Task, command_line
from bullpen.node.logs import MAX_CHUNK, Chunk, Piece, read_piece
from bullpen.node.supervisor import Supervisor

logger = logging.getLogger("bullpen")

FACE = "launch"
MODEL, TASK = "launch_model", "launch_task"
"""The annotations that keep what was asked for."""
STOP_SECONDS = 4.0
"""From SIGTERM to SIGKILL."""
ANSWER_SECONDS = 4.8
"""A stop that takes longer goes on after its answer."""
KEPT = 100
"""So many launches that have ended are kept."""

STATES: Mapping[State, str] = {
    State.STARTING: "bootstrapping",
    State.READY: "ready",
    State.SLEEPING: "bootstrapping",
    State.STOPPING: "stopping",
    State.STOPPED: "stopped",
    State.FAILED: "failed",
}
"""The words of launches. One that sleeps takes no work and is not over: it is on its way to be ready, once woken."""


@dataclass(frozen=True)
class Wanted:
    """What a caller asks for.

    Attributes:
        model: a name or a path.
        gpu_ids: indices of GPUs; None leaves it to `gpu_count`, and without that takes all.
        extra_kwargs: keywords of ``vllm.LLM``, as JSON data.
        gpu_count: so many GPUs of Bullpen's choice.
        gpu_share: the part of each GPU that it takes; None takes them alone.
    """

    model: str
    gpu_ids: Sequence[int] | None = None
    task: Task = "generate"
    extra_kwargs: Mapping[str, Any] = field(default_factory=dict)
    gpu_count: int | None = None
    gpu_share: float | None = None


class Launches:
    """The launches of one daemon.

    Args:
        supervisor: it has them all.
        log_chunk: bytes of a log that are read at once, `LEAST_PIECE` at least.
    """

    def __init__(self, supervisor: Supervisor, log_chunk: int = MAX_CHUNK) -> None:
        self._supervisor = supervisor
        self._log_chunk = log_chunk
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- reading -----------------------------------------------------------------------------------------------

    def find(self, launch_id: str) -> Instance:
        """The instance that a launch is.

        Raises:
            NotFoundError: there is none of that id.
        """
        try:
            return self._supervisor.fleet.get(launch_id)
        except NotFoundError:
            raise NotFoundError(f"Unknown launch_id: {launch_id}") from None

    def current(self) -> list[Instance]:
        """Those that have not ended, oldest first."""
        return [instance for instance in self._supervisor.fleet.listed() if instance.state not in ENDED]

    def describe(self, instance: Instance, now: float) -> dict[str, Any]:
        """A launch as JSON data, at the time ``now`` (seconds since the epoch)."""
        phase = self._phase(instance)
        return {
            "launch_id": instance.id,
            "model": model_of(instance),
            "gpu_ids": self._gpu_ids(instance),
            "task": task_of(instance),
            "state": state_of(instance),
            "created_at": timestamp(instance.created_at),
            "updated_at": timestamp(changed_at(instance)),
            "error": instance.error.message if instance.error is not None else None,
            "instance_id": instance.id,
            "instance_state": str(instance.state),
            "phase": phase,
            "progress": round(instance.progress, 3) if phase is not None else None,
            "remaining_seconds": remaining_seconds(instance, now) if instance.state is State.STARTING else None,
            "pid": instance.pid,
            "url": instance.address.url if instance.address is not None else None,
            "exit_code": instance.exit_code,
            "phases": phase_seconds(instance),
        }

    def _phase(self, instance: Instance) -> str | None:
        """What a launch is doing that is neither ready nor at its end."""
        operation = self._supervisor.fleet.roster.operation(instance.id)
        if instance.state is State.SLEEPING:
            return "waking" if operation is not None and operation.doing is Doing.WAKE else "sleeping"
        if instance.state is not State.STARTING:
            return None
        if operation is not None and operation.stage is Stage.PREPARING:
            return "preparing"
        return instance.phase or "start"

    def _gpu_ids(self, instance: Instance) -> list[int]:
        return sorted(gpu.index for gpu in self._gpus() if gpu.uuid in instance.gpus)

    def _gpus(self) -> tuple[Gpu, ...]:
        return self._supervisor.resources.gpus.list()

    def read_log(self, launch_id: str, offset: int) -> Piece:
        """A piece of the log from an offset on, cut between characters. What lies beyond its end is its end; what
        the cap has dropped is passed over.

        Raises:
            NotFoundError: there is none of that id.
        """
        has_ended = self.find(launch_id).state in ENDED  # asked for before: what is read then has all of it

        def read(start: int, end: int) -> Chunk:
            return self._supervisor.read_log(launch_id, start, end)

        return read_piece(read, offset, self._log_chunk, is_whole=has_ended)

    # -- changing ----------------------------------------------------------------------------------------------

    async def launch(self, wanted: Wanted) -> Instance:
        """Begin a launch; what is wrong with its options makes it fail later.

        Raises:
            LaunchRefusedError: the model or the GPUs cannot be.
            InvalidRequestError: a field can never work.
            ConflictError: GPUs are in use.
            LaunchError: the daemon is ending.
        """
        model = wanted.model.strip()
        if not model:
            raise LaunchRefusedError("model must be provided")
        gpus = self._choose(wanted)
        instance = await self._supervisor.create(self._config(wanted, model, gpus), at_once=True)
        self._evict()
        return instance

    def _choose(self, wanted: Wanted) -> list[Gpu]:
        """The GPUs of a launch, in the order of their indices."""
        known = {gpu.index: gpu for gpu in self._gpus()}
        if wanted.gpu_ids is not None and wanted.gpu_count is not None:
            raise LaunchRefusedError("give gpu_ids to name GPUs, or gpu_count for a number of them, not both")
        if wanted.gpu_ids is not None and not wanted.gpu_ids:
            raise LaunchRefusedError("gpu_ids cannot be empty")
        ids = sorted(known) if wanted.gpu_ids is None else sorted(set(wanted.gpu_ids))
        missing = [index for index in ids if index not in known]
        if missing:
            raise LaunchRefusedError(f"Requested GPUs are not available: {missing}")
        if wanted.gpu_share is not None and not ids:
            raise LaunchRefusedError("No GPUs available for launch: this host has none to take a gpu_share of")
        if wanted.gpu_count is None:
            self._refuse_taken([known[index] for index in ids], wanted.gpu_share)
            return [known[index] for index in ids]
        if wanted.gpu_count > len(known):
            raise LaunchRefusedError(
                f"No GPUs available for launch: {wanted.gpu_count} are asked for, this host has {len(known)}"
            )
        placed = self._supervisor.fleet.roster.book().place(wanted.gpu_count, wanted.gpu_share)
        if isinstance(placed, ConflictError):
            raise placed
        return [gpu for _, gpu in sorted(known.items()) if gpu.uuid in placed]

    def _refuse_taken(self, gpus: Sequence[Gpu], share: float | None) -> None:
        book = self._supervisor.fleet.roster.book()
        owners = [(gpu.index, rivals[0].id) for gpu in gpus if (rivals := book.rivals(gpu.uuid, share))]
        if owners:
            named = ", ".join(f"gpu {index} -> {owner}" for index, owner in owners)
            raise ConflictError(f"Requested GPUs are in use ({named})")

    def _config(self, wanted: Wanted, model: str, gpus: Sequence[Gpu]) -> Config:
        try:
            split_options(shlex.quote(model))
        except InvalidRequestError as problem:
            raise InvalidRequestError(str(problem), field="model") from problem
        options = shlex.join(command_line(model, wanted.task, wanted.extra_kwargs, len(gpus)))
        try:
            return self._supervisor.read_config(
                options,
                gpu_uuids=[gpu.uuid for gpu in gpus] or None,
                gpu_share=wanted.gpu_share,
                annotations={MODEL: model, TASK: wanted.task},
                face=FACE,
            )
        except InvalidRequestError as problem:
            field = "extra_kwargs" if problem.field == "options" else problem.field
            raise InvalidRequestError(str(problem), field=field, kind=problem.kind) from problem

    async def stop(self, launch_id: str) -> Instance:
        """Stop a launch, whose record and log stay; one that has ended stays as it is. Takes less than 5 s: where
        processes do not end by then, it is returned as it is.

        Raises:
            NotFoundError: there is none of that id.
        """
        instance = self.find(launch_id)
        ending = self._spawn(self._end(instance.id))
        await asyncio.wait([ending], timeout=ANSWER_SECONDS)
        self._evict()
        return instance

    async def _end(self, launch_id: str) -> None:
        try:
            await self._supervisor.end(launch_id, STOP_SECONDS)
        except StuckError as problem:
            logger.error("%s", problem)
        except NotFoundError:
            pass  # it was deleted meanwhile

    def _evict(self) -> None:
        """Delete the launches that ended before the newest `KEPT`."""
        ended = [
            instance
            for instance in self._supervisor.fleet.listed()
            if instance.config.face == FACE and instance.state in ENDED and instance.tree_gone
        ]
        ended.sort(key=lambda instance: instance.ended_at or instance.created_at)
        for instance in ended[:-KEPT]:
            self._spawn(self._delete(instance.id))

    async def _delete(self, launch_id: str) -> None:
        with suppress(NotFoundError, StuckError):
            await self._supervisor.stop(launch_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


# -- a launch in words -------------------------------------------------------------------------------------------------


def model_of(instance: Instance) -> str:
    """The model as it was asked for."""
    asked = (instance.config.annotations or {}).get(MODEL) if instance.config.face == FACE else None
    return asked or (instance.served.model if instance.served is not None else "")


def task_of(instance: Instance) -> Task:
    """What a launch is for."""
    if instance.config.face == FACE:
        return "embed" if (instance.config.annotations or {}).get(TASK) == "embed" else "generate"
    return "embed" if instance.served is not None and instance.served.pooling else "generate"


def state_of(instance: Instance) -> str:
    """The word for where a launch is. One that ended by itself for a reason has failed, whatever its exit code: a
    server whose engine has died ends with 0."""
    crashed = instance.state is State.STOPPED and instance.error is not None
    return STATES[State.FAILED if crashed else instance.state]


def changed_at(instance: Instance) -> float:
    """When something was last seen to change, in seconds since the epoch."""
    times = [instance.created_at, instance.ready_at, instance.ended_at, *instance.phase_started.values()]
    return max(at for at in [*times, *(note.at for note in instance.notes)] if at is not None)


def timestamp(seconds: float) -> str:
    """A time as RFC 3339 in UTC, with microseconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
