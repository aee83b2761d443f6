"""``bullpen doctor``: what it finds, where and on what it insists."""

import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bullpen.cli import main
from bullpen.cli.checks import Level, daemon, gpus, machine, software
from bullpen.cli.checks.software import Interpreter
from bullpen.client import BullpenClient, Gpu
from bullpen.core.devices import GpuProcess, MemoryUse
from bullpen.errors import StateError
from bullpen.node.mock_gpus import describe_mock
from bullpen.node.settings import Settings
from tests.support.daemon import Daemon, wait_until


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run it; return the exit code and the findings by subject."""
    code = main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0) == (document["problems"] == 0)
    return code, {finding["subject"]: finding for finding in document["findings"]}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, nobody: None) -> None:
    """Settings with which all is well."""
    monkeypatch.setenv("BULLPEN_ENGINE", "sim")
    monkeypatch.setenv("BULLPEN_PORT", "0")


def test_well_machine_is_well(simulated: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, findings = examine(capsys)
    assert code == 0
    assert "simulator" in findings["default engine"]["text"]
    assert {"Bullpen", "vLLM", "kernel", "cgroups", "open files", "memory", "/dev/shm", "disk"} <= set(findings)
    assert "bullpen serve" in findings["daemon"]["text"]


def test_people_read_it_too(simulated: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "✓ kernel" in shown and "\nMachine\n" in shown


def test_named_daemon_its_port_and_its_failed_instance_are_seen(
    client: BullpenClient, simulated: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BULLPEN_PORT", "8001")
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_FAIL": "start"})
    for _ in client.follow_log("a"):
        pass
    code, findings = examine(capsys)
    assert code == 0
    assert client.url in findings["daemon"]["text"]
    assert "a Bullpen listens" in findings[f"port {client.url.rpartition(':')[2]}"]["text"]
    assert (findings["a"]["level"], "bullpen logs a" in findings["a"]["advice"]) == ("warning", True)
    assert findings["instances"]["text"] == "1 failed"


@pytest.mark.parametrize("by", ["option", "variable"])
def test_named_daemon_that_does_not_answer_is_a_problem(
    simulated: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("BULLPEN_URL", "http://127.0.0.1:1")
    assert main(["doctor", "--json", *(["--url", "http://127.0.0.1:1"] if by == "option" else [])]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    told = {finding["subject"]: finding for finding in findings if finding["section"] == "Daemon"}
    assert set(told) == {"daemon"}, "nothing about the state directory and the port of this host"
    assert told["daemon"]["level"] == "problem" and "http://127.0.0.1:1;" in told["daemon"]["text"]


def test_port_of_another_program_is_a_problem(
    simulated: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("BULLPEN_PORT", str(port))
        monkeypatch.setenv("BULLPEN_HOST", "127.0.0.1")
        monkeypatch.setattr(daemon, "ANSWER_SECONDS", 0.2)
        code, findings = examine(capsys)
    assert code == 1
    assert findings[f"port {port}"]["level"] == "problem" and str(os.getpid()) in findings[f"port {port}"]["text"]


def test_missing_engine_and_interpreter_are_problems(
    nobody: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    monkeypatch.setenv("BULLPEN_ENGINE_PYTHON", str(empty))
    code, findings = examine(capsys)
    assert code == 1 and "make install" in findings["vLLM"]["advice"]
    monkeypatch.setenv("BULLPEN_ENGINE_PYTHON", str(tmp_path / "nothing"))
    code, findings = examine(capsys)
    assert code == 1 and "cannot be run" in findings["interpreter"]["text"]


def test_wrong_settings_are_a_problem(
    nobody: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BULLPEN_SPARES", "many")
    code, findings = examine(capsys)
    assert code == 1 and "SPARES" in findings["settings"]["text"].upper()


def test_state_directory_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = daemon.check_state_dir(tmp_path / "file" / "state")[0]
    assert finding.level is Level.PROBLEM and "--state-dir" in finding.advice


def test_state_directory_that_is_open_to_others_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert daemon.check_state_dir(tmp_path)[0].level is Level.WARNING
    tmp_path.chmod(0o700)
    assert daemon.check_state_dir(tmp_path)[0].level is Level.OK


def test_folder_for_logs_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    assert daemon.check_log_dir(tmp_path / "logs")[0].level is Level.OK
    (tmp_path / "file").write_text("")
    (finding,) = daemon.check_log_dir(tmp_path / "file" / "logs")
    assert finding.level is Level.PROBLEM and "--log-dir" in finding.advice


@pytest.mark.parametrize("elsewhere", [False, True])
def test_processes_of_a_killed_daemon_are_found(
    start_daemon: Callable[..., Daemon], tmp_path: Path, elsewhere: bool
) -> None:
    first = start_daemon(log_dir=tmp_path / "logs" if elsewhere else None).wait_warm()
    pid = first.create()["pid"]
    assert daemon.check_left_over(first.state_dir) == []
    first.kill()
    found = daemon.check_left_over(first.state_dir)
    assert [finding.level for finding in found] == [Level.WARNING] and str(pid) in found[0].text
    second = start_daemon(first.state_dir)
    assert daemon.check_left_over(first.state_dir) == []
    second.end()
    wait_until(lambda: daemon.check_left_over(first.state_dir) == [])


# -- GPUs ----------------------------------------------------------------------------------------------------------


def reported(count: int) -> list[Gpu]:
    return [gpus.as_reported(gpu, MemoryUse(81920, 80000), None) for gpu in map(describe_mock, range(count))]


@pytest.mark.parametrize(
    ("count", "platform", "levels"),
    [(0, "cpu", ["ok"]), (0, "cuda", ["warning"]), (2, "cuda", []), (1, "cpu", ["warning"])],
)
def test_gpus_and_the_build_of_vllm_must_fit(count: int, platform: str, levels: list[str]) -> None:
    real = [replace(gpu, name="NVIDIA H200") for gpu in reported(count)]
    findings = gpus.check_fit(real, Interpreter("3.11", "0.32", "2", platform))
    assert [finding.level for finding in findings] == levels


def test_mock_gpus_fit_every_build_of_vllm() -> None:
    assert gpus.check_fit(reported(2), Interpreter("3.11", "0.32", "2", "cpu")) == []


def test_strangers_that_hold_memory_and_silent_gpus_are_warnings() -> None:
    first, second = describe_mock(0), describe_mock(1)
    use = MemoryUse(81920, 80000, (GpuProcess(4711, 1920, "python3"), GpuProcess(12, None, "")))
    found = [gpus.as_reported(first, use, None), gpus.as_reported(second, None, "the driver does not say")]
    seen = [(finding.level, finding.text) for finding in gpus.describe(found, "end it")]
    assert [level for level, _ in seen] == ["ok", "warning", "warning", "warning"]
    assert "78.1 GiB of 80.0 GiB are free" in seen[0][1]
    assert seen[1][1].startswith("1.9 GiB held by process 4711 (python3)")
    assert seen[2][1].startswith("some memory held by process 12,")
    assert seen[3][1] == "the driver does not say"


class Library:
    """Stands for the driver's library."""

    def driver_version(self) -> str | None:
        return "570.1"

    def list_gpus(self) -> list[Any]:
        return [describe_mock(0)]

    def memory(self, uuid: str) -> MemoryUse:
        return MemoryUse(81920, 81000, (GpuProcess(4711, 920, "python3"),))


