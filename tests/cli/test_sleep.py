"""``bullpen sleep``, ``wake``, ``swap`` and ``explain``, and what ``ps`` and ``run`` tell of GPUs and sleep."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from bullpen.cli import main
from bullpen.cli.explain import report
from bullpen.cli.swapping import SwapDisplay, stage_times
from bullpen.client import BullpenClient, Event, Explanation, Swapped
from tests.cli.terminal import Terminal
from tests.support.daemon import Daemon, wait_until

Output = pytest.CaptureFixture[str]


def create(client: BullpenClient, name: str, gpu: str = "0", **fields: Any) -> None:
    client.create(f"--model org/{name}", instance_id=name, gpu_uuids=[gpu], **fields)
    client.wait_until_ready(name, 30)


@pytest.fixture
def pair(client: BullpenClient) -> BullpenClient:
    """``a`` sleeps on GPU 0, and ``b`` is awake there."""
    create(client, "a")
    client.sleep("a", 1)
    create(client, "b")
    return client


# -- sleep and wake ------------------------------------------------------------------------------------------------


def test_several_sleep_and_wake_side_by_side(client: BullpenClient, capsys: Output) -> None:
    create(client, "a", "0")
    create(client, "b", "1", sleep="emulate")
    assert main(["sleep", "a", "b", "a", "--level", "2", "--drain", "1", "--refuse"]) == 0
    shown = sorted(line.partition(" (0.")[0] for line in capsys.readouterr().out.splitlines())
    assert [line.rpartition(" (")[0] if line.endswith("ms)") else line for line in shown] == [
        "a sleeps at level 2",
        "b sleeps (emulated)",
    ]
    assert client.get("a").sleep_level == 2 and client.get("b").sleep_emulated
    assert main(["wake", "a", "b", "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)["instances"]
    assert {one["instance_id"]: one["state"] for one in documents} == {"a": "ready", "b": "ready"}


def test_refusals_are_the_daemons_sentence_and_exit_code_1(pair: BullpenClient, capsys: Output) -> None:
    client = pair
    client.create("--model c", instance_id="c", sleep="off")
    client.wait_until_ready("c", 30)
    assert main(["sleep", "c", "b"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("b sleeps at level 1 (") and shown.out.count("\n") == 1
    assert shown.err.startswith("bullpen: ") and "`--sleep engine`" in shown.err and shown.err.count("\n") == 1
    assert shown.err.endswith("; `bullpen stop c`, then `bullpen run … --sleep emulate` starts one that can\n")
    client.wake("b")
    assert main(["wake", "a"]) == 1
    shown = capsys.readouterr()
    assert "belongs to instance 'b'" in shown.err and "`bullpen swap a b` exchanges them" in shown.err


def test_new_instance_is_told_how_to_have_the_gpu(client: BullpenClient, capsys: Output) -> None:
    create(client, "a", "0")
    create(client, "b", "1", sleep="off")
    ways = {"0": "`bullpen sleep a` puts it to sleep", "1": "`bullpen stop b` deletes it"}
    for gpu, way in ways.items():
        assert main(["run", "m", "-d", "--gpu", gpu]) == 1
        shown = capsys.readouterr().err
        assert shown.endswith(f"; {way}\n") and shown.count("\n") == 1


def test_refusals_name_options_instead_of_fields(client: BullpenClient, capsys: Output) -> None:
    assert main(["run", "m", "-d", "--gpu", "9"]) == 1
    assert capsys.readouterr().err.startswith("bullpen: --gpu: no GPU '9' on this host")


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_ctrl_c_leaves_a_sleep_and_a_wake_alone(
    client: BullpenClient, open_terminal: Callable[..., Terminal], what: str
) -> None:
    slow = {"BULLPEN_SIM_SLEEP_SECONDS": "0.8", "BULLPEN_SIM_WAKE_SECONDS": "0.8"}
    create(client, "a", env_vars=slow)
    if what == "wake":
        client.sleep("a")
    terminal = open_terminal(what, "a")
    wait_until(lambda: client.get("a").activity is not None)
    terminal.type("\x03")
    terminal.wait_for(f"the {what} goes on; `bullpen explain a` tells how it ends")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
    wait_until(lambda: client.get("a").state == {"sleep": "sleeping", "wake": "ready"}[what])


# -- ps and run ----------------------------------------------------------------------------------------------------


def test_ps_tells_levels_gpus_and_memory(pair: BullpenClient, capsys: Output) -> None:
    wait_until(lambda: "awake" in pair.get("b").memory)
    assert main(["ps"]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()[:3]
    assert heading.split()[:6] == ["ID", "MODEL", "STATE", "GPU", "GPU", "MiB"]
    assert first.split()[:6] == ["a", "org/a", "sleeping", "1", "0", "64"]
    assert second.split()[:5] == ["b", "org/b", "ready", "0", "1024"]


@pytest.fixture
def stranger(shared: Daemon) -> Iterator[int]:
    """A process of no instance that holds 512 MiB on GPU 1: this one."""
    note = shared.state_dir / "mock-gpus" / "1" / str(os.getpid())
    note.write_text("512")
    yield os.getpid()
    note.unlink()


def test_strangers_on_gpus_are_named(
    client: BullpenClient, stranger: int, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"GPU 1: 512 MiB held by process {stranger} ("
    for command in (["ps"], ["top", "--once"]):
        assert main(command) == 0
        assert [one for one in capsys.readouterr().out.splitlines() if one.startswith(line)]
    monkeypatch.setenv("BULLPEN_ENGINE", "sim")
    monkeypatch.setenv("BULLPEN_MOCK_GPUS", "true")
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    told = [one for one in found if one["section"] == "GPUs" and str(stranger) in one["text"]]
    assert [(one["subject"], one["level"]) for one in told] == [("GPU 1", "warning")]


def test_run_passes_wishes_on(client: BullpenClient, capsys: Output) -> None:
    times = ["--sleep-after", "90s", "--discard-after", "5m", "--stop-after", "1h30m"]
    wishes = ["--gpus", "1", "--gpu-share", "0.5", "--sleep", "engine", "--pin", "--priority", "3"]
    assert main(["run", "m", "-d", "--json", *times, *wishes]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"gpus": 1, "gpu_share": 0.5, "sleep": "engine", "pin": True, "priority": 3}
    expected |= {"sleep_after": 90, "discard_after": 300, "stop_after": 5400}
    assert {name: document[name] for name in expected} == expected


def test_start_shows_what_is_left_of_it(client: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    for _ in range(2):  # the second one knows from the first how long it takes
        terminal = open_terminal("run", "org/slow", "-d", "-e", "BULLPEN_SIM_START_SECONDS=0.8")
        assert terminal.end() == 0
        client.delete("slow")
    assert " %  about " in terminal.text and " s left" in terminal.text


# -- swap ----------------------------------------------------------------------------------------------------------


def test_swap_tells_its_stages(pair: BullpenClient, capsys: Output) -> None:
    assert main(["swap", "a", "b"]) == 0
    *stages, ready, times = capsys.readouterr().out.splitlines()
    assert set(stages) <= {"out: b", "in: a"}
    assert ready.startswith("✓ a is ready in ")
    assert times.startswith("  out ") and ", in " in times and times.endswith("; b sleeps at level 1")
    assert pair.get("a").state == "ready"


def test_swap_chooses_what_goes_and_prints_one_document(pair: BullpenClient, capsys: Output) -> None:
    assert main(["swap", "a", "--level", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["in"]["instance_id"] == "a"
    assert [(one["instance_id"], one["sleep_level"]) for one in document["out"]] == [("b", 2)]


def test_swap_without_anything_to_do_says_so(client: BullpenClient, capsys: Output) -> None:
    create(client, "a")
    assert main(["swap", "a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "✓ a is ready already, nothing had to go"


def test_swap_on_a_terminal(pair: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("swap", "a", "b")
    assert terminal.end() == 0
    assert (
        "a comes in" in terminal.text and "✓ a is ready in " in terminal.text and "b sleeps at level 1" in terminal.text
    )


def test_ctrl_c_leaves_a_swap_alone(client: BullpenClient, open_terminal: Callable[..., Terminal]) -> None:
    create(client, "a", sleep="emulate", env_vars={"BULLPEN_SIM_START_SECONDS": "0.8"})
    client.sleep("a")
    create(client, "b")
    terminal = open_terminal("swap", "a", "b")
    terminal.wait_for("in: a")
    terminal.type("\x03")
    terminal.wait_for("the swap goes on; `bullpen explain a` tells how it ends")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
    wait_until(lambda: (client.get("a").state, client.get("b").state) == ("ready", "sleeping"))


def swap_event(stage: str, stages: dict[str, float], error: str | None = None) -> Event:
    about = {"revision": 1, "swap": 1, "in": "a", "out": ["b"], "stage": stage, "stages": stages, "error": error}
    return Event.read({"type": "SWAP", "object": about})


def display_lines(work: Callable[[SwapDisplay], None], **options: Any) -> list[str]:
    console = Console(width=80, highlight=False, color_system=None, **options)
    with console.capture() as capture, SwapDisplay(console, "a", []) as display:
        work(display)
    return capture.get().splitlines()


def test_swap_that_is_taken_back_says_why_in_a_line() -> None:
    def work(display: SwapDisplay) -> None:
        other = swap_event("out", {"out": 0.0})
        display.update(Event(other.type, 1, None, type(other.swap).read({**other.swap.document, "in": "x"})))  # type: ignore[union-attr]
        display.update(swap_event("out", {"out": 0.0}))
        display.update(swap_event("in", {"out": 0.0, "in": 0.5}))
        display.update(swap_event("in", {"out": 0.0, "in": 0.5}))
        display.update(swap_event("back", {"out": 0.0, "in": 0.5, "back": 0.9}, "no memory"))

    assert display_lines(work) == ["out: b", "in: a", "put back: b: no memory"]


def test_summary_of_a_swap() -> None:
    document = {"swap": 1, "seconds": 0.9, "stages": {"out": 0.0, "in": 0.4, "done": 0.9}}
    asleep = {"instance_id": "b", "state": "sleeping", "sleep_level": 2}
    swapped = Swapped.read({**document, "in": {"instance_id": "a", "state": "ready"}, "out": [asleep]})
    assert display_lines(lambda display: display.done(swapped)) == [
        "✓ a is ready in 0.90 s",
        "  out 0.40 s, in 0.50 s; b sleeps at level 2",
    ]


def test_stages_last_until_the_next_one() -> None:
    assert stage_times({"out": 0.0, "in": 0.4, "done": 1.0}, 1.1) == [("out", 0.4), ("in", 0.6)]
    assert stage_times({"out": 0.0, "in": 0.25}, 1.0) == [("out", 0.25), ("in", 0.75)]
    assert stage_times({}, None) == []


# -- explain -------------------------------------------------------------------------------------------------------


def test_explain_tells_what_was_decided(pair: BullpenClient, capsys: Output) -> None:
    assert main(["wake", "a"]) == 1
    capsys.readouterr()
    assert main(["explain", "a"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a  sleeping\n") and "belongs to instance 'b'" in shown
    assert "sleep level 1  " in shown and "goes to sleep (level 1): asked to" in shown
    assert main(["explain", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pair.explain("a").document


def test_explanation_has_everything_in_it() -> None:
    document = {
        "instance_id": "a",
        "state": "ready",
        "summary": "It is ready: woke up.",
        "waits_for": "for 'b'",
        "next_step": {"to": "level_1", "in_seconds": 243.0, "why": "unless a request comes"},
        "works": {
            "level_1": {"works": False, "why": "wrong answer", "at": "2026-01-01T09:00:00+00:00"},
            "level_2": None,
        },
        "notes": [
            {"at": "2025-12-31T10:00:00.123+00:00", "text": "goes to sleep"},
            {"at": "2026-01-01T10:00:00.456+00:00", "text": "wakes"},
        ],
    }
    assert explained(document) == [
        "a  ready",
        "why            It is ready: woke up.",
        "waits          for 'b'",
        "next           level 1 in 4 min 3 s, unless a request comes",
        "sleep level 1  does not work: wrong answer (09:00:00)",
        "sleep level 2  not tried yet",
        "",
        "What happened",
        "2025-12-31 10:00:00  goes to sleep",
        "10:00:00             wakes",
    ]


def explained(document: dict[str, Any], *, pinned: bool = False) -> list[str]:
    console = Console(width=80, highlight=False, color_system=None)
    with console.capture() as capture:
        for part in report(Explanation.read(document), datetime(2026, 1, 1, 12, tzinfo=UTC), pinned=pinned):
            console.print(part)
    return [line.rstrip() for line in capture.get().splitlines()]


def facts(document: dict[str, Any], *, pinned: bool = False) -> dict[str, str]:
    shown = explained({"instance_id": "a", "state": "ready", "summary": "It is ready.", **document}, pinned=pinned)
    return {line[:15].strip(): line[15:].strip() for line in shown[1 : shown.index("")]}


def test_explanation_of_what_is_under_way() -> None:
    activity = {"doing": "sleep", "stage": "draining", "reason": "asked to", "waits_for": None}
    works = {"level_1": {"works": False, "why": "no sleep mode", "at": None}}
    found = facts({"activity": {**activity, "since": "2026-01-01T11:59:56.6+00:00"}, "works": works})
    assert found["now"] == "sleep, draining: asked to (3 s)" and "next" not in found
    assert found["sleep level 1"] == "not available: no sleep mode"


def test_explanation_of_what_comes_next() -> None:
    works = {"level_1": None}
    step = {"to": "emulated", "in_seconds": 2.0, "why": "unless a request comes"}
    assert facts({"works": works, "next_step": step})["next"] == "asleep (emulated) in 2.00 s, unless a request comes"
    assert facts({"works": works})["next"].startswith("it stays as it is until ")
    assert facts({"works": works}, pinned=True)["next"].startswith("it is pinned until ")


def test_explain_knows_who_is_pinned(client: BullpenClient, capsys: Output) -> None:
    create(client, "a", pin=True)
    assert main(["explain", "a"]) == 0
    assert "it is pinned until" in capsys.readouterr().out
