"""Secrets never come back: not in a reply, not in an event, not in what the daemon prints."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bullpen.core import redact
from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES, watching

SECRET = "s3cr3t"  # part of each secret here, and of nothing else
SECRET_NAMES = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "hf_token",
    "OPENAI_API_KEY",
    "VLLM_API_KEY",
    "APIKEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "GITHUBTOKEN",
    "DB_PASSWORD",
    "PGPASSWORD",
    "MYSQL_PWD",
    "REDIS_PASS",
    "SMTP_PASSWD",
    "KEY_PASSPHRASE",
    "PASSWORD",
    "CLIENT_SECRET",
    "SECRET_KEY_BASE",
    "SSH_PRIVATE_KEY",
    "SIGNING_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "BASIC_AUTH",
    "API_KEY_2",
    "TOKEN",
    "KEY",
]
PLAIN_NAMES = [
    "TOKENIZERS_PARALLELISM",
    "VLLM_LOGGING_LEVEL",
    "VLLM_USE_FASTOKENS",
    "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS",
    "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD",
    "CUDA_VISIBLE_DEVICES",
    "KEYBOARD",
    "MONKEY_COUNT",
    "AUTHOR",
    "PASSENGERS",
    "COMPASS",
    "OLDPWD",
]
OPTIONS = [
    "--api-key s3cr3t-1",
    "--api-key=s3cr3t-2",
    "--api_key s3cr3t-3",
    "--api_key=s3cr3t-4",
    "--api-key s3cr3t-5 s3cr3t-6",
    "--api-key 's3cr3t 7'",
    '--api-key="s3cr3t-8"',
    "--api-key s3cr3t-9 --api-key s3cr3t-10",
    "--hf-token s3cr3t-11",
    "--hf-token=s3cr3t-12",
    "--hf_token s3cr3t-13",
    "--hf_token=s3cr3t-14",
    "--api-key=s3cr3t=15==",
    "--api-key s3cr3t-16 -tp 2",
    '--watermark-config \'{"key": "s3cr3t-17"}\'',
    '--watermark-config=\'{"key": "s3cr3t-18"}\'',
    "--watermark-config.key s3cr3t-19",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_variable_that_looks_like_a_secret(name: str) -> None:
    assert redact.environment({name: "x"}) == {name: "***"}


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_variable_that_does_not(name: str) -> None:
    assert redact.environment({name: "x"}) == {name: "x"}


def given(options: str) -> str:
    return redact.options(options, tuple(shlex.split(options)))


@pytest.mark.parametrize("secret", OPTIONS)
def test_option_with_a_secret(secret: str) -> None:
    shown = given(f"--model m {secret} --port 8000")
    assert SECRET not in shown
    assert "***" in shown
    assert shown.startswith("--model m ")
    assert shown.endswith("--port 8000")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--model  m  --api-key x --hf-overrides '{\"a\": 1}'", "--model m --api-key *** --hf-overrides '{\"a\": 1}'"),
        ("m --api-key x y --port 1", "m --api-key *** *** --port 1"),
        ("--hf-token x m", "--hf-token *** m"),
        ("--api-key=x m", "--api-key=*** m"),
        ("--api-key x -tp 2 --model m", "--api-key *** -tp 2 --model m"),
        ("--hf-token --model m", "--hf-token --model m"),
        ("--model 'a ***' --hf-token x", "--model 'a ***' --hf-token ***"),
        ("--model m --ssl-keyfile /etc/key.pem", "--model m --ssl-keyfile /etc/key.pem"),
        ("--model m   --port 1", "--model m   --port 1"),
        ("--model m --api-server-count 2", "--model m --api-server-count 2"),
    ],
)
def test_options_with_nothing_but_the_secrets_hidden(options: str, expected: str) -> None:
    assert given(options) == expected


def text_of_every_reply(daemon: Daemon, options: str, variables: dict[str, str]) -> Iterator[str]:
    """Everything that the API says about an instance with secrets, from its start to its end."""
    body: dict[str, Any] = {"options": options, "env_vars": variables}
    with watching(daemon, events="all") as watch:
        yield daemon.http.put(f"{INSTANCES}/one", json=body).text
        yield daemon.http.put(f"{INSTANCES}/one", json=body).text
        yield json.dumps(daemon.wait_state("one", "ready"))
        yield daemon.http.get(INSTANCES).text
        yield daemon.http.get(f"{INSTANCES}/one").text
        yield daemon.log("one")
        yield daemon.http.delete(f"{INSTANCES}/one").text
        yield daemon.http.post(INSTANCES, json=body | {"options": options + " --port eight"}).text
        yield daemon.http.post(INSTANCES, json=body | {"options": options + " '"}).text
        yield daemon.http.post(INSTANCES, json=body | {"options": options.replace("--model m", "")}).text
        yield daemon.http.post(INSTANCES, json=body | {"annotations": [SECRET]}).text
        yield json.dumps(watch.until("DELETED"))
        failing = variables | {"BULLPEN_SIM_FAIL": "start"}
        yield daemon.http.put(f"{INSTANCES}/bad", json=body | {"env_vars": failing}).text
        yield json.dumps(daemon.wait_state("bad", "failed"))
        yield json.dumps(watch.until("STOPPED"))
        yield daemon.http.delete(INSTANCES).text
        yield json.dumps(watch.until("DELETED"))
    with watching(daemon, since=0) as watch:
        yield json.dumps(watch.until("STOPPED"))
    yield daemon.http.post("/v1/vllm", json=body).text
    yield daemon.http.post("/v1/vllm", json=body).text
    yield daemon.http.delete("/v1/vllm").text


def test_nothing_that_the_daemon_says(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(log_level="debug").wait_warm()
    options = " ".join(["--model m", *OPTIONS[:16]])
    variables = {name: f"{SECRET}-{name}" for name in SECRET_NAMES} | {"TOKENIZERS_PARALLELISM": "false"}
    replies = list(text_of_every_reply(daemon, options, variables))
    assert not [reply for reply in replies if SECRET in reply]
    assert '"TOKENIZERS_PARALLELISM":"false"' in replies[0]
    assert '"HF_TOKEN":"***"' in replies[0]
    assert daemon.end() == 0
    assert SECRET not in "".join(daemon.output)


def test_secret_does_its_work_all_the_same(shared: Daemon) -> None:
    created = shared.create("--model m --api-key s3cr3t")
    shared.wait_state(created["instance_id"], "ready")
    models = f"{created['url']}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": "Bearer s3cr3t"}).status_code == 200


def test_process_list_shows_no_secret(shared: Daemon) -> None:
    created = shared.create("--model m --api-key s3cr3t", env_vars={"HF_TOKEN": "s3cr3t"})
    shared.wait_state(created["instance_id"], "ready")
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert SECRET.encode() not in line.read_bytes()
        except OSError:
            continue


def test_state_directory_is_for_its_owner_alone(start_daemon: Callable[..., Daemon]) -> None:
    """The journal must hold the secrets: a later daemon adopts the instances."""
    daemon = start_daemon(access_key="s3cr3t")
    daemon.http.headers["Authorization"] = "Bearer s3cr3t"
    daemon.wait_warm().create("--model m --api-key s3cr3t", env_vars={"HF_TOKEN": "s3cr3t"})
    holding = [path for path in daemon.state_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding, "what this test is about"
    for path in [daemon.state_dir, *holding]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path}: {mode:o}"
        assert path.stat().st_uid == os.getuid()
