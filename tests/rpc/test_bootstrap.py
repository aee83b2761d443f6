"""The service of vllm-bootstrap: what its callers get, in what order, and every way of being refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from bullpen.proto import bootstrap as pb
from bullpen.rpc import bootstrap
from bullpen.sim import words
from tests.rpc.engine import Asked, piece, scripted
from tests.rpc.serving import BOOTSTRAP, MODEL, Rpc, completion, eventually, everything, raw, refused, serving
from tests.sim.simulator import Simulator

Code = grpc.StatusCode


def ask(*prompts: str, launch_id: str = "gen", **more: Any) -> pb.CompleteRequest:
    return pb.CompleteRequest(launch_id=launch_id, prompts=prompts, **more)


def texts(*texts: str, launch_id: str = "emb") -> pb.EmbedRequest:
    return pb.EmbedRequest(launch_id=launch_id, texts=texts)


async def test_a_completion(rpc: Rpc) -> None:
    answer = await rpc.complete(ask("one two three", max_tokens=5))
    assert answer.completions == [
        pb.Completion(text=completion("one two three", 5), prompt_tokens=3, completion_tokens=5)
    ]


@pytest.mark.parametrize("max_tokens", [0, -7])
async def test_sixteen_tokens_where_no_number_is_given(rpc: Rpc, max_tokens: int) -> None:
    (found,) = (await rpc.complete(ask("x", max_tokens=max_tokens))).completions
    assert (found.text, found.completion_tokens) == (completion("x", 16), 16)


async def test_results_are_in_the_order_of_the_inputs_and_one_for_each(rpc: Rpc) -> None:
    prompts = [f"prompt {number % 7}" for number in range(40)]
    expected = [completion(prompt, 4) for prompt in prompts]
    answer = await rpc.complete(ask(*prompts, max_tokens=4))
    assert [found.text for found in answer.completions] == expected
    streamed = await everything(rpc.complete_stream(ask(*prompts, max_tokens=4)))
    assert [found.text for found in streamed] == expected


async def test_embeddings(rpc: Rpc) -> None:
    inputs = [f"text {number}" for number in range(100)]
    expected = [pb.Embedding(values=words.vector(MODEL, text)) for text in inputs]
    assert (await rpc.embed(texts(*inputs))).embeddings == expected
    assert await everything(rpc.embed_stream(texts(*inputs))) == expected


async def test_more_prompts_than_one_request_may_hold(rpc: Rpc) -> None:
    prompts = [str(number) for number in range(2100)]
    answer = await rpc.complete(ask(*prompts, max_tokens=1))
    assert [found.text for found in answer.completions] == [completion(prompt, 1) for prompt in prompts]


async def test_each_completion_has_its_own_counts() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        assert asked.body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert asked.body["stream_interval"] > 1_000_000
        for index, text in ((1, "b"), (0, "a"), (1, "B"), (0, "A")):
            counts = (10 + index, 2 if text.isupper() else 1)
            await asked.event(piece(index, text, "stop" if text.isupper() else None, counts))
        await asked.event({"choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": 4}})
        await asked.end()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        expected = [
            pb.Completion(text=text, prompt_tokens=prompt, completion_tokens=2)
            for text, prompt in (("aA", 10), ("bB", 11))
        ]
        assert (await rpc.complete(ask("x", "y"))).completions == expected
        assert await everything(rpc.complete_stream(ask("x", "y"))) == expected


async def test_a_stream_gives_an_item_once_it_and_those_before_it_are_done() -> None:
    steps = [asyncio.Event() for _ in range(3)]

    async def script(asked: Asked) -> None:
        await asked.begin()
        for step, index in zip(steps, (2, 0, 1), strict=True):
            await step.wait()
            await asked.event(piece(index, f"text {index}", "stop", (1, 1)))
        await asked.end()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        items = aiter(rpc.complete_stream(ask("a", "b", "c")))
        steps[0].set()
        first = asyncio.ensure_future(anext(items))
        assert not (await asyncio.wait({first}, timeout=0.1))[0], "the third came before the first"
        steps[1].set()
        assert (await first).text == "text 0"
        steps[2].set()
        assert [item.text async for item in items] == ["text 1", "text 2"]


async def test_embeddings_that_are_ready_do_not_wait_for_the_rest() -> None:
    rest = asyncio.Event()

    async def script(asked: Asked) -> None:
        if "39" in asked.body["input"]:
            await rest.wait()
        vectors = [{"index": index, "embedding": "AAAAAAAAgD8="} for index in range(len(asked.body["input"]))]
        await asked.answer({"data": vectors})

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("emb", address, "embed")
        items = aiter(rpc.embed_stream(texts(*map(str, range(40)))))
        assert list((await anext(items)).values) == [0.0, 1.0]
        rest.set()
        assert len([item async for item in items]) == 39


async def test_what_is_sent_to_the_engine() -> None:
    async def script(asked: Asked) -> None:
        choice = {"index": 0, "text": "x", "finish_reason": "stop"}
        await asked.answer({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    async with scripted(script) as (engine, address), serving() as rpc:
        rpc.book.add("gen", address, api_key="secret")
        await rpc.complete(ask("ü", max_tokens=3, temperature=0.5))
        (asked,) = engine.asked
        assert (asked.path, asked.headers["authorization"]) == ("/v1/completions", "bearer secret")
        assert asked.body == {
            "model": MODEL,
            "prompt": ["ü"],
            "max_tokens": 3,
            **bootstrap.NEUTRAL,
            "temperature": 0.5,
        }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {}),
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"top_p": 0.25, "temperature": 2.0}, {"top_p": 0.25, "temperature": 2.0}),
        ({"guided_decoding": pb.GuidedDecodingParams()}, {}),
        ({"guided_decoding": pb.GuidedDecodingParams(regex="[ab]+")}, {"structured_outputs": {"regex": "[ab]+"}}),
        (
            {"guided_decoding": pb.GuidedDecodingParams(grammar="root ::= x")},
            {"structured_outputs": {"grammar": "root ::= x"}},
        ),
        ({"guided_decoding": pb.GuidedDecodingParams(json_schema="{}")}, {"structured_outputs": {"json": "{}"}}),
        (
            {"guided_decoding": pb.GuidedDecodingParams(regex="c", choice=["a", "b"])},
            {"structured_outputs": {"choice": ["a", "b"]}},
        ),
    ],
)
def test_sampling_parameters(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert bootstrap.parameters(ask("x", **given)) == {**bootstrap.NEUTRAL, "max_tokens": 16, **wanted}


async def test_refusals_before_anything_is_asked(rpc: Rpc) -> None:
    rpc.book.add("young", 1, state="bootstrapping")
    rpc.book.add("old", 1, "embed", state="failed")
    for complete, embed in ((rpc.complete, rpc.embed), (rpc.complete_stream, rpc.embed_stream)):
        assert await refused(complete(ask(launch_id="?"))) == (Code.INVALID_ARGUMENT, "prompts must not be empty")
        assert await refused(embed(texts(launch_id="?"))) == (Code.INVALID_ARGUMENT, "texts must not be empty")
        assert await refused(complete(ask("x", launch_id="?"))) == (Code.NOT_FOUND, "Unknown launch_id: ?")
        assert await refused(embed(texts("x", launch_id="?"))) == (Code.NOT_FOUND, "Unknown launch_id: ?")
        assert await refused(complete(ask("x", launch_id="young"))) == (
            Code.FAILED_PRECONDITION,
            "Launch young is not ready (state=bootstrapping)",
        )
        # The state is looked at before the task.
        assert await refused(complete(ask("x", launch_id="old"))) == (
            Code.FAILED_PRECONDITION,
            "Launch old is not ready (state=failed)",
        )
        assert await refused(complete(ask("x", launch_id="emb"))) == (
            Code.FAILED_PRECONDITION,
            "Launch emb has task 'embed', expected 'generate'",
        )
        assert await refused(embed(texts("x", launch_id="gen"))) == (
            Code.FAILED_PRECONDITION,
            "Launch gen has task 'generate', expected 'embed'",
        )


async def test_another_method(rpc: Rpc) -> None:
    call = raw(rpc.channel.unary_unary, BOOTSTRAP + "Other")
    assert await refused(call(b"")) == (Code.UNIMPLEMENTED, "Method not found!")


async def test_what_the_engine_refuses(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, "--max-model-len", "8") as simulator:
        async with serving() as rpc:
            rpc.book.add("gen", simulator.port)
            for complete, work in ((rpc.complete, "Generation"), (rpc.complete_stream, "Generation stream")):
                for prompts in (["x"], ["x", "y"]):
                    code, details = await refused(complete(ask(*prompts, max_tokens=100)))
                    assert code is Code.INTERNAL
                    assert details.startswith(f"{work} failed: Subprocess error: This model's maximum context length")


async def test_what_fails_in_the_engine(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, fail="request") as simulator:
        async with serving() as rpc:
            rpc.book.add("gen", simulator.port)
            rpc.book.add("emb", simulator.port, "embed")
            for call, work in (
                (rpc.complete(ask("x")), "Generation"),
                (rpc.complete_stream(ask("x")), "Generation stream"),
                (rpc.embed(texts("x")), "Embedding"),
                (rpc.embed_stream(texts("x")), "Embedding stream"),
            ):
                code, details = await refused(call)
                assert code is Code.INTERNAL
                assert details.startswith(f"{work} failed: Subprocess error: the simulated engine fails this request")


async def test_a_server_that_died(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, tokens_per_second=100) as simulator:
        async with serving() as rpc:
            rpc.book.add("gen", simulator.port)
            crashed = (Code.FAILED_PRECONDITION, "Launch gen subprocess crashed")
            calls = [rpc.complete(ask("x", max_tokens=4000)), rpc.complete_stream(ask("x", "y", max_tokens=4000))]
            ends = [asyncio.ensure_future(refused(call)) for call in calls]
            await eventually("both are computed", lambda: simulator.http.get("/bullpen/gate").json()["in_flight"] == 2)
            simulator.process.kill()
            assert await asyncio.gather(*ends) == [crashed, crashed]
            assert await refused(rpc.complete(ask("x"))) == crashed


async def test_a_launch_that_is_stopped_meanwhile(tmp_path: Path) -> None:
    with Simulator.serving(tmp_path, tokens_per_second=100) as simulator:
        async with serving() as rpc:
            rpc.book.add("gen", simulator.port)
            call = rpc.complete(ask("x", max_tokens=4000))
            end = asyncio.ensure_future(refused(call))
            await eventually("it is computed", lambda: simulator.http.get("/bullpen/gate").json()["in_flight"] == 1)
            rpc.book.add("gen", simulator.port, state="stopping")
            simulator.process.terminate()
            assert await end == (Code.FAILED_PRECONDITION, "Launch gen is not ready (state=stopping)")


async def test_a_gate_that_refuses(simulator: Simulator, rpc: Rpc) -> None:
    simulator.http.post("/bullpen/gate?mode=refuse")
    try:
        code, details = await refused(rpc.complete(ask("x")))
    finally:
        simulator.http.post("/bullpen/gate?mode=open")
    assert code is Code.UNAVAILABLE
    assert "This model sleeps, or is about to" in details


@pytest.mark.parametrize("size", [100, 100_000])
async def test_details_are_one_short_line_whatever_the_engine_says(size: int) -> None:
    sentence = "Ein Schema ist keins: " + "ü" * size
    traceback = f"Traceback (most recent call last):\n  File 'x'\nValueError: {sentence}"

    async def script(asked: Asked) -> None:
        await asked.answer({"error": {"message": traceback, "code": 500}}, 500)

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        code, details = await refused(rpc.complete(ask("x")))
        assert code is Code.INTERNAL
        assert details.startswith("Generation failed: Subprocess error: ValueError: Ein Schema ist keins: üüü")
        assert len(details.encode()) < 2100
        assert "File" not in details


async def test_an_error_in_the_middle_of_a_stream_and_an_answer_that_is_cut_off() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.event(piece(0, "whole", "stop", (1, 1)))
        if asked.body["prompt"][0] == "error":
            await asked.event({"error": {"message": "out of memory", "code": 500}})
            await asked.end()
        elif asked.body["prompt"][0] == "cut":
            asked.cut()
        else:
            await asked.end()

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        items = aiter(rpc.complete_stream(ask("error", "y")))
        assert (await anext(items)).text == "whole"
        assert await refused(items) == (Code.INTERNAL, "Generation stream failed: Subprocess error: out of memory")
        assert (await refused(rpc.complete(ask("cut", "y"))))[1] == "Launch gen subprocess crashed"
        # One of two never ended: no half of a batch is passed off as the whole.
        code, details = await refused(rpc.complete(ask("missing", "y")))
        assert (code, "before it was finished" in details) == (Code.UNAVAILABLE, True)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": [{}]}', b'{"choices": 1}', b"\xff"])
async def test_an_answer_that_is_none(body: bytes) -> None:
    async def script(asked: Asked) -> None:
        await asked.raw(body)

    async with scripted(script) as (_, address), serving() as rpc:
        rpc.book.add("gen", address)
        rpc.book.add("emb", address, "embed")
        assert (await refused(rpc.complete(ask("x"))))[0] is Code.FAILED_PRECONDITION
        assert (await refused(rpc.embed(texts("x"))))[0] is Code.FAILED_PRECONDITION


async def test_messages_of_any_size(rpc: Rpc, simulator: Simulator) -> None:
    long = "word " * 1_200_000
    big = pb.CompleteRequest(launch_id="gen", prompts=[long])
    assert big.ByteSize() > 5 * 2**20
    # It is too long for the model, and that is said by the engine, not by gRPC.
    assert "maximum context length" in (await refused(rpc.complete(big)))[1]
    async with serving(rpc.book, limit_message_size=True) as limited:
        code, details = await refused(limited.complete(big))
        assert (code, "larger than max" in details) == (Code.RESOURCE_EXHAUSTED, True)
