"""The wire without the waiting: what to send, what an answer means. Any kind of client is a thin shell around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.client.models import Event, Instance, LogChunk, Swapped
from bullpen.client.target import DEFAULT_URL, Target

INSTANCES = "/v2/vllm/instances"
WATCH = f"{INSTANCES}/watch"
SWAP = "/v2/vllm/swap"
GPUS = "/v2/vllm/gpus"
SILENCE_SECONDS = 60.0
"""How long a watch with heartbeats (one every 15 s) may be silent before its connection counts as lost."""
ID_RULE = "an id has 1 to 128 of A-Z a-z 0-9 . _ -, does not begin with a dot and is not 'watch'"
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


def json_body(document: Mapping[str, Any]) -> bytes:
    """A JSON object as it is sent.

    Raises:
        InvalidRequest: something in it cannot be written as JSON.
    """
    for name, value in document.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as problem:
            text = f"{name} cannot be sent as JSON ({problem}); it may hold texts, finite numbers, lists and dicts"
            raise InvalidRequest(text, field=name) from problem
    return json.dumps(document).encode()


def instance_path(instance_id: str) -> str:
    """The path of an instance.

    Raises:
        InvalidRequest: no instance can have that id, and the path would lead somewhere else.
    """
    if not isinstance(instance_id, str) or instance_id in ("", "watch") or "/" in instance_id:
        raise InvalidRequest(f"no instance can be called {instance_id!r}: {ID_RULE}", field="instance_id")
    # Dots are unreserved, but a segment of dots alone would climb up the path.
    return f"{INSTANCES}/{quote(instance_id, safe='', errors='replace').replace('.', '%2E')}"


def config_body(options: str, **optional: Any) -> bytes:
    """The body of a create; what is None is left out."""
    given = {name: value for name, value in optional.items() if value is not None}
    return json_body({"options": options, **given})


def sleep_params(level: int | None, drain: float | None, *, refuse: bool) -> dict[str, str]:
    """The query of a sleep; what is None is left out."""
    given = {"level": level, "drain": drain, "new_requests": "refuse" if refuse else None}
    return {name: str(value) for name, value in given.items() if value is not None}


def verdict_body(level: int, *, works: bool, why: str) -> bytes:
    """The body of a verdict."""
    return json_body({"level": level, "works": works, "why": why})


def swap_body(
    incoming: str | Mapping[str, Any],
    out: str | Sequence[str],
    sleep_level: int | None,
    drain: float | None,
    *,
    refuse: bool,
) -> bytes:
    """The body of a swap."""
    body = {
        "in": incoming if isinstance(incoming, str) else dict(incoming),
        "out": out if isinstance(out, str) else list(out),
        "sleep_level": sleep_level,
        "drain": drain,
        "new_requests": "refuse" if refuse else "hold",
    }
    return json_body(body)


def log_range(start: int, end: int | None) -> dict[str, str]:
    """The header for the bytes from ``start`` up to and not including ``end``."""
    return {"Range": f"bytes={start}-{'' if end is None else max(end - 1, start)}"}


def new_headers(target: Target) -> dict[bytes, bytes]:
    """What every request carries."""
    headers = {b"Accept": b"application/json"}
    if target.access_key:
        headers[b"Authorization"] = b"Bearer " + target.access_key.encode(errors="surrogateescape")
    return headers


def client_options(target: Target, timeout: float) -> dict[str, Any]:
    """How httpx's clients are made.

    Raises:
        ClientError: the URL's host can be none.
    """
    try:
        httpx.URL(target.url)
    except httpx.InvalidURL as problem:
        raise ClientError(f"{target.url} is no URL of a daemon ({problem}); write it as {DEFAULT_URL}") from problem
    return {
        "base_url": target.url,
        "headers": new_headers(target),
        "timeout": timeout,
        # A proxy is no way to one's own loopback, and the certificates take time to load that plain HTTP needs not.
        "trust_env": not target.is_local,
        "verify": target.url.startswith("https:"),
        "limits": httpx.Limits(max_connections=None),
    }


@contextmanager
def transport_errors(target: Target) -> Iterator[None]:
    """Turn httpx's errors into this client's."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as problem:
        reason = f" ({problem})" if target.url.startswith("https:") else ""
        raise ConnectionFailed(f"no Bullpen answers at {target.url}{reason}; {way_out(target)}") from problem
    except httpx.TimeoutException as problem:
        raise TimedOut(f"the daemon at {target.url} does not answer in time; `bullpen doctor` may say why") from problem
    except httpx.RemoteProtocolError as problem:
        raise ConnectionFailed(f"the connection to {target.url} ended in the middle of an answer") from problem
    except httpx.TransportError as problem:
        raise ConnectionFailed(f"the connection to {target.url} broke: {problem}") from problem


