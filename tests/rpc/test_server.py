"""The server: who may call, health, reflection, TLS, its port."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bullpen.access import PROXY_HEADERS, REMOTE
from bullpen.errors import StateError
from bullpen.proto import bootstrap as pb
from bullpen.rpc.access import is_own_host
from bullpen.rpc.server import RpcServer
from bullpen.rpc.settings import RpcSettings
from tests.rpc.serving import BOOTSTRAP, Book, Rpc, completion, everything, raw, refused, serving
from tests.sim.simulator import Simulator

Code = grpc.StatusCode
KEY = "clé: secret"
NO = (Code.UNAUTHENTICATED, "Invalid or missing access key")


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


def request() -> pb.CompleteRequest:
    return pb.CompleteRequest(launch_id="gen", prompts=["x"])


@pytest.mark.parametrize("key", ["s3:cret", f" {KEY}\n"])
async def test_a_key_that_is_set_is_asked_for(simulator: Simulator, key: str) -> None:
    async with serving(access_key=key) as rpc:
        rpc.book.add("gen", simulator.port)
        plain = key.strip().encode()
        right = [basic(b"anyone:" + plain), basic(b":" + plain), basic(b"anyone: " + plain + b" ")]
        if key.isascii():
            right += [f"Bearer {key}", f"bearer  {key} ", f"BEARER {key}"]
        wrong = [
            "",
            "Bearer",
            "Bearer ",
            "Bearer other",
            key if key.isascii() else "x",
            "Token s3:cret",
            "Basic !",
            "Basic " + "=" * 3,
            basic(plain.replace(b":", b"")),
            basic(b"user:" + "clé".encode("latin-1")),
            basic(b"user:wrong"),
        ]
        for header in right:
            answer = await rpc.complete(request(), metadata=(("authorization", header),))
            assert answer.completions[0].text == completion("x")
        for header in wrong:
            assert await refused(rpc.complete(request(), metadata=(("authorization", header),))) == NO, header
            assert await refused(rpc.complete_stream(request(), metadata=(("authorization", header),))) == NO, header
        assert await refused(rpc.complete(request())) == NO


async def test_the_key_may_come_as_an_x_api_key(simulator: Simulator) -> None:
    async with serving(access_key="s3:cret") as rpc:
        rpc.book.add("gen", simulator.port)
        name = "x-api-key"
        wrong_too = (("authorization", "Bearer wrong"), (name, "s3:cret"))
        for metadata in (((name, "s3:cret"),), ((name, " s3:cret "),), wrong_too):
            assert len((await rpc.complete(request(), metadata=metadata)).completions) == 1
            assert len(await everything(rpc.complete_stream(request(), metadata=metadata))) == 1
        for given in ("", "s3", "s3:cret2", "Bearer s3:cret"):
            assert await refused(rpc.complete(request(), metadata=((name, given),))) == NO, given


async def test_unknown_methods_need_the_key_too(rpc: Rpc) -> None:
    async with serving(access_key="key") as guarded:
        for method in (BOOTSTRAP + "Other", "/other/Other"):
            assert await refused(raw(guarded.channel.unary_unary, method)(b"")) == NO
            assert await refused(raw(guarded.channel.stream_stream, method)(iter([b""]))) == NO


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_no_key(simulator: Simulator, key: str | None) -> None:
    async with serving(access_key=key) as rpc:
        rpc.book.add("gen", simulator.port)
        assert len((await rpc.complete(request())).completions) == 1
        assert len(await everything(rpc.complete_stream(request()))) == 1
        call = raw(rpc.channel.unary_unary, BOOTSTRAP + "Other")
        assert await refused(call(b"")) == (Code.UNIMPLEMENTED, "Method not found!")


async def test_without_a_key_other_hosts_are_refused(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bullpen.rpc.access.is_own_host", lambda peer: False)
    async with serving() as closed, serving(allow_unauthenticated=True) as open_to_all:
        for rpc in (closed, open_to_all):
            rpc.book.add("gen", simulator.port)
        assert await refused(closed.complete(request())) == (Code.PERMISSION_DENIED, REMOTE)
        assert await refused(closed.complete_stream(request())) == (Code.PERMISSION_DENIED, REMOTE)
        assert len((await open_to_all.complete(request())).completions) == 1


@pytest.mark.parametrize("name", sorted(PROXY_HEADERS))
async def test_without_a_key_what_a_proxy_passes_on_is_refused(simulator: Simulator, name: str) -> None:
    said = ((name, "127.0.0.1"),)
    refusal = (Code.PERMISSION_DENIED, REMOTE)
    async with (
        serving() as closed,
        serving(allow_unauthenticated=True) as open_to_all,
        serving(access_key="k") as keyed,
    ):
        for rpc in (closed, open_to_all, keyed):
            rpc.book.add("gen", simulator.port)
        assert await refused(closed.complete(request(), metadata=said)) == refusal
        assert await refused(closed.complete_stream(request(), metadata=said)) == refusal
        assert await refused(raw(closed.channel.unary_unary, BOOTSTRAP + "Other")(b"", metadata=said)) == refusal
        assert await check(closed, "", said) == health_pb2.HealthCheckResponse.SERVING
        assert len((await closed.complete(request())).completions) == 1
        assert len((await open_to_all.complete(request(), metadata=said)).completions) == 1
        with_key = (*said, ("authorization", "Bearer k"))
        assert len((await keyed.complete(request(), metadata=with_key)).completions) == 1


@pytest.mark.parametrize(
    ("peer", "own"),
    [
        ("ipv4:127.0.0.1:50", True),
        ("ipv4:127.9.9.9:50", True),
        ("ipv6:%5B::1%5D:50", True),
        ("ipv6:[::1]:50", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:50", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:50", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:50", False),
        ("ipv6:%5B::ffff:10.0.0.1%5D:50", False),
        ("", False),
        ("ipv4:", False),
        ("other:127.0.0.1:1", False),
    ],
)
def test_who_is_on_this_host(peer: str, own: bool) -> None:
    assert is_own_host(peer) is own


async def check(rpc: Rpc, service: str, metadata: tuple[tuple[str, str], ...] = ()) -> int:
    call = rpc.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    return int((await call(health_pb2.HealthCheckRequest(service=service), metadata=metadata)).status)


async def test_health_answers_anyone() -> None:
    serving_now = health_pb2.HealthCheckResponse.SERVING
    async with serving(access_key="key") as rpc:
        for service in ("", "bullpen.v1.Inference", "vllm_bootstrap.InferenceService"):
            assert await check(rpc, service) == serving_now
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(rpc, "other")
        assert caught.value.code() is Code.NOT_FOUND
        watch = raw(rpc.channel.unary_stream, "/grpc.health.v1.Health/Watch")
        assert await refused(watch(b"")) == NO


async def test_health_says_that_the_server_is_stopping() -> None:
    async with serving() as rpc:
        watch = rpc.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        states = aiter(watch(health_pb2.HealthCheckRequest()))
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.ensure_future(rpc.server.stop(grace=0.2))
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await stopping


async def reflect(rpc: Rpc, **question: Any) -> reflection_pb2.ServerReflectionResponse:
    call = rpc.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = await everything(call(iter([reflection_pb2.ServerReflectionRequest(**question)])))
    assert isinstance(answer, reflection_pb2.ServerReflectionResponse)
    return answer


async def test_reflection_knows_every_service() -> None:
    async with serving() as rpc:
        services = {found.name for found in (await reflect(rpc, list_services="")).list_services_response.service}
        assert services == {
            "bullpen.v1.Inference",
            "vllm_bootstrap.InferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for service in services:
            answer = await reflect(rpc, file_containing_symbol=service)
            (data,) = answer.file_descriptor_response.file_descriptor_proto
            file = FileDescriptorProto.FromString(data)
            assert service in {f"{file.package}.{found.name}" for found in file.service}


async def test_the_original_s_messages_are_described_as_its_own_client_has_them() -> None:
    async with serving() as rpc:
        answer = await reflect(rpc, file_by_filename="inference.proto")
        file = FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
    fields = {
        message.name: [(field.number, field.name, field.label, field.type, field.type_name) for field in message.field]
        for message in file.message_type
    }
    single, many, text, floats, number, message = 1, 3, 9, 2, 5, 11
    assert fields == {
        "EmbedRequest": [(1, "launch_id", single, text, ""), (2, "texts", many, text, "")],
        "EmbedResponse": [(1, "embeddings", many, message, ".vllm_bootstrap.Embedding")],
        "Embedding": [(1, "values", many, floats, "")],
        "CompleteRequest": [
            (1, "launch_id", single, text, ""),
            (2, "prompts", many, text, ""),
            (3, "max_tokens", single, number, ""),
            (4, "temperature", single, floats, ""),
            (5, "top_p", single, floats, ""),
            (6, "guided_decoding", single, message, ".vllm_bootstrap.GuidedDecodingParams"),
        ],
        "GuidedDecodingParams": [
            (1, "json_schema", single, text, ""),
            (2, "regex", single, text, ""),
            (3, "grammar", single, text, ""),
            (4, "choice", many, text, ""),
        ],
        "CompleteResponse": [(1, "completions", many, message, ".vllm_bootstrap.Completion")],
        "Completion": [
            (1, "text", single, text, ""),
            (2, "prompt_tokens", single, number, ""),
            (3, "completion_tokens", single, number, ""),
        ],
    }


async def test_the_original_s_names_are_left_free_for_its_client() -> None:
    async with serving():
        pool = descriptor_pool.Default()
        with pytest.raises(KeyError):
            pool.FindFileByName("inference.proto")
        with pytest.raises(KeyError):
            pool.FindMessageTypeByName("vllm_bootstrap.EmbedRequest")


async def test_a_port_that_is_taken() -> None:
    async with serving() as rpc:
        taken = RpcServer(Book(), RpcSettings(port=rpc.server.port))
        with pytest.raises(StateError, match=f"cannot listen for gRPC on 127.0.0.1:{rpc.server.port};"):
            await taken.start()
        await taken.stop(0)


async def test_starting_again_on_the_port_of_one_that_stopped(simulator: Simulator) -> None:
    async with serving() as first:
        port = first.server.port
    async with serving(port=port) as second:
        second.book.add("gen", simulator.port)
        assert len((await second.complete(request())).completions) == 1


async def test_tls(simulator: Simulator, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    book = Book()
    book.add("gen", simulator.port)
    server = RpcServer(book, RpcSettings(certificate=certificate, private_key=key))
    await server.start()
    try:
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        options = [("grpc.ssl_target_name_override", "localhost")]
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", trusted, options) as channel:
            rpc = Rpc(book, server, channel)
            assert (await rpc.complete(request())).completions[0].text == completion("x")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert (await refused(Rpc(book, server, channel).complete(request())))[0] is Code.UNAVAILABLE
    finally:
        await server.stop(0)


async def test_tls_that_cannot_be(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    missing = tmp_path / "missing.pem"
    for settings, sentence in (
        (RpcSettings(certificate=empty), "needs both"),
        (RpcSettings(private_key=empty), "needs both"),
        (RpcSettings(certificate=missing, private_key=empty), "cannot read .*missing.pem or"),
        (RpcSettings(certificate=empty, private_key=empty), "both must be PEM files"),
    ):
        with pytest.raises(StateError, match=sentence):
            await RpcServer(Book(), settings).start()
