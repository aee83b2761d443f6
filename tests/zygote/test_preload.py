"""Importing ahead: what failed and who left something behind is told by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bullpen.zygote.preload import read_names

PROGRAM = """
import json, sys
from bullpen.zygote.preload import PreloadReport, import_modules
seen, report = [], PreloadReport()
import_modules(sys.argv[2:], report, lambda module, done, total: seen.append([module.name, done, total]))
print(json.dumps({
    "seen": seen,
    "seconds": report.seconds,
    "modules": {m.name: [m.seconds, m.error, m.side_effect] for m in report.modules},
    "failed": [m.name for m in report.failed],
}))
"""
MODULES = {
    "good": "value = 1",
    "slow": "import time; time.sleep(0.2)",
    "wrong": "1 / 0",
    "leaves": "raise SystemExit(3)",
    "needs": "import nothing_of_the_kind",
    "brings": "import good",
    "threaded": "import threading; threading.Thread(target=threading.Event().wait, name='busy', daemon=True).start()",
    "after": "value = 2",
    "native": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None) == 0",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def preload(folder: Path, *names: str) -> dict[str, Any]:
    """Import modules in a process of its own and say how it went."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]){PROGRAM}", str(folder), *names],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def test_failures_are_noted_and_stop_nothing(folder: Path) -> None:
    report = preload(folder, "wrong", "leaves", "needs", "missing", "good")
    errors = {name: error for name, (_, error, _) in report["modules"].items()}
    assert errors == {
        "wrong": "ZeroDivisionError: division by zero",
        "leaves": "SystemExit: 3",
        "needs": "ModuleNotFoundError: No module named 'nothing_of_the_kind'",
        "missing": "ModuleNotFoundError: No module named 'missing'",
        "good": None,
    }
    assert report["failed"] == ["wrong", "leaves", "needs", "missing"]
    assert report["seen"][-1] == ["good", 5, 5]


def test_what_came_with_another_is_not_imported_again(folder: Path) -> None:
    report = preload(folder, "brings", "good", "after")
    assert list(report["modules"]) == ["brings", "after"]
    assert report["seen"] == [["brings", 1, 3], ["after", 3, 3]]


def test_times_are_each_modules_own(folder: Path) -> None:
    report = preload(folder, "good", "slow", "after")
    seconds = {name: time for name, (time, _, _) in report["modules"].items()}
    assert seconds["slow"] >= 0.2
    assert seconds["slow"] > 10 * seconds["after"]
    assert report["seconds"] >= sum(seconds.values())


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [
        ("threaded", "Python thread busy runs beside the main one"),
        ("native", "1 native thread runs beside the main one"),
    ],
)
def test_a_side_effect_is_told_of_the_module_that_had_it(folder: Path, culprit: str, reason: str) -> None:
    report = preload(folder, "good", culprit, "after")
    assert {name: effect for name, (_, _, effect) in report["modules"].items()} == {
        "good": None,
        culprit: reason,
        "after": None,
    }
    assert report["failed"] == [culprit]


def test_a_module_list_has_comments_and_blank_lines() -> None:
    lines = ["# all of them", "", "torch", "  vllm.entrypoints   # the server", "#vllm.spare", "\t"]
    assert read_names(lines) == ["torch", "vllm.entrypoints"]
