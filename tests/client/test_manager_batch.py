"""Batch jobs, with the simulator."""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bullpen.client import batch, patience
from bullpen.client.batch import BatchProgress, BatchReport, run_batch, server_url
from bullpen.client.errors import ClientError, ConnectionFailed, Unauthorized
from bullpen.client.manager import VLLMManager
from bullpen.client.models import Instance
from bullpen.client.target import Target
from bullpen.errors import ConflictError, InvalidRequestError
from tests.client.box import Box
from tests.sim.simulator import Simulator, wait_for

URL = "http://server:8000"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.serving(tmp_path_factory.mktemp("sim"), tokens_per_second=20_000) as simulator:
        yield simulator


def job(number: int, **body: Any) -> dict[str, Any]:
    default = {"model": "test/model", "prompt": f"prompt {number}", "max_tokens": 2}
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": {**default, **body}}


def write(path: Path, jobs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in jobs))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [result["custom_id"] for result in read(path)]


async def test_results_are_in_order_and_each_is_its_own(simulator: Simulator, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(number, max_tokens=1 + 7 * (number % 5)) for number in range(100)])
    seen: list[BatchProgress] = []
    report = await run_batch(
        source, tmp_path / "out", base_url=f"{simulator.url}/v1", in_flight=8, on_progress=seen.append
    )
    assert (report.total, report.resumed, report.failed) == (100, 0, 0)
    assert ids(tmp_path / "out") == [f"id-{number}" for number in range(100)]
    for number, result in enumerate(read(tmp_path / "out")):
        assert result["error"] is None and result["response"]["status_code"] == 200
        assert result["response"]["body"]["usage"]["completion_tokens"] == 1 + 7 * (number % 5)
    assert [one.done for one in seen] == sorted({one.done for one in seen})
    assert (seen[-1].done, seen[-1].total, seen[-1].seconds_left) == (100, 100, 0)
    assert seen[-1].rate > 0


async def test_refused_request_is_a_result_and_a_failure(simulator: Simulator, tmp_path: Path) -> None:
    jobs = [job(0), job(1, model="other"), {**job(2), "url": "/v1/chat/completions", "body": {"messages": []}}]
    source = write(tmp_path / "in", jobs)
    report = await run_batch(source, tmp_path / "out", base_url=simulator.url)
    assert report.failed == 2
    assert [result["response"]["status_code"] for result in read(tmp_path / "out")] == [200, 404, 400]
    again = await run_batch(source, tmp_path / "out", base_url="http://127.0.0.1:9")  # nothing is left to be asked for
    assert (again.total, again.resumed, again.failed) == (3, 3, 2)


async def test_model_of_all_requests(simulator: Simulator, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0, model="a"), job(1, model="b")])
    report = await run_batch(source, tmp_path / "out", base_url=simulator.url, model="test/model")
    assert report.failed == 0


async def test_job_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, tokens_per_second=200) as simulator:
        source, output = write(tmp_path / "in", [job(number) for number in range(120)]), tmp_path / "out"
        program = (
            "import asyncio, sys; from bullpen.client.batch import run_batch;"
            "asyncio.run(run_batch(sys.argv[1], sys.argv[2], base_url=sys.argv[3], in_flight=4))"
        )
        worker = subprocess.Popen([sys.executable, "-c", program, source, output, simulator.url])
        try:
            wait_for("there are results", lambda: output.exists() and len(output.read_bytes().splitlines()) >= 10)
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        before = output.read_bytes()
        whole = before.count(b"\n")
        assert whole < 120
        with output.open("ab") as torn:
            torn.write(b'{"id": "batch_req_1", "custom')
        asked = simulator.metric("vllm:request_success_total", finished_reason="length")
        report = await run_batch(source, output, base_url=simulator.url, in_flight=64)
        assert (report.total, report.resumed, report.failed) == (120, whole, 0)
        assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
        assert ids(output) == [f"id-{number}" for number in range(120)]
        again = simulator.metric("vllm:request_success_total", finished_reason="length") - asked
        assert 120 - whole <= again <= 120 - whole + 4  # what was in flight may have been done after all


