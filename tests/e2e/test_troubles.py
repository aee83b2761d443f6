"""Full disks, unwritable folders, engines that cannot be imported: a clear message, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, wait_until
from tests.support.processes import processes_of


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up all space."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            pass
    return file


def test_a_full_disk_refuses_creates_and_loses_nothing(start_daemon: Callable[..., Daemon], small_disk: Path) -> None:
    """What runs goes on and can be stopped; a new one is refused with the reason; with room again it works."""
    daemon = start_daemon(small_disk / "state").wait_warm()
    pid = daemon.create(instance_id="before")["pid"]
    daemon.wait_state("before", "ready")
    filler = fill(small_disk)
    reply = daemon.http.put("/v2/vllm/instances/new", json={"options": "--model " + "m" * 9000})
    assert reply.status_code == 500, reply.text
    assert "make room" in reply.json()["detail"]
    assert not processes_of("new")
    assert daemon.instance("before")["state"] == "ready"
    assert daemon.http.get("/v2/vllm/instances/new").status_code == 404
    filler.unlink()
    assert daemon.create(instance_id="new")["status"] == "started"
    assert daemon.delete("before")["status"] == "terminated"
    assert not processes_of("before", pid)


def test_a_log_on_a_full_disk_stops_nobody(start_daemon: Callable[..., Daemon], small_disk: Path) -> None:
    """A server that cannot write its log serves, and is deleted as any other."""
    daemon = start_daemon(small_disk / "state").wait_warm()
    daemon.create(instance_id="chatty", env_vars={"BULLPEN_SIM_LOG_BYTES": 4_000_000})
    daemon.wait_state("chatty", "ready")
    assert daemon.http.get("/health").status_code == 200
    assert daemon.delete("chatty")["status"] == "terminated"


def test_a_long_log_is_capped(start_daemon: Callable[..., Daemon]) -> None:
    """Beyond the cap the oldest bytes go, the newest stay, and offsets keep their meaning."""
    daemon = start_daemon(log_cap=2 * 1024 * 1024).wait_warm()
    daemon.create(instance_id="chatty", env_vars={"BULLPEN_SIM_LOG_BYTES": 12_000_000})
    daemon.wait_state("chatty", "ready")
    (log,) = (daemon.state_dir / "logs").glob("[0-9a-f]*.log")
    wait_until(lambda: log.stat().st_blocks * 512 < 4 * 1024 * 1024, 20, lambda: f"{log.stat().st_blocks * 512} bytes")
    total = log.stat().st_size
    assert total >= 12_000_000
    reply = daemon.http.get("/v2/vllm/instances/chatty/log", headers={"Range": f"bytes={total - 40}-"})
    assert reply.status_code == 206
    assert b"\0" not in reply.content
    first = daemon.http.get("/v2/vllm/instances/chatty/log", headers={"Range": "bytes=0-99"})
    assert first.status_code == 206
    assert b"\0" not in first.content
    assert int(first.headers["content-range"].split()[1].split("-")[0]) > 0


def test_an_unwritable_state_directory(tmp_path: Path) -> None:
    """The daemon ends at once and says what to do."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "logs").write_text("in the way")
    daemon = Daemon(folder)
    assert daemon.process.wait(20) == 2
    wait_until(lambda: any("--state-dir" in line for line in daemon.output))
    assert not any("Traceback" in line for line in daemon.output)


def test_a_port_that_is_taken(start_daemon: Callable[..., Daemon], tmp_path: Path, daemon: Daemon) -> None:
    """The second daemon on a port ends at once and says so."""
    port = int(daemon.url.rpartition(":")[2])
    second = Daemon(tmp_path / "other", port=port)
    assert second.process.wait(20) == 2
    wait_until(lambda: any(f"cannot listen on 127.0.0.1:{port}" in line for line in second.output))


def test_an_engine_that_cannot_be_imported(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """The daemon lives and says why it cannot launch; a create is refused with that reason, at once."""
    venv.create(tmp_path / "bare", with_pip=False)
    daemon = start_daemon(engine="vllm", engine_python=str(tmp_path / "bare" / "bin" / "python"))
    wait_until(lambda: daemon.http.get("/ready").json()["zygotes"][0]["state"] == "broken")
    ready = daemon.http.get("/ready")
    assert ready.status_code == 503
    assert "torch" in ready.json()["zygotes"][0]["error"]
    assert daemon.http.get("/health").status_code == 200
    reply = daemon.http.post("/v2/vllm/instances", json={"options": "--model m"})
    assert reply.status_code == 500
    assert "cannot be imported" in reply.json()["detail"]


def test_no_engine_at_all(tmp_path: Path) -> None:
    """Without --engine and without vLLM the daemon says how to install it."""
    venv.create(tmp_path / "bare", with_pip=False)
    daemon = Daemon(tmp_path / "state", engine="", engine_python=str(tmp_path / "bare" / "bin" / "python"))
    assert daemon.process.wait(20) == 2
    wait_until(lambda: any("make install" in line for line in daemon.output))


def test_the_simulator_runs_in_a_bare_interpreter(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """The zygote needs nothing but the standard library in the engine's interpreter."""
    venv.create(tmp_path / "bare", with_pip=False, symlinks=False)
    python = tmp_path / "bare" / "bin" / "python"
    daemon = start_daemon(engine_python=str(python)).wait_warm()
    document = daemon.wait_state(daemon.create(instance_id="bare")["instance_id"], "ready")
    assert str(tmp_path / "bare") in str(Path(f"/proc/{document['pid']}/exe").readlink())
    assert "site-packages" not in Path(f"/proc/{document['pid']}/maps").read_text()
