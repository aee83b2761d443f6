"""What real servers answer: completions, chats, streams, embeddings, and the rest of vLLM's own API."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from typing import Any

import httpx
import openai
import pytest

from tests.real import minilm
from tests.real.serving import Models, complete, serving
from tests.support.daemon import Daemon

Pair = dict[str, dict[str, Any]]
MESSAGES: list[Any] = [{"role": "user", "content": "Who is warm?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def sdk(instance: dict[str, Any]) -> openai.OpenAI:
    """OpenAI's own client of an instance."""
    return openai.OpenAI(base_url=f"{instance['url']}/v1", api_key="none", timeout=60, max_retries=0)


def curl(*arguments: str) -> bytes:
    """What curl prints."""
    command = ["curl", "-sS", "--fail-with-body", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_completion_by_the_openai_client(pair: Pair) -> None:
    """OpenAI's client gets as many tokens as it asked for."""
    answer = sdk(pair["tiny-a"]).completions.create(model="tiny-a", prompt="the model", max_tokens=8, **GREEDY)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.choices[0].text == complete(pair["tiny-a"])


def test_chat_and_the_same_chat_streamed(pair: Pair) -> None:
    """A streamed chat comes in pieces, and together they are the answer that comes at once."""
    client = sdk(pair["tiny-b"])
    whole = client.chat.completions.create(model="tiny-b", messages=MESSAGES, max_tokens=16, **GREEDY)
    stream = client.chat.completions.create(model="tiny-b", messages=MESSAGES, max_tokens=16, stream=True, **GREEDY)
    choices = [chunk.choices[0] for chunk in stream]
    pieces = [choice.delta.content for choice in choices if choice.delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"


def test_everything_by_curl(daemon: Daemon, models: Models) -> None:
    """Create, ask, read the log and delete, with curl alone."""
    base = f"{daemon.url}/v2/vllm/instances"
    as_json = ("-H", "Content-Type: application/json", "-d")
    created = json.loads(curl("-X", "POST", base, *as_json, json.dumps({"options": models.options("tiny-a")})))
    try:
        assert created["status"] == "started"
        ready = daemon.wait_state(created["instance_id"], "ready", "failed", "stopped")
        body = {"model": "tiny-a", "prompt": "the model", "max_tokens": 4, "ignore_eos": True}
        answer = json.loads(curl(f"{ready['url']}/v1/completions", *as_json, json.dumps(body)))
        assert answer["usage"]["completion_tokens"] == 4
        url = f"{base}/{created['instance_id']}"
        assert json.loads(curl(url))["status"] == "running"
        assert b"POST /v1/completions" in curl(f"{url}/log")
        assert len(curl("-H", "Range: bytes=0-99", f"{url}/log")) == 100
    finally:
        deleted = json.loads(curl("-X", "DELETE", f"{base}/{created['instance_id']}"))
    assert deleted["status"] == "terminated"


def test_two_models_at_once(pair: Pair) -> None:
    """Each answers as itself: differently from the other, and the same each time."""
    answers = {name: {complete(instance) for _ in range(3)} for name, instance in pair.items()}
    assert [len(texts) for texts in answers.values()] == [1, 1]
    assert answers["tiny-a"] != answers["tiny-b"]
    for name, instance in pair.items():
        served = httpx.get(f"{instance['url']}/v1/models").json()["data"]
        assert [model["id"] for model in served] == [name]


def test_metrics_count_what_was_answered(pair: Pair) -> None:
    """The engine's own metrics are there and move."""

    def answered() -> float:
        lines = httpx.get(f"{pair['tiny-a']['url']}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))

    before = answered()
    complete(pair["tiny-a"])
    assert answered() == before + 1


def test_tokenizer(pair: Pair) -> None:
    """Words go to tokens and back."""
    url, text = pair["tiny-a"]["url"], "the server is ready"
    tokens = httpx.post(f"{url}/tokenize", json={"model": "tiny-a", "prompt": text}).json()["tokens"]
    assert 1 < len(tokens) < len(text)
    assert httpx.post(f"{url}/detokenize", json={"model": "tiny-a", "tokens": tokens}).json()["prompt"] == text


def test_embeddings_are_those_of_transformers(daemon: Daemon) -> None:
    """A pooling model gives the vectors that transformers computes from the same files."""
    pooling = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--max-model-len", "128")
    cache = ("--kv-cache-memory-bytes", str(16 * 2**20))
    options = shlex.join([minilm.FOLDER, "--served-model-name", "minilm", *pooling, "--enforce-eager", *cache])
    with serving(daemon, options, "minilm") as instance:
        answer = sdk(instance).embeddings.create(model="minilm", input=minilm.SENTENCES, encoding_format="float")
    served = [item.embedding for item in answer.data]
    assert minilm.differs(served) < 1e-5
    assert math.dist(served[0], served[1]) > 0.1


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version"])
def test_servers_answer_on_loopback_alone(pair: Pair, path: str) -> None:
    """A server whose options name no host listens on 127.0.0.1."""
    assert pair["tiny-a"]["url"].startswith("http://127.0.0.1:")
    assert httpx.get(pair["tiny-a"]["url"] + path).status_code == 200
