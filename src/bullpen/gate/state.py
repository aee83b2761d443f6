"""The gate's state and its rules: who counts, who waits, who is sent away, and since when nobody has been inside."""

import asyncio
import ipaddress
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

Mode = Literal["open", "hold", "refuse"]
MODES: tuple[Mode, ...] = ("open", "hold", "refuse")

OWN_PATHS = "/bullpen/"
GATE_PATH = "/bullpen/gate"
WEBSOCKET = "WEBSOCKET"
"""What stands for the method of a websocket, which has none."""
PASS_HEADER = "x-bullpen-pass"
HOLD_SECONDS = 600.0
RETRY_SECONDS = 5

# vLLM 0.30 to 0.33: what its servers have in development mode alone (`entrypoints/serve/dev`, `entrypoints/rl`).
DEVELOPMENT_PATHS = frozenset(
    {
        "/abort_requests",
        "/collective_rpc",
        "/finish_weight_update",
        "/get_world_size",
        "/init_weight_transfer_engine",
        "/is_paused",
        "/is_sleeping",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/server_info",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_weight_update",
        "/update_weight_version",
        "/update_weights",
        "/wake_up",
        "/weight_checker",
        "/weight_info",
    }
)

_COUNTED_METHODS = frozenset({"POST", WEBSOCKET})


class Ruling(Enum):
    """What becomes of a request."""

    FREE = auto()
    """It passes in every mode and is not counted."""
    COUNTED = auto()
    """It has to enter, and to leave when it has ended."""
    OWN = auto()
    """It is the gate's to answer."""
    ABSENT = auto()
    """Its path does not exist for this caller."""


class Entry(Enum):
    """How an attempt to enter ended; only who was admitted has to leave."""

    ADMITTED = auto()
    REFUSED = auto()
    GONE = auto()
    """The client left while it was held."""


@dataclass(frozen=True)
class Reply:
    """An answer of the gate's own: a status, JSON, and headers beside the usual ones."""

    status: int
    content: dict[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)


NOT_FOUND = Reply(404, {"detail": "Not Found"})
REFUSAL = Reply(
    503,
    {
        "error": {
            "message": "This model sleeps, or is about to: wake it (`bullpen wake`), or try again later.",
            "type": "service_unavailable",
            "param": None,
            "code": 503,
        }
    },
    {"retry-after": str(RETRY_SECONDS)},
)


class Gate:
    """The gate of one server process; all methods belong to the event loop's thread.

    Args:
        hold_seconds: how long a request may be held before it is refused.
        local_development: whether development endpoints exist for callers on this machine alone.
        clock: monotonic seconds, by which idleness is measured.
    """

    def __init__(
        self,
        *,
        hold_seconds: float = HOLD_SECONDS,
        local_development: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hold_seconds = hold_seconds
        self._local_development = local_development
        self._clock = clock
        self._mode: Mode = "open"
        self._in_flight = 0
        self._held = 0
        self._idle_since = clock()
        self._changed: asyncio.Future[None] | None = None  # done at the next change of mode; None where nobody waits

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Gate":
        """A gate as the environment asks for it (`BULLPEN_GATE_HOLD_SECONDS`, `BULLPEN_DEV_ENDPOINTS`).

        Raises:
            ValueError: a variable has a value that cannot be used.
        """
        endpoints = environ.get("BULLPEN_DEV_ENDPOINTS", "")
        if endpoints not in {"", "loopback"}:
            raise ValueError(f"BULLPEN_DEV_ENDPOINTS is {endpoints!r}: give loopback, or leave it unset")
        text = environ.get("BULLPEN_GATE_HOLD_SECONDS") or str(HOLD_SECONDS)
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ValueError(f"BULLPEN_GATE_HOLD_SECONDS is {text!r}: give a number of seconds, like {HOLD_SECONDS:g}")
        return cls(hold_seconds=seconds, local_development=endpoints == "loopback")

    @property
    def mode(self) -> Mode:
        """What happens to a new request: it enters, is held, or is refused."""
        return self._mode

    def rule(self, method: str, path: str, peer: str | None, has_pass: bool) -> Ruling:
        """Say what becomes of a request.

        Args:
            method: in capitals, or `WEBSOCKET`.
            path: decoded, without the query.
            peer: the client's address; None where it came through a Unix socket.
            has_pass: whether it has the header `x-bullpen-pass: 1`.
        """
        if path.startswith(OWN_PATHS):
            return Ruling.OWN if is_loopback(peer) else Ruling.ABSENT
        if path in DEVELOPMENT_PATHS:
            return Ruling.ABSENT if self._local_development and not is_loopback(peer) else Ruling.FREE
        if method not in _COUNTED_METHODS or (has_pass and is_loopback(peer)):
            return Ruling.FREE
        return Ruling.COUNTED

    def answer(self, method: str, path: str, mode: str | None) -> Reply:
        """Answer a request to one of the gate's own paths; `mode` is what its query asks for, None if nothing."""
        if path != GATE_PATH:
            return NOT_FOUND
        if method == "POST":
            chosen = next((known for known in MODES if known == mode), None)
            if chosen is None:
                given = "no mode was given" if mode is None else f"there is no mode {mode!r}"
                return Reply(400, {"detail": f"{given}: POST {GATE_PATH}?mode={'|'.join(MODES)}"})
            self.set_mode(chosen)
        elif method != "GET":
            return Reply(405, {"detail": "Method Not Allowed"}, {"allow": "GET, POST"})
        return Reply(200, self.document())

    def set_mode(self, mode: Mode) -> None:
        """Open or close the gate; who is held enters, or is refused, accordingly."""
        self._mode = mode
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    def document(self) -> dict[str, object]:
        """The state as JSON; `idle_seconds` counts since the last request ended, and is 0 while there is one."""
        busy = self._in_flight or self._held
        return {
            "mode": self._mode,
            "in_flight": self._in_flight,
            "held": self._held,
            "idle_seconds": 0.0 if busy else round(max(0.0, self._clock() - self._idle_since), 3),
        }

    def enter_at_once(self) -> bool:
        """Enter if the gate is open; says whether. Who has entered must `leave`."""
        if self._mode != "open":
            return False
        self._in_flight += 1
        return True

    async def enter(self, gone: "asyncio.Future[None] | None" = None) -> Entry:
        """Enter, wait for that while the gate holds, or be refused; `gone` is done when the client has left.

        Who was admitted must `leave`. Cancelling this is safe: it then has not entered.
        """
        if self._mode == "hold":
            self._held += 1
            try:
                await self._while_held(gone)
            finally:
                self._held -= 1
                self._idle_since = self._clock()
        # No await from here on: a mode that was set after this decision cannot have been meant by it.
        if gone is not None and gone.done():
            return Entry.GONE
        return Entry.ADMITTED if self.enter_at_once() else Entry.REFUSED

    def leave(self) -> None:
        """Count one request less."""
        self._in_flight -= 1
        self._idle_since = self._clock()

    async def _while_held(self, gone: "asyncio.Future[None] | None") -> None:
        """Wait until the gate does not hold any more, the client has gone, or waiting has taken too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._hold_seconds
        while self._mode == "hold" and (left := deadline - loop.time()) > 0 and not (gone and gone.done()):
            if self._changed is None:
                self._changed = loop.create_future()
            signs = {self._changed} if gone is None else {self._changed, gone}
            await asyncio.wait(signs, timeout=left, return_when=asyncio.FIRST_COMPLETED)


def is_loopback(peer: str | None) -> bool:
    """Whether an address is this machine's own; None, a Unix socket's, is."""
    if peer is None:
        return True
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
