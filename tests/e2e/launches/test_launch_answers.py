"""Over gRPC, with several launches, callers that leave, servers that die: each caller gets its own answer or none."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import grpc
import grpc.aio
import pytest

from bullpen.proto import bootstrap, v1
from bullpen.sim import words
from tests.e2e.launches.calls import Document, in_flight, launch, reach, settle, stop
from tests.support.daemon import Daemon, wait_until
from tests.support.truth import call

REQUESTS = 500
AT_A_TIME = 48
MODELS = ("org/a", "org/b", "org/c")
DEADLINE_SECONDS = 60.0
GENERATING = ("complete", "complete_stream", "complete_v1", "stream_complete", "chat", "stream_chat")
LONG = 100_000
"""Tokens of a completion that would take a minute or more."""
LOST = {
    "Launch": (grpc.StatusCode.FAILED_PRECONDITION,),
    "Instance": (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE),
}
"""What callers hear of a launch whose server has been killed: the original's, and those of our own service."""


def completion(model: str, prompt: str, tokens: int) -> str:
    """What the simulator says to a prompt; it depends on nothing else."""
    return "".join(islice(words.completion(model, prompt), tokens))


class Methods:
    """The methods that generate, of both services."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        def unary(path: str, answer: Any) -> Callable[..., Any]:
            return channel.unary_unary(path, lambda message: message.SerializeToString(), answer.FromString)

        def stream(path: str, answer: Any) -> Callable[..., Any]:
            return channel.unary_stream(path, lambda message: message.SerializeToString(), answer.FromString)

        old, new = "/vllm_bootstrap.InferenceService/", "/bullpen.v1.Inference/"
        self.complete = unary(old + "Complete", bootstrap.CompleteResponse)
        self.complete_stream = stream(old + "CompleteStream", bootstrap.Completion)
        self.complete_v1 = stream(new + "Complete", v1.Completion)
        self.stream_complete = stream(new + "StreamComplete", v1.CompletionDelta)
        self.chat = unary(new + "Chat", v1.ChatResponse)
        self.stream_chat = stream(new + "StreamChat", v1.ChatDelta)


@dataclass
class Plan:
    """One request: which method, with what tagged prompts, and how its caller behaves."""

    method: str
    model: str
    prompts: list[str]
    tokens: int
    leaves_after: float | None
    pause: float

    @property
    def expected(self) -> list[str]:
        """The texts that belong to it."""
        prompts = [f"user: {prompt}" for prompt in self.prompts] if "chat" in self.method else self.prompts
        return [completion(self.model, prompt, self.tokens) for prompt in prompts]

    def request(self, launch_id: str) -> Any:
        """Its message."""
        sampling = v1.Sampling(max_tokens=self.tokens)
        if "chat" in self.method:
            message = v1.ChatMessage(role="user", content=self.prompts[0])
            return v1.ChatRequest(instance_id=launch_id, messages=[message], sampling=sampling)
        if self.method in ("complete", "complete_stream"):
            return bootstrap.CompleteRequest(launch_id=launch_id, prompts=self.prompts, max_tokens=self.tokens)
        return v1.CompleteRequest(instance_id=launch_id, prompts=self.prompts, sampling=sampling)


def make_plan(dice: random.Random, number: int) -> Plan:
    """Choose what a caller does; a third leave at some moment, some read slowly."""
    method = dice.choice(GENERATING)
    count = 1 if "chat" in method else dice.choice([1, 1, 2, 5])
    tag = dice.getrandbits(48)
    return Plan(
        method=method,
        model=dice.choice(MODELS),
        prompts=[f"tag {tag:x} of request {number}, prompt {place}" for place in range(count)],
        tokens=dice.randint(1, 60),
        leaves_after=dice.uniform(0.0, 0.08) if dice.random() < 0.33 else None,
        pause=dice.choice([0.0, 0.0, 0.002, 0.01]),
    )


@dataclass
class Crowd:
    """Callers, and how their requests came out."""

    methods: Methods
    ids: dict[str, str]
    killed: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    open_calls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_A_TIME))

    async def run(self, plan: Plan) -> None:
        """Make one request, and check every piece of what comes."""
        async with self.open_calls:
            launch_id = self.ids[plan.model]
            calling = getattr(self.methods, plan.method)(plan.request(launch_id), timeout=DEADLINE_SECONDS)
            if plan.leaves_after is not None:
                asyncio.get_running_loop().call_later(plan.leaves_after, calling.cancel)
            try:
                await self._read(plan, calling)
                self.outcomes["answered"] += 1
            except asyncio.CancelledError:
                assert calling.cancelled() and plan.leaves_after is not None, plan
                self.outcomes["left"] += 1
            except grpc.aio.AioRpcError as problem:
                word = "Launch" if plan.method in ("complete", "complete_stream") else "Instance"
                assert launch_id in self.killed and problem.code() in LOST[word], (plan, problem)
                assert launch_id in (problem.details() or ""), problem
                self.outcomes["lost"] += 1

    async def _read(self, plan: Plan, calling: Any) -> None:
        expected = plan.expected
        if plan.method == "complete":
            found = [item.text for item in (await calling).completions]
        elif plan.method == "chat":
            found = [choice.message.content for choice in (await calling).choices]
        else:
            found = [""] * len(expected)
            position = 0
            async for item in calling:
                place = position if plan.method == "complete_stream" else getattr(item, "index", 0)
                position += 1
                found[place] += item.content if plan.method == "stream_chat" else item.text
                # Who leaves, or loses the server, has had nothing but the beginning of its own answer.
                assert expected[place].startswith(found[place]), (plan, found)
                await asyncio.sleep(plan.pause)
        assert found == expected, plan


def launch_all(daemon: Daemon) -> dict[str, str]:
    """A launch of each model, ready."""
    ids = {model: str(launch(daemon, model, gpu_count=1)["launch_id"]) for model in MODELS}
    for launch_id in ids.values():
        reach(daemon, launch_id, "ready")
    return ids


def kill(document: Document) -> None:
    """End a launch's server as a crash does."""
    with suppress(ProcessLookupError):
        os.kill(document["pid"], signal.SIGKILL)


