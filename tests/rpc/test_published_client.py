"""The gRPC half of vllm-bootstrap's published client."""

from __future__ import annotations

import pytest

from bullpen.sim import words
from tests.rpc.serving import MODEL, completion, serving
from tests.sim.simulator import Simulator
from tests.support.published_client import needs_published_client, run_script

SCRIPT = """
import asyncio, json, sys
import grpc
from vllm_bootstrap_client import VLLMManager

async def main(address):
    seen = {}
    async with VLLMManager("http://127.0.0.1:9", grpc_address=address, access_key="key") as manager:
        seen["embed"] = await manager.embed("emb", ["a", "b"])
        seen["embed_stream"] = [item async for item in manager.embed_stream("emb", ["a", "b"])]
        one = await manager.complete("gen", ["hello there"], max_tokens=5)
        seen["complete"] = [[item.text, item.prompt_tokens, item.completion_tokens] for item in one]
        options = dict(temperature=0.0, top_p=0.5, json_schema="{}", choice=[])
        seen["many"] = [item.text for item in await manager.complete("gen", ["a", "b", "c"], 3, **options)]
        seen["stream"] = [item.text async for item in manager.complete_stream("gen", ["a", "b"], max_tokens=3)]
        seen["errors"] = []
        for launch_id, prompts in (("gen", []), ("?", ["x"]), ("emb", ["x"])):
            try:
                await manager.complete(launch_id, prompts, max_tokens=1)
            except grpc.aio.AioRpcError as error:
                seen["errors"].append([error.code().name, error.details()])
    async with VLLMManager("http://127.0.0.1:9", grpc_address=address) as manager:
        try:
            await manager.embed("emb", ["a"])
        except grpc.aio.AioRpcError as error:
            seen["errors"].append([error.code().name, error.details()])
    print(json.dumps(seen))

asyncio.run(main(sys.argv[1]))
"""


@needs_published_client
async def test_the_published_client(simulator: Simulator) -> None:
    async with serving(access_key="key") as rpc:
        rpc.book.add("gen", simulator.port)
        rpc.book.add("emb", simulator.port, "embed")
        seen = await run_script(SCRIPT, f"127.0.0.1:{rpc.server.port}")
    vectors = [pytest.approx(words.vector(MODEL, text), abs=1e-7) for text in "ab"]
    assert seen["embed"] == vectors
    assert seen["embed_stream"] == vectors
    assert seen["complete"] == [[completion("hello there", 5), 2, 5]]
    assert seen["many"] == [completion(text, 3) for text in "abc"]
    assert seen["stream"] == [completion(text, 3) for text in "ab"]
    assert seen["errors"] == [
        ["INVALID_ARGUMENT", "prompts must not be empty"],
        ["NOT_FOUND", "Unknown launch_id: ?"],
        ["FAILED_PRECONDITION", "Launch emb has task 'embed', expected 'generate'"],
        ["UNAUTHENTICATED", "Invalid or missing access key"],
    ]
