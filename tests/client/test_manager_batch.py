"""Batch jobs, with the simulator."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bullpen.client import batch, patience
from bullpen.client.batch import BatchProgress, BatchReport, run_batch
from bullpen.client.errors import ClientError, ConnectionFailed, Unauthorized
from bullpen.client.manager import VLLMManager
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


def has_results(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


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
    assert [one.done for one in seen] == list(range(101))
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
        partial = tmp_path / "out.partial"
        try:
            wait_for("there are results", lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 10)
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        before = partial.read_bytes()
        whole = before.count(b"\n")
        assert whole < 120 and not output.exists()
        with partial.open("ab") as torn:
            torn.write(b'{"id": "batch_req_1", "custom')
        asked = simulator.metric("vllm:request_success_total", finished_reason="length")
        report = await run_batch(source, output, base_url=simulator.url, in_flight=64)
        assert (report.total, report.resumed, report.failed) == (120, whole, 0)
        assert set(before[: before.rfind(b"\n") + 1].splitlines()) < set(output.read_bytes().splitlines())
        assert not partial.exists() and ids(output) == [f"id-{number}" for number in range(120)]
        again = simulator.metric("vllm:request_success_total", finished_reason="length") - asked
        assert 120 - whole <= again <= 120 - whole + 4  # what was in flight may have been done after all


async def test_server_that_ends_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number, max_tokens=20) for number in range(60)]), tmp_path / "out"
    with Simulator.serving(tmp_path, tokens_per_second=400) as first:
        port = str(first.port)
        task = asyncio.create_task(run_batch(source, output, base_url=first.url, in_flight=4, retry_seconds=20))
        await asyncio.to_thread(wait_for, "there are results", lambda: has_results(tmp_path / "out.partial"))
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
    assert sorted(ids(tmp_path / "out.partial")) == ["id-0", "id-1", "id-2"] and not output.exists()
    server = Server(lambda number, attempt: good())
    assert (await server.run(source, output)).resumed == 3
    assert sorted(server.sent) == list(range(3, 20))


async def test_first_request_that_is_never_answered_costs_the_others_nothing(tmp_path: Path) -> None:
    server = Server(lambda number, attempt: httpx.Response(503) if number == 0 else good())
    source, output = write(tmp_path / "in", [job(number) for number in range(100)]), tmp_path / "out"
    with pytest.raises(ConnectionFailed):
        await server.run(source, output, in_flight=2, retry_seconds=2)
    assert sorted(ids(tmp_path / "out.partial")) == sorted(f"id-{number}" for number in range(1, 100))
    again = Server(lambda number, attempt: good())
    report = await again.run(source, output)
    assert (report.resumed, again.sent) == (99, [0])
    assert ids(output) == [f"id-{number}" for number in range(100)]


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
        (json.dumps({**job(1), "url": "/v1/a b"}), "path"),
        (json.dumps({**job(1), "url": "/v1/\ud800"}), "path"),
        (json.dumps(job(1, temperature=float("nan"))), "NaN is no JSON value"),
        (json.dumps(job(0)), "lines 1 and 2 have the same custom_id"),
    ],
)
async def test_wrong_input_is_refused_before_anything_is_sent(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "in").write_text(f"{json.dumps(job(0))}\n{line}\n")
    with pytest.raises(InvalidRequestError, match=words):
        await run_batch(tmp_path / "in", tmp_path / "out", base_url="http://127.0.0.1:9")
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


async def test_all_wrong_lines_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("{\n" * 11 + json.dumps(job(0)))
    with pytest.raises(InvalidRequestError) as caught:
        await run_batch(tmp_path / "in", tmp_path / "out", base_url="http://127.0.0.1:9")
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'in'} has 11 mistakes; nothing was sent:"
    assert [line.partition(":")[0] for line in lines] == [f"  line {n}" for n in range(1, 11)] + ["  and 1 more"]


async def test_output_of_another_job_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0)])
    for text in ('{"custom_id": "other", "response": null, "error": null}\n', '{"custom_id": "id-0"}\n', "notes\n"):
        (tmp_path / "out").write_text(text)
        with pytest.raises(InvalidRequestError, match="line 1 is no result of"):
            await run_batch(source, tmp_path / "out", base_url="http://127.0.0.1:9")
        assert (tmp_path / "out").read_text() == text
    for wrong in (source, tmp_path, Path("/dev/null")):
        with pytest.raises(InvalidRequestError, match="is no file for results"):
            await run_batch(source, wrong, base_url="http://127.0.0.1:9")
    assert ids(source) == ["id-0"]
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        await run_batch(tmp_path / "missing", tmp_path / "out", base_url="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["out", "out.partial"])
async def test_results_of_requests_that_have_changed_are_not_taken(
    simulator: Simulator, tmp_path: Path, name: str
) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(3)]), tmp_path / "out"
    await run_batch(source, output, base_url=simulator.url)
    if name != "out":
        output.rename(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    changed = job(1)
    changed["body"]["prompt"] = "another text"
    write(source, [job(0), changed, job(2)])
    told = f"{name} has the result of another request that was called 'id-1' too"
    with pytest.raises(InvalidRequestError, match=told):
        await run_batch(source, output, base_url=simulator.url)
    assert (tmp_path / name).read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("out*")) == [name]


async def test_failed_results_that_were_removed_are_done_again(simulator: Simulator, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(3)]), tmp_path / "out"
    await run_batch(source, output, base_url=simulator.url)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[2])
    report = await run_batch(source, output, base_url=simulator.url)
    assert (report.total, report.resumed) == (3, 2)
    assert ids(output) == ["id-0", "id-1", "id-2"]


async def test_two_jobs_cannot_write_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0)])
    with (tmp_path / "out.partial").open("w") as other:
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
        assert {one.name for one in tmp_path.iterdir()} == {"in", "out"}


async def test_partial_file_that_was_cut_anywhere_becomes_whole(tmp_path: Path) -> None:
    source, output, partial = (
        write(tmp_path / "in", [job(n) for n in range(4)]),
        tmp_path / "out",
        tmp_path / "out.partial",
    )
    server = Server(lambda number, attempt: good())
    await server.run(source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[place] for place in (2, 0, 3, 1))
    output.unlink()
    for cut in range(0, len(whole), 7):
        partial.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        server.sent.clear()
        report = await server.run(source, output)
        assert (report.resumed, len(server.sent)) == (kept, 4 - kept), cut
        assert ids(output) == [f"id-{number}" for number in range(4)] and not partial.exists()
        output.unlink()


async def test_job_that_has_grown_does_what_is_new(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(3)]), tmp_path / "out"
    server = Server(lambda number, attempt: good())
    await server.run(source, output)
    write(source, [job(number) for number in (3, 0, 1, 2, 4)])
    server.sent.clear()
    report = await server.run(source, output)
    assert (report.resumed, sorted(server.sent)) == (3, [3, 4])
    assert ids(output) == ["id-3", "id-0", "id-1", "id-2", "id-4"]


async def test_full_disk_ends_the_job_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(20)]), tmp_path / "out"
    write_some, room = os.write, [1000]

    def write_as_far_as_it_fits(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = write_some(descriptor, data[: room[0]])
        room[0] -= size
        return size

    server = Server(lambda number, attempt: good())
    with monkeypatch.context() as full:
        full.setattr(os, "write", write_as_far_as_it_fits)
        with pytest.raises(ClientError, match=r"out\.partial cannot be written: No space left on device\. Make"):
            await server.run(source, output, in_flight=4)
    kept = len(ids(tmp_path / "out.partial"))
    assert 0 < kept < 20
    server.sent.clear()
    report = await server.run(source, output)
    assert (report.resumed, len(server.sent)) == (kept, 20 - kept)
    assert ids(output) == [f"id-{number}" for number in range(20)]


async def test_text_that_is_no_unicode_is_sent(simulator: Simulator, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [job(0, prompt="\ud800")])
    report = await run_batch(source, tmp_path / "out", base_url=simulator.url)
    assert report.failed == 0


async def test_request_that_ends_each_server_is_found_among_its_neighbours(tmp_path: Path) -> None:
    """A server that dies takes along what is with it; one request alone is at fault."""
    dead: list[int] = []
    running: set[asyncio.Event] = set()

    async def answer(request: httpx.Request) -> httpx.Response:
        number = int(json.loads(request.content)["prompt"].split()[1])
        died = asyncio.Event()
        running.add(died)
        try:
            await asyncio.sleep(0.01)
            if number == 3:
                dead.append(number)
                for one in running:
                    one.set()
            if died.is_set():
                raise httpx.ReadError("the server died")
            return good()
        finally:
            running.discard(died)

    async def restore() -> str:
        restored.append(len(dead))
        return "http://another:1"

    restored: list[int] = []
    source = write(tmp_path / "in", [job(number) for number in range(40)])
    report = await run_batch(
        source,
        tmp_path / "out",
        base_url=URL,
        in_flight=16,
        restore=restore,
        transport=httpx.MockTransport(answer),
    )
    assert (report.total, report.failed, dead) == (40, 1, [3, 3, 3])
    assert read(tmp_path / "out")[3]["error"]["code"] == "connection_lost"
    assert restored[:2] == [1, 2] and len(restored) <= 3, "once for each death, however many requests were lost"


async def test_server_that_cannot_be_restored_ends_the_job(tmp_path: Path) -> None:
    async def restore() -> str:
        raise ClientError("it is gone for good")

    server = Server(lambda number, attempt: httpx.ConnectError("refused"))
    with pytest.raises(ClientError, match="gone for good"):
        await server.run(write(tmp_path / "in", [job(0)]), tmp_path / "out", restore=restore)
    assert server.sent == [0]


async def test_cancelled_job_keeps_what_was_done(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", [job(number) for number in range(20)]), tmp_path / "out"
    partial = tmp_path / "out.partial"
    server = Server(lambda number, attempt: good() if number < 5 else httpx.Response(503))
    task = asyncio.create_task(server.run(source, output, in_flight=4))
    async with asyncio.timeout(20):
        while not partial.exists() or partial.read_bytes().count(b"\n") < 5:  # they are not kept back for the sixth
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ids(partial)) == [f"id-{number}" for number in range(5)]


async def test_batch_of_a_launch(simulator: Simulator, tmp_path: Path) -> None:
    box = Box()
    box.url, box.pid = simulator.url, simulator.process.pid
    source = write(tmp_path / "in", [job(number, model="gpt-4o") for number in range(3)])
    async with VLLMManager("http://127.0.0.1:8001", transport=box.transport) as manager:
        launch = await manager.launch("m")
        report = await manager.batch(launch.launch_id, source, tmp_path / "out")
    assert (report.total, report.failed) == (3, 0)
