"""The frame of ``bullpen top``: what it tells, and that it keeps to its terminal."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bullpen.cli.screen import Snapshot, frame
from bullpen.client import GpuReport, InstanceList, Readiness

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WARM = Readiness(ready=True)
ZYGOTE = {"engine": "vllm", "state": "warming", "module": "torch", "done": 3, "total": 9}
WAITING = Readiness.read({"engine": "vllm", "waiting": 1, "zygotes": [ZYGOTE]})


def instance(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "instance_id": name,
        "model": f"org/{name}",
        "state": "ready",
        "created_at": "2025-12-31T23:00:00Z",
        **fields,
    }


def gpu(index: int, **fields: Any) -> dict[str, Any]:
    document = {"index": index, "uuid": f"GPU-{index}", "name": "NVIDIA H200", "parent": None, "memory_mib": 81920}
    lists: dict[str, Any] = {"awake": [], "coming": [], "asleep": [], "foreign": [], "free_mib": 81920, "problem": None}
    return {**document, **lists, **fields}


def snapshot(
    instances: list[dict[str, Any]], gpus: list[dict[str, Any]], trouble: str = "", readiness: Readiness = WARM
) -> Snapshot:
    host = {"asleep_mib": 2048, "budget_mib": 65536, "available_mib": 102400}
    report = GpuReport.read({"gpus": gpus, "host": host})
    return Snapshot("http://127.0.0.1:1", InstanceList.read({"instances": instances}), report, readiness, trouble)


def lines(shown: Snapshot, width: int = 100, height: int | None = None) -> list[str]:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(shown, NOW, width, height))
    return capture.get().splitlines()


def test_frame_tells_who_is_awake_who_sleeps_and_why() -> None:
    claim = {"share": None, "mib": 100}
    gpus = [
        gpu(
            0,
            free_mib=40960,
            awake=[{**claim, "instance_id": "a"}],
            coming=[{**claim, "instance_id": "c", "share": 0.25}],
            asleep=[{**claim, "instance_id": "b"}],
        ),
        gpu(1, foreign=[{"pid": 4711, "name": "python3", "mib": 512}]),
        gpu(2, free_mib=None, problem="the driver does not say"),
    ]
    waits = {"doing": "start", "stage": "queued", "reason": "created", "waits_for": "until 'a' has slept"}
    listed = [
        instance("a", assigned_gpus=["GPU-0"], memory={"awake": {"gpu_mib": 40000, "host_mib": 1}}, reason="started"),
        instance("b", state="sleeping", sleep_level=1, reason="goes to sleep (level 1): asked to"),
        instance("c", state="starting", phase="waiting", activity=waits),
        instance("d", state="starting", phase="weights", progress=0.5, remaining_seconds=7.0),
        instance("e", state="failed", exit_code=1, error={"class": "error", "message": "no such model"}),
    ]
    shown = lines(snapshot(listed, gpus))
    assert "1 failed, 1 ready, 1 sleeping, 2 starting" in shown[0]
    assert shown[1] == "host memory: 2.0 GiB of 64.0 GiB kept by sleepers, 100.0 GiB free"
    assert [part for part in shown[4].split("  ") if part] == [
        "0",
        "H200",
        "█" * 12 + "░" * 12,
        "40.0/80.0 GiB",
        "a, c (25 %) (coming)",
        "b",
    ]
    assert shown[6].split()[2:4] == ["?" * 24, "?/80.0"]
    assert shown[7] == "GPU 1: 512 MiB held by process 4711 (python3), which belongs to no instance"
    assert shown[8] == "GPU 2: the driver does not say"
    rows = [line.split() for line in shown[11::2]]
    assert [row[0] for row in rows] == ["a", "b", "c", "d", "e"]
    assert rows[0][2:5] == ["ready", "0", "40000"] and rows[1][2:4] == ["sleeping", "1"]
    assert rows[2][2] == "waiting" and rows[3][2:4] == ["starting", "50%"]
    assert [line.strip("└ ") for line in shown[12::2]] == [
        "started",
        "goes to sleep (level 1): asked to",
        "start: waits until 'a' has slept (created)",
        "weights, about 7 s left",
        "no such model",
    ]


def test_empty_frame_says_what_to_do() -> None:
    shown = "\n".join(lines(snapshot([], [])))
    assert "No GPUs" in shown and "`bullpen run MODEL`" in shown


def test_create_that_waits_is_told_in_place_of_what_to_do() -> None:
    shown = lines(snapshot([], [], readiness=WAITING))
    assert shown[-2:] == ["engine vllm is being imported: at torch, 3 of 9", "1 create waits to be started"]
    assert lines(snapshot([instance("a")], [], readiness=WAITING))[-1].startswith("a ")


def test_trouble_stands_below_what_was_known() -> None:
    assert lines(snapshot([instance("a")], []), 100, 20)[-1].split()[0] == "a"
    assert lines(snapshot([instance("a")], [], "no Bullpen answers"), 100, 20)[-1] == "! no Bullpen answers"


def test_reasons_give_way_before_instances() -> None:
    listed = [instance(f"i{number}", reason="because") for number in range(8)]
    assert any("because" in line for line in lines(snapshot(listed, []), 100, 30))
    tight = lines(snapshot(listed, []), 100, 15)
    assert not any("because" in line for line in tight) and tight[-1].startswith("i7")
    tighter = lines(snapshot(listed, []), 100, 10)
    assert tighter[-1].startswith("… and ") and not any(line.startswith("i7") for line in tighter)


names = st.text("abcdefgh-", min_size=1, max_size=128)


@given(
    st.lists(names, max_size=12),
    st.lists(names, max_size=9),
    st.text("x y", max_size=300),
    st.integers(60, 200),
    st.integers(24, 60),
)
def test_frame_keeps_to_its_terminal(ids: list[str], owners: list[str], text: str, width: int, height: int) -> None:
    gpus = [
        gpu(place, awake=[{"instance_id": one, "share": 0.5}], asleep=[{"instance_id": one}] * 3)
        for place, one in enumerate(owners)
    ]
    listed = [instance(name, reason=text, assigned_gpus=["GPU-0", "GPU-1"]) for name in ids]
    shown = lines(snapshot(listed, gpus, text, WAITING), width, height)
    assert len(shown) <= height and all(len(line) <= width for line in shown)


@pytest.mark.parametrize("width", [80, 120])
def test_usual_frame_cuts_no_names(width: int) -> None:
    claim = {"instance_id": "Llama-3.1-8B-Instruct", "share": None, "mib": 1}
    shown = "\n".join(lines(snapshot([instance("a")], [gpu(0, awake=[claim])]), width))
    assert "Llama-3.1-8B-Instruct" in shown and "H200" in shown
