"""Why a call is not answered: the code and the sentence that its caller gets."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import grpc

from bullpen.engines.postmortem import ENGINE_DIED
from bullpen.errors import BullpenError
from bullpen.rpc.access import Context
from bullpen.rpc.ports import InstanceFinder, Served, Task
from bullpen.rpc.upstream import LostError, NoConnectionError, RefusedError

LONGEST_DETAILS = 2000
"""In bytes. All that goes with a status must fit in 16 KiB, where a byte may take three."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class CallError(BullpenError):
    """A call ends with this status; the text is short enough for it."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(shorten(text))
        self.code = code


class Reported:
    """A context that ends a call with a status where something goes wrong in it.

    A class, as one that is made of a generator costs each call several times as much.

    Args:
        context: of the call.
        told: what its caller is told of a request that failed.
    """

    def __init__(self, context: Context, told: Callable[[RefusedError | LostError], CallError]) -> None:
        self._context = context
        self._told = told

    async def __aenter__(self) -> None:
        """Nothing is to be done before."""

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the call."""
        if isinstance(problem, RefusedError | LostError):
            problem = self._told(problem)
        if isinstance(problem, CallError):
            await self._context.abort(problem.code, str(problem))


def shorten(text: str) -> str:
    """A text on one line, without a traceback's frames, and no longer than a status can carry."""
    lines = text.strip().splitlines()
    kept = lines[-1] if text.lstrip().startswith("Traceback (most recent call last)") else " ".join(lines)
    data = " ".join(kept.split()).encode()
    if len(data) <= LONGEST_DETAILS:
        return data.decode()
    return data[:LONGEST_DETAILS].decode(errors="ignore") + " …"


def admit(instances: InstanceFinder, launch_id: str, task: Task | None, word: str = "Launch") -> Served:
    """The launch that a call is for; any task will do where that is None. `word` is what its caller calls it.

    Raises:
        CallError: there is none, it is not ready, or its model does other work.
    """
    served = instances.find(launch_id)
    if served is None:
        raise CallError(grpc.StatusCode.NOT_FOUND, f"Unknown {word.lower()}_id: {launch_id}")
    if served.state != "ready":
        raise _not_ready(served, word)
    if task is not None and served.task != task:
        text = f"{word} {launch_id} has task '{served.task}', expected '{task}'"
        raise CallError(grpc.StatusCode.FAILED_PRECONDITION, text)
    return served


def bootstrap_failure(
    instances: InstanceFinder, launch_id: str, work: str, problem: RefusedError | LostError
) -> CallError:
    """What the original's callers are told of a failed request; `work` is what failed, as `Generation`."""
    problem = _meant(problem)
    if lost := _ended(instances, launch_id, problem, "Launch"):
        return lost
    if isinstance(problem, NoConnectionError):
        text = f"Launch {launch_id} does not answer: {problem}; try again, and if it goes on, its log may say why"
        return CallError(grpc.StatusCode.UNAVAILABLE, text)
    if isinstance(problem, LostError):
        return CallError(grpc.StatusCode.FAILED_PRECONDITION, f"Launch {launch_id} subprocess crashed")
    code = grpc.StatusCode.UNAVAILABLE if problem.status == 503 else grpc.StatusCode.INTERNAL
    return CallError(code, f"{work} failed: Subprocess error: {shorten(str(problem))}")


def failure(instances: InstanceFinder, instance_id: str, problem: RefusedError | LostError) -> CallError:
    """What callers of our own service are told of a failed request."""
    problem = _meant(problem)
    if lost := _ended(instances, instance_id, problem, "Instance"):
        return lost
    if isinstance(problem, LostError):
        text = f"Instance {instance_id} does not answer: {problem}; its log may say why"
        return CallError(grpc.StatusCode.UNAVAILABLE, text)
    return CallError(_CODES.get(problem.status, grpc.StatusCode.INTERNAL), str(problem))


def _meant(problem: RefusedError | LostError) -> RefusedError | LostError:
    """The same problem, but a refusal by a server whose engine has died is the loss of that server."""
    if isinstance(problem, RefusedError) and str(problem).startswith(ENGINE_DIED):
        return LostError("its engine has died")
    return problem


def _ended(instances: InstanceFinder, launch_id: str, problem: RefusedError | LostError, word: str) -> CallError | None:
    """The reason for a request's end where it is that the launch was stopped meanwhile."""
    if isinstance(problem, RefusedError) and problem.status != 503:
        return None
    served = instances.find(launch_id)
    return None if served is None or served.state in ("ready", "failed") else _not_ready(served, word)


def _not_ready(served: Served, word: str) -> CallError:
    text = f"{word} {served.launch_id} is not ready (state={served.state})"
    return CallError(grpc.StatusCode.FAILED_PRECONDITION, text)
