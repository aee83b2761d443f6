"""The Python client::

    from bullpen.client import BullpenClient

    with BullpenClient() as client:
        instance = client.create("--model facebook/opt-125m", instance_id="opt")
        instance = client.wait_until_ready(instance.instance_id, timeout=120)
        print(instance.url)
        client.swap("another", out="opt")  # `opt` sleeps, `another` is ready in its place
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
from bullpen.client.models import (
    Activity,
    Event,
    Instance,
    InstanceError,
    InstanceList,
    LogChunk,
    Memory,
    Readiness,
    Swap,
    Swapped,
    ZygoteState,
)
from bullpen.client.reports import (
    Claim,
    Explanation,
    ForeignProcess,
    Gpu,
    GpuReport,
    HostMemory,
    NextStep,
    Note,
    Verdict,
)
from bullpen.client.sync import BullpenClient

__all__ = [
    "Activity",
    "BullpenClient",
    "Claim",
    "ClientError",
    "ConnectionFailed",
    "Event",
    "Explanation",
    "ForeignProcess",
    "Gpu",
    "GpuReport",
    "HostMemory",
    "Instance",
    "InstanceError",
    "InstanceFailed",
    "InstanceList",
    "LogChunk",
    "Memory",
    "NextStep",
    "Note",
    "Readiness",
    "Refused",
    "Swap",
    "Swapped",
    "TimedOut",
    "Unauthorized",
    "UnexpectedAnswer",
    "Verdict",
    "ZygoteState",
]
