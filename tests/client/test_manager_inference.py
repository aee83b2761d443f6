"""Inference by the client, with a gRPC server that answers from memory."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from bullpen.client import messages
from bullpen.client.blocking import SyncVLLMManager
from bullpen.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.client.launch_errors import NotFound, NotReady, ServerFault
from bullpen.client.launches import ChatAnswer, Completion, Finished, Token, TokenLogprob, TopLogprob
from bullpen.client.manager import VLLMManager
from bullpen.proto import bootstrap, v1

PATIENCE = 10.0
KINDS: dict[str, tuple[Any, Any, bool]] = {
    f"{messages.LAUNCHES}/Embed": (bootstrap.EmbedRequest, bootstrap.EmbedResponse, False),
    f"{messages.LAUNCHES}/EmbedStream": (bootstrap.EmbedRequest, bootstrap.Embedding, True),
    f"{messages.LAUNCHES}/Complete": (bootstrap.CompleteRequest, bootstrap.CompleteResponse, False),
    f"{messages.LAUNCHES}/CompleteStream": (bootstrap.CompleteRequest, bootstrap.Completion, True),
    f"{messages.INFERENCE}/Complete": (v1.CompleteRequest, v1.Completion, True),
    f"{messages.INFERENCE}/StreamComplete": (v1.CompleteRequest, v1.CompletionDelta, True),
    f"{messages.INFERENCE}/Chat": (v1.ChatRequest, v1.ChatResponse, False),
    f"{messages.INFERENCE}/StreamChat": (v1.ChatRequest, v1.ChatDelta, True),
}


class Face:
    """Answers each call with `answers`, or with what `trouble` says; keeps what it was sent."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.trouble: list[Any] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = asyncio.Event()
        self.holds = False
        self.port = 0
        self._server: Any = None

    def service(self, details: Any) -> Any:
        if details.method not in KINDS:
            return None
        request, answer, streamed = KINDS[details.method]
        make = grpc.unary_stream_rpc_method_handler if streamed else grpc.unary_unary_rpc_method_handler
        handle = self._stream if streamed else self._answer
        return make(handle, request_deserializer=request.FromString, response_serializer=answer.SerializeToString)

    async def _begin(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.trouble:
            code, text = self.trouble.pop(0)
            await context.abort(code, text)

    async def _answer(self, request: Any, context: Any) -> Any:
        await self._begin(request, context)
        await self._hold()
        return self.answers[0]

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._begin(request, context)
        for answer in self.answers:
            yield answer
        await self._hold()

    async def _hold(self) -> None:
        try:
            while self.holds:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def start(self, port: int = 0, credentials: Any = None) -> None:
        self._server = aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        place = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(place)
        else:
            self.port = self._server.add_secure_port(place, credentials)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)


@pytest.fixture
async def face() -> AsyncIterator[Face]:
    face = Face()
    await face.start()
    yield face
    await face.stop()


@pytest.fixture
async def manager(face: Face) -> AsyncIterator[VLLMManager]:
    async with VLLMManager(f"http://127.0.0.1:{face.port - 1}", access_key="key", retry_seconds=PATIENCE) as manager:
        yield manager


def completions(*texts: str) -> list[Any]:
    return [bootstrap.Completion(text=text, prompt_tokens=3, completion_tokens=2) for text in texts]


async def test_one_prompt_gives_one_completion(manager: VLLMManager, face: Face) -> None:
    face.answers = [bootstrap.CompleteResponse(completions=completions("a"))]
    result = await manager.complete("one", prompt="Once upon a time", max_tokens=128, temperature=0.7)
    assert result == Completion("a", 3, 2) and result.text == "a"
    sent = face.requests[0]
    assert (sent.launch_id, list(sent.prompts), sent.max_tokens) == ("one", ["Once upon a time"], 128)
    assert sent.temperature == pytest.approx(0.7)
    assert not sent.HasField("top_p") and not sent.HasField("guided_decoding")
    assert face.metadata[0]["authorization"] == "Bearer key"


async def test_several_prompts_give_a_list(manager: VLLMManager, face: Face) -> None:
    face.answers = [bootstrap.CompleteResponse(completions=completions("a", "b"))]
    assert [one.text for one in await manager.complete("one", ["x", "y"], 8)] == ["a", "b"]
    await manager.complete("one", prompts=["x", "y"], max_tokens=8, temperature=0.0, choice=["p", "q"], regex=None)
    sent = face.requests[-1]
    assert sent.HasField("temperature") and list(sent.guided_decoding.choice) == ["p", "q"]
    await manager.complete("one", ["x", "y"], choice=[])
    assert not face.requests[-1].HasField("guided_decoding") and face.requests[-1].max_tokens == 0


