"""Every error that Bullpen raises on purpose, in one tree. The text of each is a sentence for its user.

============================ ======================================= ====================================
class                        means                                   what to do
============================ ======================================= ====================================
`InvalidRequestError`        the request can never work              change it as the text says
`LaunchRefusedError`         this host has no such model or GPUs      ask for what it has
`ConflictError`              another instance stands in the way      stop that one, or choose otherwise
`NotFoundError`              there is no such instance               list them
`LaunchError`                the server could not be started         the text says what is missing
`EngineError`                a server does not do what it is told    the text has its own words
`StuckError`                 processes outlive SIGKILL               the text names them and their state
`StateError`                 the state directory cannot be used      the text says why
============================ ======================================= ====================================
"""

from __future__ import annotations


class BullpenError(Exception):
    """Base of all; ``str()`` of it is a sentence for the user."""


class InvalidRequestError(BullpenError):
    """A request that can never work.

    Attributes:
        field: the field of the request that is wrong.
        kind: a stable word for programs.
    """

    def __init__(self, message: str, *, field: str = "options", kind: str = "value_error") -> None:
        super().__init__(message)
        self.field = field
        self.kind = kind


class LaunchRefusedError(BullpenError):
    """A launch that cannot be on this host."""


class ConflictError(BullpenError):
    """What was asked for belongs to another instance, or to another program."""


class NotFoundError(BullpenError):
    """There is no such instance."""


class LaunchError(BullpenError):
    """No process could be made for an instance."""


class EngineError(BullpenError):
    """A server did not sleep or wake as it was told, or gave a wrong answer afterwards."""


class StuckError(BullpenError):
    """Processes of an instance do not end, SIGKILL notwithstanding."""


class StateError(BullpenError):
    """The state directory cannot be used: not writable, full, or another daemon's."""
