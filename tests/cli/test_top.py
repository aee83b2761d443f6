"""``bullpen top``: one frame, the data, and the live view with its ways out."""

import json
import sys
from collections.abc import Callable

import pytest

from bullpen.cli import main
from bullpen.client import BullpenClient
from tests.cli.terminal import Terminal
from tests.support.daemon import Daemon

Open = Callable[..., Terminal]
ALTERNATE, BACK = b"\x1b[?1049h", b"\x1b[?1049l"


def test_one_frame(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.create("--model org/a", instance_id="a", gpu_uuids=["1"])
    client.wait_until_ready("a", 30)
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert client.url in shown[0] and "1 ready" in shown[0]
    assert [line.split()[0] for line in shown[3:6]] == ["GPU", "0", "1"]
    assert shown[5].split()[-2:] == ["a", "-"] and "mock" in shown[5]
    assert any(line.split()[:4] == ["a", "org/a", "ready", "1"] for line in shown)


def test_data_for_programs(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.create("--model a", instance_id="a")
    client.wait_until_ready("a", 30)
    assert main(["top", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["instance_id"] for one in document["instances"]] == ["a"]
    assert [gpu["index"] for gpu in document["gpus"]] == [0, 1] and "available_mib" in document["host"]


def test_live_view_needs_a_terminal(client: BullpenClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 2
    assert "--once" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("\x03", 130)])
def test_live_view_follows_what_happens_and_leaves_cleanly(
    client: BullpenClient, open_terminal: Open, key: str, code: int
) -> None:
    terminal = open_terminal("top")
    terminal.wait_for("No instances.")
    client.create("--model org/a", instance_id="newcomer", gpu_uuids=["0"])
    terminal.wait_for("newcomer  org/a  ready")
    terminal.type("x")
    terminal.type(key)
    assert terminal.end() == code
    assert terminal.raw.count(ALTERNATE) == terminal.raw.count(BACK) == 1
    assert "Traceback" not in terminal.text and "Exception" not in terminal.text


def test_view_outlives_its_daemon(start_daemon: Callable[..., Daemon], nobody: None, open_terminal: Open) -> None:
    daemon = start_daemon().wait_warm()
    terminal = open_terminal("top", "--url", daemon.url)
    terminal.wait_for("No instances.")
    daemon.kill()
    terminal.wait_for("! no Bullpen answers at")
    terminal.type("q")
    assert terminal.end() == 0


def test_keys_are_as_before_when_it_ends(client: BullpenClient, open_terminal: Open) -> None:
    code = (
        "import termios, sys\n"
        "from bullpen.cli import main\n"
        "before = termios.tcgetattr(0)\n"
        "main(['top'])\n"
        "print('same' if termios.tcgetattr(0) == before else 'changed', flush=True)"
    )
    terminal = open_terminal(command=[sys.executable, "-c", code])
    terminal.wait_for("No instances.")
    terminal.type("q")
    terminal.wait_for("same")
