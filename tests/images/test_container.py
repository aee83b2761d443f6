"""The daemon's image, its Dockerfile's instructions done for real on an overlay of this system that is thrown away.

Packages come from the archive, where it can be reached. Of the engine nothing is downloaded, which would take minutes:
the environment of these tests is lent to the image, so that pip finds all pins there and installs only Bullpen.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bullpen import __version__
from tests.images.container import END_SECONDS, Container, Image, NoContainerError, first_process, open_to_others
from tests.images.dockerfile import Context, Stage, stages
from tests.support.daemon import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VENV = "opt/bullpen/.venv"
STAMP = Path(sys.prefix, "product.stamp")
LOCAL = {"BULLPEN_HOST": "127.0.0.1", "BULLPEN_INSTANCE_HOST": "127.0.0.1"}
PROBE = ["apt-get", "-o", "APT::Update::Error-Mode=any", "update"]
NEEDED = "curl --version && python3 -c 'import ensurepip'"
# So that nothing takes long where there is no network.
QUICKLY = 'Acquire::Retries "0";\nAcquire::http::Timeout "5";\nAcquire::https::Timeout "5";\n'


def stage(name: str) -> Stage:
    """A stage of the Dockerfile, for the engine that is installed here."""
    engine = STAMP.read_text().split()[0]
    return next(found for found in stages((ROOT / "Dockerfile").read_text(), ENGINE=engine) if found.name == name)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    if not STAMP.exists():
        pytest.skip("these tests run in an environment that scripts/setup.sh has not made")
    folder = tmp_path_factory.mktemp("container")
    try:
        made = Container(folder, Path(sys.prefix), VENV)
    except NoContainerError as problem:
        pytest.skip(f"no overlay of this system: {problem}")
    try:
        if not (made.root / sys.base_prefix.lstrip("/")).exists():
            pytest.skip(f"{sys.base_prefix} lies on a file system of its own, which the overlay lacks")
        open_to_others(made)
        yield made
    finally:
        made.close()
    assert list(folder.iterdir()) == [], "it is mounted still"


@pytest.fixture(scope="module")
def has_archive(container: Container) -> bool:
    """Whether packages can be installed; else apt-get does nothing, and the image has the packages of this system."""
    (container.root / "etc/apt/apt.conf.d/99quickly").write_text(QUICKLY)
    if container.run(PROBE).returncode == 0:
        return True
    if container.run(["bash", "-c", NEEDED]).returncode != 0:
        pytest.skip("the archive of packages cannot be reached, and this system lacks curl or python3-venv")
    nothing = container.root / "usr/local/sbin/apt-get"
    nothing.write_text("#!/bin/sh\n")
    nothing.chmod(0o755)
    return False


@pytest.fixture(scope="module")
def image(container: Container, has_archive: bool) -> Image:
    engine = STAMP.read_text().split()[0]
    # An older set-up of the same engine, which is brought up to date.
    (container.root / VENV / STAMP.name).write_text(f"{engine} 0 0\n")
    made = Image(container, Context(ROOT), ENGINE=engine)
    made.environment["PIP_NO_INDEX"] = "1"
    for instruction in stage("daemon").lineage():
        made.do(instruction)
    return made


def test_packages_are_installed(image: Image, has_archive: bool) -> None:
    if not has_archive:
        pytest.skip("the archive of this system's packages cannot be reached")
    assert "\napt-get install -y " in image.output("install-packages.sh")
    shown = image.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ", "tini", "ca-certificates", "curl"])
    assert shown.stdout == "installed " * 3
    assert not image.inside("var/lib/apt/lists").exists()


def test_the_user_is_added(image: Image) -> None:
    accounts = [line for line in image.inside("etc/passwd").read_text().splitlines() if line.split(":")[2] == "1000"]
    assert accounts == ["bullpen:x:1000:1000::/home/bullpen:/bin/bash"]
    assert image.run(["id"]).stdout == "uid=1000(bullpen) gid=1000(bullpen) groups=1000(bullpen)\n"
    state = image.inside("var/lib/bullpen").stat()
    assert (state.st_uid, state.st_gid, state.st_mode & 0o777) == (1000, 1000, 0o700)
    login = image.container.run(["su", "--login", "bullpen", "--command", "id -un; pwd"])
    assert login.stdout == "bullpen\n/home/bullpen\n"


def test_the_user_writes_to_the_volumes_and_not_to_the_code(image: Image) -> None:
    volumes: list[str] = json.loads(stage("daemon").last("VOLUME") or "")
    assert volumes == [image.environment["BULLPEN_STATE_DIR"], image.environment["HF_HOME"]]
    for volume in volumes:
        written = image.run(["bash", "-c", f"echo kept >{volume}/test && cat {volume}/test && rm {volume}/test"])
        assert (written.returncode, written.stdout) == (0, "kept\n")
    for folder in ("src/bullpen", ".venv/bin", "images"):
        refused = image.run(["touch", f"/opt/bullpen/{folder}/test"])
        assert refused.returncode == 1 and "Permission denied" in refused.stdout


def test_bullpen_is_installed(image: Image) -> None:
    said = image.output("setup.sh product")
    assert "==> Installing Bullpen: done" in said and "Bullpen is installed in .venv with vLLM" in said
    assert "package lists" not in said and "Making .venv" not in said, "what it needs was there"
    assert f"vllm-bootstrap (bullpen {__version__})\n" in image.output("finish.sh")
    shown = image.run(["python", "-c", "import bullpen, sys; print(sys.prefix, bullpen.__file__)"])
    assert shown.stdout == "/opt/bullpen/.venv /opt/bullpen/src/bullpen/__init__.py\n"


@pytest.mark.parametrize("target", ["endpoint", "launcher"])
def test_its_program_runs_until_it_is_told_to_end(image: Image, tmp_path: Path, target: str) -> None:
    made, log, address = image.target(stage(target)), tmp_path / "log", image.inside("var/lib/bullpen/url")
    program: list[str] = json.loads(stage(target).last("ENTRYPOINT") or "")
    if not image.inside(program[0]).exists():
        program = program[program.index("--") + 1 :]  # tini is no package of this system
    health_check: list[str] = json.loads((stage(target).last("HEALTHCHECK") or "").partition("CMD ")[2])
    assert made.run(health_check).returncode == 1
    with log.open("w") as output:
        started = made.start(program, output, BULLPEN_ENGINE="sim", BULLPEN_PORT="0", **LOCAL)
    try:
        wait_until(lambda: started.poll() is not None or "gRPC ready on" in log.read_text(), 30, log.read_text)
        assert started.poll() is None, log.read_text()
        url = address.read_text().strip()
        healthy = made.run(health_check)
        assert (healthy.returncode, healthy.stdout) == (0, f"{url} lives\n")
        first = first_process(started)
        assert first is not None and Path(f"/proc/{first}").stat().st_uid == 1000
        launched = httpx.post(f"{url}/v2/vllm/instances", json={"options": "--model m"}, timeout=30)
        assert launched.status_code == 201, launched.text
        os.kill(first, signal.SIGTERM)
        assert started.wait(END_SECONDS) == 0, log.read_text()
    finally:
        if started.poll() is None and (first := first_process(started)):
            os.kill(first, signal.SIGKILL)
            started.wait(END_SECONDS)
    assert made.run(health_check).returncode == 1


def test_nothing_remains(tmp_path: Path) -> None:
    before = (Path("/etc/passwd").read_bytes(), Path("/proc/self/mountinfo").read_bytes())
    try:
        made = Container(tmp_path, Path(sys.prefix), VENV)
    except NoContainerError as problem:
        pytest.skip(f"no overlay of this system: {problem}")
    try:
        (made.root / "etc/passwd").write_text("")
        left = made.start(["/usr/bin/sleep", "100"], {}, output=subprocess.DEVNULL)
        wait_until(lambda: first_process(left) is not None)
        number = first_process(left)
    finally:
        made.close()
    left.wait(END_SECONDS)
    wait_until(lambda: not Path(f"/proc/{number}").exists())
    assert (Path("/etc/passwd").read_bytes(), Path("/proc/self/mountinfo").read_bytes()) == before
    assert list(tmp_path.iterdir()) == []
