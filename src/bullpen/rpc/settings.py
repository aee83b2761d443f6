"""How gRPC is to be served. Nothing here needs gRPC itself, so that a mistake is told before that is imported."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, replace
from pathlib import Path

from bullpen.errors import StateError
from bullpen.rpc.upstream import MOST_CONNECTIONS


@dataclass(frozen=True)
class RpcSettings:
    """How to serve gRPC.

    Attributes:
        host: the address to listen on; `0.0.0.0` for every one of IPv4, `::` for every one.
        port: 0 for one of the kernel's choice.
        access_key: what callers must send; None where there is none.
        allow_unauthenticated: answer remote callers although there is no key.
        certificate: the PEM file of the certificate chain; None for no TLS.
        private_key: the PEM file of its key.
        limit_message_size: keep gRPC's own limit of 4 MiB on what is received, instead of none.
        most_connections: to one instance; further requests to it wait.
    """

    host: str = "127.0.0.1"
    port: int = 0
    access_key: str | None = None
    allow_unauthenticated: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    limit_message_size: bool = False
    most_connections: int = MOST_CONNECTIONS

    def at(self, port: int) -> RpcSettings:
        """The same with another port."""
        return replace(self, port=port)

    def key_and_certificate(self) -> tuple[bytes, bytes] | None:
        """The contents of the files for TLS; None where there is to be none.

        Raises:
            StateError: they cannot be read or used.
        """
        certificate, key = self.certificate, self.private_key
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            raise StateError("TLS for gRPC needs both the certificate's file and its key's: give both, or neither")
        try:
            # gRPC would only say that it cannot listen.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            return key.read_bytes(), certificate.read_bytes()
        except ssl.SSLError as problem:
            raise StateError(
                f"cannot use {certificate} with {key} for gRPC's TLS ({problem.reason or 'no certificate in it'});"
                " both must be PEM files, and the key the certificate's"
            ) from problem
        except OSError as problem:
            raise StateError(f"cannot read {certificate} or {key} for gRPC's TLS: {problem.strerror}") from problem
