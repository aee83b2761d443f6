"""The commands that vllm-bootstrap's README prints, and what they need of this repository.

Its Python and curl examples run on a real engine; no container engine and no network are needed for these.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
import venv
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.images.dockerfile import Stage, stages
from tests.support.bootstrap_readme import BLOCKS

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ON_A_BOX = ("Client library", "Embeddings", "Completions", "Manual lifecycle", "Other operations")
BY_CURL = ("Launch", "Launch an embedding model", "Tail logs")
HERE = ("docker pull", "docker build", "docker run", "pip install the client", "pip install the extra", "uv run")
MAKE = ("Tests", "Local validation", "Both")


def command(name: str) -> list[str]:
    """The words of a block with one command."""
    return shlex.split(BLOCKS[name].replace("\\\n", " "))


def endpoint(**arguments: str) -> Stage:
    """What `docker build .` makes."""
    return stages((ROOT / "Dockerfile").read_text(), **{"ENGINE": "cuda", **arguments})[-1]


def test_no_example_is_left_out() -> None:
    assert set(BLOCKS) == {*ON_A_BOX, *BY_CURL, *HERE, *MAKE}


def test_docker_build() -> None:
    """The base that it names is what the image begins with."""
    assert command("docker build")[:3] == ["docker", "build", "--build-arg"]
    key, _, base = command("docker build")[3].partition("=")
    stage = endpoint(**{key: base})
    while stage.parent is not None:
        stage = stage.parent
    assert stage.base == base
    assert command("docker build")[-1] == ".", "the context is where the Dockerfile is"


def test_docker_run() -> None:
    """The image that was built serves at the ports that it forwards."""
    words = command("docker run")
    forwarded = [words[place + 1].split(":") for place, word in enumerate(words) if word == "-p"]
    exposed = endpoint().last("EXPOSE")
    assert exposed is not None
    assert [inside for _, inside in forwarded] == exposed.split() == ["8000", "8001"]
    assert words[-1] == command("docker build")[-2]
    assert "vllm-bootstrap" in str(endpoint().last("ENTRYPOINT"))


def test_docker_pull() -> None:
    """What is pushed has that name, in a registry of one's own."""
    name = command("docker pull")[-1].rpartition("/")[2].partition(":")[0]
    settings = ["CONTAINER_IMG_REG=registry.example/me", "IMAGE_TAG=cuda12.4-latest", "DRY_RUN=1"]
    line = ["make", "--no-print-directory", "push-endpoint", *settings]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    assert shown.endswith(f"push registry.example/me/{name}:cuda12.4-latest\n")


def test_pip_install() -> None:
    """The published client is among what is tested here; the extra has vLLM in it."""
    client = command("pip install the client")[-1]
    assert re.search(rf"^{client}==", (ROOT / "requirements" / "published-client.txt").read_text(), re.MULTILINE)
    found = re.fullmatch(r"\.\[(\w+)\]", command("pip install the extra")[-1])
    assert found is not None
    (requirement,) = PROJECT["optional-dependencies"][found[1]]
    assert requirement.startswith("vllm>=")


def test_uv_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The console script is there and runs."""
    module, _, function = PROJECT["scripts"][command("uv run")[-1]].partition(":")
    assert getattr(import_module(module), function)(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vllm-bootstrap ")


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_takes_the_environment_that_make_install_made(tmp_path: Path) -> None:
    """It resolves nothing, for which it would need a network, and makes none of its own."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    venv.create(tmp_path / ".venv")
    script = tmp_path / ".venv" / "bin" / command("uv run")[-1]
    script.write_text('#!/bin/sh\necho "that one: $*"\n')
    script.chmod(0o755)
    line = [*command("uv run"), "--port", "9000"]
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        line, cwd=tmp_path, env={**environ, "UV_OFFLINE": "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "that one: --port 9000\n"), done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"pyproject.toml", ".venv"}


@pytest.mark.parametrize("name", MAKE)
def test_make(name: str) -> None:
    """Every target exists and checks something; a dry run shows what."""
    for line in BLOCKS[name].splitlines():
        words = shlex.split(line)
        dry = [words[0], "--dry-run", *words[1:]]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "pytest" in done.stdout or "ruff check" in done.stdout
