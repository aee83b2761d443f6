"""The make targets for images: what they would run, with no container engine or a stand-in for one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = """#!/bin/sh
printf '%s ' "$(basename "$0")" "$@" >>"$(dirname "$0")/calls"; echo >>"$(dirname "$0")/calls"
exit "${FAKE_STATUS:-0}"
"""


def make(target: str, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = ("PATH", "HOME", "LANG")
    return subprocess.run(
        ["make", "--no-print-directory", target, *settings],
        cwd=ROOT,
        check=False,
        env={**{name: os.environ[name] for name in kept if name in os.environ}, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(target: str, *settings: str) -> list[str]:
    shown = make(target, "CONTAINER_IMG_REG=registry.example/me", "IMAGE_TAG=v1", "DRY_RUN=1", *settings)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for stand-ins, and the programs that the targets need besides."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "env", "make", "sed", "git", "dirname", "basename"):
        found = next(Path(place, name) for place in os.environ["PATH"].split(":") if Path(place, name).exists())
        (folder / name).symlink_to(found)
    return folder


def fake(folder: Path, name: str) -> None:
    (folder / name).write_text(FAKE)
    (folder / name).chmod(0o755)


def test_the_launcher_is_built_and_pushed() -> None:
    [build] = dry("build-launcher")
    assert re.fullmatch(
        r"docker build --tag registry.example/me/launcher:v1 --build-arg VERSION=\S+ --build-arg REVISION=\S+"
        r" --target launcher --build-arg ENGINE=cuda \.",
        build,
    )
    [push] = dry("push-launcher")
    assert push == "docker push registry.example/me/launcher:v1"
    assert dry("build-and-push-launcher") == [build, push]


@pytest.mark.parametrize(
    ("target", "settings", "part"),
    [
        ("build-endpoint", [], " --target endpoint "),
        ("build-endpoint", ["ENGINE=cpu"], " --tag registry.example/me/vllm-bootstrap:v1-cpu "),
        ("build-endpoint", ["ENGINE=cpu", "BASE_IMAGE=debian:12"], " --build-arg CPU_BASE_IMAGE=debian:12 "),
        ("build-launcher", ["BASE_IMAGE=a/b:1"], " --build-arg BASE_IMAGE=a/b:1 "),
        ("push-endpoint", [], " push registry.example/me/vllm-bootstrap:v1"),
        ("build-client", [], " --file images/client.Dockerfile "),
        ("build-client", ["ENGINE=cpu"], " --tag registry.example/me/bullpen-client:v1 "),
        ("push-client", [], " push registry.example/me/bullpen-client:v1"),
        ("build-launcher", ["CONTAINER_ENGINE=podman"], " --format docker "),
    ],
)
def test_other_images_and_settings(target: str, settings: list[str], part: str) -> None:
    [line] = dry(target, *settings)
    assert part in line


def test_the_tag_is_the_commit() -> None:
    shown = make("push-launcher", "CONTAINER_IMG_REG=r", "DRY_RUN=1")
    assert re.fullmatch(r"docker push r/launcher:[0-9a-f.]+\n", shown.stdout)


@pytest.mark.parametrize("target", ["build-launcher", "push-launcher", "build-and-push-launcher", "build-client"])
def test_a_registry_is_needed(target: str) -> None:
    refused = make(target, "DRY_RUN=1")
    assert refused.returncode == 2 and refused.stdout == ""
    assert "CONTAINER_IMG_REG is not set. Name your registry, as in: make " in refused.stderr


def test_an_unknown_engine_is_refused() -> None:
    refused = make("build-launcher", "CONTAINER_IMG_REG=r", "ENGINE=tpu", "DRY_RUN=1")
    assert refused.returncode == 2 and "ENGINE is 'tpu'; it can be cuda or cpu" in refused.stderr


@pytest.mark.parametrize(
    ("present", "used"), [(["docker"], "docker"), (["podman"], "podman"), (["docker", "podman"], "docker")]
)
def test_whichever_is_there_is_called(programs: Path, present: list[str], used: str) -> None:
    for name in present:
        fake(programs, name)
    done = make("build-and-push-launcher", "CONTAINER_IMG_REG=r", "IMAGE_TAG=t", PATH=str(programs))
    assert done.returncode == 0, done.stderr
    build, push = (programs / "calls").read_text().splitlines()
    assert build.startswith(f"{used} build --tag r/launcher:t ")
    assert push == f"{used} push r/launcher:t "


def test_nothing_is_pushed_that_could_not_be_built(programs: Path) -> None:
    fake(programs, "docker")
    done = make("build-and-push-launcher", "CONTAINER_IMG_REG=r", PATH=str(programs), FAKE_STATUS="3")
    assert done.returncode == 2
    assert [line.split()[1] for line in (programs / "calls").read_text().splitlines()] == ["build"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [([], "neither docker nor podman is on the PATH"), (["CONTAINER_ENGINE=nerdctl"], "nerdctl is not on the PATH")],
)
def test_no_container_engine(programs: Path, settings: list[str], sentence: str) -> None:
    refused = make("build-launcher", "CONTAINER_IMG_REG=r", *settings, PATH=str(programs))
    assert refused.returncode == 2 and sentence in refused.stderr and "DRY_RUN=1" in refused.stderr


def test_validate_is_both_checks() -> None:
    shown = make("validate", "--dry-run").stdout
    assert "ruff check" in shown and "lint-imports" in shown and "-m pytest" in shown
    assert "--fix" not in make("lint-verify", "--dry-run").stdout


def test_the_list_of_targets_is_aligned() -> None:
    rows = make("help").stdout.splitlines()
    assert {row.split()[1] for row in rows} >= {"lint-verify", "validate", "build-launcher", "push-launcher"}
    assert {len(row) - len(re.sub(r"^  make \S+ +", "", row)) for row in rows} == {32}
    assert all(len(row) <= 120 for row in rows)
