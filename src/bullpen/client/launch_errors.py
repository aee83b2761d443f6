"""What can go wrong with launches and with inference; the same tree as `bullpen.client.errors`.

======================== ======================================== ==========================================
class                    means                                    what to do
======================== ======================================== ==========================================
`NotFound`               there is no such launch or instance      list them
`Conflict`               something stands in the way              its sentence names it
`NotReady`               the launch takes no such work now        wait for it, or look at its task
`RevisionGone`           events of a watch were missed            list the instances, then watch anew
`ServerFault`            the server or its engine failed          its sentence, and the log, say why
`LaunchFailed`           the launch ended before it was ready     its sentence and its log say why
`LaunchTimedOut`         the launch is not ready in time          wait longer, or look at its log
======================== ======================================== ==========================================
"""

from __future__ import annotations

from bullpen.client.errors import ClientError, InvalidRequest, Refused, TimedOut
from bullpen.client.launches import LaunchResponse
from bullpen.errors import ConflictError


class NotFound(Refused):
    """The server knows nothing of that name (status 404)."""


class Conflict(Refused, ConflictError):
    """Something stands in the way, such as the owner of a GPU (status 409)."""


class NotReady(Conflict):
    """The launch is not ready, does another task, or its server has just died."""


class RevisionGone(Refused):
    """The events after a revision cannot be given (status 410)."""


class ServerFault(Refused):
    """The server, or the engine behind it, failed at this (status 500 to 599)."""


class LaunchFailed(ClientError, RuntimeError):
    """A launch ended before it was ready.

    Attributes:
        launch: as it was last seen.
    """

    def __init__(self, message: str, launch: LaunchResponse) -> None:
        super().__init__(message)
        self.launch = launch


class LaunchTimedOut(TimedOut, TimeoutError):
    """A launch is not ready in time.

    Attributes:
        launch: as it was last seen; None where the server did not answer once.
    """

    def __init__(self, message: str, launch: LaunchResponse | None) -> None:
        super().__init__(message)
        self.launch = launch


def refused(problem: Refused) -> Refused:
    """The same refusal, as the class that fits its status."""
    if type(problem) is not Refused:
        return problem
    kinds: dict[int, type[Refused]] = {
        400: InvalidRequest,
        422: InvalidRequest,
        404: NotFound,
        409: Conflict,
        410: RevisionGone,
    }
    kind = kinds.get(problem.status, ServerFault if problem.status >= 500 else Refused)
    return kind(str(problem), problem.status)
