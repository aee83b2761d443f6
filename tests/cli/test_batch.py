"""``bullpen batch run``: with simulators of a real daemon, through kills of the command, the server and the daemon."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.cli import main
from bullpen.client import BullpenClient
from tests.cli.jobs import Work, answered, ids, running, start
from tests.cli.terminal import Terminal, bullpen
from tests.support.daemon import Daemon, wait_until

Open = Callable[..., Terminal]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [["batch"], ["batch", "--help"], ["batch", "run", "--help"]])
def test_help_has_an_example(nobody: None, capsys: Captured, words: list[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "  bullpen batch run jobs.jsonl -o out.jsonl" in shown.out and "Example" in shown.out and shown.err == ""


def test_help_has_the_exit_codes(nobody: None, capsys: Captured) -> None:
    assert main(["batch", "run", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Exit codes:" in shown and all(f"  {code} " in shown for code in (0, 1, 2, 3, 130))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run"], "bullpen batch run --help"),
        (["run", "jobs", "-o", "out"], "--model"),
        (["run", "jobs", "-o", "out", "-m", "m", "-c", "0"], "--concurrency"),
        (["run", "jobs", "-o", "out", "-m", "m", "--", "--model", "n"], "the model is named twice"),
    ],
)
def test_wrong_usage_is_one_line(nobody: None, capsys: Captured, words: list[str], hint: str) -> None:
    assert main(["batch", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("bullpen: ") and shown.err.count("\n") == 1 and hint in shown.err


def test_nobody_there(nobody: None, capsys: Captured, tmp_path: Path) -> None:
    assert main(Work(tmp_path, 1).words("--url", "127.0.0.1:9")) == 1
    assert capsys.readouterr().err.startswith("bullpen: no Bullpen answers at http://127.0.0.1:9; ")


# -- the whole run -------------------------------------------------------------------------------------------------


def test_results_are_in_the_order_of_the_jobs(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    url, work = start(client), Work(tmp_path)
    work.write(*({"prompt": f"p {number}", "max_tokens": 1 + 9 * (number % 5)} for number in range(100)))
    assert main(work.words("-c", "16")) == 0
    work.check(100)
    for number, result in enumerate(work.results):
        assert set(result) == {"id", "custom_id", "response", "error"} and result["error"] is None
        assert set(result["response"]) == {"status_code", "request_id", "body"}
        body = result["response"]["body"]
        assert body["usage"]["completion_tokens"] == 1 + 9 * (number % 5) and body["model"] == "org/tiny"
    assert answered(url) == 100
    assert ids(client) == ["m"], "what ran before runs on"


def test_progress_without_a_terminal_is_a_few_lines(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    start(client)
    work = Work(tmp_path, 200)
    assert main(work.words()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [f"{number} of 200" for number in range(20, 201, 20)]
    assert all("/s" in line for line in lines) and "\x1b" not in "".join(lines)
    assert last.startswith("✓ 200 requests done in ") and str(work.out) in last


def test_progress_on_a_terminal_has_rate_and_time_left(
    client: BullpenClient, open_terminal: Open, tmp_path: Path
) -> None:
    start(client, tokens_per_second=20)
    terminal = open_terminal(*Work(tmp_path, 40).words("-c", "4"))
    terminal.wait_for("jobs.jsonl → out.jsonl")
    shown = terminal.wait_for("s left")
    assert " of 40  " in shown and ("/s  about" in shown or "/min  about" in shown)
    terminal.wait_for("✓ 40 requests done")
    assert terminal.end() == 0


def test_json_is_one_document(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    start(client)
    work = Work(tmp_path, 3)
    assert main(work.words("--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("seconds") > 0
    assert document == {
        "input": str(work.jobs),
        "output": str(work.out),
        "model": "m",
        "instance_id": "m",
        "total": 3,
        "succeeded": 3,
        "failed": 0,
        "resumed": 0,
    }


def test_requests_that_fail_are_told_and_exit_code_3(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    start(client)
    work = Work(tmp_path)
    work.write({"prompt": "a"}, {"prompt": ""}, {"prompt": "c"})
    assert main(work.words()) == 3
    assert [one["response"]["status_code"] for one in work.results] == [200, 400, 200]
    assert "1 of 3 failed" in capsys.readouterr().out


def test_job_that_is_done_asks_for_nothing(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    url, work = start(client), Work(tmp_path, 3)
    assert main(work.words()) == 0
    before = work.out.read_bytes()
    assert main(work.words("--json", model="another/model")) == 0
    assert "✓ 3 requests are done" in capsys.readouterr().err
    assert work.out.read_bytes() == before and answered(url) == 3 and ids(client) == ["m"]


# -- who does it ---------------------------------------------------------------------------------------------------


def test_model_that_is_served_is_used(client: BullpenClient, tmp_path: Path) -> None:
    url, work = start(client), Work(tmp_path, 3)
    assert main(work.words(model="org/tiny")) == 0
    work.check(3)
    assert answered(url) == 3 and ids(client) == ["m"]


@pytest.mark.parametrize("state", ["sleeping", "stopped"])
def test_server_that_is_not_up_is_made_ready(client: BullpenClient, tmp_path: Path, state: str) -> None:
    client.create("--model org/tiny", instance_id="m", sleep="engine")
    client.wait_until_ready("m", 30)
    if state == "sleeping":
        client.sleep("m")
    else:
        os.kill(client.get("m").pid or 0, signal.SIGKILL)
        wait_until(lambda: client.get("m").ended)
    work = Work(tmp_path, 3)
    assert main(work.words()) == 0
    work.check(3)


def test_model_is_launched_and_stopped_afterwards(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path, 5)
    assert main(work.words("--", "--seed", "1", model="org/new")) == 0
    work.check(5)
    assert {one["response"]["body"]["model"] for one in work.results} == {"org/new"}
    shown = capsys.readouterr().out
    assert "new is ready in" in shown and "new was launched for this and is stopped." in shown
    assert ids(client) == []


def test_launch_that_fails_says_why_and_costs_nothing(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path, 2)
    assert main(work.words("--", "--bogus", model="org/new")) == 1
    assert "--bogus" in capsys.readouterr().err
    assert ids(client) == [] and not work.out.exists() and not work.partial.exists()


def test_key_of_the_server_itself(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    client.create("--model org/tiny --api-key secret", instance_id="m")
    client.wait_until_ready("m", 30)
    work = Work(tmp_path, 2)
    assert main(work.words()) == 1
    assert "wants another access key" in capsys.readouterr().err
    assert main(work.words("--api-key", "secret")) == 0
    work.check(2)


# -- wrong input ---------------------------------------------------------------------------------------------------


def test_wrong_lines_are_told_before_anything_is_done(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path, 3)
    first, second, third = work.jobs.read_text().splitlines()
    work.jobs.write_text(f"{first}\n{second[:-1]}\n\n{third.replace('POST', 'GET')}\n")
    assert main(work.words(model="org/new")) == 2
    shown = capsys.readouterr()
    head, *lines = shown.err.splitlines()
    assert head == f"bullpen: {work.jobs} has 2 mistakes; nothing was sent:"
    assert "  line 2: this is no JSON" in lines[0] and lines[1].startswith("  line 4: the method is 'GET'")
    assert shown.out == "" and ids(client) == []
    assert [one.name for one in tmp_path.iterdir()] == ["jobs.jsonl"]


def test_missing_input(nobody: None, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path)
    work.jobs.unlink()
    assert main(work.words()) == 2
    assert capsys.readouterr().err == f"bullpen: {work.jobs} cannot be read: No such file or directory\n"


def test_output_that_cannot_be_written(nobody: None, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path, 1)
    for wrong, said in ((tmp_path, "is no file for results"), (tmp_path / "no" / "out", "cannot be written: No such")):
        work.out = wrong
        assert main(work.words()) in (1, 2)
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and str(wrong) in shown and said in shown


def test_output_that_grows_too_large_ends_the_job_and_loses_nothing(client: BullpenClient, tmp_path: Path) -> None:
    url, work = start(client), Work(tmp_path, 60)
    limit = (4000, resource.RLIM_INFINITY)
    done = bullpen(*work.words("-c", "4"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"bullpen: {work.partial} cannot be written: File too large."
        " Make that possible, and run the job again: it goes on where it is\n"
    )
    kept = work.kept
    assert 0 < kept < 60
    asked = answered(url)
    assert main(work.words()) == 0
    work.check(60)
    assert answered(url) - asked in range(60 - kept, 60 - kept + 5)


# -- kills ---------------------------------------------------------------------------------------------------------


def test_killed_command_goes_on_where_it_was(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    url, work = start(client, tokens_per_second=50), Work(tmp_path, 150)
    for _ in range(3):
        before = work.kept
        with work.running("-c", "4") as process:
            wait_until(lambda least=before + 5: work.kept >= least)  # type: ignore[misc]
            process.kill()
    kept = work.kept
    assert 15 <= kept < 150 and not work.out.exists()
    wait_until(lambda: running(url) == 0)
    asked = answered(url)
    assert main(work.words("--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["resumed"] == kept
    assert f"{kept} of 150 requests were done before" in captured.err
    work.check(150)
    assert answered(url) - asked == 150 - kept, "nothing is done twice"


def test_killed_command_leaves_a_launch_that_the_next_one_uses_and_stops(
    client: BullpenClient, tmp_path: Path, capsys: Captured
) -> None:
    work = Work(tmp_path, 60, max_tokens=40)
    with work.running("-c", "2", model="org/new") as process:
        process.kill()
    assert ids(client) == ["new"]
    pid = client.get("new").pid
    assert main(work.words(model="org/new")) == 0
    work.check(60)
    assert "new was launched for this and is stopped." in capsys.readouterr().out
    assert ids(client) == [] and pid is not None


def test_server_that_is_killed_is_started_again(client: BullpenClient, tmp_path: Path) -> None:
    start(client, tokens_per_second=50)
    work = Work(tmp_path, 120)
    with work.running("-c", "4") as process:
        first = client.get("m").pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "m is failed (" in shown and "m is ready again" in shown and said == ""
    work.check(120)
    assert client.get("m").pid != first


def test_server_that_is_deleted_ends_the_job_which_goes_on_later(client: BullpenClient, tmp_path: Path) -> None:
    start(client, tokens_per_second=50)
    work = Work(tmp_path, 120)
    with work.running("-c", "4") as process:
        client.delete("m")
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "'m'" in said and said.startswith("bullpen: ") and said.count("\n") == 1
    kept = work.kept
    url = start(client)
    assert main(work.words()) == 0
    work.check(120)
    assert answered(url) == 120 - kept


def test_killed_daemon_takes_nothing_along(start_daemon: Callable[..., Daemon], nobody: None, tmp_path: Path) -> None:
    daemon = start_daemon().wait_warm()
    daemon.create("--model org/tiny", instance_id="m", env_vars={"BULLPEN_SIM_TOKENS_PER_SECOND": "50"})
    daemon.wait_state("m", "ready")
    work = Work(tmp_path, 120)
    with work.running("-c", "4", "--url", daemon.url) as process:
        daemon.kill()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    work.check(120)
    start_daemon(daemon.state_dir).end()


def test_ctrl_c_says_how_to_go_on_and_stops_what_was_launched(
    client: BullpenClient, open_terminal: Open, tmp_path: Path
) -> None:
    work = Work(tmp_path, 100, max_tokens=100)
    terminal = open_terminal(*work.words("-c", "2", model="org/new"))
    wait_until(lambda: work.kept >= 5)
    terminal.type("\x03")
    terminal.wait_for("of 100 requests are done; run the same command again, and it goes on")
    assert terminal.end() == 130
    assert ids(client) == [] and not work.out.exists()
    kept = work.kept
    url = start(client)
    assert main(work.words()) == 0
    work.check(100)
    assert answered(url) == 100 - kept


def test_ctrl_c_while_it_is_launched(client: BullpenClient, open_terminal: Open, tmp_path: Path) -> None:
    start(client, "other")
    work = Work(tmp_path, 3)
    terminal = open_terminal(*work.words("--", "--max-model-len", "64", model="org/new"))
    wait_until(lambda: "new" in ids(client) or terminal.process.poll() is not None)
    terminal.type("\x03")
    assert terminal.end() in (0, 130)
    assert ids(client) == ["other"]


def test_two_commands_cannot_do_the_same_job(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    start(client, tokens_per_second=50)
    work = Work(tmp_path, 100)
    with work.running("-c", "2"):
        assert main(work.words()) == 1
        assert f"another job is writing {work.out}" in capsys.readouterr().err
