"""The ways on which a batch job's requests get to an instance's own server: straight there, or through the daemon.

A server listens on its host's loopback as a rule. From elsewhere, and from behind a tunnel or outside of a container,
its requests go to the daemon by gRPC, which hands them on as they are.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from bullpen.client import messages, wire
from bullpen.client.batch_files import Answer
from bullpen.client.errors import ClientError, ConnectionFailed, InvalidRequest, Refused, Unauthorized
from bullpen.client.inference import Address, Inference, was_aborted
from bullpen.client.launch_errors import NotFound, NotReady
from bullpen.client.models import Instance
from bullpen.client.target import Target, is_loopback
from bullpen.client.target import base_url as read_url

LOOK_SECONDS = 3.0
"""How long a server may take to show that it is the one; through the daemon it goes otherwise."""
CHECK_SECONDS = 30.0
REQUEST_SECONDS = 3600.0
LISTENING = "0A"
"""The state of a socket that listens, as ``/proc/net/tcp`` has it."""

Post = Callable[[str, bytes], Awaitable[Answer]]
"""Sends a body to a path. Raises ConnectionFailed, TimedOut, or what ends the job."""


class Way(Protocol):
    """A way to a server."""

    @property
    def place(self) -> str:
        """Where it leads, for sentences."""

    def opened(self) -> AbstractAsyncContextManager[Post]:
        """Be able to send requests, one at a time."""

    def follow(self, instance: Instance) -> None:
        """Lead to where the instance answers now."""

    def was_sent(self, problem: ConnectionFailed) -> bool:
        """Whether the server may have had the request, and ended with it."""

    def complaint(self, problem: ConnectionFailed) -> str:
        """What to say, and to do, where a server stays away."""


class ByHttp:
    """Straight to a server.

    Args:
        url: the server's, with or without ``/v1``.
        access_key: the server's own.
        timeout: seconds that it may take for a request.
        transport: how requests travel, for tests; None: over the network.
    """

    def __init__(
        self, url: str, access_key: str | None, timeout: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._target = Target(server_root(url), access_key, was_named=True)
        self._options = {**wire.client_options(self._target, timeout), "transport": transport}
        if self._options["verify"]:
            self._options["verify"] = httpx.create_ssl_context()  # reading the certificates takes time

    @property
    def place(self) -> str:
        """The server's URL."""
        return self._target.url

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Post]:
        """A client, and so a connection, of one's own: httpx looks through all of a client's whenever it needs one."""
        async with httpx.AsyncClient(**self._options) as http:

            async def post(path: str, body: bytes) -> Answer:
                headers = {"Content-Type": "application/json"}
                with wire.transport_errors(self._target):
                    response = await http.post(f"{self._target.url}{path}", content=body, headers=headers)
                return Answer(response.status_code, response.content, response.headers.get("x-request-id", ""))

            yield post

    def follow(self, instance: Instance) -> None:
        """Lead to the instance's own URL."""
        if instance.url is not None:
            self.move(instance.url)

    def move(self, url: str) -> None:
        """Lead to another URL."""
        self._target = Target(server_root(url), self._target.access_key, was_named=True)

    def was_sent(self, problem: ConnectionFailed) -> bool:
        """Whether there was a connection."""
        return not isinstance(problem.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))

    def complaint(self, problem: ConnectionFailed) -> str:
        """That nobody is there."""
        return f"nobody answers at {self.place}; start that server, or give its base_url"