async def kill_now_and_then(daemon: Daemon, crowd: Crowd, dice: random.Random, times: int) -> None:
    """Kill a server while its requests are computed, and put another launch in its place."""
    for _ in range(times):
        await asyncio.sleep(dice.uniform(0.1, 0.4))
        model = dice.choice(MODELS)
        old = crowd.ids[model]
        document = await asyncio.to_thread(reach, daemon, old, "ready")
        crowd.killed.add(old)
        kill(document)
        await asyncio.to_thread(reach, daemon, old, "failed")
        new = await asyncio.to_thread(launch_when_free, daemon, model)
        await asyncio.to_thread(reach, daemon, new, "ready")
        crowd.ids[model] = new


def launch_when_free(daemon: Daemon, model: str) -> str:
    """Launch on a GPU of Bullpen's choice, as soon as one is free."""
    answers: list[Any] = []

    def try_it() -> bool:
        answers.append(call(f"{daemon.url}/launch", "POST", {"model": model, "gpu_count": 1}))
        assert answers[-1][0] in (201, 409), answers[-1]
        return bool(answers[-1][0] == 201)

    wait_until(try_it, describe=lambda: str(answers[-1]))
    return str(answers[-1][1]["launch_id"])


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kills"), [(1, 0), (2, 3), (3, 3)])
async def test_nobody_gets_another_s_answer(start_here: Callable[..., Daemon], seed: int, kills: int) -> None:
    """500 requests with prompts of their own to three launches at once; servers are killed under some of them."""
    variables = {"BULLPEN_SIM_TOKENS_PER_SECOND": "300", "BULLPEN_SIM_START_SECONDS": "0"}
    daemon = start_here(grpc_port=None, mock_gpus=True, mock_gpu_count=len(MODELS), environment=variables).wait_warm()
    dice = random.Random(seed)
    plans = [make_plan(dice, number) for number in range(REQUESTS)]
    address = daemon.wait_grpc()
    ids = launch_all(daemon)
    async with grpc.aio.insecure_channel(address) as channel:
        crowd = Crowd(Methods(channel), ids)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*map(crowd.run, plans), kill_now_and_then(daemon, crowd, dice, kills))
    assert crowd.outcomes.total() == REQUESTS
    assert crowd.outcomes["answered"] > REQUESTS * 0.4, crowd.outcomes
    assert crowd.outcomes["left"] > REQUESTS * 0.1, crowd.outcomes
    assert (crowd.outcomes["lost"] > 0) == (kills > 0), crowd.outcomes
    for launch_id in crowd.ids.values():
        await until_idle(reach(daemon, launch_id, "ready"))
    settle(daemon)


def idle(document: Document) -> bool:
    """Whether a server computes nothing, by its gate and by its engine."""
    return in_flight(document) == 0 and set(metrics(document).values()) == {0.0}


def metrics(document: Document) -> dict[str, float]:
    """How many requests a server's engine computes, and how many wait."""
    _, page = call(f"{document['url']}/metrics")
    lines = [line.rpartition(" ") for line in str(page).splitlines() if line.startswith("vllm:num_requests_")]
    found = {name.partition("{")[0]: float(value) for name, _, value in lines}
    assert found.keys() >= {"vllm:num_requests_running", "vllm:num_requests_waiting"}, page
    return found


@pytest.fixture
def slow_daemon(start_here: Callable[..., Daemon]) -> Daemon:
    """One whose launches write 50 tokens a second."""
    variables = {"BULLPEN_SIM_TOKENS_PER_SECOND": "50"}
    return start_here(grpc_port=None, mock_gpus=True, mock_gpu_count=1, environment=variables).wait_warm()


