"""The commands of the API's documents, run by a shell as they are printed there.

They name the ports 8000 to 8012, so only one run of these tests may be under way on a machine; others wait for it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon import Daemon
from tests.support.processes import is_alive
from tests.web.calls import INSTANCES

PORTS = (8000, 8001, 8005, 8010, 8011, 8012)
LOCK_SECONDS = 90.0

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def ports() -> Iterator[None]:
    """The ports that the examples name, for this run alone."""
    lock = (Path(tempfile.gettempdir()) / "bullpen-tests-printed-ports.lock").open("w")
    with closing(lock):
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pytest.skip("another run of these tests has the ports")
                time.sleep(0.2)
        for port in PORTS:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("0.0.0.0", port))
                except OSError:
                    pytest.skip(f"port {port}, which the examples name, is in use on this machine")
        yield


@pytest.fixture(scope="module")
def printed(ports: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The daemon where the examples expect it."""
    with Daemon(tmp_path_factory.mktemp("printed") / "state", host=None, port=None) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def daemon(printed: Daemon) -> Iterator[Daemon]:
    assert printed.url == "http://127.0.0.1:8001", "the default port"
    yield printed
    printed.http.delete(INSTANCES)


def run(command: str) -> bytes:
    """What a command prints."""
    done = subprocess.run(["bash", "-euc", command], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def reply(command: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    document: dict[str, Any] = json.loads(run(command))
    return document


# -- one instance (v1) ---------------------------------------------------------------------------------------------

JSON_EXAMPLE = """
{
  "options": "--model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --port 8005",
  "env_vars": {
    "VLLM_USE_V1": "1",
    "VLLM_LOGGING_LEVEL": "DEBUG"
  }
}
"""


def test_one_instance(daemon: Daemon) -> None:
    post = r"""
curl -X POST \
  -H "Content-Type: application/json" \
  -d 'JSON_EXAMPLE' \
  http://localhost:8001/v1/vllm
"""
    delete = r"""
curl -X DELETE \
  -H "Content-Type: application/json" \
  http://localhost:8001/v1/vllm
"""
    get = r"""
curl -X GET \
  -H "Content-Type: application/json" \
  http://localhost:8001/v1/vllm
"""
    started = reply(post.replace("JSON_EXAMPLE", JSON_EXAMPLE))
    pid = started["pid"]
    assert started == {"status": "started", "pid": pid}
    assert is_alive(pid)
    assert reply(get) == {"status": "started", "pid": pid}
    assert daemon.wait_state("default", "ready")["url"] == "http://127.0.0.1:8005"
    assert httpx.get("http://localhost:8005/health").status_code == 200
    assert reply(delete) == {"status": "terminated", "pid": pid}
    assert not is_alive(pid)
    assert reply(get) == {"status": "stopped", "pid": pid}


# -- many instances (v2) -------------------------------------------------------------------------------------------

CREATE_OPT = r"""
curl -X POST http://localhost:8001/v2/vllm/instances \
  -H "Content-Type: application/json" \
  -d '{
    "options": "--model facebook/opt-125m --port 8000"
  }'
"""


def test_quick_start(daemon: Daemon) -> None:
    printed_id = "a1b2c3d4-e5f6-7890-abcd-ef1234567890"
    created = reply(CREATE_OPT)
    assert created["status"] == "started"
    assert created["instance_id"]
    daemon.wait_state(created["instance_id"], "ready")
    # The page shows one id for all; the daemon chose another, so the same instance is made once more under that id.
    daemon.delete(created["instance_id"])
    daemon.create("--model facebook/opt-125m --port 8000", instance_id=printed_id)
    daemon.wait_state(printed_id, "ready")
    status = reply("curl -X GET http://localhost:8001/v2/vllm/instances/a1b2c3d4-e5f6-7890-abcd-ef1234567890")
    assert (status["status"], status["instance_id"]) == ("running", printed_id)
    chat = r"""
curl http://localhost:8000/v2/chat/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "facebook/opt-125m",
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "Tell me a joke about AI."}
    ],
    "temperature": 0.7,
    "max_tokens": 100
  }'
"""
    # The printed path is not vLLM's: the server itself answers, as it does to any path that it does not have.
    assert reply(chat) == {"detail": "Not Found"}
    answer = reply(chat.replace("/v2/chat", "/v1/chat"))
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 100
    deleted = reply("curl -X DELETE http://localhost:8001/v2/vllm/instances/a1b2c3d4-e5f6-7890-abcd-ef1234567890")
    assert (deleted["status"], deleted["instance_id"]) == ("terminated", printed_id)


def test_basic_single_instance(daemon: Daemon) -> None:
    created = reply(CREATE_OPT)
    daemon.wait_state(created["instance_id"], "ready")
    assert reply("curl http://localhost:8000/v2/models") == {"detail": "Not Found"}, "as above"
    assert reply("curl http://localhost:8000/v1/models")["data"][0]["id"] == "facebook/opt-125m"
    daemon.create(instance_id="abc123...")
    deleted = reply("curl -X DELETE http://localhost:8001/v2/vllm/instances/abc123...")
    assert (deleted["status"], deleted["instance_id"]) == ("terminated", "abc123...")


def test_several_models_on_different_ports(daemon: Daemon) -> None:
    commands = r"""
# Start Llama 2 on port 8010
curl -X PUT http://localhost:8001/v2/vllm/instances/llama2 \
  -H "Content-Type: application/json" \
  -d '{
    "options": "--model meta-llama/Llama-2-7b-hf --port 8010"
  }'

# Start GPT-2 on port 8011
curl -X PUT http://localhost:8001/v2/vllm/instances/gpt2 \
  -H "Content-Type: application/json" \
  -d '{
    "options": "--model gpt2 --port 8011"
  }'

# Start OPT on port 8012
curl -X PUT http://localhost:8001/v2/vllm/instances/opt \
  -H "Content-Type: application/json" \
  -d '{
    "options": "--model facebook/opt-1.3b --port 8012"
  }'
"""
    run(commands)
    listed = reply("""
# List all instances
curl http://localhost:8001/v2/vllm/instances
""")
    assert (listed["total_instances"], listed["running_instances"]) == (3, 3)
    models = {"llama2": ("meta-llama/Llama-2-7b-hf", 8010), "gpt2": ("gpt2", 8011), "opt": ("facebook/opt-1.3b", 8012)}
    for instance in listed["instances"]:
        model, port = models.pop(instance["instance_id"])
        assert (instance["status"], instance["model"], instance["url"]) == (
            "running",
            model,
            f"http://127.0.0.1:{port}",
        )
        daemon.wait_state(instance["instance_id"], "ready")
        assert httpx.get(f"http://localhost:{port}/v1/models").json()["data"][0]["id"] == model
    assert not models
    stopped = reply("curl -X DELETE http://localhost:8001/v2/vllm/instances")
    assert (stopped["status"], stopped["total_stopped"]) == ("all_stopped", 3)
    assert {one["status"] for one in stopped["stopped_instances"]} == {"terminated"}


def test_environment_variables(daemon: Daemon) -> None:
    created = reply(r"""
curl -X POST http://localhost:8001/v2/vllm/instances \
  -H "Content-Type: application/json" \
  -d '{
    "options": "--model meta-llama/Llama-2-7b-hf --port 8000 --tensor-parallel-size 2",
    "env_vars": {
      "CUDA_VISIBLE_DEVICES": "0,1",
      "VLLM_ATTENTION_BACKEND": "FLASHINFER",
      "MAX_BATCH_SIZE": "128"
    }
  }'
""")
    assert created["status"] == "started"
    assert created["env_vars"] == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "VLLM_ATTENTION_BACKEND": "FLASHINFER",
        "MAX_BATCH_SIZE": "128",
    }
    daemon.wait_state(created["instance_id"], "ready")
    listed = reply("""
# Get detailed status
curl http://localhost:8001/v2/vllm/instances
""")
    assert [one["instance_id"] for one in listed["instances"]] == [created["instance_id"]]
    deleted = reply("curl -X DELETE http://localhost:8001/v2/vllm/instances")
    assert deleted["total_stopped"] == 1


def test_logs(daemon: Daemon) -> None:
    daemon.create(instance_id="abc123...", env_vars={"BULLPEN_SIM_LOG_BYTES": str(3 * 1024 * 1024)})
    daemon.wait_state("abc123...", "ready")
    whole = run("""
# Get up to 1 MB of logs from the beginning (no Range header → 200 OK)
curl http://localhost:8001/v2/vllm/instances/abc123.../log
""")
    first = run(r"""
# Get the first 1 MB chunk (Range header → 206 Partial Content)
curl -H "Range: bytes=0-1048575" \
  http://localhost:8001/v2/vllm/instances/abc123.../log
""")
    second = run(r"""
# Second chunk — continue from byte 1048576
curl -H "Range: bytes=1048576-2097151" \
  http://localhost:8001/v2/vllm/instances/abc123.../log
""")
    open_ended = run(r"""
# Open-ended range — from byte 2097152 to EOF (up to 1 MB)
curl -H "Range: bytes=2097152-" \
  http://localhost:8001/v2/vllm/instances/abc123.../log
""")
    assert first == whole
    assert [len(chunk) for chunk in (first, second, open_ended)] == [1024 * 1024] * 3
    assert first != second != open_ended


def test_streaming_a_log(daemon: Daemon) -> None:
    """The loop of the page, with the client at hand."""
    daemon.create(instance_id="id", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.2"})
    daemon.wait_state("id", "failed")
    start, data = 0, b""
    while True:
        resp = httpx.get(
            "http://localhost:8001/v2/vllm/instances/id/log",
            headers={"Range": f"bytes={start}-"},
        )
        if resp.status_code == 416:
            break
        if not resp.content:
            break
        start += len(resp.content)
        data += resp.content
    assert data == daemon.http.get(f"{INSTANCES}/id/log").content
    assert resp.headers["content-range"] == f"bytes */{start}"


def test_same_port_twice_fails(daemon: Daemon) -> None:
    daemon.create("--model m --port 8000", instance_id="1")
    second = httpx.put(f"http://localhost:8001{INSTANCES}/2", json={"options": "--model m --port 8000"})
    assert second.status_code == 409
    assert "'1'" in second.json()["detail"]
