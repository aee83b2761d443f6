"""The command line as a whole: help, usage errors, exit codes, early answers."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bullpen import __version__
from bullpen.cli import COMMANDS, main
from bullpen.client import BullpenClient
from bullpen.daemon import serve as daemon
from bullpen.node.settings import Settings
from tests.cli.terminal import COMMAND, bullpen
from tests.support.daemon import Daemon


def test_version_by_module_and_by_option() -> None:
    assert bullpen("--version").stdout == f"bullpen {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  bullpen {name}" in shown and "Example" in shown


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["ps", "--bogus"], "bullpen ps --help"),
        (["bogus"], "bullpen --help"),
        (["run", "m", "--max-model-len", "9"], "behind `--`"),
        (["run", "m", "--env", "X"], "NAME=VALUE"),
        (["run"], "MODEL"),
        (["run", "m", "--", "--model", "n"], "the model is named twice"),
        (["run", "m", "--", "--model=n"], "the model is named twice"),
        (["stop"], "--all"),
        (["stop", "a", "--all"], "give ids, or --all, not both"),
        (["logs", "a", "-f", "--json"], "--json"),
        (["logs", "a", "--tail", "-1"], "--tail"),
        (["validate", "m", "--max-model-len", "9"], "bullpen validate MODEL -- "),
        (["validate", "m", "--", "--model", "n"], "the model is named twice"),
        (["run", "m", "--sleep-after", "soon"], "--sleep-after is a number of seconds"),
        (["run", "m", "--sleep", "deep"], "--sleep"),
        (["run", "m", "--gpus", "0"], "--gpus"),
        (["sleep"], "ID"),
        (["sleep", "a", "--level", "3"], "--level"),
        (["swap", "a", "b", "a"], "a cannot come in and go out"),
        (["serve", "--port", "99999"], "port"),
        (["serve", "--mock-gpu-count", "2"], "give --mock-gpus too"),
        (["serve", "--mock-gpu-memory", "2"], "give --mock-gpus too"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], nobody: None, arguments: list[str], hint: str
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("bullpen: ") and shown.err.count("\n") == 1 and hint in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["ps"],
        ["logs", "a"],
        ["stop", "a"],
        ["run", "m"],
        ["run", "m", "--json"],
        ["sleep", "a"],
        ["wake", "a"],
        ["swap", "a", "b"],
        ["swap", "a", "--json"],
        ["explain", "a"],
        ["top", "--once"],
        ["top", "--json"],
        ["validate", "m"],
    ],
)
def test_nobody_there_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], nobody: None, arguments: list[str]
) -> None:
    assert main([*arguments, "--url", "127.0.0.1:9"]) == 1
    shown = capsys.readouterr()
    advice = "check that URL first, or start a daemon with `bullpen serve`"
    assert shown.err == f"bullpen: no Bullpen answers at http://127.0.0.1:9; {advice}\n"
    assert shown.out == ""


def test_nobody_where_a_daemon_was_found_before(
    capsys: pytest.CaptureFixture[str], nobody: None, tmp_path: Path
) -> None:
    (tmp_path / "nobody").mkdir()
    (tmp_path / "nobody" / "url").write_text("http://127.0.0.1:9")
    assert main(["ps"]) == 1
    advice = "start one with `bullpen serve`, or name it with --url or BULLPEN_URL"
    assert capsys.readouterr().err == f"bullpen: no Bullpen answers at http://127.0.0.1:9; {advice}\n"


def test_reader_that_goes_away_is_no_error(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_LOG_BYTES": "3000000"})
    client.wait_until_ready("a", 30)
    process = subprocess.Popen([*COMMAND, "logs", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


# -- serve ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, nobody: None) -> list[Settings]:
    """The settings that daemons would have been started with."""
    found: list[Settings] = []

    def serve(settings: Settings) -> int:
        found.append(settings)
        return 7

    monkeypatch.setattr(daemon, "serve", serve)
    return found


def test_every_setting_is_a_flag() -> None:
    flags = set(inspect.signature(COMMANDS["serve"]).parameters)
    assert flags == {*Settings.model_fields, "config"} - {"access_key"}


def test_flags_go_before_environment_before_file(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "bullpen.yaml"
    file.write_text("port: 1\nspares: 1\nlog-cap: 1\nmock_gpus: true\nallow-env: [A, B]\n")
    monkeypatch.setenv("BULLPEN_PORT", "2")
    monkeypatch.setenv("BULLPEN_SPARES", "2")
    assert main(["serve", "--config", str(file), "--port", "3"]) == 7
    settings = served[0]
    assert (settings.port, settings.spares, settings.log_cap, settings.host) == (3, 2, 1, "0.0.0.0")
    assert settings.mock_gpus and settings.allow_env == ("A", "B")


def test_flags_arrive_as_they_were_given(served: list[Settings], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = {
        "host": "127.0.0.1",
        "port": 0,
        "grpc-port": 0,
        "grpc-tls-cert": tmp_path / "certificate",
        "grpc-tls-key": tmp_path / "key",
        "state-dir": tmp_path,
        "engine": "sim",
        "engine-python": sys.executable,
        "access-key-file": key,
        "instance-host": "::1",
        "mock-gpu-count": 3,
        "mock-gpu-memory": 1000,
        "sleep-timeout": 3.5,
        "wake-timeout": 4.5,
        "drain": 5.5,
        "memory-timeout": 6.5,
        "turn-timeout": 7.5,
        "stop-timeout": 1.5,
        "start-timeout": 2.5,
        "on-exit": "keep",
        "spares": 0,
        "log-level": "debug",
        "log-cap": 0,
        "log-dir": tmp_path / "logs",
        "log-chunk": 8,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    switches = ["--mock-gpus", "--allow-unauthenticated", "--allow-env", "LD_PRELOAD", "--allow-env", "PATH"]
    assert main(["serve", *words, *switches]) == 7
    found: dict[str, Any] = served[0].model_dump()
    assert {name: found[name.replace("-", "_")] for name in given} == given
    assert found["mock_gpus"] and found["allow_unauthenticated"]
    assert found["allow_env"] == ("LD_PRELOAD", "PATH") and found["access_key"] == "secret"


def test_serve_serves(shared: Daemon, tmp_path: Path) -> None:
    command = [*COMMAND, "serve", "--engine", "sim", "--port", "0"]
    with Daemon(tmp_path / "own", command=command, port=1).wait_ready().wait_warm() as own:
        assert own.create()["engine"] == "sim"
        own.wait_line("bullpen: engine sim warm in ")


def test_port_of_another_daemon_is_told(shared: Daemon, nobody: None, tmp_path: Path) -> None:
    port = shared.url.rpartition(":")[2]
    command = ["serve", "--engine", "sim", "--host", "127.0.0.1", "--state-dir", str(tmp_path), "--port", port]
    done = bullpen(*command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["bullpen: another Bullpen daemon has that port"]


def test_serve_imports_nothing_for_people() -> None:
    code = (
        "import sys, bullpen.daemon.serve\n"
        "bullpen.daemon.serve.serve = lambda settings: 0\n"
        "from bullpen.cli import main\n"
        "assert main(['serve', '--engine', 'sim']) == 0\n"
        "import gc\n"
        "assert gc.isenabled()\n"
        "print([name for name in ('rich', 'httpx', 'psutil', 'bullpen.client') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "[]\n"