def endless(methods: Methods, launch_id: str) -> dict[str, Any]:
    """A call of each kind that does not end by itself."""
    plans = {name: Plan(name, "m", ["tagged"], LONG, None, 0.0) for name in GENERATING}
    return {name: getattr(methods, name)(plan.request(launch_id), timeout=30) for name, plan in plans.items()}


async def end_of(calling: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the words with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(calling, "__aiter__"):
            async for _ in calling:
                pass
        else:
            await calling
    return caught.value.code(), caught.value.details() or ""


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, while calls go on."""
    await asyncio.to_thread(wait_until, condition)


async def until_idle(document: Document) -> None:
    """Wait until a server computes nothing."""
    await until(lambda: idle(document))


@pytest.mark.parametrize("victim", ["server", "child"])
async def test_a_worker_that_is_killed_during_requests(slow_daemon: Daemon, victim: str) -> None:
    """Every caller hears it, the launch has failed, the GPU is free, and the next launch answers."""
    address = slow_daemon.wait_grpc()
    name = launch(slow_daemon)["launch_id"]
    document = reach(slow_daemon, name, "ready")
    async with grpc.aio.insecure_channel(address) as channel:
        methods = Methods(channel)
        calls = endless(methods, name)
        await until(lambda: in_flight(document) == len(calls))
        if victim == "server":
            kill(document)
        else:
            child = await asyncio.to_thread(child_of, document)
            os.kill(child, signal.SIGKILL)
        for method, (code, text) in zip(calls, await asyncio.gather(*map(end_of, calls.values())), strict=True):
            if victim == "server":
                word = "Launch" if method in ("complete", "complete_stream") else "Instance"
                assert code in LOST[word] and name in text, (method, code, text)
            else:
                lost = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
                assert code in lost, (method, code, text)
        failed = await asyncio.to_thread(reach, slow_daemon, name, "failed")
        assert failed["error"]
        code, text = await end_of(methods.complete(Plan("complete", "m", ["x"], 1, None, 0).request(name), timeout=30))
        assert (code, text) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            f"Launch {name} is not ready (state=failed)",
        )
        await asyncio.to_thread(settle, slow_daemon)
        again = await asyncio.to_thread(launch_when_free, slow_daemon, "m")
        await asyncio.to_thread(reach, slow_daemon, again, "ready")
        plan = Plan("complete", "m", ["after"], 5, None, 0)
        answer = await methods.complete(plan.request(again), timeout=30)
        assert [item.text for item in answer.completions] == plan.expected
    assert stop(slow_daemon, name) == reach(slow_daemon, name, "failed"), "a failed one stays failed"


def child_of(document: Document) -> int:
    """The engine child of a launch's server."""
    path = f"/proc/{document['pid']}/task/{document['pid']}/children"
    with open(path, encoding="ascii") as file:
        return int(file.read().split()[0])


async def test_a_worker_that_is_killed_between_requests(slow_daemon: Daemon) -> None:
    """The connection that was kept for it is of no use to anyone; the next request hears the truth at once."""
    address = slow_daemon.wait_grpc()
    async with grpc.aio.insecure_channel(address) as channel:
        methods = Methods(channel)
        for round_number in range(3):
            name = launch_when_free(slow_daemon, "m")
            document = reach(slow_daemon, name, "ready")
            plan = Plan("complete", "m", [f"round {round_number}"], 3, None, 0)
            answer = await methods.complete(plan.request(name), timeout=30)
            assert [item.text for item in answer.completions] == plan.expected
            kill(document)
            code, text = await end_of(methods.complete(plan.request(name), timeout=30))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert text in (f"Launch {name} subprocess crashed", f"Launch {name} is not ready (state=failed)")
            assert reach(slow_daemon, name, "failed")["error"]
    settle(slow_daemon)


async def test_streams_that_are_cancelled_end_in_the_engine(slow_daemon: Daemon) -> None:
    """After they have read a little, or nothing; and a reader that does not read holds up nobody else."""
    address = slow_daemon.wait_grpc()
    name = launch(slow_daemon)["launch_id"]
    document = reach(slow_daemon, name, "ready")
    async with grpc.aio.insecure_channel(address) as channel:
        methods = Methods(channel)
        calls = endless(methods, name)
        await until(lambda: in_flight(document) == len(calls))
        await anext(aiter(calls["stream_complete"]))
        plan = Plan("complete", "m", ["beside"], 3, None, 0)
        beside = await methods.complete(plan.request(name), timeout=30)
        assert [item.text for item in beside.completions] == plan.expected
        for calling in calls.values():
            calling.cancel()
        await until_idle(document)
    assert stop(slow_daemon, name)["state"] == "stopped"
