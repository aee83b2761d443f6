"""Batch jobs whose server cannot be reached from here: the daemon hands the requests on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bullpen.client import batch, messages, patience
from bullpen.client.batch import BatchReport, run_batch_by
from bullpen.client.batch_ways import ByDaemon, ByHttp, Way, way_to
from bullpen.client.errors import ClientError, ConnectionFailed, Unauthorized, UnexpectedAnswer
from bullpen.client.inference import Address, Inference
from bullpen.client.launch_errors import NotFound
from bullpen.client.manager import VLLMManager
from bullpen.client.models import Instance
from bullpen.client.target import Target
from tests.client.box import URL, Box
from tests.rpc.engine import Asked, scripted
from tests.rpc.serving import Rpc, serving
from tests.sim.simulator import Simulator

Script = Callable[[Asked], Awaitable[None]]
NAME = "i-one"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)


def write(folder: Path, count: int, **fields: Any) -> Path:
    path = folder / "in"
    jobs = (
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"prompt {n}", "max_tokens": 2},
            **fields,
        }
        for n in range(count)
    )
    path.write_text("".join(json.dumps(one) + "\n" for one in jobs))
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out").read_text().splitlines()]


def number(asked: Asked) -> int:
    return int(asked.body["prompt"].split()[1])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


async def through(rpc: Rpc, folder: Path, timeout: float = 60.0, key: str | None = None, **more: Any) -> BatchReport:
    """Do the job in a folder through a gRPC server."""
    address = Address(f"127.0.0.1:{rpc.server.port}", tls=False, is_local=True)
    inference = Inference(address, key, 0.0, limit_response=False)
    try:
        way = ByDaemon(inference, NAME, timeout)
        return await run_batch_by(way, folder / "in", folder / "out", **{"retry_seconds": 20.0, **more})
    finally:
        await inference.close()


@asynccontextmanager
async def answering(script: Script, **settings: Any) -> AsyncIterator[Rpc]:
    async with scripted(script) as (_, address), serving(**settings) as rpc:
        rpc.book.add(NAME, address)
        yield rpc


# -- which way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_url", [URL, "http://127.0.0.1:8000"])
async def test_launch_whose_server_is_out_of_reach(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, base_url: str
) -> None:
    """On another host, and behind the end of a tunnel here, where nobody listens at the server's own port."""
    box = Box()
    box.url = f"http://127.0.0.1:{free_port()}"
    source = write(tmp_path, 100)
    with Simulator.serving(tmp_path_factory.mktemp("sim"), tokens_per_second=20_000) as simulator:
        async with serving(access_key="key") as rpc:
            rpc.book.add(NAME, simulator.port)
            grpc_address = f"127.0.0.1:{rpc.server.port}"
            async with VLLMManager(
                base_url, access_key="key", grpc_address=grpc_address, transport=box.transport
            ) as manager:
                launch = await manager.launch("m")
                report = await manager.batch(launch.launch_id, source, tmp_path / "out", in_flight=16)
    assert (report.total, report.failed) == (100, 0)
    assert [one["custom_id"] for one in read(tmp_path)] == [f"id-{n}" for n in range(100)]
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 2 for one in read(tmp_path))


class Server:
    """What listens at a port of this host: it tells its models, and notes who has asked for more or shown a key."""

    def __init__(self, *names: str, status: int = 200) -> None:
        self.problems: list[str] = []
        self.answers = 0
        self._status = status
        self._body = json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if not head.startswith("get /v1/models http/1.1\r\n") or "authorization" in head or "x-api-key" in head:
            self.problems.append(head)
        self.answers += 1
        start = f"HTTP/1.1 {self._status} x\r\nConnection: close\r\nContent-Length: {len(self._body)}\r\n\r\n"
        writer.write(start.encode() + self._body)
        writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        listener = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        async with listener:
            yield listener.sockets[0].getsockname()[1]


HERE, THERE = Target("http://127.0.0.1:8001", "key"), Target("http://box:8001", "key")


async def way(instance: Instance, target: Target) -> type[Way]:
    """Which way a job takes whose server wants a key."""
    async with serving(access_key="key") as rpc:
        address = Address(f"127.0.0.1:{rpc.server.port}", tls=False, is_local=True)
        async with way_to(instance, target, address, api_key="secret") as found:
            assert found.place == (instance.url if isinstance(found, ByHttp) else f"{address.target} (a)")
            return type(found)


