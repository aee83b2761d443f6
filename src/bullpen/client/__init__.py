"""The Python client::

    from bullpen.client import BullpenClient

    with BullpenClient() as client:
        instance = client.create("--model facebook/opt-125m", instance_id="opt")
        instance = client.wait_until_ready(instance.instance_id, timeout=120)
        print(instance.url)
        client.swap("another", out="opt")  # `opt` sleeps, `another` is ready in its place
        client.delete(instance.instance_id)

`VLLMManager`, and without ``await`` `SyncVLLMManager`, launch models and have texts written and embedded::

    async with VLLMManager("http://your-server:8000") as manager:
        async with manager.run("meta-llama/Llama-3.1-8B-Instruct") as launch:
            result = await manager.complete(launch.launch_id, prompt="Once upon a time", max_tokens=128)
            print(result.text)

`run_batch` sends a file of requests and writes the file of results.

Where the daemon's URL and key come from is told in `bullpen.client.target`, what can go wrong in
`bullpen.client.errors` and `bullpen.client.launch_errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InstanceFailed,
    InvalidRequest,
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

if TYPE_CHECKING:
    from bullpen.client.batch import BatchProgress, BatchReport, run_batch
    from bullpen.client.blocking import SyncVLLMManager
    from bullpen.client.launch_errors import (
        Conflict,
        LaunchFailed,
        LaunchTimedOut,
        NotFound,
        NotReady,
        RevisionGone,
        ServerFault,
    )
    from bullpen.client.launches import (
        ChatAnswer,
        Completion,
        Finished,
        GPUStatsResponse,
        LaunchRequest,
        LaunchResponse,
        LaunchState,
        LogsResponse,
        SystemStatsResponse,
        Token,
        TokenLogprob,
        TopLogprob,
    )
    from bullpen.client.manager import VLLMManager

_LATER = {
    "bullpen.client.batch": ["BatchProgress", "BatchReport", "run_batch"],
    "bullpen.client.blocking": ["SyncVLLMManager"],
    "bullpen.client.launch_errors": [
        "Conflict",
        "LaunchFailed",
        "LaunchTimedOut",
        "NotFound",
        "NotReady",
        "RevisionGone",
        "ServerFault",
    ],
    "bullpen.client.launches": [
        "ChatAnswer",
        "Completion",
        "Finished",
        "GPUStatsResponse",
        "LaunchRequest",
        "LaunchResponse",
        "LaunchState",
        "LogsResponse",
        "SystemStatsResponse",
        "Token",
        "TokenLogprob",
        "TopLogprob",
    ],
    "bullpen.client.manager": ["VLLMManager"],
}

__all__ = [
    "Activity",
    "BatchProgress",
    "BatchReport",
    "BullpenClient",
    "ChatAnswer",
    "Claim",
    "ClientError",
    "Completion",
    "Conflict",
    "ConnectionFailed",
    "Event",
    "Explanation",
    "Finished",
    "ForeignProcess",
    "GPUStatsResponse",
    "Gpu",
    "GpuReport",
    "HostMemory",
    "Instance",
    "InstanceError",
    "InstanceFailed",
    "InstanceList",
    "InvalidRequest",
    "LaunchFailed",
    "LaunchRequest",
    "LaunchResponse",
    "LaunchState",
    "LaunchTimedOut",
    "LogChunk",
    "LogsResponse",
    "Memory",
    "NextStep",
    "NotFound",
    "NotReady",
    "Note",
    "Readiness",
    "Refused",
    "RevisionGone",
    "ServerFault",
    "Swap",
    "Swapped",
    "SyncVLLMManager",
    "SystemStatsResponse",
    "TimedOut",
    "Token",
    "TokenLogprob",
    "TopLogprob",
    "Unauthorized",
    "UnexpectedAnswer",
    "VLLMManager",
    "Verdict",
    "ZygoteState",
    "run_batch",
]


def __getattr__(name: str) -> Any:
    # The command line uses the other client alone, and pydantic takes as long to import as all the rest.
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
