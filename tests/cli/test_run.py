"""``bullpen run``: on a terminal, without one, to a good end and to a bad one, and Ctrl-C in between."""

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from bullpen.cli import main
from bullpen.client import BullpenClient
from tests.cli.terminal import COMMAND, Terminal
from tests.support.daemon import Daemon, wait_until

Open = Callable[..., Terminal]


def ids(client: BullpenClient) -> list[str]:
    return [instance.instance_id for instance in client.list().instances]


def test_detached_run_leaves_a_server_that_answers_the_curl_line(
    client: BullpenClient, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"A": "b=c", "BULLPEN_SIM_START_SECONDS": "0.8"}
    given = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    assert main(["run", "org/tiny", "-d", *given, "--engine", "sim", "--", "--served-model-name", "it's"]) == 0
    shown = capsys.readouterr().out
    assert "tiny is ready in" in shown and shown.count("weights") == 1, "a line for each phase, and no table"
    instance = client.get("tiny")
    assert instance.env_vars == variables and instance.model == "org/tiny"
    assert f"It answers at {instance.url}\n" in shown
    curl = shlex.split(shown[shown.index("curl ") :].partition("\n\n")[0])
    header = dict([curl[curl.index("-H") + 1].split(": ")])
    reply = httpx.post(curl[1], headers=header, content=curl[curl.index("-d") + 1])
    assert reply.status_code == 200 and reply.json()["model"] == "it's"


def test_names_are_free_ones_and_an_id_is_taken_as_given(
    client: BullpenClient, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["m"], ["m"], ["m", "--id", "other"]):
        assert main(["run", *arguments, "-d"]) == 0
    assert ids(client) == ["m", "m-2", "other"]
    assert main(["run", "m", "-d", "--id", "other"]) == 1
    shown = capsys.readouterr().err
    assert "'other' exists" in shown and "`bullpen stop other` deletes it" in shown


@pytest.mark.parametrize("name", ["a b", "a/b", ".a", "watch"])
def test_wrong_id_is_told_the_rule(client: BullpenClient, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["run", "m", "-d", "--id", name]) == 1
    shown = capsys.readouterr().err
    assert "1 to 128 of A-Z a-z 0-9 . _ -" in shown and shown.count("\n") == 1


def test_folder_of_a_model_goes_by_its_full_path(
    client: BullpenClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["run", "./my model", "-d", "--json"]) == 0
    assert client.get("my-model").model == str(tmp_path / "my model")