@pytest.mark.parametrize(
    ("server", "goes"),
    [
        (Server("m", "other"), ByHttp),
        (Server(status=401), ByHttp),
        (Server("other"), ByDaemon),
        (Server(status=404), ByDaemon),
        (Server(status=503), ByDaemon),
    ],
    ids=["its names", "its key", "another's names", "no such server", "not ready"],
)
async def test_server_of_this_host(server: Server, goes: type[Way]) -> None:
    """The process of the instance's pid listens there. Whether it is the same process, its names tell."""
    async with server.listening() as port:
        instance = Instance("a", url=f"http://127.0.0.1:{port}", pid=os.getpid(), served_model_names=["m"])
        assert await way(instance, HERE) is goes
        assert await way(instance, THERE) is ByDaemon
    assert (server.answers, server.problems) == (1, []), "without a key, and only where it may be the one"


@pytest.mark.parametrize("pid", [None, 2**30, 1, os.getppid()])
async def test_stranger_at_the_end_of_a_tunnel_is_asked_nothing(pid: int | None) -> None:
    """Whatever listens on this host at that port is not the process that the daemon knows."""
    server = Server("m")
    async with server.listening() as port:
        instance = Instance("a", url=f"http://127.0.0.1:{port}", pid=pid, served_model_names=["m"])
        assert await way(instance, HERE) is ByDaemon
    assert server.answers == 0


