"""A simulator that these tests share, and a gRPC server whose book has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.rpc.serving import Rpc, serving
from tests.sim.simulator import Simulator


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.serving(
        tmp_path_factory.mktemp("rpc"), "--max-model-len", "100000", tokens_per_second=20_000
    ) as started:
        yield started


@pytest.fixture
async def rpc(simulator: Simulator) -> AsyncIterator[Rpc]:
    """`gen` generates and `emb` embeds; both are the simulator."""
    async with serving() as served:
        served.book.add("gen", simulator.port)
        served.book.add("emb", simulator.port, "embed")
        yield served
