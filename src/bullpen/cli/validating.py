"""The course of ``bullpen validate``: start, ask, sleep, wake, and ask again, for each kind of sleep that there is.

What its question finds after a wake is stored with the daemon, whose own canary is but one token long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from bullpen.cli import words
from bullpen.cli.asking import AskError, Server, same_answer
from bullpen.client import BullpenClient, ClientError, Instance, InstanceFailed, Memory, Refused

MEASURE_SECONDS = 3.0
"""How long it is waited for what an instance holds to be measured."""
PAUSE = 0.05
EMULATED = "emulated"
LEVELS: Mapping[str, int | None] = {"level 1": 1, "level 2": 2}
LONGEST_WHY = 500
"""Characters of a reason that the daemon takes."""


class Outcome(StrEnum):
    """What came of a step."""

    WORKS = "works"
    DIFFERS = "differs"
    FAILS = "fails"
    NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class Step:
    """One step: what came of it, how many seconds it took, and the memory that was held then.

    Attributes:
        name: what was done.
        kind: of sleep, which it is about: ``level 1``, ``level 2``, ``emulated``; empty: none.
        gpu_mib: on each GPU, in MiB; None: not known. Likewise `host_mib`.
        detail: why it is not as it should be.
    """

    name: str
    kind: str
    outcome: Outcome
    seconds: float | None = None
    gpu_mib: int | None = None
    host_mib: int | None = None
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something that is there does not work."""
        return self.outcome in (Outcome.DIFFERS, Outcome.FAILS)

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """What an answer after a wake has shown, for the daemon to remember.

    Attributes:
        kind: of sleep: ``level 1`` or ``level 2``.
        why: how that is known.
        problem: why it could not be stored; empty: it was.
    """

    kind: str
    works: bool
    why: str
    problem: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


