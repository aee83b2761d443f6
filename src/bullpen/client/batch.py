"""Batch jobs: a file of requests is sent to a server with the OpenAI API, and its results are a file in the same order.

::

    report = await run_batch("jobs.jsonl", "out.jsonl", base_url="http://127.0.0.1:8000")

A job that was ended at any moment goes on when it is run again: what has a result is not done again, only what was in
flight is. A server that is away is waited for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from bullpen.client.batch_files import Answer, Request, Result, Results, answered, check_requests, failed, read_requests
from bullpen.client.batch_ways import REQUEST_SECONDS, ByHttp, Post, Way
from bullpen.client.errors import ConnectionFailed, TimedOut, Unauthorized
from bullpen.client.patience import Patience

ATTEMPTS = 3
"""How often a request is sent that the server fails at with a status 500, does not answer in time, or dies of."""
SYNC_SECONDS = 1.0
"""How often at most what was written is forced onto the disk: what counts when the power fails, not for a kill."""
AWAY = (429, 502, 503, 504)
"""The statuses of a server that will take the request later."""
RETRY_SECONDS = 300.0

Restore = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class BatchProgress:
    """How far a job is.

    Attributes:
        done: results that there are, those of earlier runs among them.
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
        resumed: how many results earlier runs had left.
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
    timeout: float = REQUEST_SECONDS,
    retry_seconds: float = RETRY_SECONDS,
    on_progress: Callable[[BatchProgress], None] | None = None,
    restore: Callable[[], Awaitable[str]] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> BatchReport:
    """Do what is left of a job.

    Args:
        source: the requests, a line of JSON each: ``custom_id``, ``method``, ``url`` and ``body``.
        output: where the results are in the end; until then they are in ``OUTPUT.partial``, in no order.
        base_url: the server's, with or without ``/v1``.
        model: the model of all requests, whatever their bodies say; None: as they say.
        access_key: the server's key.
        in_flight: how many requests are with the server at a time.
        timeout: seconds that the server may take for one of them.
        retry_seconds: how long a server that is away, or says that it has too much to do, is waited for.
        on_progress: called at the beginning and with each result.
        restore: called when the connection is lost; it may start the server again, and returns its URL, which
            may be another one. What it raises ends the job.
        transport: how requests travel, for tests; None: over the network.

    Raises:
        InvalidRequest: a file is not what it ought to be; nothing was sent.
        Conflict: another job is writing the results.
        ConnectionFailed: nobody is at that URL, or the server is away for longer. Run the job again later.
        Unauthorized: the server wants another key.
        ClientError: the results cannot be written.
    """
    way = ByHttp(base_url, access_key, timeout, transport)

    async def move() -> None:
        assert restore is not None
        way.move(await restore())

    return await run_batch_by(
        way,
        source,
        output,
        model=model,
        in_flight=in_flight,
        retry_seconds=retry_seconds,
        on_progress=on_progress,
        restore=None if restore is None else move,
    )


async def run_batch_by(
    way: Way,
    source: Path | str,
    output: Path | str,
    *,
    model: str | None = None,
    in_flight: int = 64,
    retry_seconds: float = RETRY_SECONDS,
    on_progress: Callable[[BatchProgress], None] | None = None,
    restore: Restore | None = None,
) -> BatchReport:
    """Do what is left of a job as `run_batch` does, on this way to the server.

    Args:
        way: the way to the server; what ``restore`` does may change where it leads.
        source, output, model, in_flight, retry_seconds, on_progress, restore: as for `run_batch`.

    Raises:
        NotFound: the daemon does not know the server any more.
        BullpenError: all that `run_batch` raises.
    """
    source, output, began = Path(source), Path(output), time.monotonic()
    places = await asyncio.to_thread(check_requests, source)
    with await asyncio.to_thread(Results, output, source, places) as results:
        journal = Journal(results, len(places), on_progress)
        left = ((place, one) for place, one in enumerate(read_requests(source)) if not results.has(place))
        sender = Sender(Line(way, restore), model, retry_seconds)
        await send_all(sender, way, left, journal, min(in_flight, journal.left))
        await asyncio.to_thread(results.finish)
        return BatchReport(len(places), journal.resumed, results.failed, time.monotonic() - began)


def check_batch(source: Path | str, output: Path | str) -> BatchProgress:
    """Check the files of a job, and tell how far it is; nothing is sent. With all results there, the job is finished.

    Args:
        source: the requests.
        output: the results.

    Raises:
        InvalidRequest: a file is not what it ought to be.
        Conflict: another job is writing the results.
        ClientError: the results cannot be written.
    """
    source, output = Path(source), Path(output)
    places = check_requests(source)
    with Results(output, source, places) as results:
        if results.done == len(places):
            results.finish()
        return BatchProgress(results.done, len(places), results.failed, 0.0, None)


