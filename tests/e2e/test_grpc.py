"""gRPC beside the REST API, in one daemon: its port, its instances, its end."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest

from bullpen.proto import bootstrap, v1
from bullpen.sim import words
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import processes_of

DEADLINE_SECONDS = 20.0
END_SECONDS = 8.0
SLOW = {"BULLPEN_SIM_TOKENS_PER_SECOND": "50"}
EARLY = "PYTHONHASHSEED"
"""Counts when a zygote starts, and not later."""


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A warm daemon with gRPC at the port after its own."""
    return start_daemon(grpc_port=None, allow_env=EARLY).wait_warm()


@pytest.fixture
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    """A channel to its gRPC server."""
    with grpc.insecure_channel(daemon.wait_grpc()) as opened:
        yield opened


def call(channel: grpc.Channel, method: str, message: Any, answer: Any) -> Any:
    """A method's one answer."""
    make: Any = channel.unary_unary(method, lambda given: given.SerializeToString(), answer.FromString)
    return make(message, timeout=DEADLINE_SECONDS)


def stream(channel: grpc.Channel, message: v1.CompleteRequest) -> Any:
    """A completion as it is written."""
    make: Any = channel.unary_stream(
        "/bullpen.v1.Inference/StreamComplete",
        lambda given: given.SerializeToString(),
        v1.CompletionDelta.FromString,
    )
    return make(message, timeout=DEADLINE_SECONDS)


def refusal(attempt: Callable[[], Any]) -> tuple[grpc.StatusCode, str | None]:
    """The code and the words with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        attempt()
    return caught.value.code(), caught.value.details()


def test_its_port_comes_after_the_other(daemon: Daemon) -> None:
    port = int(daemon.url.rpartition(":")[2])
    assert daemon.wait_grpc() == f"127.0.0.1:{port + 1}"
    assert daemon.http.get("/").json()["grpc_port"] == port + 1
    assert daemon.http.get("/ready").json()["grpc_port"] == port + 1


def test_instances_of_the_other_apis_answer(daemon: Daemon, channel: grpc.Channel) -> None:
    """By their served name, with their own API key, and as launches too; none where they are not ready."""
    daemon.create("--model m --served-model-name other --api-key secret", instance_id="one")
    daemon.wait_state("one", "ready")
    request = bootstrap.CompleteRequest(launch_id="one", prompts=["hello"], max_tokens=4)
    path = "/vllm_bootstrap.InferenceService/Complete"
    answer = call(channel, path, request, bootstrap.CompleteResponse)
    assert answer.completions[0].text == "".join(islice(words.completion("m", "hello"), 4))
    daemon.http.post("/stop/one")
    code, text = refusal(lambda: call(channel, path, request, bootstrap.CompleteResponse))
    assert (code, text) == (grpc.StatusCode.FAILED_PRECONDITION, "Launch one is not ready (state=stopped)")


def test_servers_do_not_have_grpc_s_settings(daemon: Daemon, channel: grpc.Channel) -> None:
    """What the daemon sets for its own gRPC is nothing to servers, not even where their zygote starts after it."""
    document = daemon.create(instance_id="one", env_vars={EARLY: "1"})
    assert len(daemon.http.get("/ready").json()["zygotes"]) == 2
    assert b"GRPC_VERBOSITY" not in Path(f"/proc/{document['pid']}/environ").read_bytes()


def test_sigterm_ends_what_is_written(daemon: Daemon, channel: grpc.Channel) -> None:
    """A stream without an end hears UNAVAILABLE, and the daemon ends in time with nothing left."""
    pid = daemon.create(instance_id="slow", env_vars=SLOW)["pid"]
    daemon.wait_state("slow", "ready")
    request = v1.CompleteRequest(instance_id="slow", prompts=["x"], sampling=v1.Sampling(max_tokens=100_000))
    deltas = stream(channel, request)
    next(deltas)
    began = time.monotonic()
    assert daemon.end() == 0, "".join(daemon.output)
    assert time.monotonic() - began < END_SECONDS
    code, _ = refusal(lambda: list(deltas))
    assert code is grpc.StatusCode.UNAVAILABLE
    wait_until(lambda: not processes_of("slow", pid), 5)
    assert not [line for line in daemon.output if "Traceback" in line], "".join(daemon.output)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """It is told at once, as for the other port; nothing has been started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "bullpen", "serve", "--engine", "sim", "--host", "127.0.0.1", "--port", "0"]
        options = ["--grpc-port", str(port), "--state-dir", str(tmp_path)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"bullpen: cannot listen on 127.0.0.1:{port} for gRPC: Address already in use;"
        " choose another --grpc-port (0 for none), or end the program there\n"
    )
    assert done.stdout == ""


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    """It is told at once."""
    command = [sys.executable, "-m", "bullpen", "serve", "--engine", "sim", "--port", "0", "--state-dir", str(tmp_path)]
    options = ["--grpc-tls-cert", str(tmp_path / "none"), "--grpc-tls-key", str(tmp_path / "none")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "for gRPC's TLS: No such file or directory" in done.stderr
