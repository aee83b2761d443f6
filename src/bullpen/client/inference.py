"""Inference over gRPC. grpcio is imported only when the first call is made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.client.launch_errors import NotFound, NotReady, ServerFault
from bullpen.client.messages import Call
from bullpen.client.patience import Patience
from bullpen.client.target import is_loopback

DEFAULT_REST_PORT = 8000


@dataclass(frozen=True)
class Address:
    """Where a gRPC server is, as gRPC writes it, and whether it speaks TLS.

    Attributes:
        authorities: the certificates, as PEM, of those who may vouch for it; None: those that gRPC knows.
    """

    target: str
    tls: bool
    is_local: bool = False
    authorities: bytes | None = None

    @classmethod
    def find(cls, base_url: str, given: str | None) -> Address:
        """What was given, ``host:port`` or ``https://host:port``; else the port after that of the base URL.

        TLS is spoken where the URL in question begins with ``https:``; a ``host:port`` that was given is no URL.

        Raises:
            InvalidRequest: there is no port after it.
        """
        base = urlsplit(base_url)
        host = base.hostname or "localhost"
        if given is None:
            port = (base.port or DEFAULT_REST_PORT) + 1
            if port > 65535:
                raise InvalidRequest(f"no port comes after that of {base_url}; give grpc_address", field="port")
            name = f"[{host}]" if ":" in host else host
            return cls(f"{name}:{port}", base.scheme == "https", is_loopback(host))
        scheme, _, rest = given.rpartition("://")
        return cls(rest.rstrip("/"), scheme == "https", is_loopback(urlsplit(f"//{rest}").hostname or ""))

    def vouched_for(self, file: Path | str) -> Address:
        """The same place, by TLS, with the certificates in a PEM file as those who may vouch for it.

        Raises:
            ClientError: the file cannot be read, or holds no certificate.
        """
        try:
            authorities = Path(file).read_bytes()
        except OSError as problem:
            raise ClientError(f"grpc_ca: {file} cannot be read: {problem.strerror}") from problem
        if b"-----BEGIN CERTIFICATE-----" not in authorities:
            raise ClientError(f"grpc_ca: {file} holds no certificate; give a PEM file, such as the server's own one")
        return replace(self, tls=True, authorities=authorities)


class Inference:
    """A channel to one gRPC server; it is opened by the first call.

    Args:
        address: the server.
        access_key: the key that every call carries; None: none.
        retry_seconds: how long a call is tried again after the connection was lost.
        limit_response: refuse answers of more than 4 MiB, gRPC's own limit.
    """

    def __init__(self, address: Address, access_key: str | None, retry_seconds: float, *, limit_response: bool) -> None:
        self.address = address
        self._access_key = access_key
        self._retry_seconds = retry_seconds
        self._limit_response = limit_response
        self._has_answered = False
        self._is_closed = False
        self._channel: Any = None

    async def ask(self, call: Call, timeout: float | None) -> Any:
        """Send a message, receive one.

        Args:
            call: what is sent.
            timeout: seconds that the server is given; None: as long as it takes.
        """
        async with aclosing(self._answers(call, timeout, streamed=False)) as answers:
            return await anext(answers)

    def stream(self, call: Call, timeout: float | None) -> AsyncGenerator[Any]:
        """Send a message, receive many. Leaving off early cancels the call on the server."""
        return self._answers(call, timeout, streamed=True)

    async def close(self) -> None:
        """Close the channel; calls in flight end."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def _answers(self, call: Call, timeout: float | None, *, streamed: bool) -> AsyncGenerator[Any]:
        """The answers to a message. It is sent again where the connection is lost before the first of them."""
        grpc = load_grpc()
        channel, metadata, patience = self._open(grpc), self._metadata(), Patience(self._retry_seconds)
        make = channel.unary_stream if streamed else channel.unary_unary
        send = make(call.method, request_serializer=serialize, response_deserializer=call.answer.FromString)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            running, has_begun = send(call.message, metadata=metadata, timeout=left), False
            try:
                if not streamed:
                    answer = await running
                    self._has_answered = True
                    yield answer
                    return
                async for answer in running:
                    self._has_answered = has_begun = True
                    yield answer
                return
            except grpc.aio.AioRpcError as problem:
                lost = problem.code() is grpc.StatusCode.UNAVAILABLE
                self._has_answered |= not lost
                if not (lost and self._has_answered and not has_begun and await patience.pause()):
                    unreached = (grpc.ChannelConnectivity.CONNECTING, grpc.ChannelConnectivity.TRANSIENT_FAILURE)
                    was_reached = self._has_answered or channel.get_state() not in unreached
                    raise failure(grpc, problem, self.address, was_reached=was_reached) from problem
            finally:
                running.cancel()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if not self._access_key:
            return ()
        if not (self._access_key.isascii() and self._access_key.isprintable()):
            raise ClientError("gRPC carries no access key with other characters than printable ASCII; set another one")
        return (("authorization", f"Bearer {self._access_key}"),)

    def _open(self, grpc: Any) -> Any:
        if self._is_closed:
            raise ClientError("this client was closed; make another one")
        if self._channel is None:
            options = [
                # A server that is back should be found soon.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                # A box that is gone without a word must not hold a call for ever; servers accept no faster pings.
                ("grpc.keepalive_time_ms", 310_000),
                ("grpc.enable_http_proxy", 0 if self.address.is_local else 1),
            ]
            if not self._limit_response:
                options += [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            if self.address.tls:
                credentials = grpc.ssl_channel_credentials(self.address.authorities)
                self._channel = grpc.aio.secure_channel(self.address.target, credentials, options=options)
            else:
                self._channel = grpc.aio.insecure_channel(self.address.target, options=options)
        return self._channel


def load_grpc() -> Any:
    """The gRPC library.

    Raises:
        ClientError: it is not installed.
    """
    try:
        import grpc.aio
    except ImportError as problem:
        raise ClientError(f"inference needs grpcio ({problem}); install bullpen-client[grpc]") from problem
    return grpc


def serialize(message: Any) -> bytes:
    """The bytes of a message."""
    return bytes(message.SerializeToString())


def was_aborted(problem: ConnectionFailed) -> bool:
    """Whether a connection failed between the daemon and an instance that ended while it had the request."""
    grpc, cause = load_grpc(), problem.__cause__
    return isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.ABORTED


def failure(grpc: Any, problem: Any, address: Address, *, was_reached: bool) -> ClientError:
    """The error for a status that is not OK; it has the server's own sentence.

    Args:
        grpc: the library.
        problem: what it raised.
        address: the server.
        was_reached: there was a server; else the address may be wrong.
    """
    code, said = problem.code(), problem.details() or problem.code().name
    refusals: dict[Any, tuple[type[Refused], int]] = {
        grpc.StatusCode.INVALID_ARGUMENT: (InvalidRequest, 400),
        grpc.StatusCode.OUT_OF_RANGE: (InvalidRequest, 400),
        grpc.StatusCode.NOT_FOUND: (NotFound, 404),
        grpc.StatusCode.FAILED_PRECONDITION: (NotReady, 409),
        grpc.StatusCode.RESOURCE_EXHAUSTED: (Refused, 429),
    }
    if code in refusals:
        kind, status = refusals[code]
        return kind(said, status)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return Unauthorized(f"{said}: set BULLPEN_ACCESS_KEY, or give access_key")
    if code is grpc.StatusCode.UNAVAILABLE and was_reached:
        return ConnectionFailed(said)
    if code is grpc.StatusCode.UNAVAILABLE:
        where = f"{address.target}{' with TLS' if address.tls else ''}"
        return ConnectionFailed(f"{said} (the gRPC server was looked for at {where}; else give grpc_address)")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"the answer took longer than was allowed: {said}")
    if code is grpc.StatusCode.ABORTED:
        return ConnectionFailed(said)
    if code is grpc.StatusCode.CANCELLED:
        return ConnectionFailed(f"the call was ended: {said}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UnexpectedAnswer(f"what answers at {address.target} does not offer this ({said})")
    return ServerFault(said, 500)