class Validation:
    """Tries one model.

    Args:
        client: of the daemon.
        name: the id of the instances that are made, one after the other, and removed.
        options: their command line.
        fields: the other fields of their creates.
        api_key: what their server wants to be asked with.
        tell: called with what is being done.
    """

    def __init__(
        self,
        client: BullpenClient,
        name: str,
        options: str,
        fields: Mapping[str, Any],
        api_key: str | None,
        tell: Callable[[str], None],
    ) -> None:
        self._client = client
        self._name = name
        self._options = options
        self._fields = fields
        self._api_key = api_key
        self._tell = tell
        self.steps: list[Step] = []
        self._found: list[Judged] = []
        self.judged: list[Judged] = []
        """What was stored for the ladder, or could not be."""
        self.why_emulated = ""
        """Why the engine's own sleep cannot be tried."""

    def run(self) -> None:
        """Take every step that can be taken.

        Raises:
            ClientError: no instance can be made at all.
        """
        try:
            self._try_each("engine", LEVELS)
        except Refused as problem:
            if problem.status != 422:
                raise
            # It is about sleep if it does not come again without.
            self.why_emulated = str(problem)
        if not any(step.is_bad for step in self.steps if not step.kind):
            self._try_each("emulate", {EMULATED: None})
        if self.why_emulated:
            why = self.why_emulated
            self.steps += [Step(f"sleep at {kind}", kind, Outcome.NOT_AVAILABLE, detail=why) for kind in LEVELS]

    def _try_each(self, sleep: str, kinds: Mapping[str, int | None]) -> None:
        with self._instance(sleep):
            server = self._start()
            before = None if server is None else self._first_answer(server)
            if server is None or before is None:
                return
            for kind, level in kinds.items():
                if self._sleep(kind, level):
                    self._wake(kind, server, before)
            self._store()

    # -- start -------------------------------------------------------------------------------------------------

    @contextmanager
    def _instance(self, sleep: str) -> Iterator[None]:
        """An instance that may sleep so; it is gone in the end, whatever happens."""
        self._wait_until_warm()
        self._tell("starting" if sleep == "engine" else "starting, with emulated sleep")
        self._client.create(self._options, instance_id=self._name, sleep=sleep, **self._fields)
        try:
            yield
        finally:
            with suppress(ClientError):
                self._client.delete(self._name)

    def _wait_until_warm(self) -> None:
        """Wait until the engine can be forked, so that a create is short and Ctrl-C never leaves one half-way."""
        while True:
            readiness = self._client.ready()
            engine = self._fields.get("engine") or readiness.engine
            warming = [one for one in readiness.zygotes if one.engine == engine and one.state == "warming"]
            if not warming:
                return
            self._tell(words.warming(warming[0]).partition(":")[0])
            time.sleep(PAUSE)

    def _start(self) -> Server | None:
        started = time.monotonic()
        try:
            instance = self._client.wait_until_ready(self._name, on_change=self._tell_start)
        except InstanceFailed as problem:
            self._add("start", "", Outcome.FAILS, started, detail=str(problem))
            return None
        if not self.steps:
            self._add("start", "", Outcome.WORKS, started, memory=self._measured("awake"))
        name = next(iter(instance.served_model_names), instance.model or "")
        return Server(str(instance.url), name, self._api_key)

    def _tell_start(self, instance: Instance) -> None:
        if instance.state == "starting" and instance.phase != "ready":
            doing = words.doing(instance) if instance.phase == "waiting" else words.phase(instance.phase or "start")
            left = words.time_left(instance.remaining_seconds)
            self._tell(", ".join(filter(None, ["starting", doing, left])))

    def _first_answer(self, server: Server) -> str | None:
        self._tell("asking")
        started = time.monotonic()
        try:
            answer = server.ask()
        except AskError as problem:
            self._add("answer", "", Outcome.FAILS, started, detail=str(problem))
            return None
        if not any(step.name == "answer" for step in self.steps):
            self._add("answer", "", Outcome.WORKS, started)
        return answer

    # -- sleep and wake ----------------------------------------------------------------------------------------

    def _sleep(self, kind: str, level: int | None) -> bool:
        """Put it to sleep; return whether it sleeps."""
        name = f"sleep {kind}" if level is None else f"sleep at {kind}"
        self._tell(name)
        started = time.monotonic()
        try:
            self._client.sleep(self._name, level)
        except Refused as problem:
            outcome = Outcome.NOT_AVAILABLE if problem.status == 409 else Outcome.FAILS
            self._add(name, kind, outcome, started, detail=str(problem))
            return False
        taken = time.monotonic() - started
        # Without a process nothing is held.
        memory = Memory(0, 0) if level is None else self._measured(f"level_{level}")
        self.steps.append(Step(name, kind, Outcome.WORKS, taken, memory.gpu_mib, memory.host_mib))
        return True

    def _wake(self, kind: str, server: Server, before: str) -> None:
        name = f"wake from {kind}"
        self._tell(name)
        pid = self._client.get(self._name).pid
        started = time.monotonic()
        try:
            self._client.wake(self._name)
        except Refused as problem:
            self._add(name, kind, Outcome.FAILS, started, detail=str(problem))
            return
        taken = time.monotonic() - started
        outcome, detail = self._look_at(kind, server, before, pid)
        memory = self._measured("awake")
        self.steps.append(Step(name, kind, outcome, taken, memory.gpu_mib, memory.host_mib, detail))

    def _look_at(self, kind: str, server: Server, before: str, pid: int | None) -> tuple[Outcome, str]:
        """What came of a wake, and why. One that failed ends in a restart, which the daemon's own verdict tells."""
        found = self._client.explain(self._name).works.get(kind.replace(" ", "_"))
        if found is not None and not found.works:
            return Outcome.FAILS, f"the daemon had to restart it: {found.why}"
        if kind in LEVELS and self._client.get(self._name).pid != pid:
            return (
                Outcome.FAILS,
                "it was started again instead, which says nothing about this sleep; see the daemon's log",
            )
        outcome, detail = self._compare(server, before)
        if kind in LEVELS:
            why = one_line(f"by bullpen validate: {detail or 'it answered as before the sleep'}")
            self._found.append(Judged(kind, outcome is Outcome.WORKS, why))
        return outcome, detail

    def _compare(self, server: Server, before: str) -> tuple[Outcome, str]:
        try:
            same = same_answer(before, server.ask())
        except AskError as problem:
            return Outcome.FAILS, str(problem)
        return (Outcome.WORKS, "") if same else (Outcome.DIFFERS, "it answers otherwise than before the sleep")

    # -- what came of it ---------------------------------------------------------------------------------------

    def _store(self) -> None:
        """Have the daemon remember what was found out with this instance, which must still be there."""
        found, self._found = self._found, []
        for judged in found:
            level = LEVELS[judged.kind]
            assert level is not None
            try:
                self._client.judge(self._name, level, works=judged.works, why=judged.why)
            except ClientError as problem:
                judged = replace(judged, problem=str(problem))
            self.judged.append(judged)

    def _add(
        self, name: str, kind: str, outcome: Outcome, started: float, *, memory: Memory | None = None, detail: str = ""
    ) -> None:
        held = memory or Memory()
        seconds = time.monotonic() - started
        self.steps.append(Step(name, kind, outcome, seconds, held.gpu_mib, held.host_mib, detail))

    def _measured(self, depth: str) -> Memory:
        """What was measured at a depth, as soon as that is known; unknown where it does not come to be."""
        deadline = time.monotonic() + MEASURE_SECONDS
        while (found := self._client.get(self._name).memory.get(depth)) is None and time.monotonic() < deadline:
            time.sleep(PAUSE)
        return found or Memory()


def one_line(text: str) -> str:
    """A reason as the daemon takes it: what is no plain text in it, or too long, is left out."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())[:LONGEST_WHY]


def is_well(steps: Sequence[Step]) -> bool:
    """Whether all that is available works."""
    return bool(steps) and not any(step.is_bad for step in steps)


def verdict(model: str, steps: Sequence[Step]) -> str:
    """All of it in one line."""
    start = next((step for step in steps if not step.kind and step.is_bad), None)
    if start is not None:
        return f"{model} cannot be used: {start.name} {start.outcome}."
    bad = {step.kind for step in steps if step.is_bad}
    missing = {step.kind for step in steps if step.outcome is Outcome.NOT_AVAILABLE}
    kinds = [*LEVELS, EMULATED]
    works = [kind for kind in kinds if kind not in bad | missing]
    parts = [
        f"{text} {', '.join(found)}"
        for text, found in (
            ("sleep works:", works),
            ("does not work:", [kind for kind in kinds if kind in bad]),
            ("not available:", [kind for kind in kinds if kind in missing - bad]),
        )
        if found
    ]
    return f"{model}: {'; '.join(parts)}."
