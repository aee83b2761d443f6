"""How much of the simulator's own throughput is left through gRPC: `python -m tests.rpc.throughput [tokens ...]`.

64 callers ask for completions one after the other, straight over HTTP and through gRPC in turns, in one run. The gRPC
server is a process of its own, as the simulator is.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import grpc.aio
import uvloop

from bullpen.core.instance import Address
from bullpen.proto import bootstrap as pb
from bullpen.rpc.ports import Served
from bullpen.rpc.server import RpcServer
from bullpen.rpc.settings import RpcSettings
from tests.sim.simulator import Simulator

CALLERS = 64
ROUNDS = 3
SECONDS = 2.0

Call = Callable[[str], Awaitable[None]]


class One:
    """One launch, called `one`."""

    def __init__(self, port: int) -> None:
        self._served = Served("one", "ready", "generate", Address("127.0.0.1", port), "test/model")

    def find(self, launch_id: str) -> Served | None:
        """The launch."""
        return self._served if launch_id == "one" else None


async def serve(simulator_port: int) -> None:
    """Be the gRPC server until standard input ends."""
    server = RpcServer(One(simulator_port), RpcSettings())
    await server.start()
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def rate(call: Call, seconds: float) -> float:
    """Calls per second of all callers together."""
    start = time.monotonic()
    done = 0

    async def caller(number: int) -> None:
        nonlocal done
        while time.monotonic() < start + seconds:
            await call(f"caller {number} call {done}")
            done += 1

    await asyncio.gather(*map(caller, range(CALLERS)))
    return done / (time.monotonic() - start)


async def over_http(port: int, tokens: int, seconds: float) -> float:
    """The rate straight to the simulator."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(prompt: str) -> None:
            body = {"model": "test/model", "prompt": [prompt], "max_tokens": tokens}
            async with session.post(url, json=body) as answer:
                assert len(json.loads(await answer.read())["choices"]) == 1

        return await rate(call, seconds)


async def over_grpc(port: int, tokens: int, seconds: float) -> float:
    """The rate through the gRPC server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        complete = channel.unary_unary(
            "/vllm_bootstrap.InferenceService/Complete",
            request_serializer=pb.CompleteRequest.SerializeToString,
            response_deserializer=pb.CompleteResponse.FromString,
        )

        async def call(prompt: str) -> None:
            answer = await complete(pb.CompleteRequest(launch_id="one", prompts=[prompt], max_tokens=tokens))
            assert len(answer.completions) == 1

        return await rate(call, seconds)


def part(*arguments: object) -> list[str]:
    """The command line of a part of this program."""
    return [sys.executable, "-m", "tests.rpc.throughput", *map(str, arguments)]


def measured(*arguments: object) -> float:
    """What a part has measured; each is a process of its own, as the two ways of calling disturb each other."""
    return float(subprocess.run(part(*arguments), check=True, capture_output=True, text=True).stdout)


def compare(simulator_port: int, grpc_port: int, tokens: int, seconds: float) -> None:
    """Print both rates and their ratio."""
    ratios = []
    for _ in range(ROUNDS):
        straight = measured("http", simulator_port, tokens, seconds)
        through = measured("grpc", grpc_port, tokens, seconds)
        ratios.append(through / straight)
        print(f"{tokens} tokens: HTTP {straight:,.0f}/s, gRPC {through:,.0f}/s, ratio {through / straight:.2f}")
    print(f"{tokens} tokens: median ratio {statistics.median(ratios):.2f}")


def main() -> None:
    """Run everything and print it, or be the part that is asked for."""
    match sys.argv[1:]:
        case ["serve", port]:
            uvloop.run(serve(int(port)))
            return
        case ["http", port, tokens, seconds]:
            print(uvloop.run(over_http(int(port), int(tokens), float(seconds))))
            return
        case ["grpc", port, tokens, seconds]:
            print(uvloop.run(over_grpc(int(port), int(tokens), float(seconds))))
            return
    with tempfile.TemporaryDirectory() as folder, Simulator.serving(Path(folder)) as simulator:
        command = part("serve", simulator.port)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            grpc_port = int(server.stdout.readline())
            for wanted in sys.argv[1:] or ["16", "64"]:
                compare(simulator.port, grpc_port, int(wanted), SECONDS)
            server.communicate()


if __name__ == "__main__":
    main()
