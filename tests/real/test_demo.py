"""The demo as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.real.serving import Models


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_demo(models: Models) -> None:
    """Every step is right, warm starts are far quicker than the cold one, and the figures are told."""
    command = [sys.executable, "-m", "bullpen.demo", "--json", "--cache", str(models.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert min(told["ratios"]) > 5
    assert 0 < told["memory"]["further_instance"] < told["cold"]["memory"] / 3
    assert len({answer["text"] for answer in told["answers"].values()}) == 2
