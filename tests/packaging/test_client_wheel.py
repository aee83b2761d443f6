"""The wheel `bullpen-client`: what is in it, and that it works with nothing else than what it declares."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import bullpen
from bullpen.client import __all__ as public_names
from tests.sim.simulator import Simulator

ROOT = Path(__file__).parents[2]
ROOMS = {"client", "errors", "paths", "proto"}
SECONDS = 120
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str | Path, **options: object) -> str:
    """Run a command that must succeed, without this process's paths; return what it writes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment,
    )
    assert done.returncode == options.get("code", 0), done.stdout
    return done.stdout


def needed(requirements: list[str], extra: str = "") -> set[str]:
    """The distributions that requirements ask for here, and those that these ask for in turn."""
    names: set[str] = set()
    wanted = [(Requirement(one), extra) for one in requirements]
    while wanted:
        requirement, of_extra = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        if requirement.name not in names:
            names.add(requirement.name)
            wanted += [(Requirement(one), "") for one in distribution(requirement.name).requires or []]
    return names


def gather(folder: Path, names: set[str]) -> Path:
    """A folder from which these distributions, and no others, can be imported."""
    folder.mkdir()
    for name in names:
        found = distribution(name)
        for part in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            link = folder / part
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(part))))
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, *PIP, "wheel", *options, ROOT / "packaging" / "client")
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> dict[str, list[str]]:
    """The fields of the wheel's metadata."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        head = archive.read(name).decode().partition("\n\n")[0]
    fields: dict[str, list[str]] = {}
    for line in head.splitlines():
        field, _, value = line.partition(": ")
        fields.setdefault(field, []).append(value)
    return fields


@pytest.fixture(scope="module")
def python(wheel: Path, metadata: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel and what it declares; grpcio is not part of that."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder / "venv", with_pip=False)
    interpreter = folder / "venv" / "bin" / "python"
    run(sys.executable, *PIP, "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    others = gather(folder / "others", needed(metadata["Requires-Dist"]))
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{others}\n")
    return interpreter


@pytest.fixture(scope="module")
def with_grpc(metadata: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the extra adds."""
    every, without = needed(metadata["Requires-Dist"], "grpc"), needed(metadata["Requires-Dist"])
    return gather(tmp_path_factory.mktemp("extra") / "grpc", every - without)