class ByDaemon:
    """Through the daemon, by gRPC.

    Args:
        inference: the channel to the daemon; it must not try again by itself.
        instance_id: whose server it is.
        timeout: seconds that it may take for a request.
    """

    def __init__(self, inference: Inference, instance_id: str, timeout: float) -> None:
        self._inference = inference
        self._instance_id = instance_id
        self._timeout = timeout

    @property
    def place(self) -> str:
        """The instance's name and the daemon's address."""
        return f"{self._inference.address.target} ({self._instance_id})"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Post]:
        """The channel, which all share."""
        yield self._post

    def follow(self, instance: Instance) -> None:
        """Nothing: the daemon knows where its instances are."""

    def was_sent(self, problem: ConnectionFailed) -> bool:
        """Whether the daemon says so. One that ends itself takes no server along."""
        return was_aborted(problem)

    def complaint(self, problem: ConnectionFailed) -> str:
        """The daemon's sentence, or gRPC's."""
        return str(problem)

    async def check(self) -> None:
        """Make sure that the daemon is there and hands requests on: it refuses one that leads nowhere as such.

        Raises:
            ClientError: it is not there, does not know this, or wants another key; or grpcio is missing.
        """
        with suppress(InvalidRequest):
            await self._inference.ask(messages.relay(self._instance_id, "", b""), CHECK_SECONDS)

    async def _post(self, path: str, body: bytes) -> Answer:
        try:
            answer = await self._inference.ask(messages.relay(self._instance_id, path, body), self._timeout)
        except (Unauthorized, NotFound):
            raise
        except NotReady as problem:
            raise ConnectionFailed(str(problem)) from problem
        except Refused as problem:
            # What gRPC has no room for is no matter of waiting; all else counts as if the server had said it.
            status = 413 if problem.status == 429 else problem.status
            return Answer(status, json.dumps({"error": {"message": str(problem), "code": status}}).encode())
        return Answer(answer.status, answer.body)


@asynccontextmanager
async def way_to(
    instance: Instance, target: Target, address: Address, *, api_key: str | None = None
) -> AsyncIterator[Way]:
    """The way to an instance's own server: straight to it where it can be reached from here, else through the daemon.

    Args:
        instance: whose server it is.
        target: the daemon that has it.
        address: the daemon's gRPC server.
        api_key: what the server itself wants to be asked with; the daemon knows that by itself.

    Raises:
        ClientError: there is no server now, or no way to it.
    """
    if instance.url is None:
        raise ClientError(f"instance {instance.instance_id!r} has no server now; wake it first")
    if await can_reach(instance, target):
        yield ByHttp(instance.url, api_key, REQUEST_SECONDS)
        return
    inference = Inference(address, target.access_key, retry_seconds=0.0, limit_response=False)
    try:
        way = ByDaemon(inference, instance.instance_id, REQUEST_SECONDS)
        await way.check()
        yield way
    finally:
        await inference.close()


async def can_reach(instance: Instance, target: Target) -> bool:
    """Whether an instance's URL leads to that very instance as seen from here; a stranger would get its requests.

    A daemon on this host's loopback need not be on this host, for what is there may be a tunnel's end. So on the
    loopback the process of the instance's pid must be the one that listens; else the instance must be where the daemon
    is. In both cases it must have the instance's names, which it is asked for without a key.
    """
    assert instance.url is not None
    parts = urlsplit(instance.url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if "+unix" in parts.scheme:
        return False
    if not is_loopback(host):
        return host == urlsplit(target.url).hostname and await serves(instance, Target(instance.url)) is True
    if not target.is_local or instance.pid is None or not await asyncio.to_thread(listens, instance.pid, port):
        return False
    return await serves(instance, Target(instance.url)) is not False


async def serves(instance: Instance, target: Target) -> bool | None:
    """Whether a server has the names of an instance's models; None where it tells nobody without its key."""
    try:
        async with httpx.AsyncClient(**wire.client_options(target, LOOK_SECONDS)) as http:
            answer = await http.get(f"{target.url}/v1/models")
            if answer.status_code == 401:
                return None
            names = {model["id"] for model in answer.json()["data"]} if answer.is_success else set()
    except (ClientError, httpx.HTTPError, ValueError, LookupError, TypeError):
        return False
    return set(instance.served_model_names) <= names


def listens(pid: int, port: int) -> bool:
    """Whether a process of this host listens at a TCP port; False as well where this user may not know."""
    listening = set()
    try:
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    listening.add(f"socket:[{fields[9]}]")
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    return any(file_of(pid, descriptor) in listening for descriptor in descriptors)


def file_of(pid: int, descriptor: str) -> str | None:
    """What a descriptor of a process is open on; None where it has been closed meanwhile."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        return None


def server_root(base_url: str) -> str:
    """A server's URL without what its OpenAI API begins with."""
    return read_url(base_url).removesuffix("/v1")
