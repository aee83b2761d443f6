"""Which daemon a client speaks to, and with which key.

The URL is the argument, else ``BULLPEN_URL``, else what the daemon of this user's state directory left there, else
port 8001 of this host. The key is the argument, else ``BULLPEN_ACCESS_KEY`` or ``VLLM_ACCESS_KEY``, else what that
same daemon left; it is for that daemon alone and never sent to another URL.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bullpen.client.errors import ClientError
from bullpen.paths import default_state_dir

DEFAULT_URL = "http://127.0.0.1:8001"
KEY_VARIABLES = ("BULLPEN_ACCESS_KEY", "VLLM_ACCESS_KEY")


@dataclass(frozen=True)
class Target:
    """A daemon's base URL, without a slash at its end, and the key for it.

    Attributes:
        was_named: the user gave the URL, by argument or variable; else it was found, or is the default.
    """

    url: str
    access_key: str | None = field(default=None, repr=False)
    was_named: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is reached through this host's loopback."""
        return is_loopback(urlsplit(self.url).hostname or "")


def find(url: str | None = None, access_key: str | None = None, environ: Mapping[str, str] = os.environ) -> Target:
    """Find the daemon to speak to.

    Raises:
        ClientError: the URL is none.
    """
    folder = Path(environ.get("BULLPEN_STATE_DIR") or default_state_dir())
    left = read_file(folder / "url")
    named = url or environ.get("BULLPEN_URL")
    chosen = base_url(named or left or DEFAULT_URL)
    key = access_key or next((environ[name] for name in KEY_VARIABLES if environ.get(name)), None)
    if key is None and same_place(chosen, left or DEFAULT_URL):
        key = read_file(folder / "access_key")
    return Target(chosen, key, was_named=bool(named))


def base_url(text: str) -> str:
    """Bring a URL into the form that paths can be put behind; ``host:port`` will do.

    Raises:
        ClientError: it is no HTTP URL.
    """
    text = text.strip()
    full = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in full):
        raise ClientError(f"{text!r} is no URL of a daemon; write it as {DEFAULT_URL}")
    return full.rstrip("/")


def read_file(path: Path) -> str | None:
    """The text of a file, None where there is none to be had."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def same_place(one: str, other: str) -> bool:
    """Whether two URLs lead to the same port of the same host; all names of the loopback are one host."""
    first, second = urlsplit(one), urlsplit(other)
    if (first.scheme, first.port) != (second.scheme, second.port):
        return False
    hosts = (first.hostname or "", second.hostname or "")
    return hosts[0] == hosts[1] or all(map(is_loopback, hosts))


def is_loopback(host: str) -> bool:
    """Whether a host is this one's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
