"""What can go wrong between a client and a daemon. The text of each is a sentence for the user.

======================== ======================================== ==========================================
class                    means                                    what to do
======================== ======================================== ==========================================
`ConnectionFailed`       nobody answers, or the connection broke  start a daemon, or name the right URL
`UnexpectedAnswer`       what answers is no Bullpen               name the right URL
`Refused`                the daemon said no                       its sentence says what to change
`InvalidRequest`         the request can never work               change it as its sentence says
`Unauthorized`           the daemon wants another key             give it
`TimedOut`               it takes longer than was allowed         wait longer, or look at the log
`InstanceFailed`         the instance will not become ready       its sentence and its log say why
======================== ======================================== ==========================================
"""

from __future__ import annotations

from bullpen.client.models import Instance
from bullpen.errors import BullpenError, InvalidRequestError


class ClientError(BullpenError):
    """Base of all that a client raises."""


class ConnectionFailed(ClientError):
    """There is no connection to a daemon, or not any more."""


class UnexpectedAnswer(ClientError):
    """What answers does not speak Bullpen's API."""


class TimedOut(ClientError):
    """It takes longer than was allowed."""


class Refused(ClientError):
    """The daemon answered, and the answer is no.

    Attributes:
        status: the HTTP status, 400 to 599.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unauthorized(Refused):
    """The daemon wants an access key, or another one."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 401)


class InvalidRequest(Refused, InvalidRequestError):
    """A request that can never work: the server says so (status 400 or 422), or it was not even sent (400).

    Attributes:
        field: the argument that is wrong, where it was not sent.
    """

    def __init__(self, message: str, status: int = 400, *, field: str = "options") -> None:
        super().__init__(message, status)
        self.field = field


class InstanceFailed(ClientError):
    """An instance ended before it was ready.

    Attributes:
        instance: as it was last seen.
    """

    def __init__(self, message: str, instance: Instance) -> None:
        super().__init__(message)
        self.instance = instance
