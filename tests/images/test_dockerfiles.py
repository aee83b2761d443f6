"""The Dockerfiles: hadolint's rules, and that the builder is sent what they copy. No container engine is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.dockerfile import Context, Stage, copies, faults, instructions, scripts, shell_faults, stages

ROOT = Path(__file__).parents[2]
FILES = ["Dockerfile", "images/client.Dockerfile"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def read(file: str, **arguments: str) -> list[Stage]:
    return stages((ROOT / file).read_text(), **arguments)


def target(name: str, engine: str = "cuda") -> Stage:
    return next(stage for stage in read("Dockerfile", ENGINE=engine) if stage.name == name)


@pytest.mark.parametrize("engine", ["cuda", "cpu"])
@pytest.mark.parametrize("file", FILES)
def test_no_rule_is_broken(file: str, engine: str) -> None:
    assert faults(read(file, ENGINE=engine)) == []


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("file", FILES)
def test_hadolint_agrees(file: str) -> None:
    result = subprocess.run([str(HADOLINT), ROOT / file], check=False, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


BROKEN = {
    "DL3006": "FROM ubuntu",
    "DL3002": 'FROM ubuntu:24.04\nENTRYPOINT ["a"]\nHEALTHCHECK NONE',
    "DL4006": "FROM ubuntu:24.04\nRUN true",
    "DL3020": "FROM ubuntu:24.04\nADD a b",
    "DL3025": "FROM ubuntu:24.04\nCMD sleep 1",
    "DL3000": "FROM ubuntu:24.04\nWORKDIR tmp",
    "DL3021": "FROM ubuntu:24.04\nCOPY a b c",
    "DL3015": "FROM ubuntu:24.04\nRUN apt-get install -y gcc && rm -rf /var/lib/apt/lists/*",
    "DL3009": "FROM ubuntu:24.04\nRUN apt-get install -y --no-install-recommends gcc",
    "DL3042": "FROM ubuntu:24.04\nRUN pip install a==1",
    "DL3013": "FROM ubuntu:24.04\nRUN pip install --no-cache-dir a",
    "DL3004": "FROM ubuntu:24.04\nRUN sudo true",
    "secret": "FROM ubuntu:24.04\nENV VLLM_ACCESS_KEY=abc",
}


@pytest.mark.parametrize(("rule", "text"), BROKEN.items(), ids=BROKEN)
def test_a_broken_rule_is_found(rule: str, text: str) -> None:
    assert any(rule in fault for fault in faults(stages(text)))


@pytest.mark.parametrize("tag", ["ubuntu:latest", "ubuntu:rolling", "reg.example:5000/ubuntu"])
def test_a_base_without_a_version_is_found(tag: str) -> None:
    assert any(fault.startswith("DL3006") for fault in faults(stages(f"FROM {tag} AS a")))


def test_continued_lines_are_one_instruction() -> None:
    found = list(instructions("# no\nRUN a \\\n  # nor this\n  && b\n\nUSER 1"))
    assert [(one.name, one.value, one.line) for one in found] == [("RUN", "a && b", 2), ("USER", "1", 6)]


@pytest.mark.parametrize("file", FILES)
def test_what_is_run_is_a_script_that_keeps_the_rules(file: str) -> None:
    called = {script for stage in read(file, ENGINE="cpu") for script in scripts(stage)}
    assert len(called) > 1
    for script in called:
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"
        if script != "scripts/setup.sh":  # which is for any machine; where an image needs more, its RUN says so
            assert list(shell_faults((ROOT / script).read_text())) == []


@pytest.mark.parametrize("file", FILES)
def test_every_run_calls_scripts_alone(file: str) -> None:
    for stage in read(file):
        for found in stage.instructions:
            if found.name == "RUN":
                words = [part.replace("ENGINE=", "").split()[-2:] for part in found.value.split("&&")]
                assert all(any(".sh" in word for word in part) for part in words), found.value


@pytest.mark.parametrize(("file", "engine"), [("Dockerfile", "cuda"), ("images/client.Dockerfile", "cuda")])
def test_everything_that_is_copied_is_sent(file: str, engine: str) -> None:
    context = Context(ROOT)
    for stage in read(file, ENGINE=engine):
        copied: set[str] = set()
        for sources, _ in copies(stage):
            for source in sources:
                files = context.files(source)
                assert files, f"{source} is not there, or .dockerignore leaves it out"
                copied |= {str(path) for path in files}
        assert set(scripts(stage)) <= copied, f"{stage.name} runs what it has not copied"


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "access_key", ".env", "src/bullpen/__pycache__/a.pyc", "tests/a.py"]
)
def test_what_an_image_does_not_need_is_not_sent(path: str) -> None:
    assert not Context(ROOT).has(path)


def test_launcher_and_endpoint_start_by_themselves() -> None:
    launcher, endpoint = target("launcher"), target("endpoint")
    assert launcher.last("ENTRYPOINT") == '["/usr/bin/tini", "--", "bullpen", "serve"]'
    assert endpoint.last("ENTRYPOINT") == '["/usr/bin/tini", "--", "vllm-bootstrap"]'
    assert launcher.last("EXPOSE") == "8001 8002" and endpoint.last("EXPOSE") == "8000 8001"
    assert read("Dockerfile")[-1].name == "endpoint", "what `docker build .` makes"


def test_the_engine_chooses_the_base() -> None:
    assert [stage.name for stage in _ancestors(target("endpoint", "cuda"))] == ["endpoint", "daemon", "base-cuda"]
    assert [stage.name for stage in _ancestors(target("endpoint", "cpu"))] == ["endpoint", "daemon", "base-cpu"]


def test_the_base_has_the_cuda_of_the_pinned_engine() -> None:
    pins = (ROOT / "requirements" / "engine-cuda.txt").read_text().splitlines()
    toolkit = next(line.partition("==")[2] for line in pins if line.startswith("cuda-toolkit=="))
    version = ".".join(toolkit.split()[0].split(".")[:3])
    assert _ancestors(target("endpoint"))[-1].base.startswith(f"nvidia/cuda:{version}-")


def test_the_version_is_the_products() -> None:
    from bullpen import __version__

    for file in FILES:
        final = read(file)[-1].lineage()
        assert any(found.value == f"VERSION={__version__}" for found in final if found.name == "ARG"), file


def _ancestors(stage: Stage) -> list[Stage]:
    return [stage, *(_ancestors(stage.parent) if stage.parent else [])]