async def test_what_can_never_work_is_not_sent(manager: VLLMManager, face: Face) -> None:
    ask: Any = manager
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: ask.complete("one"), "either prompt, one text, or prompts"),
        (lambda: ask.complete("one", ["x"], prompt="x"), "either prompt, one text, or prompts"),
        (lambda: ask.complete("one", "text"), "prompts is a list of texts"),
        (lambda: ask.complete("one", 5), "prompts is a list of texts"),
        (lambda: ask.complete("one", ["x", 5]), r"prompts\[1\] is a text, and not 5"),
        (lambda: ask.complete("one", prompt="a\ud800"), r"prompts\[0\] holds half a character"),
        (lambda: ask.complete("one", ["x"], regex="a", json_schema="{}"), "only one of json_schema, regex"),
        (lambda: ask.complete("one", ["x"], temprature=1.0), "no option 'temprature' here; there are .*temperature"),
        (lambda: ask.complete("one", ["x"], n=2), "no option 'n' here"),
        (lambda: ask.complete("one", ["x"], temperature="hot"), "temperature is a number, and not 'hot'"),
        (lambda: ask.complete("one", ["x"], 2**40), "max_tokens is a whole number from -2147483648"),
        (lambda: ask.complete("one", ["x"], seed=2**80), "seed is a whole number of at most 64 bits"),
        (lambda: ask.complete("one", ["x"], stop=[5]), "stop is a list, each a text"),
        (lambda: ask.complete("one", ["x"], seed=1, json_schema=5), "json_schema is a text"),
        (lambda: ask.complete(5, ["x"]), "launch_id is a text"),
        (lambda: anext(ask.complete_stream("one", ["x"], seed=1)), "no option 'seed' here"),
        (lambda: anext(ask.complete_each("one", ["x"], ignore_eos="no")), "ignore_eos is True or False"),
        (lambda: ask.embed("one", "text"), "texts is a list of texts"),
        (lambda: ask.chat("one", [{"role": "user", "body": "x"}]), r"conversation\[0\] is a dict with role, content"),
        (lambda: ask.chat("one", ["hi"]), r"conversation\[0\] is a dict"),
        (lambda: ask.chat("one", [{"role": "user", "content": [{"type": "text"}]}]), "is one text; what has several"),
        (lambda: anext(ask.stream("one")), "either prompt, one text, or conversation"),
    ]
    for call, words in wrong:
        with pytest.raises(InvalidRequest, match=words):
            await call()
    assert not face.requests


async def test_streams_of_whole_items(manager: VLLMManager, face: Face) -> None:
    face.answers = completions("a", "b")
    assert [one.text async for one in manager.complete_stream("one", ["x", "y"], 8)] == ["a", "b"]
    face.answers = [bootstrap.Embedding(values=[0.5, 1.0]), bootstrap.Embedding(values=[0.25])]
    assert [one async for one in manager.embed_stream("one", ["x", "y"])] == [[0.5, 1.0], [0.25]]
    face.answers = [bootstrap.EmbedResponse(embeddings=face.answers)]
    assert await manager.embed("one", ["x", "y"]) == [[0.5, 1.0], [0.25]]


async def test_completions_as_they_finish(manager: VLLMManager, face: Face) -> None:
    usage = v1.Usage(prompt_tokens=3, completion_tokens=2)
    face.answers = [v1.Completion(index=1, text="b", usage=usage), v1.Completion(index=0, text="a", usage=usage)]
    found = [one async for one in manager.complete_each("one", ["x", "y"], model="lora", seed=7, json_schema="{}")]
    assert found == [Finished(1, Completion("b", 3, 2)), Finished(0, Completion("a", 3, 2))]
    sent = face.requests[0]
    assert (sent.instance_id, sent.model, sent.sampling.seed) == ("one", "lora", 7)
    assert sent.sampling.structured_outputs.json == "{}"
    assert not sent.sampling.HasField("temperature")


