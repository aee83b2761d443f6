"""The synchronous client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import httpx

from bullpen.client import wire
from bullpen.client.errors import ConnectionFailed, InstanceFailed, TimedOut
from bullpen.client.models import Event, Instance, InstanceList, LogChunk, Readiness, Swapped
from bullpen.client.reports import Explanation, GpuReport, Verdict, read_verdicts
from bullpen.client.target import Target, find


class BullpenClient:
    """A client of one daemon; a context manager, and safe to use from several threads.

    Every method raises `ClientError`: `ConnectionFailed` where nobody answers, `Unauthorized` for want of the key,
    `Refused` where the daemon says no.

    Args:
        url: the daemon's; see `bullpen.client.target` for where it comes from when it is None.
        access_key: the daemon's admin key; likewise.
        timeout: seconds that the daemon may take to answer. Streams, and what changes instances, take as long as
            they take.
    """

    def __init__(self, url: str | None = None, access_key: str | None = None, timeout: float = 10.0) -> None:
        self.target: Target = find(url, access_key)
        self._timeout = timeout
        self._http = httpx.Client(**wire.client_options(self.target, timeout))

    @property
    def url(self) -> str:
        """The daemon's base URL."""
        return self.target.url

    # -- the daemon --------------------------------------------------------------------------------------------

    def health(self) -> Mapping[str, Any]:
        """Ask whether the daemon lives; return what it says."""
        return self._ask("GET", "/health")

    def ready(self) -> Readiness:
        """Ask whether the daemon can launch, and how far each engine is warmed."""
        return Readiness.read(self._ask("GET", "/ready", expected=(200, 503)))

    # -- instances ---------------------------------------------------------------------------------------------

    def create(
        self,
        options: str,
        *,
        instance_id: str | None = None,
        env_vars: Mapping[str, str] | None = None,
        gpu_uuids: Sequence[str] | None = None,
        annotations: Mapping[str, str] | None = None,
        engine: str | None = None,
        gpus: int | None = None,
        gpu_share: float | None = None,
        sleep: str | None = None,
        sleep_after: float | str | None = None,
        discard_after: float | str | None = None,
        stop_after: float | str | None = None,
        pin: bool | None = None,
        priority: int | None = None,
        warm_up: Mapping[str, Any] | None = None,
    ) -> Instance:
        """Create an instance. It has been started when this returns, and is not ready yet.

        While the engine is still being imported, the call waits for that.

        Args:
            options: ``vllm serve``'s command line, split as a shell splits words (`shlex.join` makes one).
            instance_id: the id; the daemon's choice where None.
            env_vars: environment of the server.
            gpu_uuids: GPUs that it claims, by UUID, a beginning of one, or index; None claims none by name.
            annotations: opaque to Bullpen, returned as given.
            engine: ``vllm`` or ``sim``; the daemon's default where None.
            gpus: how many GPUs of the daemon's choice it claims.
            gpu_share: the share of each GPU that it takes, above 0 to 1; None takes them alone.
            sleep: ``engine``, ``emulate`` (a stop that keeps the slot) or ``off``; the daemon's choice where None.
            sleep_after: seconds without a request, or text such as ``5m``, until it sleeps by itself.
            discard_after: the same until it gives its weights up too.
            stop_after: the same until its process ends.
            pin: never let it step down by itself, or for others.
            priority: the higher, the later it is chosen where one must step down for another.
            warm_up: a request to be sent once it answers: ``{"path": "/v1/completions", "body": {…}}``.
        """
        body = wire.config_body(
            options,
            env_vars=None if env_vars is None else dict(env_vars),
            gpu_uuids=None if gpu_uuids is None else list(gpu_uuids),
            annotations=None if annotations is None else dict(annotations),
            engine=engine,
            gpus=gpus,
            gpu_share=gpu_share,
            sleep=sleep,
            sleep_after=sleep_after,
            discard_after=discard_after,
            stop_after=stop_after,
            pin=pin,
            priority=priority,
            warm_up=None if warm_up is None else dict(warm_up),
        )
        method, path = ("POST", wire.INSTANCES) if instance_id is None else ("PUT", wire.instance_path(instance_id))
        document = self._ask(method, path, body=body, expected=(201,), patient=True)
        return wire.read_instance(self.target, document)

    def get(self, instance_id: str) -> Instance:
        """Describe an instance."""
        return wire.read_instance(self.target, self._ask("GET", wire.instance_path(instance_id)))

    def list(self) -> InstanceList:
        """Describe all instances."""
        return InstanceList.read(self._ask("GET", wire.INSTANCES))

    def delete(self, instance_id: str) -> Instance:
        """Stop and remove an instance; no process of it is left when this returns."""
        document = self._ask("DELETE", wire.instance_path(instance_id), patient=True)
        return wire.read_instance(self.target, document)

    def delete_all(self) -> Sequence[Instance]:
        """Stop and remove all instances, side by side; return those that were stopped."""
        document = self._ask("DELETE", wire.INSTANCES, patient=True)
        return [Instance.read(instance) for instance in document.get("stopped_instances", [])]

    # -- sleep and swap ----------------------------------------------------------------------------------------

    def sleep(
        self, instance_id: str, level: int | None = None, drain: float | None = None, refuse: bool = False
    ) -> Instance:
        """Put an instance to sleep; it sleeps when this returns. One that sleeps at least so deep is left alone.

        Args:
            instance_id: which one.
            level: 1 keeps its weights in host memory, 2 discards them; None: the lightest that works.
            drain: seconds that requests in flight may take to end; the daemon's setting where None.
            refuse: refuse new requests while it sleeps; else they are held until it is awake.
        """
        path = f"{wire.instance_path(instance_id)}/sleep"
        document = self._ask("POST", path, params=wire.sleep_params(level, drain, refuse=refuse), patient=True)
        return wire.read_instance(self.target, document)

    def wake(self, instance_id: str) -> Instance:
        """Have an instance ready, whether it sleeps, was stopped or has failed; it is ready when this returns."""
        document = self._ask("POST", f"{wire.instance_path(instance_id)}/wake", patient=True)
        return wire.read_instance(self.target, document)

    def swap(
        self,
        incoming: str | Mapping[str, Any],
        out: str | Sequence[str] = "auto",
        sleep_level: int | None = None,
        drain: float | None = None,
        refuse: bool = False,
    ) -> Swapped:
        """Have one instance ready in the place of others, which sleep then; or have all as it was before.

        Args:
            incoming: an id, or a new instance's fields: ``{"options": …, "instance_id": …}``, as for `create`.
            out: an id, or several, or ``auto``: those that stand in its way, by priority and last use.
            sleep_level, drain, refuse: as for `sleep`.
        """
        body = wire.swap_body(incoming, out, sleep_level, drain, refuse=refuse)
        document = self._ask("POST", wire.SWAP, body=body, patient=True)
        return wire.read_swapped(self.target, document)

    def explain(self, instance_id: str) -> Explanation:
        """Ask why an instance is as it is, what it waits for and what happens to it next."""
        return Explanation.read(self._ask("GET", f"{wire.instance_path(instance_id)}/explain", patient=True))

    def judge(self, instance_id: str, level: int, *, works: bool, why: str) -> Mapping[str, Verdict | None]:
        """Have it remembered whether a level of sleep works for an instance's model, engine and GPU.

        The ladder leaves out what does not work. The last word counts: later sleeps and wakes may change it again.

        Args:
            instance_id: one of that model that can sleep.
            level: 1 or 2.
            works: whether it wakes from there and answers as before.
            why: how that is known, in one line; `explain` shows it.

        Returns:
            What is remembered now, by ``level_1`` and ``level_2``.
        """
        body = wire.verdict_body(level, works=works, why=why)
        return read_verdicts(self._ask("POST", f"{wire.instance_path(instance_id)}/verdicts", body=body))

    def gpus(self) -> GpuReport:
        """Ask for all GPUs, who has them and what is free."""
        return GpuReport.read(self._ask("GET", wire.GPUS, patient=True))

    # -- logs --------------------------------------------------------------------------------------------------

    def log(self, instance_id: str, start: int = 0, end: int | None = None) -> tuple[bytes, int]:
        """Bytes of an instance's log from ``start`` up to and not including ``end`` (1 MiB at most), and its size."""
        chunk = self.log_chunk(instance_id, start, end)
        return chunk.data, chunk.total

    def log_chunk(self, instance_id: str, start: int = 0, end: int | None = None) -> LogChunk:
        """The same, with the place of the first byte: the oldest bytes of a long log may be gone."""
        path, headers = f"{wire.instance_path(instance_id)}/log", wire.log_range(start, end)
        response = self._send("GET", path, headers=headers)
        wire.check(self.target, response, 206, 416)
        return wire.read_log_chunk(self.target, response, start, end)

    def log_chunks(self, instance_id: str, start: int = 0) -> Iterator[LogChunk]:
        """All there is of a log from ``start`` on, piece by piece."""
        while (chunk := self.log_chunk(instance_id, start)).data:
            yield chunk
            start = chunk.start + len(chunk.data)

    def follow_log(self, instance_id: str, start: int = 0) -> Iterator[bytes]:
        """The log from ``start`` on, and then what is written, until the server process ends."""
        path, headers = f"{wire.instance_path(instance_id)}/log", wire.log_range(start, None)
        with wire.transport_errors(self.target), self._stream(path, {"follow": "true"}, None, headers) as response:
            yield from response.iter_raw()

    # -- events ------------------------------------------------------------------------------------------------

    def watch(self, since: int | None = None, fine: bool = False) -> Iterator[Event]:
        """What happens to instances, until the daemon ends or the iterator is closed.

        Args:
            since: a revision; only what happened after it. None begins with a CREATED for every instance there is.
            fine: every change of state and phase too, and a heartbeat every 15 s.
        """
        with wire.transport_errors(self.target), self._open_watch(since, fine=fine) as response:
            yield from self._events(response)

    def follow(self, instance_id: str, timeout: float | None = None) -> Iterator[Event]:
        """What happens to one instance: first how it is, as a CREATED, then every change, to its DELETED.

        Raises:
            TimedOut: ``timeout`` seconds have passed.
            ConnectionFailed: the daemon ends.
        """
        with wire.transport_errors(self.target), self._open_watch(None, fine=True) as response:
            # The watch is open, so nothing is missed between this look and the first event.
            current = self.get(instance_id)
            yield Event("CREATED", current.revision, current)
            with cut_off(response, timeout) as expired:
                try:
                    for event in self._events(response):
                        if event.instance is not None and event.instance.instance_id == instance_id:
                            yield event
                            if event.type == "DELETED":
                                return
                except httpx.TransportError:
                    if not expired.is_set():
                        raise
        if expired.is_set():
            raise TimedOut(f"{timeout:g} s have passed")
        raise ConnectionFailed(f"the daemon at {self.url} is ending")

    def wait_until_ready(
        self, instance_id: str, timeout: float | None = None, on_change: Callable[[Instance], None] | None = None
    ) -> Instance:
        """Wait for an instance to be ready (or asleep, which it can only be after it was).

        Args:
            instance_id: which one.
            timeout: seconds to wait at most.
            on_change: called with the instance as it is, and whenever its state, phase or progress changes.

        Raises:
            InstanceFailed: it ended; the text is the daemon's sentence.
            TimedOut: it is not ready in time.
        """
        instance: Instance | None = None
        try:
            for event in self.follow(instance_id, timeout):
                if event.instance is None:
                    continue
                if on_change is not None and event.instance != instance:
                    on_change(event.instance)
                instance = event.instance
                if event.type == "DELETED":
                    raise InstanceFailed(f"instance {instance_id!r} was removed while it was starting", instance)
                if instance.ended:
                    raise InstanceFailed(why_ended(instance), instance)
                if instance.state in ("ready", "sleeping"):
                    return instance
        except TimedOut as problem:
            doing = instance.phase or instance.state if instance is not None else "starting"
            raise TimedOut(f"instance {instance_id!r} is not ready after {timeout:g} s: {doing}") from problem
        raise ConnectionFailed(f"the daemon at {self.url} is ending")

    # -- the connection ----------------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        expected: tuple[int, ...] = (200,),
        patient: bool = False,
    ) -> Mapping[str, Any]:
        response = self._send(method, path, body=body, params=params, patient=patient)
        wire.check(self.target, response, *expected)
        return wire.read_object(self.target, response.content)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        patient: bool = False,
    ) -> httpx.Response:
        sent = {**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})}
        timeout = httpx.Timeout(self._timeout, read=None if patient else self._timeout)
        with wire.transport_errors(self.target):
            return self._http.request(method, path, content=body, params=params, headers=sent, timeout=timeout)

    @contextmanager
    def _stream(
        self, path: str, params: Mapping[str, str], silence: float | None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        timeout = httpx.Timeout(self._timeout, read=silence)
        with self._http.stream("GET", path, params=params, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                response.read()
            wire.check(self.target, response, 200)
            yield response

    @contextmanager
    def _open_watch(self, since: int | None, *, fine: bool) -> Iterator[httpx.Response]:
        params = {**({} if since is None else {"since": str(since)}), **({"events": "all"} if fine else {})}
        with self._stream(wire.WATCH, params, wire.SILENCE_SECONDS if fine else None) as response:
            yield response

    def _events(self, response: httpx.Response) -> Iterator[Event]:
        reader = wire.EventReader(self.target)
        for data in response.iter_raw():
            yield from reader.feed(data)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> BullpenClient:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()


def why_ended(instance: Instance) -> str:
    """The daemon's sentence about an ended instance."""
    if instance.error is not None:
        return instance.error.message
    return f"instance {instance.instance_id!r} ended by itself before it was ready; its log may say why"


@contextmanager
def cut_off(response: httpx.Response, seconds: float | None) -> Iterator[threading.Event]:
    """End a stream after some time; the event tells that it was this that ended it.

    httpx limits the time between two pieces, not that of the whole, and a stream may be silent for long.
    """
    expired = threading.Event()
    connection: socket.socket | None = response.extensions["network_stream"].get_extra_info("socket")

    def cut() -> None:
        expired.set()
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut) if seconds is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield expired
    finally:
        if timer is not None:
            timer.cancel()
