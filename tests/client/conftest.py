"""One daemon for all tests of the client; each test leaves it without instances."""

from collections.abc import Iterator

import pytest

from bullpen.client import BullpenClient
from tests.support.daemon import Daemon


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("shared")) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def client(shared: Daemon) -> Iterator[BullpenClient]:
    with BullpenClient(shared.url) as client:
        yield client
        client.delete_all()
