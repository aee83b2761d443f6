"""HTTP as it comes over the wire: what is kept alive, what is refused, what happens when a client leaves."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sim.simulator import DEADLINE_SECONDS, Simulator, wait_for


@pytest.fixture
def wire(shared: Simulator) -> Iterator[socket.socket]:
    with connect(shared) as connection:
        yield connection


def connect(simulator: Simulator) -> socket.socket:
    return socket.create_connection(("127.0.0.1", simulator.port), timeout=DEADLINE_SECONDS)


def until_end(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_one_connection_carries_several_requests_even_when_sent_at_once(wire: socket.socket) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    wire.sendall((head % len(body) + body) * 2 + last)
    data = until_end(wire)
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.count(b"connection: close") == 1


def test_http_1_0_gets_a_stream_that_ends_with_the_connection(wire: socket.socket) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True}).encode()
    wire.sendall(
        b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
    )
    head, _, content = until_end(wire).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert content.startswith(b"data: {")
    assert content.endswith(b"data: [DONE]\n\n")


def test_bodies_in_chunks_and_expectations(shared: Simulator, wire: socket.socket) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    answer = shared.http.post(
        "/v1/completions", content=iter([body[:5], body[5:]]), headers={"content-type": "application/json"}
    )
    assert (answer.request.headers["transfer-encoding"], answer.status_code) == ("chunked", 200)
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    wire.sendall(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert wire.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.sendall(body)
    assert until_end(wire).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01 tls\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nspace : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: 1\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: 1\r\n" * 300 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 300_000, 413),
        (b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n" + b"x" * 300_000, 413),
        (b"GET http://host/health?x=1#y HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
        (b"GET /h%65alth HTTP/1.1\r\nConnection: close\r\n\r\n", 200),
        (b"GET http://[/ HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    ],
)
def test_strange_requests(wire: socket.socket, request_: bytes, status: int) -> None:
    wire.sendall(request_)
    assert until_end(wire).startswith(b"HTTP/1.1 %d " % status)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60), st.sampled_from([b"", b"GET /health HTTP/1.1\r\n", b"POST /tokenize HTTP/1.1\r\nContent-"])
)
def test_any_bytes_leave_the_server_well(shared: Simulator, data: bytes, beginning: bytes) -> None:
    with connect(shared) as connection:
        connection.sendall(beginning + data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        until_end(connection)
    assert shared.http.get("/health").status_code == 200
    assert "Traceback" not in shared.log


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(shared: Simulator, stream: bool) -> None:
    aborted = shared.metric("vllm:request_success_total", finished_reason="abort")
    shared.http.post("/sleep")
    with pytest.raises(httpx.ReadTimeout):
        url = f"{shared.url}/v1/completions"
        httpx.post(url, json={"prompt": "x", "stream": stream}, timeout=0.1, trust_env=False)
    wait_for("it has ended", lambda: shared.metric("vllm:num_requests_waiting") == 0)
    assert shared.metric("vllm:request_success_total", finished_reason="abort") == aborted + 1
    shared.http.post("/wake_up")
