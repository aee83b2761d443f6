"""What the daemon asks of an engine: the outer half. The inner half is its world, in ``bullpen.zygote.worlds``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bullpen.engines.crash import Failure
from bullpen.engines.phases import PhaseReader
from bullpen.engines.sleeping import Call


@dataclass(frozen=True)
class Place:
    """What the daemon gives an instance.

    Attributes:
        host: where it listens, with `port`; None where a Unix socket takes the port's place.
        folder: its own, for sockets and temporary files.
        visible_devices: its accelerators, indices as NVML counts them or UUIDs of MIG devices; None leaves it all.
        sleep: whether it is started so that it can sleep.
        share: the part of each accelerator's memory that it may use, 0 to 1; its options may say otherwise.
    """

    host: str
    port: int | None
    folder: Path
    visible_devices: tuple[str, ...] | None = None
    sleep: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Known:
    """What the daemon knows of a server that has ended, beside its log.

    Attributes:
        oom_kills: how many processes the kernel's out-of-memory killer has ended since it started; None if unknown.
    """

    model: str | None
    port: int | None
    oom_kills: int | None


class Engine(Protocol):
    """How to run one kind of server.

    Its options are read by its own parser in a leased process (``World.check``), where it is also started
    (``World.serve``); everything else about it is here.
    """

    name: str
    health_path: str
    """Answers 200 when the server is ready, at the instance's URL."""

    def missing(self, python: str) -> str | None:
        """Why this engine cannot run in that interpreter, and how to install it; None where it can."""

    def command_line(self, argv: Sequence[str], has_host: bool, place: Place) -> list[str]:
        """The options with what the user left to us."""

    def environment(self, place: Place, user: Mapping[str, str]) -> dict[str, str]:
        """Variables for the server: ours, then the user's on top."""

    def early_environment(self, user: Mapping[str, str]) -> dict[str, str]:
        """The user's variables that only count at import, so that they need a zygote of their own."""

    def sleep_calls(self, level: int) -> tuple[Call, ...]:
        """The calls that put an awake server to sleep, in order.

        Args:
            level: 1 keeps the weights in host memory, 2 does not.
        """

    def deepen_calls(self, version: str) -> tuple[Call, ...]:
        """The calls that take a server of that version from level 1 to level 2. It needs its accelerators for that:
        it is awake, whole or in part, in between."""

    def wake_calls(self, level: int) -> tuple[Call, ...]:
        """The calls that wake a server that sleeps at that level, in order."""

    def canary(self, served_name: str, pooling: bool) -> Call:
        """A short request whose answer depends on the weights alone."""

    def canary_answer(self, pooling: bool, body: bytes) -> str:
        """What was answered to a canary, for `same_answer`.

        Raises:
            ValueError: it is no answer to a canary.
        """

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two answers come from the same weights, as far as a canary can tell."""

    def api_key(self, argv: Sequence[str], environment: Mapping[str, str]) -> str | None:
        """A key that the server accepts; None where it demands none."""

    def phases(self) -> PhaseReader:
        """A reader that tells the phases of a start from the log."""

    def failure(self, exit_code: int | None, log_tail: bytes, known: Known) -> Failure | None:
        """Why a server ended, from its exit code and the end of its log; None for a normal end."""
