"""Connections to the instances: kept, bounded for each, never shared by two answers."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bullpen.core.instance import Address
from bullpen.proto import bootstrap as pb
from bullpen.rpc import connections
from bullpen.rpc.embeddings import embedded
from bullpen.rpc.ports import Served
from bullpen.rpc.upstream import LostError, RefusedError, Upstream
from tests.rpc.engine import Asked, Engine, scripted
from tests.rpc.serving import completion, eventually, serving
from tests.sim.simulator import Simulator


def served(address: Address, **more: Any) -> Served:
    return Served("one", "ready", "generate", address, "model", **more)


TWO_ANSWERS = b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{"a":1}'


async def echo(asked: Asked) -> None:
    await asked.answer(asked.body)


async def test_connections_are_kept_between_requests() -> None:
    async with scripted(echo) as (engine, address):
        upstream = Upstream()
        for number in range(5):
            assert await upstream.ask(served(address), "/x", {"number": number}) == {"number": number}
        assert engine.connections == 1
        upstream.close()


async def test_a_connection_that_streamed_to_its_end_is_kept() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.event({"n": 1})
        await asked.end()

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        for _ in range(3):
            assert [event async for event in upstream.stream(served(address), "/x", {})] == [{"n": 1}]
        assert engine.connections == 1
        upstream.close()


async def test_a_kept_connection_that_the_server_closed_meanwhile() -> None:
    async def script(asked: Asked) -> None:
        # The second request on a connection finds it closed before any answer.
        if any(other.connection == asked.connection for other in engine.asked[:-1]):
            asked.cut()
        else:
            await asked.answer({"connection": asked.connection})

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        assert await upstream.ask(served(address), "/x", {}) == {"connection": 1}
        assert await upstream.ask(served(address), "/x", {}) == {"connection": 2}
        assert len(engine.asked) == 3
        upstream.close()


async def test_a_request_whose_answer_has_begun_is_not_sent_again() -> None:
    async def script(asked: Asked) -> None:
        if len(engine.asked) == 1:
            await asked.answer({})
        else:
            asked.writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
            await asked.writer.drain()
            asked.writer.close()

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        await upstream.ask(served(address), "/x", {})
        with pytest.raises(LostError):
            await upstream.ask(served(address), "/x", {})
        assert len(engine.asked) == 2
        upstream.close()


async def test_a_new_connection_that_is_closed_is_not_tried_for_ever() -> None:
    async def script(asked: Asked) -> None:
        asked.cut()

    async with scripted(script) as (engine, address):
        with pytest.raises(LostError):
            await Upstream().ask(served(address), "/x", {})
        assert len(engine.asked) == 1


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}{}", b"SMTP\r\n\r\n", TWO_ANSWERS, b"\x00" * 100]
)
async def test_what_is_no_answer(answer: bytes) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(answer)
        await asked.writer.drain()

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        for _ in range(2):
            try:
                assert await upstream.ask(served(address), "/x", {}) == {}
            except LostError:
                assert not answer.startswith(b"HTTP")
        # Bytes that nobody asked for are no answer to the next request: its connection is another.
        assert engine.connections == 2
        upstream.close()


async def test_an_interim_answer_is_none() -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asked.answer({"n": 1})

    async with scripted(script) as (_, address):
        upstream = Upstream()
        assert await upstream.ask(served(address), "/x", {}) == {"n": 1}
        upstream.close()


async def test_a_request_that_is_given_up_closes_its_connection() -> None:
    async def script(asked: Asked) -> None:
        if asked.body:
            await asked.gone.wait()
        await asked.answer({"for": "the next one"})

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await upstream.ask(served(address), "/x", {"slow": True})
        await eventually("the engine knows", engine.asked[0].gone.is_set)
        await upstream.ask(served(address), "/x", {})
        assert engine.asked[1].connection == 2
        upstream.close()


async def test_who_leaves_when_the_answer_is_there_leaves_nothing_of_it_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asyncio.sleep(0.02)
        await asked.event(asked.body)
        await asked.end()

    async def first() -> None:
        assert [event async for event in upstream.stream(served(address), "/x", {"n": 1})]

    def complete(connection: connections.Connection) -> None:
        arrive(connection)
        leaving.cancel()

    async with scripted(script) as (_, address):
        upstream = Upstream()
        leaving = asyncio.ensure_future(first())
        arrive = connections.Connection.on_message_complete
        monkeypatch.setattr(connections.Connection, "on_message_complete", complete)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert [event async for event in upstream.stream(served(address), "/x", {"n": 2})] == [{"n": 2}]
        upstream.close()


async def test_a_stream_that_is_left_in_the_middle_closes_its_connection() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        for number in range(2 if "short" in asked.body else 1000):
            await asked.event({"for": asked.body, "number": number})
            await asyncio.sleep(0.001)
        await asked.end()

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        events = upstream.stream(served(address), "/x", {"long": 1})
        assert await anext(events) == {"for": {"long": 1}, "number": 0}
        await events.aclose()
        found = [event async for event in upstream.stream(served(address), "/x", {"short": 1})]
        assert found == [{"for": {"short": 1}, "number": number} for number in range(2)]
        await eventually("the engine knows", engine.asked[0].gone.is_set)
        upstream.close()


async def test_an_error_in_one_request_ends_the_others_of_its_batch() -> None:
    async def script(asked: Asked) -> None:
        if "0" in asked.body["input"]:
            await eventually("the other is asked too", lambda: len(engine.asked) == 2)
            await asked.answer({"error": {"message": "no"}}, 400)
        await asked.gone.wait()

    async with scripted(script) as (engine, address):
        upstream = Upstream()
        with pytest.raises(RefusedError, match="no"):
            async for _ in embedded(upstream, served(address), [str(number) for number in range(40)], {}, most=32):
                raise AssertionError("nothing was answered")
        await eventually("the other is given up", engine.asked[1].gone.is_set)
        upstream.close()


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
    async with scripted(echo) as (engine, address):
        upstream = Upstream()
        for _ in range(2):
            await upstream.ask(served(address), "/x", {})
            await eventually("it is closed", lambda: engine.open == 0)
        assert engine.connections == 2
        upstream.close()


async def test_requests_to_one_are_bounded_and_make_nobody_else_wait() -> None:
    release = asyncio.Event()

    async def script(asked: Asked) -> None:
        await release.wait()
        await asked.answer(asked.body)

    async with scripted(script) as (slow, slow_address), scripted(echo) as (_, other_address):
        upstream = Upstream(most_connections=3)
        waiting = [
            asyncio.ensure_future(upstream.ask(served(slow_address), "/x", {"number": number})) for number in range(10)
        ]
        await eventually("three are asked", lambda: len(slow.asked) == 3)
        assert await upstream.ask(served(other_address), "/x", {"n": 1}) == {"n": 1}
        assert len(slow.asked) == slow.connections == 3
        waiting[1].cancel()
        waiting[5].cancel()
        await eventually("another has the place of one that left", lambda: len(slow.asked) == 4)
        release.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        answers = [answer for answer in done if not isinstance(answer, asyncio.CancelledError)]
        assert answers == [{"number": number} for number in (0, 2, 3, 4, 6, 7, 8, 9)]
        assert [asked.body["number"] for asked in slow.asked] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        upstream.close()


async def test_unix_sockets(tmp_path: Path) -> None:
    async with scripted(echo, tmp_path / "engine.sock") as (engine, address):
        upstream = Upstream()
        for _ in range(2):
            assert await upstream.ask(served(address), "/x", {"n": 1}) == {"n": 1}
        assert engine.connections == 1
        upstream.close()
    with pytest.raises(LostError):
        await upstream.ask(served(address), "/x", {})


async def test_a_simulator_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "sim.sock"
    with Simulator.serving(tmp_path, "--uds", str(path)):
        async with serving() as rpc:
            rpc.book.add("gen", Address("", None, str(path)))
            answer = await rpc.complete(pb.CompleteRequest(launch_id="gen", prompts=["x"]))
            assert answer.completions[0].text == completion("x")


async def test_an_instance_with_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=elsewhere"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    engine = Engine(echo)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0, ssl=context)
    async with server:
        upstream = Upstream()
        address = Address("0.0.0.0", server.sockets[0].getsockname()[1], tls=True)
        assert await upstream.ask(served(address), "/x", {"n": 1}) == {"n": 1}
        upstream.close()
        server.close()
        engine.close()


async def test_a_long_answer_is_read_no_faster_than_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "AHEAD_BYTES", 100_000)
    sent = 0

    async def script(asked: Asked) -> None:
        nonlocal sent
        await asked.begin()
        for number in range(400):
            await asked.event({"number": number, "text": "x" * 100_000})
            sent += 1
        await asked.end()

    async with scripted(script) as (_, address):
        upstream = Upstream()
        events = upstream.stream(served(address), "/x", {})
        assert (await anext(events))["number"] == 0
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 300, "the kernel's buffers hold a few megabytes, and so does ours"
        assert [event["number"] async for event in events] == list(range(1, 400))
        upstream.close()


async def test_an_address_that_is_none() -> None:
    with pytest.raises(LostError):
        await Upstream().ask(Served("one", "ready", "generate", None, "model"), "/x", {})
