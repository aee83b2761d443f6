"""Calls to a running server: its gate, its sleep mode, a canary.

Every call has a deadline in seconds and raises `EngineCallError` with a sentence that names the call and what went
wrong. Nothing here decides anything, and nothing changes an instance.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bullpen.core.instance import Instance
from bullpen.engines.base import Engine
from bullpen.engines.redact import redact
from bullpen.engines.registry import ENGINES
from bullpen.engines.sleeping import IS_SLEEPING, VERSION, Call
from bullpen.errors import EngineError
from bullpen.node.http import Answer, NoAnswerError, ask

GATE = "/bullpen/gate"
PASS = ("x-bullpen-pass", "1")
"""Lets a request of ours through a closed gate, uncounted."""
GATE_SECONDS = 5.0
"""The gate answers from the server's own loop, which may be busy, but never for long."""
FIRST_TICK, LONGEST_TICK, TICK_GROWTH = 0.005, 0.25, 1.5
"""Seconds between two looks at a gate while requests end."""
LONGEST_SENTENCE = 300
NOT_FOUND = 404

Mode = Literal["open", "hold", "refuse"]


class EngineCallError(EngineError):
    """A server did not do what it was told; the text is a sentence that says what and why."""


@dataclass(frozen=True)
class Activity:
    """What a server is doing, by its gate.

    Attributes:
        in_flight: requests that it has admitted and not yet answered whole.
        held: requests that wait at the gate.
        idle_seconds: since the last of its requests ended, or since it began; 0 while one is in flight or held.
        mode: ``open``, ``hold`` or ``refuse``.
    """

    in_flight: int
    held: int
    idle_seconds: float
    mode: str


class EngineControl:
    """What can be asked of an instance's server. The instance must have an address; it is only read."""

    async def activity(self, instance: Instance, seconds: float = GATE_SECONDS) -> Activity:
        """What the server is doing."""
        call = Call("GET", GATE)
        return _activity(call, await _Session(instance, seconds).send(call))

    async def set_gate(self, instance: Instance, mode: Mode, seconds: float = GATE_SECONDS) -> Activity:
        """Open or close the gate; what the server is doing after that."""
        call = Call("POST", f"{GATE}?mode={mode}")
        return _activity(call, await _Session(instance, seconds).send(call))

    async def drain(self, instance: Instance, seconds: float, mode: Literal["hold", "refuse"]) -> Activity:
        """Close the gate and wait until no request is in flight, ``seconds`` at most; what the server is doing then.

        Where the gate itself is slow to answer it may take `GATE_SECONDS` longer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        seen = await self.set_gate(instance, mode)
        tick = FIRST_TICK
        while seen.in_flight and (left := deadline - loop.time()) > 0:
            await asyncio.sleep(min(tick, left))
            tick = min(tick * TICK_GROWTH, LONGEST_TICK)
            seen = await self.activity(instance)
        return seen

    async def sleep(self, instance: Instance, level: int, seconds: float, *, deepen: bool = False) -> None:
        """Put the server to sleep at level 1 or 2; ``deepen``: it sleeps at level 1 and shall at level 2.

        What is in flight is ended: drain first.
        """
        session = _Session(instance, seconds)
        calls = session.engine.sleep_calls(level)
        if deepen:
            calls = session.engine.deepen_calls(str(_field(VERSION, await session.send(VERSION), "version")))
        await session.send_all(calls)
        await session.confirm(calls, sleeping=True)

    async def wake(self, instance: Instance, level: int, seconds: float) -> None:
        """Wake the server from sleep at ``level``. The gate stays as it is."""
        session = _Session(instance, seconds)
        calls = session.engine.wake_calls(level)
        await session.send_all(calls)
        await session.confirm(calls, sleeping=False)

    async def is_sleeping(self, instance: Instance, seconds: float = GATE_SECONDS) -> bool:
        """Whether the server, or a part of it, sleeps."""
        return await _Session(instance, seconds).is_sleeping()

    async def canary(self, instance: Instance, seconds: float) -> str:
        """Ask a short question, past a closed gate; the answer, for the engine's ``same_answer``."""
        assert instance.served is not None
        session = _Session(instance, seconds)
        name = instance.served.served_model_names[0]
        pooling = instance.served.pooling
        call = session.engine.canary(name, pooling)
        answer = await session.ask(call)
        if answer.status == NOT_FOUND and not pooling:
            # The options need not say that a model embeds: vLLM finds out from its files, and generates nothing then.
            pooling = True
            call = session.engine.canary(name, pooling)
            answer = await session.ask(call)
        _check(call, answer)
        try:
            return session.engine.canary_answer(pooling, answer.body)
        except ValueError as problem:
            raise EngineCallError(f"{_name(call)}: {redact(str(problem))}") from problem

    async def warm_up(self, instance: Instance, path: str, body: str, seconds: float) -> None:
        """Send a request of the user's, past a closed gate; ``body`` is JSON text."""
        await _Session(instance, seconds).send(Call("POST", path, body.encode()))