def way_out(target: Target) -> str:
    """What to do where nobody answers."""
    if target.was_named:
        return "check that URL first, or start a daemon with `bullpen serve`"
    return "start one with `bullpen serve`, or name it with --url or BULLPEN_URL"


def check(target: Target, response: httpx.Response, *expected: int) -> None:
    """Let an answer pass whose status is expected; the body of another one must have been read.

    Raises:
        Refused: the daemon says no.
        UnexpectedAnswer: this is no daemon's answer.
    """
    status = response.status_code
    if status in expected:
        return
    if status == 401:
        wrong = "does not accept this access key" if target.access_key else "wants its access key"
        raise Unauthorized(f"the daemon at {target.url} {wrong}: set BULLPEN_ACCESS_KEY, or give --access-key")
    text = sentence(response.content)
    if status < 400 or text is None or text == "Not Found":  # a daemon's own 404 names what is not there
        raise foreign(target)
    raise Refused(text, status)


def sentence(content: bytes) -> str | None:
    """The words of an error's body; None where it has no such thing."""
    try:
        detail = json.loads(content)["detail"]
        if isinstance(detail, str):
            return detail
        return "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in detail)
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def read_object(target: Target, content: bytes) -> Mapping[str, Any]:
    """The JSON object of a body.

    Raises:
        UnexpectedAnswer: it is none.
    """
    try:
        document = json.loads(content)
    except ValueError:
        raise foreign(target) from None
    if not isinstance(document, dict):
        raise foreign(target)
    return document


def read_instance(target: Target, document: Mapping[str, Any]) -> Instance:
    """The instance that a JSON object describes.

    Raises:
        UnexpectedAnswer: it describes none.
    """
    if "instance_id" not in document:
        raise foreign(target)
    return Instance.read(document)


def read_swapped(target: Target, document: Mapping[str, Any]) -> Swapped:
    """The swap that a JSON object describes.

    Raises:
        UnexpectedAnswer: it describes none.
    """
    if not isinstance(document.get("in"), dict):
        raise foreign(target)
    return Swapped.read(document)


def foreign(target: Target) -> UnexpectedAnswer:
    """The error for an answer that no daemon gives."""
    return UnexpectedAnswer(f"what answers at {target.url} is no Bullpen; name its URL with --url or BULLPEN_URL")


def read_log_chunk(target: Target, response: httpx.Response, start: int, end: int | None) -> LogChunk:
    """The bytes of a log in an answer 206, or 416 where there are none at ``start``."""
    found = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if found is None:
        raise foreign(target)
    first, total = found[1], int(found[2])
    if first is None:
        return LogChunk(b"", start, total)
    data = response.content if end is None or end > start else b""
    return LogChunk(data, int(first), total)


class EventReader:
    """Puts the bytes of a watch, in pieces of any size, together to events."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._rest = b""

    def feed(self, data: bytes) -> Sequence[Event]:
        """Take the next bytes; return the events that they complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [Event.read(read_object(self._target, line)) for line in lines if line]