@pytest.mark.parametrize(
    ("server", "daemon", "goes"),
    [
        (Server("m"), "http://this.host:8001", ByHttp),
        (Server("m"), "http://other.host:8001", ByDaemon),
        (Server("m"), "http://127.0.0.1:8001", ByDaemon),
        (Server("other"), "http://this.host:8001", ByDaemon),
        (Server(status=401), "http://this.host:8001", ByDaemon),
    ],
)
async def test_server_of_another_host(
    monkeypatch: pytest.MonkeyPatch, server: Server, daemon: str, goes: type[Way]
) -> None:
    """It is taken for the instance where the daemon is, and shows its names."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: resolve("127.0.0.1" if "this" in str(host) else host, *rest, **more),
    )
    async with server.listening() as port:
        instance = Instance("a", url=f"http://this.host:{port}", pid=os.getpid(), served_model_names=["m"])
        assert await way(instance, Target(daemon, "key")) is goes
    assert server.problems == []


async def test_which_way_it_goes() -> None:
    for target, url in (
        (HERE, f"http://127.0.0.1:{free_port()}"),
        (HERE, "http+unix:///x/a.sock"),
        (THERE, "http+unix:///x/a.sock"),
        (THERE, "http://no-such-host.invalid:80"),
        (Target("http://no-such-host.invalid:8001", "key"), "http://no-such-host.invalid:80"),
    ):
        assert await way(Instance("a", url=url, pid=os.getpid()), target) is ByDaemon, (target, url)
    nowhere = Address("127.0.0.1:9", tls=False, is_local=True)
    for instance, said in (
        (Instance("a"), "wake it first"),
        (Instance("a", url="http://127.0.0.1:9"), "looked for at 127.0.0.1:9;"),
    ):
        with pytest.raises(ClientError, match=said):
            async with way_to(instance, HERE, nowhere):
                pass


async def test_without_grpcio_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc.aio", None)
    box, source = Box(), write(tmp_path, 2)
    box.url = "http://127.0.0.1:9"
    async with VLLMManager(URL, transport=box.transport) as manager:
        launch = await manager.launch("m")
        with pytest.raises(ClientError, match=r"needs grpcio .*; install bullpen-client\[grpc\]"):
            await manager.batch(launch.launch_id, source, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


# -- troubles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_passing_trouble_with_the_server(tmp_path: Path, status: int) -> None:
    times: dict[int, int] = {}

    async def script(asked: Asked) -> None:
        times[number(asked)] = times.get(number(asked), 0) + 1
        await asked.answer({"id": "x"}, status if times[number(asked)] < 3 else 200)

    write(tmp_path, 3)
    async with answering(script) as rpc:
        assert (await through(rpc, tmp_path)).failed == 0
    assert times == {0: 3, 1: 3, 2: 3}


async def test_what_the_server_refuses_is_a_result(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"error": {"message": "no"}}, [200, 400, 404, 500][number(asked)])

    write(tmp_path, 4)
    async with answering(script) as rpc:
        assert (await through(rpc, tmp_path)).failed == 3
    answers = [one["response"] for one in read(tmp_path)]
    assert [answer["status_code"] for answer in answers] == [200, 400, 404, 500]
    assert all(answer["body"] == {"error": {"message": "no"}} for answer in answers)


async def test_path_that_is_none_of_inference_is_a_result(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        pytest.fail("it was asked")

    write(tmp_path, 1, url="/sleep")
    async with answering(script) as rpc:
        assert (await through(rpc, tmp_path)).failed == 1
    answer = read(tmp_path)[0]["response"]
    assert answer["status_code"] == 400 and "/sleep is no path of inference" in answer["body"]["error"]["message"]


async def test_request_that_is_larger_than_the_daemon_takes_is_a_result(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"id": "x"})

    write(tmp_path, 1, body={"prompt": "x" * 5_000_000})
    async with answering(script, limit_message_size=True) as rpc:
        assert (await through(rpc, tmp_path)).failed == 1
    assert read(tmp_path)[0]["response"]["status_code"] == 413


async def test_server_that_is_away_for_a_while(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        if number(asked) == 3:
            rpc.book.add(NAME, 1)  # nobody listens there
            asyncio.get_running_loop().call_later(0.1, rpc.book.add, NAME, address, "generate", "bootstrapping")
            asyncio.get_running_loop().call_later(0.2, rpc.book.add, NAME, address)
        await asked.answer({"id": "x"})

    write(tmp_path, 10)
    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add(NAME, address)
        report = await through(rpc, tmp_path, in_flight=1)
    assert (report.total, report.failed) == (10, 0)
    assert [number(asked) for asked in engine.asked] == list(range(10)), "nothing is asked twice"


async def test_daemon_that_is_away_for_a_while(tmp_path: Path) -> None:
    second = asyncio.Event()

    async def script(asked: Asked) -> None:
        if number(asked) == 3:
            second.set()
        await asked.answer({"id": "x"})

    write(tmp_path, 200)
    async with scripted(script) as (engine, address):
        async with serving() as rpc:
            rpc.book.add(NAME, address)
            job = asyncio.create_task(through(rpc, tmp_path, in_flight=1))
            await asyncio.wait_for(second.wait(), 20)
            port = rpc.server.port
        async with serving(rpc.book, port=port):
            report = await asyncio.wait_for(job, 30)
    assert (report.total, report.failed) == (200, 0)
    assert len(engine.asked) <= 201, "what was in flight alone"


async def test_request_that_ends_each_server_is_given_up(tmp_path: Path) -> None:
    restored = 0

    async def restore() -> None:
        nonlocal restored
        restored += 1

    async def script(asked: Asked) -> None:
        await asyncio.sleep(0.01)
        if number(asked) == 3:
            asked.cut()
        else:
            await asked.answer({"id": "x"})

    write(tmp_path, 20)
    async with answering(script) as rpc:
        report = await through(rpc, tmp_path, in_flight=8, restore=restore)
    assert (report.total, report.failed, restored) == (20, 1, batch.ATTEMPTS - 1)
    error = read(tmp_path)[3]["error"]
    assert error["code"] == "connection_lost" and error["message"].startswith(f"Instance {NAME} does not answer: ")


async def test_answer_that_takes_too_long_is_a_result_and_ends_in_the_engine(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asyncio.sleep(60)

    write(tmp_path, 1)
    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add(NAME, address)
        assert (await through(rpc, tmp_path, timeout=0.1)).failed == 1
        for asked in engine.asked:
            await asyncio.wait_for(asked.gone.wait(), 20)
    assert read(tmp_path)[0]["error"]["code"] == "timed_out" and len(engine.asked) == batch.ATTEMPTS


async def test_cancelled_job_ends_in_the_engine_and_goes_on_later(tmp_path: Path) -> None:
    is_slow = True

    async def script(asked: Asked) -> None:
        if number(asked) >= 3 and is_slow:
            await asyncio.sleep(60)
        await asked.answer({"id": "x"})

    write(tmp_path, 10)
    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add(NAME, address)
        job = asyncio.create_task(through(rpc, tmp_path, in_flight=2))
        async with asyncio.timeout(20):
            while len(engine.asked) < 5:
                await asyncio.sleep(0.005)
        job.cancel()
        for asked in engine.asked[3:]:
            await asyncio.wait_for(asked.gone.wait(), 20)
        is_slow = False
        report = await through(rpc, tmp_path)
    assert (report.resumed, report.total, report.failed) == (3, 10, 0)


async def test_what_ends_a_job_at_once(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"id": "x"})

    write(tmp_path, 3)
    async with answering(script, access_key="key") as rpc:
        with pytest.raises(Unauthorized, match="BULLPEN_ACCESS_KEY"):
            await through(rpc, tmp_path, key="wrong")
        rpc.book.launches.clear()
        with pytest.raises(NotFound, match=f"Unknown instance_id: {NAME}"):
            await through(rpc, tmp_path, key="key")
    with pytest.raises(ConnectionFailed, match=r"grpc_address\)\. Run the job again later: it goes on where it is"):
        await through(rpc, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


async def test_daemon_that_is_too_old_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "INFERENCE", "/bullpen.v0.Inference")
    write(tmp_path, 1)
    async with serving() as rpc:
        with pytest.raises(UnexpectedAnswer, match="does not offer this"):
            await through(rpc, tmp_path)
        address = Address(f"127.0.0.1:{rpc.server.port}", tls=False, is_local=True)
        with pytest.raises(UnexpectedAnswer, match="does not offer this"):
            async with way_to(Instance("a", url="http+unix:///x/a.sock"), Target("http://box:1"), address):
                pass
