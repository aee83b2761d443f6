"""``python -m bench``: which benchmarks run, and what happens where one cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import __main__ as command
from bench import docs, gpu_common
from bench.common import Options, Progress, Result, UnavailableError
from bullpen.core.devices import Gpu, MemoryUse
from bullpen.errors import StateError

MODELS = ("org/model", "/models/other")


@pytest.mark.parametrize(
    ("words", "names", "models"),
    [
        ([], list(command.BENCHMARKS), ()),
        (["swap", "start"], ["swap", "start"], ()),
        (["gpu-sleep", *MODELS], ["gpu-sleep"], MODELS),
        (["swap", "gpu-sleep", MODELS[0], "start"], ["swap", "gpu-sleep", "start"], MODELS[:1]),
    ],
)
def test_words_are_benchmarks_and_the_models_of_gpu_sleep(
    words: list[str], names: list[str], models: tuple[str, ...]
) -> None:
    assert command.read_words(words) == (names, models)


@pytest.mark.parametrize("words", [["snap"], ["snap", "gpu-sleep"], ["start", "org/model"]])
def test_another_word_is_refused(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match="there is no benchmark"):
        command.read_words(words)


class Measurable:
    """A benchmark that needs nothing."""

    TITLE = "One that can be measured"

    @staticmethod
    def run(options: Options, progress: Progress) -> Result:
        progress.expect(1)
        progress.step("measuring")
        return Result(Measurable.TITLE, "By heart.", data={"models": options.gpu_models})


class Unmeasurable:
    """A benchmark that needs what is not here."""

    TITLE = "One that cannot"

    @staticmethod
    def run(options: Options, progress: Progress) -> Result:
        raise UnavailableError("there is no NVIDIA GPU here")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two benchmarks, and the page that is written from them."""
    monkeypatch.setattr(command, "BENCHMARKS", {"swap": Measurable, "gpu-sleep": Unmeasurable})
    monkeypatch.setattr(command, "LATEST", tmp_path / "latest.json")
    page = tmp_path / "performance.md"
    monkeypatch.setattr(docs.write, "__defaults__", (page,))
    return page


def test_a_benchmark_that_cannot_run_here_says_so_and_is_no_failure(tmp_path: Path, page: Path) -> None:
    application = typer.Typer()
    application.command()(command.main)
    output = CliRunner().invoke(application, ["--write-docs", "--json", str(tmp_path / "out.json")])
    assert output.exit_code == 0, output.output
    assert "gpu-sleep: not measured: there is no NVIDIA GPU here" in output.output
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["swap"]
    text = page.read_text()
    assert "## One that can be measured\n\nBy heart." in text
    assert "## One that cannot\n\nNot yet measured. `make bench ARGS=gpu-sleep`" in text


def test_the_newest_result_stays_where_it_cannot_be_measured_anew(tmp_path: Path, page: Path) -> None:
    earlier = {"title": "One that cannot", "method": "On another machine.", "tables": [], "goals": [], "data": {}}
    (tmp_path / "latest.json").write_text(json.dumps({"gpu-sleep": {**earlier, "machine": {}, "quick": False}}))
    application = typer.Typer()
    application.command()(command.main)
    assert CliRunner().invoke(application, ["gpu-sleep", "--write-docs"]).exit_code == 0
    assert "## One that cannot\n\nOn another machine." in page.read_text()


class Reader:
    """NVML, that says what it is told to."""

    def __init__(self, gpus: dict[str, int], driver: str | None = "575.51.03", problem: str = "") -> None:
        self.free = gpus
        self.driver = driver
        self.problem = problem

    def list_gpus(self) -> list[Gpu]:
        if self.problem:
            raise StateError(self.problem)
        return [Gpu(index, uuid, "H", 81920) for index, uuid in enumerate(self.free)]

    def memory(self, uuid: str) -> MemoryUse:
        return MemoryUse(81920, self.free[uuid])

    def driver_version(self) -> str | None:
        return self.driver


def test_the_gpu_with_the_most_free_memory_is_measured_on() -> None:
    device = gpu_common.find_device(Reader({"GPU-a": 100, "GPU-b": 300, "GPU-c": 200}))
    assert device.visible["CUDA_VISIBLE_DEVICES"] == "1"
    assert device.used_mib() == 81920 - 300
    assert gpu_common.describe(device) == "H (80 GiB), NVIDIA driver 575.51.03"


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (Reader({}), "no NVIDIA GPU"),
        (Reader({}, driver=None), "no NVIDIA GPU"),
        (Reader({}, problem="the NVIDIA driver does not answer"), "does not answer"),
    ],
)
def test_a_machine_without_a_gpu_that_works_is_told(reader: Reader, words: str) -> None:
    with pytest.raises(UnavailableError, match=words):
        gpu_common.find_device(reader)


@pytest.mark.parametrize(
    ("found", "words"),
    [("not installed", "is not installed"), ("2.13.0+cpu", "is a CPU build"), ("2.13.0+cu130", None)],
)
def test_a_cpu_build_will_not_do(monkeypatch: pytest.MonkeyPatch, found: str, words: str | None) -> None:
    monkeypatch.setattr(gpu_common, "version", lambda distribution: found)
    if words is None:
        gpu_common.require_cuda("torch")
    else:
        with pytest.raises(UnavailableError, match=words):
            gpu_common.require_cuda("torch")
