"""A stop is answered in the time that the contract gives it, whatever the launch does.

The 5 s are the callers' own deadline: a stop that takes longer ends with their timeout, as it would for users.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from bullpen.proto import v1
from tests.e2e.launches.calls import Document, in_flight, launch, loading, reach, settle, status, stop
from tests.e2e.launches.nvml import Driver
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call, trees

pytestmark = pytest.mark.slow  # processes that heed nothing are given seconds to end
GPUS = 4
LOADING = {"BULLPEN_SIM_START_SECONDS": "600"}
LONG = 100_000
CASES = [
    ({}, "ready", False),
    ({"BULLPEN_SIM_STUBBORN": "1"}, "ready", False),
    ({"BULLPEN_SIM_STUBBORN": "2"}, "ready", False),
    ({"BULLPEN_SIM_STUBBORN": "2"}, "ready", True),
    (LOADING, "bootstrapping", False),
    ({**LOADING, "BULLPEN_SIM_STUBBORN": "2"}, "bootstrapping", False),
    ({**LOADING, "BULLPEN_SIM_STUBBORN": "2"}, "bootstrapping", True),
]
"""The simulator's variables, the state in which it is stopped, whether it is frozen by SIGSTOP then."""


@contextmanager
def streaming(daemon: Daemon, launch_id: str) -> Iterator[None]:
    """Read a completion that does not end; it is under way inside the context, and ends with an error after it."""
    request = v1.CompleteRequest(instance_id=launch_id, prompts=["x", "y"], sampling=v1.Sampling(max_tokens=LONG))
    with grpc.insecure_channel(daemon.wait_grpc()) as channel:
        make = channel.unary_stream(
            "/bullpen.v1.Inference/StreamComplete",
            v1.CompleteRequest.SerializeToString,
            v1.CompletionDelta.FromString,
        )
        deltas = make(request, timeout=30)
        next(deltas)
        yield
        with pytest.raises(grpc.RpcError) as caught:
            list(deltas)
    assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(("variables", "state", "frozen"), CASES)
def test_in_time_whatever_the_processes_do(
    start_here: Callable[..., Daemon], variables: dict[str, str], state: str, frozen: bool
) -> None:
    """Four at once, each asked to stop twice at once; a setting for other instances changes nothing."""
    settings = {"mock_gpus": True, "mock_gpu_count": GPUS, "stop_timeout": 60}
    daemon = start_here(environment=variables, **settings).wait_warm()
    names = [str(launch(daemon, gpu_ids=[gpu])["launch_id"]) for gpu in range(GPUS)]
    before = [loading(daemon, name) and reach(daemon, name, state) for name in names]
    for one in before if frozen else []:
        os.kill(one["pid"], signal.SIGSTOP)
    with ThreadPoolExecutor(2 * GPUS) as pool:
        answers = list(pool.map(lambda name: stop(daemon, name), names * 2))
    assert [(one["state"], one["error"]) for one in answers] == [("stopped", None)] * (2 * GPUS)
    assert not trees(daemon.state_dir)
    settle(daemon)


@pytest.mark.parametrize("stubborn", ["0", "2"])
def test_in_time_while_a_stream_is_open(start_here: Callable[..., Daemon], stubborn: str) -> None:
    variables = {"BULLPEN_SIM_STUBBORN": stubborn, "BULLPEN_SIM_TOKENS_PER_SECOND": "50"}
    daemon = start_here(grpc_port=None, environment=variables, mock_gpus=True, mock_gpu_count=1).wait_warm()
    document = reach(daemon, launch(daemon)["launch_id"], "ready")
    name = document["launch_id"]
    with streaming(daemon, name):
        assert in_flight(document) == 1
        stopped = stop(daemon, name)
    assert (stopped["state"], stopped["error"]) == ("stopped", None)
    assert not trees(daemon.state_dir)
    settle(daemon)


def test_in_time_before_the_engine_is_warm(start_here: Callable[..., Daemon]) -> None:
    """A launch that waits for the first fork is called off, and its GPUs are free at once."""
    daemon = start_here(mock_gpus=True, mock_gpu_count=1)
    for _ in range(3):
        name = launch(daemon)["launch_id"]
        assert stop(daemon, name)["state"] == "stopped"
    assert reach(daemon, launch(daemon)["launch_id"], "ready")
    settle(daemon)


def test_in_time_with_everything_at_once(start_here: Callable[..., Daemon], tmp_path: Path) -> None:
    """Processes that heed nothing, a stream, a launch that loads, and a driver that hangs."""
    driver = Driver(tmp_path / "driver")
    variables = {"BULLPEN_SIM_STUBBORN": "2", "BULLPEN_SIM_TOKENS_PER_SECOND": "50", **LOADING}
    daemon = start_here(grpc_port=None, environment={**driver.environment, **variables}).wait_warm()
    daemon.create(instance_id="ready", gpu_uuids=["GPU-0"], env_vars={"BULLPEN_SIM_START_SECONDS": 0})
    documents: list[Document] = [reach(daemon, "ready", "ready")]
    with ThreadPoolExecutor(4) as pool, driver.hangs():
        stats = pool.submit(call, f"{daemon.url}/stats", seconds=60.0)
        driver.wait_for_call()
        documents.append(loading(daemon, launch(daemon, gpu_ids=[1])["launch_id"]))
        with streaming(daemon, "ready"):
            ends = list(pool.map(lambda one: stop(daemon, one["launch_id"]), documents))
        assert [one["state"] for one in ends] == ["stopped"] * 2
        assert not trees(daemon.state_dir)
        assert stats.result(60)[0] == 200
    wait_until(lambda: call(f"{daemon.url}/stats")[1]["gpu_count"] == 3)
    assert [status(daemon, one["launch_id"])["state"] for one in documents] == ["stopped"] * 2
