"""Batch jobs: a file of requests is sent to a server with the OpenAI API, and its results are a file in the same order.

::

    report = await run_batch("jobs.jsonl", "out.jsonl", base_url="http://127.0.0.1:8000")

A job that was ended at any moment goes on when it is run again. What is in the file of results is not done again; what
was in flight, or was done ahead of an earlier request that was not, is. A server that is away is waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bullpen.client import wire
from bullpen.client.batch_files import (
    Request,
    Result,
    Results,
    answered,
    count_requests,
    failed,
    read_requests,
)
from bullpen.client.errors import ClientError, ConnectionFailed, TimedOut, Unauthorized
from bullpen.client.models import Instance
from bullpen.client.patience import Patience
from bullpen.client.target import Target, is_loopback
from bullpen.client.target import base_url as read_url

ATTEMPTS = 3
"""How often a request is sent that the server fails at with a status 500, or does not answer in time."""
AHEAD = 8
"""How many times `in_flight` the newest request in flight may be ahead of the oldest result that is not there yet."""
SYNC_SECONDS = 1.0
"""How often at most what was written is forced onto the disk: what counts when the power fails, not for a kill."""
AWAY = (429, 502, 503, 504)
"""The statuses of a server that will take the request later."""


@dataclass(frozen=True)
class BatchProgress:
    """How far a job is.

    Attributes:
        done: results that are in the file, those of earlier runs among them.
        total: requests.
        failed: how many of the results are no success.
        rate: results a second, since this run began.
        seconds_left: at this rate; None before there is one.
    """

    done: int
    total: int
    failed: int
    rate: float
    seconds_left: float | None


@dataclass(frozen=True)
class BatchReport:
    """A job that is done.

    Attributes:
        total: requests, and so results.
        resumed: how many results an earlier run had left.
        failed: how many results are no success.
        seconds: how long this run took.
    """

    total: int
    resumed: int
    failed: int
    seconds: float


async def run_batch(
    source: Path | str,
    output: Path | str,
    *,
    base_url: str,
    model: str | None = None,
    access_key: str | None = None,
    in_flight: int = 64,
    timeout: float = 3600.0,
    retry_seconds: float = 300.0,
    on_progress: Callable[[BatchProgress], None] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> BatchReport:
    """Do what is left of a job.

    Args:
        source: the requests, a line of JSON each: ``custom_id``, ``method``, ``url`` and ``body``.
        output: the results; what is in it already is kept.
        base_url: the server's, with or without ``/v1``.
        model: the model of all requests, whatever their bodies say; None: as they say.
        access_key: the server's key.
        in_flight: how many requests are with the server at a time.
        timeout: seconds that the server may take for one of them.
        retry_seconds: how long a server that is away, or says that it has too much to do, is waited for.
        on_progress: called whenever results were written.
        transport: how requests travel, for tests; None: over the network.

    Raises:
        InvalidRequestError: a file is not what it ought to be; nothing was sent.
        ConflictError: another job is writing the results.
        ConnectionFailed: nobody is at that URL, or the server is away for longer. Run the job again later.
        Unauthorized: the server wants another key.
    """
    source, output, began = Path(source), Path(output), time.monotonic()
    target = Target(read_url(base_url).removesuffix("/v1"), access_key, was_named=True)
    total = await asyncio.to_thread(count_requests, source)
    with await asyncio.to_thread(Results, output, source) as results:
        journal = Journal(results, total, on_progress)
        async with httpx.AsyncClient(**wire.client_options(target, timeout), transport=transport) as http:
            sender = Sender(target, http, model, retry_seconds)
            await send_all(sender, islice(read_requests(source), results.done, None), journal, in_flight)
        journal.sync()
        return BatchReport(total, journal.resumed, results.failed, time.monotonic() - began)


async def send_all(sender: Sender, requests: Iterator[Request], journal: Journal, in_flight: int) -> None:
    """Send requests side by side; write the results in their order."""
    slots = asyncio.Semaphore(in_flight)
    sent: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue(AHEAD * in_flight)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(write_all(sent, journal))
            for request in requests:
                await slots.acquire()
                task = group.create_task(sender.send(request))
                task.add_done_callback(lambda _: slots.release())
                await sent.put(task)
            await sent.put(None)
    except BaseExceptionGroup as several:
        # The first one ended the others; most are the same server being away.
        first = several.exceptions[0]
        raise first from first.__cause__


async def write_all(sent: asyncio.Queue[asyncio.Task[Result] | None], journal: Journal) -> None:
    """Write the results of tasks in the order in which those were begun, as many at a time as there are."""
    ready: list[Result] = []
    try:
        while (task := await sent.get()) is not None:
            if not task.done():
                journal.write(ready)
            ready.append(await task)
            if sent.empty():
                journal.write(ready)
    finally:
        journal.write(ready)


class Journal:
    """Writes results and tells of it."""

    def __init__(self, results: Results, total: int, on_progress: Callable[[BatchProgress], None] | None) -> None:
        self.resumed = results.done
        self._results = results
        self._total = total
        self._on_progress = on_progress
        self._began = self._synced = time.monotonic()

    def write(self, ready: list[Result]) -> None:
        """Append results to the file, and empty the list."""
        if not ready:
            return
        self._results.write(ready)
        ready.clear()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        if self._on_progress is not None:
            self._on_progress(self._progress())

    def sync(self) -> None:
        """Have on the disk what was written."""
        self._results.sync()
        self._synced = time.monotonic()

    def _progress(self) -> BatchProgress:
        done = self._results.done
        rate = (done - self.resumed) / max(time.monotonic() - self._began, 1e-6)
        left = (self._total - done) / rate if rate else None
        return BatchProgress(done, self._total, self._results.failed, rate, left)


class Sender:
    """Sends requests to one server, each until there is a result."""

    def __init__(self, target: Target, http: httpx.AsyncClient, model: str | None, retry_seconds: float) -> None:
        self._target = target
        self._http = http
        self._model = model
        self._retry_seconds = retry_seconds
        self._has_answered = False

    async def send(self, request: Request) -> Result:
        """The result of a request.

        Raises:
            ConnectionFailed: the server is away for longer than it is waited for.
            Unauthorized: it wants another key.
        """
        patience, attempts = Patience(self._retry_seconds), 0
        while True:
            try:
                response = await self._post(request)
            except TimedOut as problem:
                attempts += 1
                if attempts == ATTEMPTS:
                    return failed(request, "timed_out", str(problem))
                continue
            except ConnectionFailed as problem:
                # A request that ends the server each time must not do so for ever.
                attempts += was_sent(problem)
                if attempts == ATTEMPTS:
                    return failed(request, "connection_lost", str(problem))
                # Where a server has never answered, the URL is wrong rather than the server away.
                if not self._has_answered or not await patience.pause():
                    away = f"nobody answers at {self._target.url}; start that server, or give its base_url"
                    raise ConnectionFailed(f"{away}. Run the job again: it goes on where it is") from problem
                continue
            self._has_answered = True
            status = response.status_code
            if status == 401:
                raise Unauthorized(f"the server at {self._target.url} wants another access key than the one given")
            if status in AWAY:
                if not await patience.pause():
                    away = f"the server at {self._target.url} takes no requests: it answers {status}"
                    raise ConnectionFailed(f"{away}. Run the job again later: it goes on where it is")
                continue
            attempts += status >= 500
            if status < 500 or attempts == ATTEMPTS:
                return answered(request, response)

    async def _post(self, request: Request) -> httpx.Response:
        body = request.body if self._model is None else {**request.body, "model": self._model}
        with wire.transport_errors(self._target):
            return await self._http.post(request.url, json=body)


def was_sent(problem: ConnectionFailed) -> bool:
    """Whether the server may have had the request."""
    return not isinstance(problem.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))


def server_url(target: Target, instance: Instance) -> str:
    """The URL of an instance's own server.

    Raises:
        ClientError: it cannot be reached from here.
    """
    if instance.url is None:
        raise ClientError(f"instance {instance.instance_id!r} has no server now; wake it first")
    if is_loopback(urlsplit(instance.url).hostname or "") and not target.is_local:
        raise ClientError(
            f"{instance.url} can be reached on the server's own host only: run this there,"
            " or launch with extra_kwargs={'host': '0.0.0.0'} and an api_key"
        )
    return instance.url