async def test_options_of_the_other_service_keep_the_order(manager: VLLMManager, face: Face) -> None:
    usage = v1.Usage(prompt_tokens=3, completion_tokens=2)
    top = [v1.TopLogprob(token="c", logprob=-0.5)]
    logprobs = [v1.TokenLogprob(token="b", logprob=-1.5, top=top), v1.TokenLogprob(token="d")]
    face.answers = [
        v1.Completion(index=1, text="b", finish_reason="stop", usage=usage, logprobs=logprobs),
        v1.Completion(index=0, text="a", finish_reason="length", usage=usage),
    ]
    found = await manager.complete(
        "one", ["x", "y"], 8, seed=7, stop=["."], top_k=5, logprobs=1, temperature=0.0, regex=None
    )
    likely = (TokenLogprob("b", -1.5, (TopLogprob("c", -0.5),)), TokenLogprob("d", None))
    assert found == [Completion("a", 3, 2, "length"), Completion("b", 3, 2, "stop", likely)]
    sampling = face.requests[0].sampling
    assert (sampling.max_tokens, sampling.seed, sampling.top_k, sampling.logprobs) == (8, 7, 5, 1)
    assert list(sampling.stop) == ["."] and sampling.HasField("temperature")
    face.answers = face.answers[1:]
    assert (await manager.complete("one", prompt="x", model="lora")).text == "a"
    assert face.requests[1].model == "lora" and not face.requests[1].sampling.HasField("max_tokens")


async def test_several_completions_of_a_prompt(manager: VLLMManager, face: Face) -> None:
    face.answers = [v1.Completion(index=0, choice=1, text="b"), v1.Completion(index=0, choice=0, text="a")]
    found = [(one.choice, one.completion.text) async for one in manager.complete_each("one", ["x"], n=2)]
    assert found == [(1, "b"), (0, "a")] and face.requests[0].sampling.n == 2


async def test_chat(manager: VLLMManager, face: Face) -> None:
    message = v1.ChatMessage(role="assistant", content="hello")
    choice = v1.ChatChoice(message=message, reasoning="hm", finish_reason="stop")
    face.answers = [v1.ChatResponse(choices=[choice], usage=v1.Usage(prompt_tokens=3, completion_tokens=2))]
    answer = await manager.chat(
        "one", [{"role": "user", "content": "hi"}], stop=["x"], choice=["a"], logit_bias={1: 2.0}
    )
    assert answer == ChatAnswer("hello", "hm", "stop", 3, 2)
    sent = face.requests[0]
    assert (sent.messages[0].role, sent.messages[0].content, list(sent.sampling.stop)) == ("user", "hi", ["x"])
    assert list(sent.sampling.structured_outputs.choice.values) == ["a"]
    assert dict(sent.sampling.logit_bias) == {1: 2.0}


async def test_tokens(manager: VLLMManager, face: Face) -> None:
    usage = v1.Usage(prompt_tokens=3, completion_tokens=2)
    face.answers = [v1.CompletionDelta(text="a"), v1.CompletionDelta(text="b", finish_reason="length", usage=usage)]
    found = [one async for one in manager.stream("one", prompt="x", max_tokens=2)]
    assert found == [Token("a"), Token("b", "", "length", 3, 2)]
    face.answers = [v1.ChatDelta(role="assistant", reasoning="hm"), v1.ChatDelta(content="a", finish_reason="stop")]
    found = [one async for one in manager.stream("one", conversation=[{"role": "user", "content": "x"}])]
    assert found == [Token("", "hm"), Token("a", "", "stop")]


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("INVALID_ARGUMENT", InvalidRequest, 400),
        ("NOT_FOUND", NotFound, 404),
        ("FAILED_PRECONDITION", NotReady, 409),
        ("RESOURCE_EXHAUSTED", Refused, 429),
        ("INTERNAL", ServerFault, 500),
        ("UNAUTHENTICATED", Unauthorized, 401),
    ],
)
async def test_refusals_have_the_sentence_of_the_server(
    manager: VLLMManager, face: Face, code: str, kind: type[Refused], status: int
) -> None:
    face.trouble = [(grpc.StatusCode[code], "because")] * 2
    with pytest.raises(kind, match="because") as caught:
        await manager.embed("one", ["x"])
    assert (type(caught.value), caught.value.status) == (kind, status)
    with pytest.raises(kind, match="because"):
        await anext(manager.stream("one", prompt="x"))


async def test_service_that_is_not_there(manager: VLLMManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KINDS, f"{messages.INFERENCE}/Chat")
    with pytest.raises(UnexpectedAnswer, match="does not offer"):
        await manager.chat("one", [])


async def test_deadline(manager: VLLMManager, face: Face) -> None:
    face.holds, face.answers = True, [bootstrap.EmbedResponse()]
    with pytest.raises(TimedOut):
        await manager.embed("one", ["x"], timeout=0.1)
    await asyncio.wait_for(face.cancelled.wait(), PATIENCE)


