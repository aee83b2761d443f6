"""``bullpen batch run`` against a daemon on another host, as far as the command can tell: it hands the requests on."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from bullpen.cli import main
from bullpen.client import BullpenClient
from tests.cli.jobs import Work, answered, ids, running, start
from tests.support.daemon import Daemon, wait_until

Captured = pytest.CaptureFixture[str]
KEY = "a-key"


def outer_address() -> str | None:
    """An address of this host that is not its loopback's."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family is socket.AF_INET and psutil.net_if_stats()[name].isup and not one.address.startswith("127."):
                return str(one.address)
    return None


def from_outside(daemon: Daemon) -> str:
    """A daemon's URL as others have it."""
    return f"http://{outer_address()}:{urlsplit(daemon.url).port}"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that anyone can reach who has the key."""
    if outer_address() is None:
        pytest.skip("this host has no address but its loopback's")
    folder = tmp_path_factory.mktemp("box")
    with Daemon(folder, host="0.0.0.0", access_key=KEY, grpc_port=None, stop_timeout=1) as daemon:
        yield daemon.wait_ready().wait_warm()


@pytest.fixture
def client(box: Daemon, nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[BullpenClient]:
    """A client of the daemon that the commands find in the environment."""
    for name, value in (
        ("BULLPEN_URL", from_outside(box)),
        ("BULLPEN_ACCESS_KEY", KEY),
        ("NO_PROXY", "*"),
        ("no_proxy", "*"),
    ):
        monkeypatch.setenv(name, value)
    with BullpenClient() as client:
        assert not client.target.is_local
        yield client
        client.delete_all()


def test_whole_job(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    url, work = start(client), Work(tmp_path, 200)
    assert main(work.words("--json")) == 0
    work.check(200)
    document = json.loads(capsys.readouterr().out)
    assert (document["total"], document["succeeded"], document["failed"]) == (200, 200, 0)
    assert url.startswith("http://127.0.0.1:") and answered(url) == 200 and ids(client) == ["m"]


def test_model_is_launched_and_stopped_afterwards(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    work = Work(tmp_path, 5)
    assert main(work.words("--", "--api-key", "secret", model="org/new")) == 0
    work.check(5)
    assert "new was launched for this and is stopped." in capsys.readouterr().out
    assert ids(client) == []


def test_killed_command_goes_on_where_it_was(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    url, work = start(client, tokens_per_second=50), Work(tmp_path, 120)
    for _ in range(2):
        before = work.kept
        with work.running("-c", "4") as process:
            wait_until(lambda least=before + 5: work.kept >= least)  # type: ignore[misc]
            process.kill()
    kept = work.kept
    assert 10 <= kept < 120 and not work.out.exists()
    wait_until(lambda: running(url) == 0)  # what was in flight has ended in the engine
    asked = answered(url)
    assert main(work.words("--json")) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == kept
    work.check(120)
    assert answered(url) - asked == 120 - kept, "nothing is done twice"


def test_server_that_is_killed_is_started_again(client: BullpenClient, tmp_path: Path) -> None:
    start(client, tokens_per_second=50)
    work = Work(tmp_path, 120)
    with work.running("-c", "4") as process:
        first = client.get("m").pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "m is failed (" in shown and "m is ready again" in shown and said == ""
    work.check(120)
    assert client.get("m").pid != first


def test_daemon_that_is_killed_and_comes_back(
    start_daemon: Callable[..., Daemon], nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if outer_address() is None:
        pytest.skip("this host has no address but its loopback's")
    for name, value in (("BULLPEN_ACCESS_KEY", KEY), ("NO_PROXY", "*"), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    daemon = start_daemon(host="0.0.0.0", access_key=KEY, grpc_port=None).wait_warm()
    url, ports = from_outside(daemon), {"port": urlsplit(daemon.url).port, "grpc_port": None}
    with BullpenClient(url) as client:
        own = start(client, tokens_per_second=50)
    work = Work(tmp_path, 120)
    with work.running("-c", "4", "--url", url) as process:
        kept = work.kept
        daemon.kill()
        start_daemon(daemon.state_dir, host="0.0.0.0", access_key=KEY, **ports)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and said == "", said
    work.check(120)
    assert kept < 120 and answered(own) in range(120, 129), "its server has lived on"


def test_nobody_speaks_grpc_there(client: BullpenClient, tmp_path: Path, capsys: Captured) -> None:
    start(client)
    work = Work(tmp_path, 3)
    assert main(work.words("--grpc-address", "127.0.0.1:9")) == 1
    said = capsys.readouterr().err
    assert "looked for at 127.0.0.1:9; else give" in said and said.count("\n") == 1
    assert not work.out.exists() and not work.partial.exists()
    port = urlsplit(client.target.url).port
    assert port is not None and main(work.words("--grpc-address", f"127.0.0.1:{port + 1}")) == 0
    work.check(3)