def test_contents(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        of_package = {name for name in names if not name.startswith("bullpen_client-")}
        assert {name.split("/")[1].removesuffix(".py") for name in of_package} == {*ROOMS, "__init__", "py.typed"}
        source = ROOT / "src" / "bullpen"
        for room in ROOMS:
            files = [source / f"{room}.py"] if (source / f"{room}.py").exists() else (source / room).rglob("*.py*")
            expected = {f"bullpen/{file.relative_to(source)}" for file in files if file.suffix != ".pyc"}
            assert expected and expected <= names
        rest = {name.partition("/")[2] for name in names - of_package}
        assert rest == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
        (text,) = (archive.read(name) for name in names if name.endswith("/LICENSE"))
        assert text == (ROOT / "LICENSE").read_bytes()


def test_metadata(metadata: dict[str, list[str]]) -> None:
    assert (metadata["Name"], metadata["Version"]) == (["bullpen-client"], [bullpen.__version__])
    assert metadata["License-Expression"] == ["Apache-2.0"]
    of_main = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {one.partition(";")[0].strip() for one in metadata["Requires-Dist"]}
    assert declared <= set(of_main), "the same bounds as the main package's"
    assert [re.split("[<>=]", one)[0] for one in metadata["Requires-Dist"] if ";" not in one] == ["httpx", "pydantic"]


EVERYTHING = """
import importlib, json, pkgutil, sys
import bullpen.client
for module in pkgutil.walk_packages(bullpen.client.__path__, "bullpen.client."):
    importlib.import_module(module.name)
names = [name for name in bullpen.client.__all__ if hasattr(bullpen.client, name)]
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("bullpen.")}
others = {name.partition(".")[0] for name in sys.modules} & {"grpc", "google", "vllm", "rich", "fastapi", "psutil"}
print(json.dumps([bullpen.__file__, bullpen.__version__, names, sorted(rooms), sorted(others)]))
"""


def test_every_module_is_imported_without_grpcio_and_without_other_rooms(python: Path) -> None:
    file, version, names, rooms, others = json.loads(run(python, "-I", "-c", EVERYTHING))
    assert Path(file).is_relative_to(python.parents[1]) and version == bullpen.__version__
    assert names == list(public_names)
    assert set(rooms) <= ROOMS and others == []


INFERENCE = """
import asyncio, sys
sys.path += sys.argv[1:]
from bullpen.client import ClientError, VLLMManager

async def main():
    async with VLLMManager("http://127.0.0.1:9", retry_seconds=0) as manager:
        for call in (manager.embed("m", ["a"]), manager.complete("m", prompt="a"), manager.chat("m", [])):
            try:
                await call
            except ClientError as problem:
                print(type(problem).__name__, problem)

asyncio.run(main())
"""


def test_inference_without_grpcio_says_what_to_install(python: Path) -> None:
    lines = run(python, "-I", "-c", INFERENCE).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("ClientError inference needs grpcio (") and line.endswith(
            "; install bullpen-client[grpc]"
        )


def test_inference_with_grpcio_goes_to_the_server(python: Path, with_grpc: Path) -> None:
    lines = run(python, "-I", "-c", INFERENCE, with_grpc).splitlines()
    found = [line for line in lines if line.startswith("ConnectionFailed ")]
    assert len(found) == 3 and all("127.0.0.1:10" in line for line in found)


BATCH = """
import asyncio, sys
from bullpen.client import run_batch
print(asyncio.run(run_batch(sys.argv[1], sys.argv[2], base_url=sys.argv[3])))
"""


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    (tmp_path / "sim").mkdir()
    with Simulator.serving(tmp_path / "sim") as simulator:
        yield simulator


def test_batch_job_needs_no_grpcio(python: Path, simulator: Simulator, tmp_path: Path) -> None:
    body = {"model": "test/model", "prompt": "a", "max_tokens": 2}
    job = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(job))
    said = run(python, "-I", "-c", BATCH, tmp_path / "in", tmp_path / "out", simulator.url)
    assert said.startswith("BatchReport(total=1, resumed=0, failed=0")
    assert json.loads((tmp_path / "out").read_text())["custom_id"] == "one"


USER = """
import asyncio

from bullpen.client import BullpenClient, VLLMManager, run_batch


async def main() -> None:
    async with VLLMManager("http://127.0.0.1:8000") as manager, manager.run("org/model") as launch:
        one = await manager.complete(launch.launch_id, prompt="Hello", max_tokens=4)
        several = await manager.complete(launch.launch_id, ["Hello"])
        text: str = one.text + several[0].text
        report = await run_batch("in", "out", base_url="http://127.0.0.1:8000")
        print(text, report.failed + 1, [one.instance_id.upper() for one in BullpenClient().list().instances])


asyncio.run(main())
"""


def mypy(python: Path, folder: Path, program: str, code: int) -> str:
    """What mypy says of a program that its user's editor would check with that interpreter."""
    file = folder / "user.py"
    file.write_text(program)
    options = ("--strict", "--config-file=", "--no-error-summary", "--cache-dir", folder / "cache")
    return run(sys.executable, "-m", "mypy", *options, "--python-executable", python, file, code=code)


@pytest.mark.slow
def test_types_are_found(python: Path, tmp_path: Path) -> None:
    assert mypy(python, tmp_path, USER, 0) == ""
    wrong = mypy(python, tmp_path, USER.replace("one.text + several", "one.prompt_tokens + several"), 1)
    assert 'Unsupported operand types for + ("int" and "str")' in wrong
