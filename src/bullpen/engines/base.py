"""What the daemon asks of an engine: the outer half. The inner half is its world, in ``bullpen.zygote.worlds``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bullpen.engines.crash import Failure
from bullpen.engines.phases import PhaseReader


@dataclass(frozen=True)
class Place:
    """What the daemon gives an instance: where to listen, its own folder for sockets, its accelerators by index."""

    host: str
    port: int | None
    folder: Path
    gpu_indices: tuple[int, ...] | None = None


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

    def phases(self) -> PhaseReader:
        """A reader that tells the phases of a start from the log."""

    def failure(self, exit_code: int | None, log_tail: bytes, known: Known) -> Failure | None:
        """Why a server ended, from its exit code and the end of its log; None for a normal end."""
