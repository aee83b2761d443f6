"""The Python client::

    from bullpen.client import BullpenClient

    with BullpenClient() as client:
        instance = client.create("--model facebook/opt-125m", instance_id="opt")
        instance = client.wait_until_ready(instance.instance_id, timeout=120)
        print(instance.url)
        client.delete(instance.instance_id)

Where the daemon's URL and key come from is told in `bullpen.client.target`, what can go wrong in
`bullpen.client.errors`.
"""

from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InstanceFailed,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.client.models import Event, Instance, InstanceError, InstanceList, LogChunk, Readiness, ZygoteState
from bullpen.client.sync import BullpenClient

__all__ = [
    "BullpenClient",
    "ClientError",
    "ConnectionFailed",
    "Event",
    "Instance",
    "InstanceError",
    "InstanceFailed",
    "InstanceList",
    "LogChunk",
    "Readiness",
    "Refused",
    "TimedOut",
    "Unauthorized",
    "UnexpectedAnswer",
    "ZygoteState",
]
