"""Writes ``docs/performance.md`` from the results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
HEAD = """\
<!-- Made by `make bench ARGS=--write-docs`; change bench/, not this page. -->

# Performance

What is measured, beside what, and how. `make bench` measures it on your machine in twenty minutes, `make bench
ARGS=--quick` in five; `make bench ARGS="start memory"` runs single benchmarks.

Machines are noisy and differ: rows compare within one table, which was measured in one run, and ratios say more than
times. Figures are the median, with the smallest and the largest in brackets.
"""


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cores": str(os.cpu_count()),
        "processor": cpu,
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        **{name: version(name) for name in ("bullpen", "vllm", "torch")},
    }


def version(distribution: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(results: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str], page: Path = PAGE) -> None:
    """Write the page.

    Args:
        results: by the benchmark's name, as they are kept in JSON.
        missing: the titles of benchmarks that have none, by name.
        page: the file.
    """
    sections = [HEAD, summary(results), *map(section, results.values()), *map(not_measured, missing, missing.values())]
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(sections))


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What was to be reached, of all benchmarks, in one table."""
    rows = [
        [goal["what"], goal["limit"], goal["measured"], "yes" if goal["reached"] else "**no**"]
        for result in results.values()
        for goal in result["goals"]
    ]
    return f"## At a glance\n\n{markdown_table(['', 'to reach', 'measured', 'reached'], rows)}\n"


def section(result: Mapping[str, Any]) -> str:
    """One benchmark."""
    facts = ", ".join(f"{name}: {value}" for name, value in result["machine"].items())
    quick = " A quick run: few repetitions." if result["quick"] else ""
    parts = [f"## {result['title']}\n", result["method"], f"\n_{facts}.{quick}_\n"]
    for table in result["tables"]:
        parts += [f"### {table['title']}\n", markdown_table(table["columns"], table["rows"]), ""]
        if table["note"]:
            parts += [table["note"], ""]
    return "\n".join(parts)


def not_measured(name: str, title: str) -> str:
    """The section of a benchmark without a result."""
    return f"## {title}\n\nNot yet measured. `make bench ARGS={name}` does, or says what the machine lacks for it.\n"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is what, the others are figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
