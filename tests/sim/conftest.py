"""One simulator that most tests of the API share: they leave it awake, idle and with its weights."""

from collections.abc import Iterator

import pytest

from tests.sim.simulator import Simulator


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.serving(
        tmp_path_factory.mktemp("shared"),
        "--served-model-name",
        "one",
        "two",
        "--max-model-len",
        "4096",
        "--enable-sleep-mode",
        sleep_seconds=0,
        wake_seconds=0,
        tokens_per_second=20_000,
    ) as simulator:
        yield simulator
