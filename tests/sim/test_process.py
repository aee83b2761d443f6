"""The two processes: how they start, fail, die and are ended."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.sim.simulator import DEADLINE_SECONDS, SOURCE, Simulator, is_alive, wait_for

PHASES = [
    "bullpen sim: this is a simulator, no model is loaded",
    "non-default args: {",
    "Resolved architecture: SimForCausalLM",
    "Initializing a V1 LLM engine (vsim) with config: model='test/model'",
    "Starting to load model test/model...",
    "Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]",
    "Loading safetensors checkpoint shards: 100% Completed | 4/4",
    "Loading weights took ",
    "GPU KV cache size: 131,072 tokens",
    "init engine (profile, create kv cache, warmup model) took ",
    "Starting vLLM server on http://127.0.0.1:",
    "INFO:     Application startup complete.",
]


def health(simulator: Simulator) -> int:
    try:
        return httpx.get(f"{simulator.url}/health", timeout=DEADLINE_SECONDS, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_phases_are_logged_in_vllms_order(shared: Simulator) -> None:
    places = [shared.log.find(phase) for phase in PHASES]
    assert -1 not in places
    assert places == sorted(places)
    assert places[0] == 0
    assert f"(APIServer pid={shared.process.pid}) INFO " in shared.log
    assert shared.engine_pid != shared.process.pid


def test_the_port_is_bound_but_refuses_until_ready(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Simulator(tmp_path, "m", "--host", "127.0.0.1", "--port", str(port), start_seconds=0.6) as simulator:
        wait_for("the engine starts", lambda: "Initializing a V1 LLM engine" in simulator.log)
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS)
        simulator.wait_serving()
        assert health(simulator) == 200


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Simulator(tmp_path, "m", "--host", "127.0.0.1", "--port", port) as simulator:
            assert simulator.wait_ended() == 1
            assert "Traceback (most recent call last):" in simulator.log
            assert "OSError: [Errno 98] Address already in use" in simulator.log


def test_a_socket_of_the_file_system_and_ipv6(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Simulator.serving(tmp_path, "--uds", str(path)) as simulator:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://sim/health").status_code == 200
        assert f"Starting vLLM server on unix:{path}" in simulator.log
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
        with Simulator.serving(tmp_path, "--host", "::1") as simulator:
            assert simulator.url.startswith("http://[::1]:")
            assert health(simulator) == 200


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["--port", "1"], {}, 2, "api_server.py: error: no model given"),
        (["m", "--port", "abc"], {}, 2, "argument --port: invalid int value: 'abc'"),
        (["m"], {"start_seconds": "soon"}, 1, "BULLPEN_SIM_START_SECONDS is 'soon': give a number"),
        (["m"], {"fail": "often"}, 1, "BULLPEN_SIM_FAIL is 'often': give one of start, health"),
    ],
)
def test_starts_that_are_refused(
    tmp_path: Path, arguments: list[str], environment: dict[str, object], code: int, message: str
) -> None:
    with Simulator(tmp_path, *arguments, **environment) as simulator:
        assert simulator.wait_ended() == code
        assert message in simulator.log
        assert simulator.log.startswith("bullpen sim: this is a simulator")


def test_failing_at_the_start(tmp_path: Path) -> None:
    with Simulator(tmp_path, "m", "--host", "127.0.0.1", "--port", "0", fail="start") as simulator:
        assert simulator.wait_ended() == 1
        log = simulator.log
        cause = log.index(
            "RuntimeError: the simulated engine fails to start because BULLPEN_SIM_FAIL=start asks for it"
        )
        result = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
        assert cause < log.index(result + "{'EngineCore': 1}")
        assert log.count("Traceback (most recent call last):") == 2
        assert not is_alive(simulator.engine_pid)


def test_failing_health_and_requests(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, fail="health") as simulator:
        assert health(simulator) == 503
    with Simulator.serving(tmp_path, fail="request") as simulator:
        assert health(simulator) == 200
        messages = [{"role": "user", "content": "x"}]
        for path in ("completions", "chat/completions", "embeddings"):
            for stream in (False, True):
                body = {"prompt": "x", "input": "x", "messages": messages, "stream": stream}
                answer = simulator.http.post(f"/v1/{path}", json=body)
                assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert simulator.metric("vllm:request_success_total", finished_reason="error") == 6


def test_the_engine_child_dies(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path) as simulator, ThreadPoolExecutor() as threads:
        whole = threads.submit(simulator.ask, max_tokens=100_000)
        stream = threads.submit(simulator.ask, max_tokens=100_000, stream=True)
        wait_for("both run", lambda: simulator.metric("vllm:num_requests_running") == 2)
        os.kill(simulator.engine_pid, signal.SIGKILL)
        wait_for("health notices", lambda: health(simulator) == 503)
        assert whole.result(DEADLINE_SECONDS).json()["error"]["type"] == "InternalServerError"
        assert '"error":{"message":"EngineCore encountered an issue.' in stream.result(DEADLINE_SECONDS).text
        assert simulator.http.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        assert simulator.http.post("/sleep").status_code == 500
        assert simulator.http.get("/is_sleeping").status_code == 500
        assert simulator.wait_ended() == 0
        assert "EngineCore died unexpectedly (exit code -9)" in simulator.log


def test_the_server_is_killed(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path) as simulator:
        simulator.process.kill()
        wait_for("the engine child ends by itself", lambda: not is_alive(simulator.engine_pid))


@pytest.mark.parametrize("when", ["starting", "serving", "sleeping"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_on_a_signal(tmp_path: Path, when: str, number: signal.Signals) -> None:
    arguments = ("m", "--host", "127.0.0.1", "--port", "0")
    start_seconds = 3 if when == "starting" else 0
    with Simulator(tmp_path, *arguments, start_seconds=start_seconds, vllm_server_dev_mode=1) as simulator:
        engine = simulator.engine_pid
        if when != "starting":
            simulator.wait_serving()
        if when == "sleeping":
            simulator.http.post("/sleep")
        simulator.process.send_signal(number)
        assert simulator.wait_ended() == 0
        wait_for("the engine child has ended", lambda: not is_alive(engine))
        assert "died unexpectedly" not in simulator.log


def test_ending_with_requests_under_way(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path) as simulator, ThreadPoolExecutor() as threads:
        answer = threads.submit(simulator.ask, max_tokens=100_000)
        wait_for("it runs", lambda: simulator.metric("vllm:num_requests_running") == 1)
        simulator.process.terminate()
        assert answer.result(DEADLINE_SECONDS).json()["choices"][0]["finish_reason"] == "abort"
        assert simulator.wait_ended() == 0


def test_a_stubborn_engine_child(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, stubborn=1) as simulator:
        engine = simulator.engine_pid
        os.kill(engine, signal.SIGTERM)
        assert health(simulator) == 200
        simulator.process.terminate()
        assert simulator.wait_ended() == 0
        os.kill(engine, signal.SIGTERM)
        assert is_alive(engine)
        # As vLLM's orphans do, it holds the port that its server listened on.
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", simulator.port))


def test_a_stubborn_server(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, stubborn=2) as simulator:
        simulator.process.terminate()
        os.kill(simulator.engine_pid, signal.SIGTERM)
        assert health(simulator) == 200
        simulator.process.kill()
        simulator.wait_ended()
        assert is_alive(simulator.engine_pid)


@pytest.mark.parametrize("start_seconds", [0, 3])
def test_ending_by_itself(tmp_path: Path, start_seconds: float) -> None:
    environment = {"start_seconds": start_seconds, "exit_after": 0.6, "exit_code": 7}
    with Simulator(tmp_path, "m", "--host", "127.0.0.1", "--port", "0", **environment) as simulator:
        assert simulator.wait_ended() == 7
        assert "ending with exit code 7" in simulator.log
        wait_for("the engine child has ended", lambda: not is_alive(simulator.engine_pid))


def test_log_bytes(tmp_path: Path) -> None:
    sizes = []
    for size in (0, 200_000):
        with Simulator(tmp_path, "m", "--host", "127.0.0.1", "--port", "0", fail="start", log_bytes=size) as simulator:
            assert simulator.wait_ended() == 1
            filler = [line for line in simulator.log.splitlines(keepends=True) if line.endswith("....\n")]
            sizes.append(sum(map(len, filler)))
    assert sizes == [0, 200_000]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "BULLPEN_SIM_LOG_BYTES": "1000000"}
    command = [sys.executable, "-m", "bullpen.sim", "m", "--host", "127.0.0.1", "--port", str(port)]
    with (
        Path("/dev/full").open("wb") as full,
        subprocess.Popen(command, stdout=full, stderr=full, env=environment) as server,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

                def probe_health() -> bool:
                    assert server.poll() is None
                    try:
                        return client.get("/health").status_code == 200
                    except httpx.TransportError:
                        return False

                wait_for("it serves", probe_health)
                answer = client.post("/v1/completions", json={"prompt": "x"})
                assert answer.status_code == 200
            server.terminate()
            assert server.wait(DEADLINE_SECONDS) == 0
        finally:
            server.kill()


def test_importing_starts_nothing() -> None:
    script = (
        "import os, sys, threading, signal\n"
        "before = signal.getsignal(signal.SIGTERM), set(os.listdir('/proc/self/fd'))\n"
        "import bullpen.sim.server, bullpen.sim.options\n"
        "assert threading.active_count() == 1 and len(os.listdir('/proc/self/task')) == 1\n"
        "assert before == (signal.getsignal(signal.SIGTERM), set(os.listdir('/proc/self/fd')))\n"
        "others = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in others if not name.startswith('__')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    # -S: without what an environment's .pth files import.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], check=False, env=environment, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (0, "['bullpen']\n"), done.stderr
