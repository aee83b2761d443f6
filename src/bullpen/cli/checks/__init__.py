"""What ``bullpen doctor`` looks at: each check is a function that returns findings and changes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

GIB = 1 << 30


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, in a word or two.
        text: what is there.
        advice: what to do, in one sentence; empty where all is well.
    """

    subject: str
    level: Level
    text: str
    advice: str = ""

    def document(self) -> dict[str, str]:
        """As JSON data."""
        return asdict(self)


def ok(subject: str, text: str) -> Finding:
    """A finding that all is well."""
    return Finding(subject, Level.OK, text)


def warning(subject: str, text: str, advice: str) -> Finding:
    """A finding that something may get in the way."""
    return Finding(subject, Level.WARNING, text, advice)


def problem(subject: str, text: str, advice: str) -> Finding:
    """A finding that something will not work."""
    return Finding(subject, Level.PROBLEM, text, advice)
