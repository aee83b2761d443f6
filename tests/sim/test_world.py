"""The simulator as the zygote sees it."""

import pytest

from bullpen.zygote.worlds import OptionsError
from bullpen.zygote.worlds.sim import SimWorld


def test_what_a_check_answers() -> None:
    line = "m --port 1 --served-model-name a b -tp 2 -dp 2 --gpu-memory-utilization 0.25 --runner pooling"
    assert SimWorld().check(line.split()) == {
        "model": "m",
        "port": 1,
        "host": None,
        "uds": None,
        "tls": False,
        "served_model_names": ["a", "b"],
        "version": "sim",
        "sleep": None,
        "utilization": 0.25,
        "devices": 4,
        "pooling": True,
    }
    plain = SimWorld().check(["m"])
    assert (plain["utilization"], plain["devices"], plain["pooling"]) == (None, 1, False)


def test_what_a_check_refuses() -> None:
    with pytest.raises(OptionsError, match="no number of devices"):
        SimWorld().check(["m", "-tp", "none"])
