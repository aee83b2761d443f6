"""Requests of the OpenAI API that go to an instance's own server as they are: which of them may, and how they fail."""

from __future__ import annotations

import json

import grpc

from bullpen.proto import v1 as pb
from bullpen.rpc import failures
from bullpen.rpc.failures import CallError
from bullpen.rpc.ports import InstanceFinder
from bullpen.rpc.upstream import LostError, RefusedError

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v2/embed",
    "/pooling",
    "/classify",
)
"""Where vLLM infers. Its other paths change the server, which is not its callers' but the daemon's."""


def check(request: pb.RelayRequest) -> None:
    """Make sure that a request may go to a server.

    Raises:
        CallError: it may not.
    """
    if request.path not in PATHS:
        known = ", ".join(PATHS)
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, f"{request.path} is no path of inference; those are {known}")
    if _is_streamed(request.body):
        text = "the answer comes as a whole: leave 'stream' out, or call StreamComplete or StreamChat"
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, text)


def failure(instances: InstanceFinder, instance_id: str, problem: RefusedError | LostError) -> CallError:
    """What callers are told of a request that was not answered. One that its server ended with may be why."""
    told = failures.failure(instances, instance_id, problem)
    if told.code is grpc.StatusCode.UNAVAILABLE and isinstance(problem, LostError) and problem.was_sent:
        return CallError(grpc.StatusCode.ABORTED, str(told))
    return told


def _is_streamed(body: bytes) -> bool:
    """Whether a body asks for a streamed answer. What is no JSON asks for nothing: the server will say so."""
    if b'"stream"' not in body:  # as a rule; a large body takes long to read
        return False
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and bool(document.get("stream"))