def test_gpus_are_looked_at_without_a_daemon(monkeypatch: pytest.MonkeyPatch, nobody: None) -> None:
    monkeypatch.setattr(gpus, "Nvml", Library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    findings = gpus.check_gpus(Settings(), None, "http://127.0.0.1:9", None)
    assert [(finding.subject, finding.level) for finding in findings] == [
        ("driver", "ok"),
        ("GPU 0", "ok"),
        ("GPU 0", "warning"),
    ]
    assert "570.1" in findings[0].text and "4711" in findings[2].text and "bullpen serve" in findings[2].advice


def test_driver_that_does_not_work_is_a_problem(monkeypatch: pytest.MonkeyPatch, nobody: None) -> None:
    class Broken(Library):
        def driver_version(self) -> str | None:
            raise StateError("the NVIDIA driver does not answer: version mismatch")

    monkeypatch.setattr(gpus, "Nvml", Broken)
    findings = gpus.check_gpus(Settings(), None, "http://127.0.0.1:9", None)
    assert [(finding.level, "mismatch" in finding.text) for finding in findings] == [("problem", True)]


def test_default_engine_is_explained() -> None:
    assert "settings" in software.check_default(Settings(engine="vllm")).text


def test_tight_limits_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1024))
    monkeypatch.setattr(machine, "own_limit", lambda name: 100 if name == "pids.max" else 1 << 28)
    for check in (machine.check_open_files, machine.check_processes, machine.check_memory):
        finding = check()
        assert finding.level is Level.WARNING and finding.advice
