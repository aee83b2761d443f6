"""The asynchronous connection to a daemon's REST API: calls, streams, and what is tried again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from bullpen.client import wire
from bullpen.client.errors import ClientError, ConnectionFailed, InvalidRequest, Refused, TimedOut
from bullpen.client.launch_errors import RevisionGone, refused
from bullpen.client.models import Event
from bullpen.client.patience import LONGEST_PAUSE_SECONDS, Patience
from bullpen.client.target import Target

AWAY = (502, 503, 504)
"""What a proxy answers while there is no server behind it, and a server that is about to end."""

T = TypeVar("T")


class Rest:
    """A connection pool to one daemon.

    Args:
        target: the daemon.
        timeout: seconds that it may take to answer.
        retry_seconds: how long a call that may be sent twice is tried again after the connection was lost.
        transport: another one than the network, for tests.
    """

    def __init__(
        self, target: Target, timeout: float, retry_seconds: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._retry_seconds = retry_seconds
        self._has_answered = False
        self._http = httpx.AsyncClient(**wire.client_options(target, timeout), transport=transport)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        repeatable: bool = True,
        patient: bool = False,
    ) -> bytes:
        """Make a call; return the body of an answer 2xx.

        Args:
            method, path, body, params: what is sent.
            repeatable: it may be sent twice, for it changes nothing, or the same thing to the same.
            patient: the answer comes when something is done; it may take as long as that takes.

        Raises:
            ClientError: as its subclasses say.
        """
        patience = Patience(self._retry_seconds)
        while True:
            try:
                response = await self._send(method, path, body, params, patient=patient)
            except ConnectionFailed as problem:
                was_sent = not isinstance(problem.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
                # Where a server has never answered, the URL is wrong rather than a connection lost.
                again = self._has_answered and (repeatable or not was_sent)
                if not again or not await patience.pause():
                    raise
                continue
            if response.status_code in AWAY and repeatable and await patience.pause():
                continue
            return self._content(response)

    async def ask_for(self, kind: type[T], method: str, path: str, **call: Any) -> T:
        """Make a call as `ask` does; return the body as a typed value.

        Raises:
            UnexpectedAnswer: the body is something else.
        """
        content = await self.ask(method, path, **call)
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as problem:
            raise wire.foreign(self._target) from problem

    async def ask_object(self, method: str, path: str, **call: Any) -> Mapping[str, Any]:
        """Make a call as `ask` does; return the body's JSON object."""
        return wire.read_object(self._target, await self.ask(method, path, **call))

    @asynccontextmanager
    async def watch(self, since: int | None = None, *, fine: bool = False) -> AsyncIterator[AsyncIterator[Event]]:
        """Open the watch; nothing is missed that happens after this was entered."""
        self._check_open()
        params = {**({} if since is None else {"since": str(since)}), **({"events": "all"} if fine else {})}
        timeout = httpx.Timeout(self._timeout, read=wire.SILENCE_SECONDS if fine else None)
        with wire.transport_errors(self._target):
            async with self._http.stream("GET", wire.WATCH, params=params, timeout=timeout) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._content(response)
                async with aclosing(self._events(response)) as events:
                    yield events

    async def follow(self, since: int | None, *, fine: bool) -> AsyncGenerator[Event]:
        """The events of the watch; where it ends it is opened again after the last of them.

        Raises:
            RevisionGone: the daemon does not know any more what happened since.
            ConnectionFailed: it could not be opened, or not again.
        """
        patience, has_begun = Patience(self._retry_seconds), False
        while True:
            opened: float | None = None
            try:
                async with self.watch(since, fine=fine) as events:
                    has_begun, opened = True, time.monotonic()
                    async for event in events:
                        patience.renew()
                        since = max(since or 0, event.revision)
                        yield event
                lost: ClientError = ConnectionFailed(f"the daemon at {self._target.url} has ended its watch")
            except RevisionGone as problem:
                if not has_begun:
                    raise
                text = f"events were missed while the connection was lost ({problem}); list the instances, then watch"
                raise RevisionGone(f"{text} without since", problem.status) from problem
            except (ConnectionFailed, TimedOut, Refused) as problem:
                if isinstance(problem, Refused) and problem.status not in AWAY:
                    raise
                lost = problem
            if opened is not None and time.monotonic() - opened > LONGEST_PAUSE_SECONDS:
                patience.renew()  # it was open for long, if silent
            if not has_begun or not await patience.pause():
                raise lost

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise ClientError("this client was closed; make another one")

    async def _send(
        self, method: str, path: str, body: bytes | None, params: Mapping[str, str] | None, *, patient: bool
    ) -> httpx.Response:
        self._check_open()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        timeout = httpx.Timeout(self._timeout, read=None if patient else self._timeout)
        with wire.transport_errors(self._target):
            response = await self._http.request(
                method, path, content=body, params=params, headers=headers, timeout=timeout
            )
        self._has_answered = True
        return response

    def _content(self, response: httpx.Response) -> bytes:
        status = response.status_code
        if status in AWAY and wire.sentence(response.content) is None:
            raise ConnectionFailed(f"nobody is behind {self._target.url} now: it answers {status}; try again later")
        try:
            wire.check(self._target, response, *range(200, 300))
        except Refused as problem:
            raise refused(problem) from None
        return response.content

    async def _events(self, response: httpx.Response) -> AsyncGenerator[Event]:
        reader = wire.EventReader(self._target)
        async for data in response.aiter_raw():
            for event in reader.feed(data):
                yield event


def segment(launch_id: str) -> str:
    """A launch id as one segment of a path.

    Raises:
        InvalidRequest: no launch can have that id, and the path would lead somewhere else.
    """
    if not isinstance(launch_id, str) or "/" in launch_id:
        raise InvalidRequest(f"no launch can be called {launch_id!r}: give the launch_id of one", field="launch_id")
    return quote(launch_id, safe="", errors="replace").replace(".", "%2E") or "%20"