def test_json_is_one_document(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "-d", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    now = dict(client.get("m").document)
    for measured_later in (document, now):
        measured_later.pop("memory", None)
    assert document == now and document["state"] == "ready"


def test_json_of_a_failed_start_has_the_error(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "--json", "-e", "BULLPEN_SIM_FAIL=start"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == client.get("m").document["error"]


def test_failed_start_shows_the_log_and_last_says_why(
    client: BullpenClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "m", "-e", "BULLPEN_SIM_FAIL=start"]) == 1
    error = client.get("m").error
    *excerpt, last = capsys.readouterr().err.splitlines()
    assert error is not None and error.kind == "error"
    assert last.startswith(f"bullpen: m did not start: {error.message} (`bullpen logs m` has the log")
    assert "`bullpen stop m`" in last
    assert any("RuntimeError" in line for line in excerpt) and all(line.startswith("  | ") for line in excerpt)


def test_failure_that_is_explained_needs_no_log(client: BullpenClient) -> None:
    process = subprocess.Popen([*COMMAND, "run", "m"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("It answers at" in line for line in iter(process.stdout.readline, ""))
    pid = client.get("m").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    shown = process.communicate(timeout=30)[1]
    error = client.get("m").error
    assert error is not None and error.kind == "killed"
    assert process.returncode == 1 and shown.count("\n") == 1
    assert error.message in shown and "`bullpen logs m` has the log" in shown


def test_server_outlives_its_daemon_and_run_says_so(
    start_daemon: Callable[..., Daemon], nobody: None, tmp_path: Path
) -> None:
    daemon = start_daemon().wait_warm()
    process = subprocess.Popen(
        [*COMMAND, "run", "m", "--url", daemon.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any("It answers at" in line for line in iter(process.stdout.readline, ""))
    url = daemon.http.get("/v2/vllm/instances/m").json()["url"]
    daemon.kill()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and said.count("\n") == 1
    assert f"m goes on at {url}" in said and "the next `bullpen serve` adopts it" in said
    start_daemon(daemon.state_dir).end()


def test_refused_options_are_one_line(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m", "--", "--bogus"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--bogus" in shown
    assert ids(client) == []


@pytest.mark.parametrize(("code", "expected", "said"), [(0, 0, "has ended by itself"), (3, 1, "bullpen: m failed")])
def test_run_stays_until_the_server_ends(
    client: BullpenClient, capsys: pytest.CaptureFixture[str], code: int, expected: int, said: str
) -> None:
    ends = ["-e", "BULLPEN_SIM_EXIT_AFTER=0.3", "-e", f"BULLPEN_SIM_EXIT_CODE={code}"]
    assert main(["run", "m", *ends]) == expected
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert client.get("m").exit_code == code


def test_terminal_shows_the_start_live(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "org/tiny", "-e", "BULLPEN_SIM_START_SECONDS=0.8")
    terminal.wait_for("tiny is starting")
    terminal.wait_for("▸ weights")
    terminal.wait_for(" %")
    shown = terminal.wait_for("tiny is ready for")
    assert "✓ KV cache" in shown and f"It answers at {client.get('tiny').url}" in shown
    client.delete("tiny")
    terminal.wait_for("tiny was stopped.")
    assert terminal.end() == 0


def test_removal_by_somebody_else_before_it_is_ready_is_a_failure(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "m", "-d", "-e", "BULLPEN_SIM_START_SECONDS=30")
    terminal.wait_for("m is starting")
    client.delete("m")
    terminal.wait_for("m was stopped before it was ready.")
    assert terminal.end() == 1


def test_ctrl_c_offers_to_stop_it(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "m")
    terminal.wait_for("m is ready for")
    terminal.type("\x03")
    terminal.wait_for("Stop it? [Y/n]")
    terminal.type("\n")
    terminal.wait_for("m stopped.")
    assert terminal.end() == 130
    assert ids(client) == []


def test_ctrl_c_while_it_starts_and_no(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "m", "-e", "BULLPEN_SIM_START_SECONDS=30")
    terminal.wait_for("m is starting")
    terminal.type("\x03")
    terminal.wait_for("Stop it? [Y/n]")
    terminal.type("n\n")
    terminal.wait_for("`bullpen stop m` stops it.")
    assert terminal.end() == 130
    assert client.get("m").state == "starting"


def test_second_ctrl_c_ends_at_once(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "m")
    terminal.wait_for("m is ready for")
    terminal.type("\x03")
    terminal.wait_for("Stop it? [Y/n]")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert ids(client) == ["m"]


def test_second_ctrl_c_ends_a_stop_that_takes_long(client: BullpenClient, open_terminal: Open) -> None:
    terminal = open_terminal("run", "m", "-e", "BULLPEN_SIM_STUBBORN=2")
    terminal.wait_for("m is ready for")
    terminal.type("\x03")
    terminal.wait_for("Stop it? [Y/n]")
    terminal.type("\n")
    wait_until(lambda: client.get("m").state == "stopping")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert ids(client) == ["m"]


def test_without_a_terminal_ctrl_c_leaves_it_running(client: BullpenClient) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "m"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    shown = iter(process.stdout.readline, "")
    assert any("It answers at" in line for line in shown)
    process.send_signal(signal.SIGINT)
    assert "`bullpen stop m` stops it." in process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert client.get("m").state == "ready"
