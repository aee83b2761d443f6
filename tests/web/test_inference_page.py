"""The examples of docs/inference.md, run in their order as they are printed; only the ports are others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "inference.md").read_text()
EXAMPLES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
REST, GRPC = "localhost:8001", "localhost:8002"
SECONDS = 60

GRPCURL = """
import sys
import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

words, given = sys.argv[1:], {"-max-time": None}
assert words.pop(0) == "-plaintext"
while words[0].startswith("-"):
    flag, value, *words = words
    given[flag] = value
assert given.keys() == {"-max-time", "-d"}
address, method = words
service, name = method.split("/")
with grpc.insecure_channel(address) as channel:
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    found = pool.FindServiceByName(service).FindMethodByName(name)
    asked, answer = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
    call = channel.unary_stream("/" + method, asked.SerializeToString, answer.FromString)
    deadline = given["-max-time"] and float(given["-max-time"])
    for one in call(json_format.Parse(given["-d"], asked()), timeout=deadline):
        print(json_format.MessageToJson(one))
"""
"""Stands in for the program where that is not installed: it knows a service by reflection, too."""


def example(language: str, text: str) -> str:
    """The one example that has a text in it."""
    (found,) = [body for kind, body in EXAMPLES if kind == language and text in body]
    return str(found)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("page") / "state", grpc_port=None) as daemon:
        daemon.wait_ready().wait_grpc()
        yield daemon.wait_warm()


@pytest.fixture
def daemon(running: Daemon) -> Iterator[Daemon]:
    yield running
    running.http.delete(INSTANCES)


@pytest.fixture
def moved(daemon: Daemon) -> Callable[[str], str]:
    """An example with this daemon's ports."""
    port = int(daemon.url.rpartition(":")[2])

    def move(text: str) -> str:
        return text.replace(REST, f"127.0.0.1:{port}").replace(GRPC, f"127.0.0.1:{port + 1}")

    return move


@pytest.fixture
def shell(daemon: Daemon, moved: Callable[[str], str], tmp_path: Path) -> Callable[..., str]:
    """Run commands; return what they print."""
    commands = tmp_path / "commands"
    commands.mkdir()
    if shutil.which("grpcurl") is None:
        (commands / "grpcurl").write_text(f"#!{sys.executable}\n{GRPCURL}")
    (commands / "bullpen").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bullpen "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)

    def run(text: str, **variables: str) -> str:
        environ = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "BULLPEN_URL": daemon.url, **variables}
        line = ["bash", "-euc", moved(text)]
        done = subprocess.run(
            line, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def documents(text: str) -> list[Any]:
    """The JSON documents in a text, one behind the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


async def run_python(source: str) -> dict[str, Any]:
    """Run an example; return its names, and as `printed` what it prints."""
    names: dict[str, Any] = {"printed": []}
    names["print"] = lambda *values, end="\n": names["printed"].append(values)
    if "async with" in source:
        source = f"async def main():\n{textwrap.indent(source, '    ')}\n    globals().update(locals())"
        exec(compile(source, "inference.md", "exec"), names)
        await names["main"]()
    else:
        exec(compile(source, "inference.md", "exec"), names)
    return names


def test_the_page_has_no_example_that_is_not_run() -> None:
    assert [kind for kind, _ in EXAMPLES] == ["bash", "bash", "python", "python", "python", "bash", "bash", "python"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_by_curl_and_by_grpc(daemon: Daemon, shell: Callable[..., str]) -> None:
    (launch,) = documents(shell(example("bash", '-d \'{"model"')))
    assert (launch["model"], launch["state"]) == ("Qwen/Qwen3-0.6B", "bootstrapping")
    name = launch["launch_id"]
    daemon.wait_state(name, "ready")

    one, two, *pieces = documents(shell(example("bash", "Inference/Complete"), ID=name))
    assert sorted(found.get("index", 0) for found in (one, two)) == [0, 1]
    assert all(found["text"] and found["usage"]["completionTokens"] == 16 for found in (one, two))
    assert "".join(piece.get("content", "") for piece in pieces) and pieces[-1]["finishReason"] == "length"

    status, log, listed, stats, stopped = documents(shell(example("bash", "/status/$ID"), ID=name))
    assert (status["state"], stopped["state"]) == ("ready", "stopped")
    assert log["offset"] == 0 and len(log["content"].encode()) == log["next_offset"] > 0
    assert [one["launch_id"] for one in listed] == [name]
    assert stats["gpu_count"] == len(stats["gpus"])


async def test_python(daemon: Daemon, moved: Callable[[str], str]) -> None:
    seen = await run_python(moved(example("python", "import VLLMManager")))
    (one,), (several,), (joke,), *tokens = seen["printed"]
    assert one and joke and len(several) == 2 and all(several)
    assert "".join(text for (text,) in tokens) == joke, "a stream has the same text"
    assert len(seen["vectors"]) == 2 and len(seen["vectors"][0]) == len(seen["vectors"][1]) > 0
    assert daemon.http.get("/launch").json() == []


async def test_python_without_await(daemon: Daemon, moved: Callable[[str], str]) -> None:
    (written,) = (await run_python(moved(example("python", "        print(manager.complete("))))["printed"]
    assert written[0]
    assert daemon.http.get("/launch").json() == []


async def test_python_step_by_step(daemon: Daemon, moved: Callable[[str], str]) -> None:
    printed = (await run_python(moved(example("python", "except LaunchFailed"))))["printed"]
    *progress, one, two, three = printed
    assert progress[-1][0] == "ready" and progress[0][0] == "bootstrapping"
    assert {done[0] for done in (one, two, three)} == {0, 1, 2}
    assert daemon.http.get("/launch").json() == []


async def test_batch(
    daemon: Daemon,
    shell: Callable[..., str],
    moved: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell(example("bash", "bullpen batch run"))
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in results] == ["1", "2"]
    assert [one["response"]["status_code"] for one in results] == [200, 200]
    monkeypatch.chdir(tmp_path)
    ((total, failed, seconds),) = (await run_python(moved(example("python", "manager.batch("))))["printed"]
    assert (total, failed) == (2, 0) and seconds >= 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in again] == ["1", "2"]
    assert daemon.http.get("/launch").json() == []
