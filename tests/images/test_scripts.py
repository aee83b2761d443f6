"""The scripts that the images run, without a container engine: dry where they would change this system."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bullpen import __version__
from tests.images.dockerfile import Context, copies, stages
from tests.support.daemon import Daemon

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
SCRIPTS = sorted(IMAGES.glob("*.sh"))


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [IMAGES / script, *arguments]
    return subprocess.run(
        command, check=False, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("what", "needed", "other"), [("cuda", "gcc", "libnuma1"), ("cpu", "libnuma1", "gcc"), ("client", "tini", "curl")]
)
def test_packages(what: str, needed: str, other: str) -> None:
    shown = run("install-packages.sh", what, DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    update, install, clean = shown.stdout.splitlines()
    assert (update, clean) == ("apt-get update", "rm -rf /var/lib/apt/lists")
    packages = install.removeprefix("apt-get install -y --no-install-recommends ").split()
    assert {"ca-certificates", "tini", needed} <= set(packages) and other not in packages


def test_python_is_installed_where_the_base_has_none_that_fits(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = run("install-packages.sh", "cuda", DRY_RUN="1", PATH=path)
    assert "python3 python3-venv python3-dev" in shown.stdout
    assert "python3" not in run("install-packages.sh", "client", DRY_RUN="1", PATH=path).stdout


@pytest.mark.parametrize("what", [(), ("gpu",)])
def test_packages_for_what_is_unknown(what: tuple[str, ...]) -> None:
    refused = run("install-packages.sh", *what, DRY_RUN="1")
    assert refused.returncode == 2 and "say cuda, cpu or client" in refused.stderr


@pytest.mark.parametrize("owner", ["", "ubuntu:x:1000:1000::/home/ubuntu:/bin/bash"])
def test_user(tmp_path: Path, owner: str) -> None:
    (tmp_path / "getent").write_text(f"#!/bin/sh\n[ -n '{owner}' ] && echo '{owner}'\n")
    (tmp_path / "getent").chmod(0o755)
    shown = run("add-user.sh", DRY_RUN="1", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert shown.returncode == 0, shown.stderr
    assert ("userdel --remove ubuntu" in shown.stdout) == bool(owner)
    assert "useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash bullpen" in shown.stdout
    assert "-m 0700 /var/lib/bullpen" in shown.stdout and ".cache/huggingface" in shown.stdout


@pytest.mark.slow
def test_the_daemon_is_installed_before_its_code_comes(tmp_path: Path) -> None:
    """As the Dockerfile has it: the package's one file first, the installation, and then all of it."""
    folder, context = tmp_path / "opt", Context(ROOT)
    daemon = next(stage for stage in stages((ROOT / "Dockerfile").read_text()) if stage.name == "daemon")
    *early, code, finish = copies(daemon)
    assert code == (["src"], "src")
    for sources, destination in early:
        context.copy(sources, folder / destination)
    assert [path.name for path in (folder / "src/bullpen").iterdir()] == ["__init__.py"]
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=60)
    # What installs it is as new as in the image, where the requirements have brought it.
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setuptools").symlink_to(Path(sysconfig.get_path("purelib"), "setuptools"))
    pip: list[str | Path] = [
        venv / "bin/python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--editable",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    done = subprocess.run([*pip, folder], check=False, timeout=60, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Its libraries are the ones here, behind its own.
    site = next((venv / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for sources, destination in (code, finish):
        context.copy(sources, folder / destination)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [folder / "images/finish.sh"], check=False, capture_output=True, text=True, timeout=60, env=alone
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"bullpen {__version__}\nvllm-bootstrap (bullpen {__version__})\n"
    where: list[str | Path] = [venv / "bin/python", "-c", "import bullpen.daemon; print(bullpen.daemon.__file__)"]
    shown = subprocess.run(where, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=30, env=alone)
    assert shown.stdout.startswith(str(folder))
    assert any((folder / "src/bullpen/cli/__pycache__").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds it, is not installed"
)
def test_the_client_is_installed(tmp_path: Path) -> None:
    folder = tmp_path / "client"
    libraries = sysconfig.get_path("purelib")
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    done = run("install-client.sh", folder, *options, PYTHONPATH=libraries)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"bullpen-client {__version__}\n")
    shown = subprocess.run(
        [folder / "bin/python", "-c", "import bullpen; print(bullpen.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=30,
        env={"PATH": os.environ["PATH"]},
    )
    assert shown.stdout.startswith(str(folder))


def test_the_client_is_installed_with_pins() -> None:
    shown = run("install-client.sh", "/opt/client", DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    assert "--constraint requirements/bullpen.txt ./packaging/client[grpc]" in shown.stdout
    assert run("install-client.sh").returncode != 0


def test_health_of_a_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path, access_key="secret") as daemon:
        daemon.wait_ready()
        healthy = run("healthcheck.sh", BULLPEN_STATE_DIR=str(tmp_path))
        assert (healthy.returncode, healthy.stdout) == (0, f"{daemon.url} lives\n")
    ended = run("healthcheck.sh", BULLPEN_STATE_DIR=str(tmp_path))
    assert ended.returncode == 1 and "no daemon has said" in ended.stdout


def test_health_of_a_dead_port(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "url").write_text(f"http://127.0.0.1:{free.getsockname()[1]}")
        sick = run("healthcheck.sh", BULLPEN_STATE_DIR=str(tmp_path))
    assert sick.returncode == 1
    assert "/health does not answer: curl: " in sick.stdout and sick.stdout.count("\n") == 1


def test_health_of_a_port_that_hangs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (tmp_path / "url").write_text(f"http://127.0.0.1:{silent.getsockname()[1]}")
        sick = run("healthcheck.sh", BULLPEN_STATE_DIR=str(tmp_path))
    assert sick.returncode == 1 and "does not answer" in sick.stdout