class _Session:
    """Calls to one server with one deadline for all of them."""

    def __init__(self, instance: Instance, seconds: float) -> None:
        assert instance.address is not None
        self.engine: Engine = ENGINES[instance.config.engine]
        self._address = instance.address
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._calls = 0
        # The server has the daemon's environment, and the instance's own on top.
        environment = {**os.environ, **(instance.config.env_vars or {})}
        key = self.engine.api_key(instance.config.argv, environment)
        self._headers = [PASS] if key is None else [PASS, ("Authorization", f"Bearer {key}")]

    async def ask(self, call: Call) -> Answer:
        """Make a call, whatever is answered. Raises EngineCallError where nothing is."""
        loop = asyncio.get_running_loop()
        left = max(self._deadline - loop.time(), 0)
        self._calls += 1
        try:
            return await ask(self._address, call.method, call.path, body=call.body, headers=self._headers, seconds=left)
        except NoAnswerError as problem:
            why = str(problem)
            if loop.time() >= self._deadline:
                since = " of the first call" if self._calls > 1 else ""
                why = f"was not answered within {self._seconds:.3g} s{since}"
            raise EngineCallError(f"{_name(call)} {why}") from problem

    async def send(self, call: Call) -> Answer:
        """Make a call that must succeed."""
        answer = await self.ask(call)
        _check(call, answer)
        return answer

    async def send_all(self, calls: Sequence[Call]) -> None:
        """Make calls one after the other."""
        for call in calls:
            _check_success(call, await self.send(call))

    async def is_sleeping(self) -> bool:
        """Whether the server says that it sleeps."""
        return bool(_field(IS_SLEEPING, await self.send(IS_SLEEPING), "is_sleeping"))

    async def confirm(self, calls: Sequence[Call], *, sleeping: bool) -> None:
        """Make sure that calls had their effect."""
        if await self.is_sleeping() != sleeping:
            state = "awake" if sleeping else "asleep"
            raise EngineCallError(f"{_name(calls[-1])} was answered well, but the server is still {state}")


def _name(call: Call) -> str:
    return f"{call.method} {call.path}"


def _check(call: Call, answer: Answer) -> None:
    if not 200 <= answer.status < 300:
        words = _words(answer.body)
        raise EngineCallError(f"{_name(call)} was answered with {answer.status}{f': {words}' if words else ''}")


def _check_success(call: Call, answer: Answer) -> None:
    """Some calls are answered with 200 and ``{"success": false}``, most with no word at all."""
    try:
        content = json.loads(answer.body or b"{}")
    except ValueError:
        return
    if isinstance(content, dict) and content.get("success") is False:
        raise EngineCallError(f"{_name(call)} was answered with success: false")


def _field(call: Call, answer: Answer, name: str) -> Any:
    """A field of an answer that must have it."""
    try:
        return json.loads(answer.body)[name]
    except (ValueError, KeyError, TypeError):
        raise EngineCallError(f"{_name(call)} was answered without {name!r}: {_words(answer.body)}") from None


def _activity(call: Call, answer: Answer) -> Activity:
    in_flight, held, idle_seconds, mode = (
        _field(call, answer, name) for name in ("in_flight", "held", "idle_seconds", "mode")
    )
    try:
        return Activity(int(in_flight), int(held), float(idle_seconds), str(mode))
    except (ValueError, TypeError):
        raise EngineCallError(f"{_name(call)} was answered with no gate's words: {_words(answer.body)}") from None


def _words(body: bytes) -> str:
    """The server's own sentence about an error, on one line, shortened, without secrets."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    while isinstance(content, dict):
        content = next((content[name] for name in ("error", "message", "detail") if name in content), None)
        if isinstance(content, str):
            text = content
    line = " ".join(redact(text).split())
    return line if len(line) <= LONGEST_SENTENCE else f"{line[: LONGEST_SENTENCE - 1]}…"
