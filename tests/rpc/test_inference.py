"""Bullpen's own service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from bullpen.proto import v1 as pb
from bullpen.rpc.sampling import chat_parameters, completion_parameters
from bullpen.sim import words
from tests.rpc.engine import Asked, Json, piece, scripted
from tests.rpc.serving import MODEL, Rpc, completion, everything, refused, serving

Code = grpc.StatusCode

SAMPLING = pb.Sampling(
    max_tokens=7,
    temperature=0.7,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    stop=["a", "b"],
    seed=-1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    repetition_penalty=1.1,
    logprobs=2,
    n=2,
    stop_token_ids=[1, 2],
    ignore_eos=True,
    min_tokens=3,
    logit_bias={5: -1.5},
    structured_outputs=pb.StructuredOutputs(choice=pb.StructuredOutputs.Choice(values=["x", "y"])),
)
PARAMETERS: Json = {
    "max_tokens": 7,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "stop": ["a", "b"],
    "seed": -1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logprobs": 2,
    "n": 2,
    "stop_token_ids": [1, 2],
    "ignore_eos": True,
    "min_tokens": 3,
    "logit_bias": {"5": -1.5},
    "structured_outputs": {"choice": ["x", "y"]},
}


def ask(*prompts: str, model: str = "", **sampling: Any) -> pb.CompleteRequest:
    return pb.CompleteRequest(instance_id="gen", prompts=prompts, model=model, sampling=pb.Sampling(**sampling))


def say(content: str, **sampling: Any) -> pb.ChatRequest:
    message = pb.ChatMessage(role="user", content=content)
    return pb.ChatRequest(instance_id="gen", messages=[message], sampling=pb.Sampling(**sampling))


def test_every_sampling_parameter_has_the_api_s_name() -> None:
    assert completion_parameters(SAMPLING) == PARAMETERS
    # A field that is added must be sent.
    assert set(pb.Sampling.DESCRIPTOR.fields_by_name) == set(PARAMETERS)
    others = {name: value for name, value in PARAMETERS.items() if name not in ("max_tokens", "logprobs")}
    chat = {**others, "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2}
    assert chat_parameters(SAMPLING) == chat
    assert completion_parameters(pb.Sampling()) == {}
    assert completion_parameters(pb.Sampling(temperature=0, seed=0)) == {"temperature": 0, "seed": 0}


@pytest.mark.parametrize("kind", ["json", "regex", "grammar"])
def test_structured_outputs(kind: str) -> None:
    sampling = pb.Sampling()
    setattr(sampling.structured_outputs, kind, "text")
    assert completion_parameters(sampling) == {"structured_outputs": {kind: "text"}}


async def test_completions(rpc: Rpc) -> None:
    (found,) = await everything(rpc.complete_v1(ask("one two", max_tokens=3)))
    usage = pb.Usage(prompt_tokens=2, completion_tokens=3)
    assert found == pb.Completion(text=completion("one two", 3), finish_reason="length", usage=usage)
    several = await everything(rpc.complete_v1(ask("a", "b", "c", max_tokens=3)))
    assert {item.index: item.text for item in several} == dict(enumerate(completion(text, 3) for text in "abc"))


async def test_completions_token_by_token(rpc: Rpc) -> None:
    deltas = await everything(rpc.stream_complete(ask("one two", max_tokens=5)))
    assert "".join(delta.text for delta in deltas) == completion("one two", 5)
    assert [delta.finish_reason for delta in deltas] == ["", "", "", "", "length"]
    assert [delta.HasField("usage") for delta in deltas] == [False] * 4 + [True]
    assert deltas[-1].usage == pb.Usage(prompt_tokens=2, completion_tokens=5)


async def test_results_come_as_they_finish() -> None:
    step = asyncio.Event()

    async def script(asked: Asked) -> None:
        assert asked.body["n"] == 2
        await asked.begin()
        for index in (3, 0):
            await asked.event(piece(index, f"text {index}", "stop", (1, index)))
        await step.wait()
        for index in (1, 2):
            await asked.event(piece(index, f"text {index}", "stop", (1, index)))
        await asked.end()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        items = aiter(rpc.complete_v1(ask("a", "b", n=2)))
        first = [await anext(items), await anext(items)]
        step.set()
        places = [(item.index, item.choice, item.text) for item in first + [item async for item in items]]
        assert places == [(1, 1, "text 3"), (0, 0, "text 0"), (0, 1, "text 1"), (1, 0, "text 2")]
        assert first[0].usage == pb.Usage(prompt_tokens=1, completion_tokens=3)


async def test_pieces_are_passed_on_at_once_whatever_the_chunks() -> None:
    step = asyncio.Event()

    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.chunk(b': ping\n\ndata: {"choices": [{"index": 0, "text": "\xc3')
        await asked.chunk(b'\xbc", "finish_reason": null}]}\r\n\r\nda')
        await step.wait()
        await asked.chunk(b'ta: {"choices": [{"index": 0, "text": "!", "finish_reason": "stop"}], "usage": null}\n\n')
        await asked.event({"choices": [], "usage": {"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2}})
        await asked.end()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        items = aiter(rpc.stream_complete(ask("x")))
        assert (await anext(items)).text == "ü"
        step.set()
        assert [item async for item in items] == [
            pb.CompletionDelta(text="!", finish_reason="stop", usage=pb.Usage(prompt_tokens=4, completion_tokens=2))
        ]


async def test_log_probabilities() -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"b": -0.5, "c": -1.0}],
        "text_offset": [0, 1],
    }
    content = [{"token": "hi", "logprob": -1.5, "bytes": [], "top_logprobs": [{"token": "ho", "logprob": -2.0}]}]

    async def script(asked: Asked) -> None:
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        if asked.path == "/v1/completions":
            choice: Json = {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs}
        else:
            message = {"role": "assistant", "content": "hi", "reasoning": "why"}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
        await asked.answer({"choices": [choice], "usage": usage})

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        (found,) = await everything(rpc.complete_v1(ask("x", logprobs=2)))
        top = [pb.TopLogprob(token="b", logprob=-0.5), pb.TopLogprob(token="c", logprob=-1.0)]
        assert found.logprobs == [pb.TokenLogprob(token="a"), pb.TokenLogprob(token="b", logprob=-0.5, top=top)]
        (choice,) = (await rpc.chat(say("x", logprobs=1))).choices
        assert choice.reasoning == "why"
        listed = [pb.TopLogprob(token="ho", logprob=-2.0)]
        assert choice.logprobs == [pb.TokenLogprob(token="hi", logprob=-1.5, top=listed)]


async def test_chat(rpc: Rpc) -> None:
    answer = await rpc.chat(say("hello there", max_tokens=4))
    message = pb.ChatMessage(role="assistant", content=completion("user: hello there", 4))
    assert answer == pb.ChatResponse(
        choices=[pb.ChatChoice(message=message, finish_reason="length")],
        usage=pb.Usage(prompt_tokens=3, completion_tokens=4),
    )


async def test_chat_token_by_token(rpc: Rpc) -> None:
    first, *deltas = await everything(rpc.stream_chat(say("hello there", max_tokens=4)))
    assert first == pb.ChatDelta(role="assistant")
    assert "".join(delta.content for delta in deltas) == completion("user: hello there", 4)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=4)


async def test_embeddings(rpc: Rpc) -> None:
    request = pb.EmbedRequest(instance_id="emb", texts=[f"text {number}" for number in range(70)])
    found = {item.index: item for item in await everything(rpc.embed_v1(request))}
    assert found == {
        index: pb.Embedding(index=index, values=words.vector(MODEL, text)) for index, text in enumerate(request.texts)
    }


async def test_the_name_of_an_adapter_and_other_wishes() -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"error": {"message": f"The model `{asked.body['model']}` does not exist."}}, 404)

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address)
        rpc.book.add("emb", address, "embed")
        missing = (Code.NOT_FOUND, "The model `adapter` does not exist.")
        assert await refused(rpc.complete_v1(ask("x", model="adapter"))) == missing
        assert await refused(rpc.stream_complete(ask("x", model="adapter"))) == missing
        request = pb.EmbedRequest(instance_id="emb", texts=["x"], model="adapter", dimensions=8)
        assert await refused(rpc.embed_v1(request)) == missing
        assert engine.asked[-1].body["dimensions"] == 8
        chat = say("x")
        chat.model = "adapter"
        assert await refused(rpc.chat(chat)) == missing
        assert await refused(rpc.stream_chat(chat)) == missing


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, Code.INVALID_ARGUMENT),
        (401, Code.INTERNAL),
        (404, Code.NOT_FOUND),
        (429, Code.RESOURCE_EXHAUSTED),
        (500, Code.INTERNAL),
        (503, Code.UNAVAILABLE),
    ],
)
async def test_what_the_engine_refuses(status: int, code: grpc.StatusCode) -> None:
    async def script(asked: Asked) -> None:
        await asked.answer({"error": {"message": "no", "code": status}}, status)

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        assert await refused(rpc.complete_v1(ask("x"))) == (code, "no")
        assert await refused(rpc.chat(say("x"))) == (code, "no")


async def test_refusals_before_anything_is_asked(rpc: Rpc, tmp_path: Path) -> None:
    rpc.book.add("young", 1, state="bootstrapping")
    for request, expected in (
        (pb.CompleteRequest(instance_id="?"), (Code.INVALID_ARGUMENT, "prompts must not be empty")),
        (pb.CompleteRequest(instance_id="?", prompts="x"), (Code.NOT_FOUND, "Unknown instance_id: ?")),
        (
            pb.CompleteRequest(instance_id="young", prompts="x"),
            (Code.FAILED_PRECONDITION, "Instance young is not ready (state=bootstrapping)"),
        ),
        (
            pb.CompleteRequest(instance_id="emb", prompts="x"),
            (Code.FAILED_PRECONDITION, "Instance emb has task 'embed', expected 'generate'"),
        ),
    ):
        assert await refused(rpc.complete_v1(request)) == expected
        assert await refused(rpc.stream_complete(request)) == expected
    assert await refused(rpc.chat(pb.ChatRequest(instance_id="gen"))) == (
        Code.INVALID_ARGUMENT,
        "messages must not be empty",
    )
    assert (await refused(rpc.embed_v1(pb.EmbedRequest())))[1] == "texts must not be empty"


async def test_a_server_that_is_gone(rpc: Rpc) -> None:
    rpc.book.add("gen", 1)
    code, details = await refused(rpc.chat(say("x")))
    assert (code, details.startswith("Instance gen does not answer: ")) == (Code.UNAVAILABLE, True)