async def test_leaving_a_stream_or_a_call_ends_it_on_the_server(manager: VLLMManager, face: Face) -> None:
    face.holds, face.answers = True, [v1.CompletionDelta(text="a")]
    async with aclosing(manager.stream("one", prompt="x")) as tokens:
        assert (await anext(tokens)).text == "a"
    await asyncio.wait_for(face.cancelled.wait(), PATIENCE)
    face.cancelled.clear()
    face.answers = [bootstrap.EmbedResponse()]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(manager.embed("one", ["x"]), 0.1)
    await asyncio.wait_for(face.cancelled.wait(), PATIENCE)


async def test_address_where_nobody_is_fails_at_once(unused_tcp_port: int) -> None:
    async with VLLMManager("http://127.0.0.1:1", grpc_address=f"127.0.0.1:{unused_tcp_port}") as manager:
        with pytest.raises(ConnectionFailed, match="give grpc_address"):
            await asyncio.wait_for(manager.embed("one", ["x"]), PATIENCE)


async def test_server_that_comes_back_is_found_again(manager: VLLMManager, face: Face) -> None:
    face.answers = [bootstrap.EmbedResponse()]
    await manager.embed("one", ["x"])
    await face.stop()
    asking = asyncio.create_task(manager.embed("one", ["y"]))
    await asyncio.sleep(0.2)
    await face.start(face.port)
    await asyncio.wait_for(asking, PATIENCE)
    assert list(face.requests[-1].texts) == ["y"]


async def test_stream_that_has_begun_is_not_begun_again(manager: VLLMManager, face: Face) -> None:
    face.holds, face.answers = True, [v1.CompletionDelta(text="a")]
    async with aclosing(manager.stream("one", prompt="x")) as tokens:
        await anext(tokens)
        await face.stop()
        await face.start(face.port)
        with pytest.raises(ConnectionFailed):
            await asyncio.wait_for(anext(tokens), PATIENCE)
    assert len(face.requests) == 1


async def test_server_that_is_busy_is_not_looked_for_elsewhere(face: Face) -> None:
    """The address was right: the words are the server's alone."""
    async with VLLMManager(f"http://127.0.0.1:{face.port - 1}", retry_seconds=0.0) as manager:
        for call in (lambda: manager.embed("one", ["x"]), lambda: anext(manager.stream("one", prompt="x"))):
            face.trouble = [(grpc.StatusCode.UNAVAILABLE, "busy")]
            with pytest.raises(ConnectionFailed, match=r"^busy$"):
                await call()


async def test_server_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    face = Face()
    await face.start(credentials=grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]))
    try:
        face.answers = [bootstrap.EmbedResponse(embeddings=[bootstrap.Embedding(values=[0.5])])]
        place = f"localhost:{face.port}"
        for address in (place, f"https://{place}"):
            async with VLLMManager("http://h", grpc_address=address, grpc_ca=certificate) as manager:
                assert await asyncio.wait_for(manager.embed("one", ["x"]), PATIENCE) == [[0.5]]
        async with VLLMManager("http://h", grpc_address=f"https://{place}") as manager:
            with pytest.raises(ConnectionFailed, match="with TLS"):
                await asyncio.wait_for(manager.embed("one", ["x"]), PATIENCE)
    finally:
        await face.stop()
    for file, words in ((key, "holds no certificate"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ClientError, match=words):
            VLLMManager("http://h", grpc_ca=file)


async def test_large_messages(manager: VLLMManager, face: Face) -> None:
    face.answers = [bootstrap.EmbedResponse(embeddings=[bootstrap.Embedding(values=[1.0] * 1_200_000)])]
    assert len((await manager.embed("one", ["x"]))[0]) == 1_200_000
    limited = VLLMManager(f"http://127.0.0.1:{face.port - 1}", limit_response=True)
    async with limited:
        with pytest.raises(Refused, match="larger"):
            await limited.embed("one", ["x"])


async def test_key_that_no_header_can_hold(face: Face) -> None:
    async with VLLMManager(f"http://127.0.0.1:{face.port - 1}", access_key="schlüssel") as manager:
        face.answers = [bootstrap.EmbedResponse()]
        with pytest.raises(ClientError, match="printable ASCII"):
            await manager.embed("one", ["x"])


async def test_synchronous_twin(face: Face) -> None:
    def work() -> list[Token]:
        with SyncVLLMManager(f"http://127.0.0.1:{face.port - 1}") as manager:
            assert manager.complete("one", prompt="x", max_tokens=1) == Completion("a", 3, 2)
            face.answers = [v1.CompletionDelta(text=str(number)) for number in range(100)]
            return list(manager.stream("one", prompt="x"))

    face.answers = [bootstrap.CompleteResponse(completions=completions("a"))]
    assert "".join(token.text for token in await asyncio.to_thread(work)) == "".join(map(str, range(100)))