async def test_server_that_ends_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number, max_tokens=20) for number in range(60)]), tmp_path / "out"
    with Simulator.serving(tmp_path, tokens_per_second=400) as first:
        port = str(first.port)
        task = asyncio.create_task(run_batch(source, output, base_url=first.url, in_flight=4, retry_seconds=20))
        await asyncio.to_thread(wait_for, "there are results", lambda: output.exists() and output.stat().st_size)
        first.process.kill()
        await asyncio.to_thread(first.process.wait)
    with Simulator.serving(tmp_path, "--port", port, tokens_per_second=4000):
        report = await asyncio.wait_for(task, 30)
    assert (report.total, report.failed) == (60, 0)
    assert ids(output) == [f"id-{number}" for number in range(60)]


# -- with answers as the test wants them -------------------------------------------------------------------------

Answer = Callable[[int, int], httpx.Response | Exception]


class Server:
    """A server in memory; `answer` is told the number of the job and how often that was sent so far."""

    def __init__(self, answer: Answer) -> None:
        self.sent: list[int] = []
        self.most = self.running = 0
        self._answer = answer

    async def run(self, source: Path, output: Path, **options: Any) -> BatchReport:
        """Run a job with it."""
        transport = httpx.MockTransport(self._handle)
        return await run_batch(source, output, base_url=URL, transport=transport, **options)

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        number = int(json.loads(request.content)["prompt"].split()[1])
        self.sent.append(number)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        found = self._answer(number, self.sent.count(number))
        if isinstance(found, Exception):
            raise found
        return found


def good() -> httpx.Response:
    return httpx.Response(200, json={"id": "x"})


async def test_many_are_in_flight_and_no_more_than_allowed(tmp_path: Path) -> None:
    server = Server(lambda number, attempt: good())
    await server.run(write(tmp_path / "in", [job(one) for one in range(50)]), tmp_path / "out", in_flight=7)
    assert server.most == 7


@pytest.mark.parametrize("trouble", [httpx.Response(429), httpx.Response(503), httpx.Response(500)])
async def test_passing_trouble(tmp_path: Path, trouble: httpx.Response) -> None:
    server = Server(lambda number, attempt: trouble if attempt < 3 else good())
    report = await server.run(write(tmp_path / "in", [job(0), job(1)]), tmp_path / "out")
    assert report.failed == 0
    assert sorted(server.sent) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("trouble", "status", "code"),
    [
        (httpx.Response(500, text="bad"), 500, None),
        (httpx.ReadTimeout("slow"), None, "timed_out"),
        (httpx.ReadError("the server died of it"), None, "connection_lost"),
    ],
)
async def test_lasting_trouble_with_one_request(
    tmp_path: Path, trouble: httpx.Response | Exception, status: int, code: str
) -> None:
    server = Server(lambda number, attempt: trouble if number == 1 else good())
    report = await server.run(write(tmp_path / "in", [job(n) for n in range(3)]), tmp_path / "out")
    assert report.failed == 1
    assert server.sent.count(1) == batch.ATTEMPTS
    result = read(tmp_path / "out")[1]
    assert (result["response"] or {}).get("status_code") == status
    assert (result["error"] or {}).get("code") == code


async def test_url_where_nobody_is_fails_at_once(tmp_path: Path) -> None:
    server = Server(lambda number, attempt: httpx.ConnectError("refused"))
    with pytest.raises(ConnectionFailed, match="nobody answers at http://server:8000"):
        await server.run(write(tmp_path / "in", [job(0)]), tmp_path / "out")
    assert server.sent == [0]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (httpx.ConnectError("refused"), ConnectionFailed),
        (httpx.Response(503), ConnectionFailed),
        (httpx.Response(401), Unauthorized),
    ],
)
async def test_server_that_stays_away_ends_the_job_and_costs_nothing(
    tmp_path: Path, trouble: httpx.Response | Exception, kind: type[Exception]
) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(20)]), tmp_path / "out"
    server = Server(lambda number, attempt: good() if number < 3 else trouble)
    with pytest.raises(kind):
        await server.run(source, output, in_flight=2, retry_seconds=0.02)
    assert ids(output) == ["id-0", "id-1", "id-2"]
    server = Server(lambda number, attempt: good())
    assert (await server.run(source, output)).resumed == 3
    assert sorted(server.sent) == list(range(3, 20))


