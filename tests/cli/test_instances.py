"""``bullpen ps``, ``logs`` and ``stop``."""

import json
import os
import subprocess
from collections.abc import Callable

import pytest

from bullpen.cli import main
from bullpen.cli.ps import show
from bullpen.cli.tail import STEP, start_of_last_lines
from bullpen.client import BullpenClient, GpuReport, InstanceList, Readiness
from tests.cli.terminal import COMMAND, Terminal
from tests.support.daemon import wait_until

Output = pytest.CaptureFixture[str]


def create(client: BullpenClient, name: str, **env_vars: str) -> None:
    client.create(f"--model org/{name}", instance_id=name, env_vars=env_vars)


# -- ps ------------------------------------------------------------------------------------------------------------


def test_ps_with_nothing_says_what_to_do(client: BullpenClient, capsys: Output) -> None:
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == "No instances. `bullpen run MODEL` starts one.\n"
    assert main(["ps", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_ps_with_a_create_that_waits_does_not_say_what_to_do(capsys: Output) -> None:
    zygote = {"engine": "vllm", "state": "warming", "module": "torch", "done": 3, "total": 9}
    readiness = Readiness.read({"engine": "vllm", "waiting": 1, "zygotes": [zygote]})
    show(InstanceList.read({"instances": []}), readiness, GpuReport.read({"gpus": []}))
    assert capsys.readouterr().out.splitlines() == [
        "engine vllm is being imported: at torch, 3 of 9",
        "1 create waits to be started",
    ]


def test_ps_without_a_terminal_cuts_nothing(client: BullpenClient, capsys: Output) -> None:
    name = "long-" * 20 + "name"
    create(client, name)
    create(client, "b", BULLPEN_SIM_FAIL="start")
    ready = client.wait_until_ready(name, 30)
    for _ in client.follow_log("b"):
        pass
    assert main(["ps"]) == 0
    heading, first, second, error, *_ = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "MODEL", "STATE", "URL", "AGE", "START", "PID", "ENGINE"]
    assert first.split()[:4] == [name, f"org/{name}", "ready", ready.url] and str(ready.pid) in first
    assert second.split()[:4] == ["b", "org/b", "failed", "(1)"]
    ended = client.get("b")
    assert str(ended.url) not in second and str(ended.pid) not in second.split()
    failure = ended.error
    assert failure is not None and error == f"b: {failure.message}"


def test_ps_on_a_narrow_terminal_keeps_to_it(client: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    create(client, "long-" * 20 + "name")
    terminal = open_terminal("ps", columns=80)
    assert terminal.end() == 0
    lines = terminal.text.splitlines()
    assert len(lines) == 2 and all(len(line) <= 80 for line in lines)
    assert "http://127.0.0.1:" in lines[1] and "…" in lines[1]


def test_ps_for_programs(client: BullpenClient, capsys: Output) -> None:
    create(client, "a")
    create(client, "b")
    client.wait_until_ready("a", 30)
    client.wait_until_ready("b", 30)
    wait_until(lambda: all(instance.memory for instance in client.list().instances))
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == client.list().document
    assert main(["ps", "-q"]) == 0
    assert capsys.readouterr().out == "a\nb\n"


# -- logs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 1, 2, 5, 100_000])
def test_log_is_printed_as_it_is(client: BullpenClient, capfdbinary: pytest.CaptureFixture[bytes], tail: int) -> None:
    create(client, "a", BULLPEN_SIM_LOG_BYTES=str(3 * STEP), BULLPEN_SIM_EXIT_AFTER="0", BULLPEN_SIM_EXIT_CODE="0")
    whole = b"".join(client.follow_log("a"))
    assert main(["logs", "a"]) == 0
    assert capfdbinary.readouterr().out == whole
    assert main(["logs", "a", "--tail", str(tail)]) == 0
    lines = whole.splitlines(keepends=True)
    assert capfdbinary.readouterr().out == b"".join(lines[len(lines) - min(tail, len(lines)) :])


class OneLog:
    """Stands for a client whose only log is ``data``, of which the first ``gone`` bytes were dropped."""

    def __init__(self, data: bytes, gone: int = 0) -> None:
        self._data, self._gone = data, gone

    def log_chunk(self, instance_id: str, start: int = 0, end: int | None = None) -> tuple[bytes, int, int]:
        from bullpen.client import LogChunk

        first = max(start, self._gone)
        last = len(self._data) if end is None else end
        return LogChunk(self._data[first : max(first, last)], first, len(self._data))


@pytest.mark.parametrize(
    ("data", "lines", "start"),
    [
        (b"", 3, 0),
        (b"a", 1, 0),
        (b"a\n", 1, 0),
        (b"a\nb", 1, 2),
        (b"a\nb\n", 1, 2),
        (b"a\n\n\n", 2, 2),
        (b"a\nb\nc", 2, 2),
        (b"a\nb\nc", 0, 5),
        (b"x" * (3 * STEP), 1, 0),
        (b"a\n" + b"x" * (2 * STEP) + b"\n", 1, 2),
        (b"a\n" + b"x" * (2 * STEP - 2) + b"\nb\n", 2, 2),
    ],
)
def test_last_lines_begin_there(data: bytes, lines: int, start: int) -> None:
    assert start_of_last_lines(OneLog(data), "a", lines) == start  # type: ignore[arg-type]


@pytest.mark.parametrize("gone", [1, STEP // 2, STEP + 1, 3 * STEP])
def test_last_lines_of_a_log_whose_beginning_is_gone(gone: int) -> None:
    data = b"x" * (3 * STEP)
    assert start_of_last_lines(OneLog(data, gone), "a", 4) == gone  # type: ignore[arg-type]


def test_log_is_followed(client: BullpenClient) -> None:
    create(client, "a", BULLPEN_SIM_START_SECONDS="0.5", BULLPEN_SIM_EXIT_AFTER="0.2", BULLPEN_SIM_EXIT_CODE="0")
    done = subprocess.run([*COMMAND, "logs", "a", "-f"], capture_output=True, timeout=30, check=True)
    assert done.stdout == b"".join(chunk.data for chunk in client.log_chunks("a"))
    assert done.stderr == b"bullpen: a has ended with exit code 0; this was its log\n"


def test_ctrl_c_ends_a_follow_quietly(client: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    create(client, "a")
    terminal = open_terminal("logs", "a", "-f")
    terminal.wait_for("startup complete")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text and "Abort" not in terminal.text


def test_log_for_programs(client: BullpenClient, capsys: Output) -> None:
    create(client, "a", BULLPEN_SIM_EXIT_AFTER="0", BULLPEN_SIM_EXIT_CODE="0")
    whole = b"".join(client.follow_log("a"))
    assert main(["logs", "a", "--json", "--tail", "1"]) == 0
    last = whole.decode().splitlines(keepends=True)[-1]
    assert json.loads(capsys.readouterr().out) == {"instance_id": "a", "log": last, "total": len(whole)}


@pytest.mark.parametrize(
    "arguments",
    [[verb, "nobody"] for verb in ("logs", "stop", "sleep", "wake", "swap", "explain")],
)
def test_unknown_instance_leads_to_the_list(client: BullpenClient, capsys: Output, arguments: list[str]) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err == "bullpen: no instance 'nobody'; `bullpen ps` lists those there are\n"


# -- stop ----------------------------------------------------------------------------------------------------------


def test_stop_some_and_say_which_are_unknown(client: BullpenClient, capsys: Output) -> None:
    for name in "abc":
        create(client, name)
    assert main(["stop", "a", "nobody", "b", "a"]) == 1
    shown = capsys.readouterr()
    assert sorted(line.partition(" (")[0] for line in shown.out.splitlines()) == ["a stopped", "b stopped"]
    assert "'nobody'" in shown.err
    assert [instance.instance_id for instance in client.list().instances] == ["c"]


def test_stop_all_and_then_nothing(client: BullpenClient, capsys: Output) -> None:
    create(client, "a", BULLPEN_SIM_EXIT_AFTER="0")
    create(client, "b")
    for _ in client.follow_log("a"):
        pass
    assert main(["stop", "--all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    words = {instance["instance_id"]: instance["status"] for instance in document["stopped_instances"]}
    assert words == {"a": "not_running", "b": "terminated"} and document["total_stopped"] == 2
    assert main(["stop", "--all"]) == 0
    assert capsys.readouterr().out == "Nothing to stop: there are no instances.\n"


@pytest.mark.parametrize("line", ["stop al", "sleep beta al", "wake al", "swap al", "swap beta al", "explain al"])
def test_shell_completion_knows_the_ids(client: BullpenClient, line: str) -> None:
    create(client, "alpha")
    create(client, "beta")
    environment = {
        **os.environ,
        "_BULLPEN_COMPLETE": "complete_bash",
        "COMP_WORDS": f"bullpen {line}",
        "COMP_CWORD": str(line.count(" ") + 1),
    }
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["alpha"]
