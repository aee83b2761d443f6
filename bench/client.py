"""How the benchmarks ask servers: plain calls, and waiting for the first piece of a streamed completion."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench.common import BenchError

POLL_SECONDS = 0.005
"""Pause between two tries to reach a server that is not there yet."""
ALIVE_SECONDS = 1.0
"""Pause between two looks whether that server still lives; each costs time that the start would have."""
PROMPT = "In a bullpen the next pitcher is"
TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A streamed completion: when its first piece came (by ``time.monotonic``), and the whole text."""

    at: float
    text: str


@contextlib.contextmanager
def connection(url: str, timeout: float) -> Iterator[http.client.HTTPConnection]:
    """A connection that ends with the context; nothing is sent yet."""
    parts = urlsplit(url)
    opened = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        yield opened
    finally:
        opened.close()


def call(method: str, url: str, body: Any = None, timeout: float = 120.0) -> Any:
    """Send a request on a new connection, as curl does; return the JSON of the reply.

    Raises:
        BenchError: the reply is an error.
        OSError: nobody answers.
    """
    return json.loads(send(method, url, body, timeout))


def send(method: str, url: str, body: Any = None, timeout: float = 120.0) -> bytes:
    """As `call`, for replies of any kind."""
    data = None if body is None else json.dumps(body)
    with connection(url, timeout) as opened:
        parts = urlsplit(url)
        path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        opened.request(method, path, data, {"Content-Type": "application/json"})
        reply = opened.getresponse()
        content = reply.read()
    if reply.status >= 400:
        raise BenchError(f"{method} {url} was answered with {reply.status}: {content[:500].decode(errors='replace')}")
    return content


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with connection(url, 2.0) as opened:
            opened.request("GET", urlsplit(url).path)
            return opened.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = POLL_SECONDS) -> float:
    """Wait for a condition, looking again after each pause; return when it was seen.

    Raises:
        BenchError: it does not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(pause)
    return time.monotonic()


def complete(url: str, model: str, timeout: float = 60.0) -> Answer:
    """Ask for a streamed completion of `PROMPT`.

    Raises:
        OSError, http.client.HTTPException, BenchError: the server is not there, goes away, or refuses.
    """
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    first, pieces = 0.0, []
    with connection(url, timeout) as opened:
        opened.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = opened.getresponse()
        if reply.status != 200:
            raise BenchError(f"{url} answers {reply.status}: {reply.read()[:500].decode(errors='replace')}")
        while (line := reply.readline()) and line.strip() != b"data: [DONE]":
            if line.startswith(b"data: "):
                first = first or time.monotonic()
                pieces.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["text"])
        if not line:
            raise BenchError(f"{url} ended a completion in the middle")
    return Answer(first, "".join(pieces))


def first_answer(url: str, model: str, seconds: float, alive: Callable[[], bool]) -> Answer:
    """Try again and again until a server that is being started answers a completion.

    Raises:
        BenchError: it does not in time, or has ended.
    """
    begun = looked = time.monotonic()
    while True:
        try:
            return complete(url, model)
        except (OSError, http.client.HTTPException):
            now = time.monotonic()
            if now - begun > seconds:
                raise BenchError(f"no answer from {url} in {seconds:.0f} s") from None
            if now - looked > ALIVE_SECONDS:
                looked = now
                if not alive():
                    raise BenchError(f"the server that should answer at {url} has ended") from None
            time.sleep(POLL_SECONDS)