async def test_slow_first_request_holds_up_only_so_many(tmp_path: Path) -> None:
    server = Server(lambda number, attempt: httpx.Response(503) if number == 0 else good())
    source = write(tmp_path / "in", [job(number) for number in range(200)])
    with pytest.raises(ConnectionFailed):
        await server.run(source, tmp_path / "out", in_flight=2, retry_seconds=0.2)
    assert 2 * batch.AHEAD <= len(set(server.sent)) <= 2 * batch.AHEAD + 4


async def test_path_that_names_a_host_goes_to_the_server(tmp_path: Path) -> None:
    hosts: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return good()

    source = write(tmp_path / "in", [{**job(0), "url": "//elsewhere/v1"}, {**job(1), "url": "/@elsewhere"}])
    await run_batch(source, tmp_path / "out", base_url=URL, transport=httpx.MockTransport(answer))
    assert hosts == ["server", "server"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: this is no JSON"),
        ("[]", "no JSON object"),
        (json.dumps({**job(1), "custom_id": 1}), "'custom_id'"),
        (json.dumps({**job(1), "body": None}), "'body'"),
        (json.dumps({**job(1), "method": "GET"}), "POST"),
        (json.dumps({**job(1), "url": "http://x/v1"}), "path"),
        (json.dumps(job(1, stream=True)), "stream"),
        (json.dumps(job(0)), "lines 1 and 2 have the same custom_id"),
    ],
)
async def test_wrong_input_is_refused_before_anything_is_sent(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "in").write_text(f"{json.dumps(job(0))}\n{line}\n")
    with pytest.raises(InvalidRequestError, match=words):
        await run_batch(tmp_path / "in", tmp_path / "out", base_url="http://127.0.0.1:9")
    assert not (tmp_path / "out").exists()


async def test_output_of_another_job_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0)])
    (tmp_path / "out").write_text('{"custom_id": "other"}\n')
    with pytest.raises(InvalidRequestError, match="line 1 is no result of"):
        await run_batch(source, tmp_path / "out", base_url="http://127.0.0.1:9")
    assert (tmp_path / "out").read_text() == '{"custom_id": "other"}\n'
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        await run_batch(tmp_path / "missing", tmp_path / "out", base_url="http://127.0.0.1:9")


async def test_two_jobs_cannot_write_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0)])
    with (tmp_path / "out").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="another job is writing"):
            await run_batch(source, tmp_path / "out", base_url="http://127.0.0.1:9")


async def test_output_that_was_cut_anywhere_becomes_whole(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(4)]), tmp_path / "out"
    server = Server(lambda number, attempt: good())
    await server.run(source, output)
    whole = output.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {0, 1, len(whole) // 2, *ends, *(end - 1 for end in ends), *(min(end + 1, len(whole)) for end in ends)}:
        output.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        server.sent.clear()
        report = await server.run(source, output)
        assert (report.resumed, report.total, sorted(server.sent)) == (kept, 4, list(range(kept, 4))), cut
        assert ids(output) == [f"id-{number}" for number in range(4)]


async def test_cancelled_job_keeps_what_was_done(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(20)]), tmp_path / "out"
    server = Server(lambda number, attempt: good() if number < 5 else httpx.Response(503))
    task = asyncio.create_task(server.run(source, output, in_flight=4))
    async with asyncio.timeout(20):
        while not output.exists() or len(ids(output)) < 5:  # they are not kept back for the sixth
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ids(output) == [f"id-{number}" for number in range(5)]


async def test_batch_of_a_launch(simulator: Simulator, tmp_path: Path) -> None:
    box = Box()
    box.url = simulator.url
    source = write(tmp_path / "in", [job(number, model="gpt-4o") for number in range(3)])
    async with VLLMManager("http://127.0.0.1:8001", transport=box.transport) as manager:
        launch = await manager.launch("m")
        report = await manager.batch(launch.launch_id, source, tmp_path / "out")
    assert (report.total, report.failed) == (3, 0)


def test_url_of_an_instance() -> None:
    here, there = Target("http://127.0.0.1:8001"), Target("http://box:8001")
    local = Instance("a", url="http://127.0.0.1:9000")
    assert server_url(here, local) == local.url
    assert server_url(there, Instance("a", url="http://box:9000")) == "http://box:9000"
    with pytest.raises(ClientError, match="own host only"):
        server_url(there, local)
    with pytest.raises(ClientError, match="wake it first"):
        server_url(here, Instance("a"))