async def send_all(
    sender: Sender,
    way: Way,
    requests: Iterator[tuple[int, Request]],
    journal: Journal,
    in_flight: int,
) -> None:
    """Send requests, so many side by side; note each result as it comes."""

    async def send_some() -> None:
        async with way.opened() as post:
            for place, request in requests:
                journal.write(place, await sender.send(post, request))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(send_some())
    except BaseExceptionGroup as several:
        # The first one ended the others; most are the same server being away.
        first = several.exceptions[0]
        raise first from first.__cause__


class Journal:
    """Notes results and tells of it."""

    def __init__(self, results: Results, total: int, on_progress: Callable[[BatchProgress], None] | None) -> None:
        self.resumed = results.done
        self._results = results
        self._total = total
        self._on_progress = on_progress
        self._began = self._synced = time.monotonic()
        self._tell()

    @property
    def left(self) -> int:
        """How many results are missing."""
        return self._total - self._results.done

    def write(self, place: int, result: Result) -> None:
        """Add the result of the request at a place."""
        self._results.write(place, result)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._results.sync()
            self._synced = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is None:
            return
        done = self._results.done
        rate = (done - self.resumed) / max(time.monotonic() - self._began, 1e-6)
        seconds_left = self.left / rate if rate else None
        self._on_progress(BatchProgress(done, self._total, self._results.failed, rate, seconds_left))


class Line:
    """The way to the server, which may end and be restored."""

    def __init__(self, way: Way, restore: Restore | None) -> None:
        self.way = way
        self.times_lost = 0
        self._restore = restore
        self._restoring = asyncio.Lock()
        self._has_answered = False

    async def send(self, post: Post, path: str, body: bytes) -> Answer:
        """Send a request.

        Raises:
            ConnectionFailed: there is no connection, or not any more.
            TimedOut: the server takes longer than it may.
        """
        answer = await post(path, body)
        self._has_answered = True
        return answer

    async def restore(self, times_lost: int) -> bool:
        """Have the server back; whether it is worth to try again.

        Args:
            times_lost: how often it was lost when the request was sent. If it is more often by now, somebody
                else has had it restored.
        """
        if self._restore is None:
            # Where a server has never answered, the URL is wrong rather than the server away.
            return self._has_answered
        async with self._restoring:
            if times_lost == self.times_lost:
                await self._restore()
                self.times_lost += 1
        return True


class Sender:
    """Sends requests to one server, each until there is a result."""

    def __init__(self, line: Line, model: str | None, retry_seconds: float) -> None:
        self._line = line
        self._model = model
        self._retry_seconds = retry_seconds
        self._one_suspect = asyncio.Lock()

    async def send(self, post: Post, request: Request) -> Result:
        """The result of a request.

        Raises:
            ConnectionFailed: the server is away for longer than it is waited for.
            Unauthorized: it wants another key.
        """
        body = dict(request.body) if self._model is None else {**request.body, "model": self._model}
        content, patience, attempts, losses = json.dumps(body).encode(), Patience(self._retry_seconds), 0, 0
        while True:
            times_lost = self._line.times_lost
            try:
                # Of those that were with a server when it died, one may be why. They go to the next one in turn,
                # so that none counts as the cause for having been next to it.
                if losses == ATTEMPTS - 1:
                    async with self._one_suspect:
                        answer = await self._line.send(post, request.url, content)
                else:
                    answer = await self._line.send(post, request.url, content)
            except TimedOut as problem:
                attempts += 1
                if attempts == ATTEMPTS:
                    return failed(request, "timed_out", str(problem))
                continue
            except ConnectionFailed as problem:
                losses += self._line.way.was_sent(problem)
                if losses == ATTEMPTS:
                    return failed(request, "connection_lost", str(problem))
                if not await self._line.restore(times_lost) or not await patience.pause():
                    raise away(self._line.way.complaint(problem)) from problem
                continue
            status, place = answer.status, self._line.way.place
            attempts += status >= 500 and status not in AWAY
            if status == 401:
                raise Unauthorized(f"the server at {place} wants another access key than the one given")
            if (status < 500 and status not in AWAY) or attempts == ATTEMPTS:
                return answered(request, answer)
            if not await patience.pause():
                raise away(f"the server at {place} takes no requests: it answers {status}")


def away(why: str) -> ConnectionFailed:
    """The error for a server that is waited for no longer."""
    return ConnectionFailed(f"{why}. Run the job again later: it goes on where it is")
