"""Who a caller is, by the same rule for REST and gRPC: does it have the key, and is it a program of this host?"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable

PROXY_HEADERS = frozenset({"forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"})
REMOTE = (
    "this daemon has no access key and answers callers on its own host alone; set BULLPEN_ACCESS_KEY for it, or start"
    " it with --allow-unauthenticated behind a network policy"
)


def has_key(authorization: bytes, key: bytes) -> bool:
    """Whether a header carries the key, as a Bearer token or as the password of HTTP Basic; in constant time."""
    scheme, _, credentials = authorization.strip().partition(b" ")
    given = b""
    if scheme.lower() == b"bearer":
        given = credentials
    elif scheme.lower() == b"basic":
        try:
            given = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            given = b""
    return is_key(given, key)


def carries_key(headers: Iterable[tuple[str, bytes]], key: bytes) -> bool:
    """Whether one of a request's headers, named in small letters, carries the key: `authorization` or `x-api-key`."""
    return any(
        (name == "authorization" and has_key(value, key)) or (name == "x-api-key" and is_key(value, key))
        for name, value in headers
    )


def is_key(given: bytes, key: bytes) -> bool:
    """Whether this is the key, blanks around it aside; in constant time."""
    return hmac.compare_digest(given.strip(), key)


def is_proxied(names: Iterable[str]) -> bool:
    """Whether a request came through a proxy, by the names of its headers, in small letters.

    A proxy on this host speaks for whoever it names, or hides: its callers are not this host's.
    """
    return not PROXY_HEADERS.isdisjoint(names)


def is_loopback(address: str) -> bool:
    """Whether an address of IPv4 or IPv6 is this host's loopback."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
