"""The zygote in an interpreter that has nothing but the standard library, and with names that clash."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.zygote import boot
from tests.zygote.running import RunningZygote, wait_for
from tests.zygote.test_zygote import health

BOOT = str(boot.__file__)
WITHOUT = {name: "" for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


def run(python: str, code: str, cwd: Path) -> str:
    """What a program prints that runs the zygote's main module first, as a module beside the engine."""
    program = f"import runpy, sys\nsys.path[0] = {os.path.dirname(BOOT)!r}\nrunpy.run_path({BOOT!r})\n{code}"
    done = subprocess.run(
        [python, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=cwd,
        env={**os.environ, **WITHOUT},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_serves_where_none_of_the_daemons_packages_are(
    start_zygote: Callable[..., RunningZygote], bare_python: str, tmp_path: Path
) -> None:
    zygote = start_zygote(python=bare_python, environment=WITHOUT)
    process = zygote.lease()
    assert not process.check(["--model"])["ok"]
    argv = ["--model", "m", "--uds", str(tmp_path / "sock")]
    assert process.check(argv)["model"] == "m"
    with (tmp_path / "log").open("wb") as log:
        process.start(argv, {"BULLPEN_SIM_START_SECONDS": "0"}, log.fileno(), title="bullpen: bare and long")
    assert health(tmp_path / "sock") == 200
    assert Path(f"/proc/{process.pid}/comm").read_text() == "bullpen: bare a\n", "without setproctitle, for top"
    loaded = wait_for(lambda: Path(f"/proc/{process.pid}/maps").read_text())
    assert "site-packages" not in loaded


def test_the_daemons_packages_are_not_to_be_had(bare_python: str, tmp_path: Path) -> None:
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('pydantic', 'pytest', 'bullpen.zygote')])"
    assert run(bare_python, code, tmp_path) == "[False, False, True]"


def test_no_folder_of_bullpen_is_on_the_path(bare_python: str, tmp_path: Path) -> None:
    """Its modules have plain names, like ``client`` and ``main``; an engine's modules may have them as well."""
    code = "import importlib.util as u\nprint([n for n in ('client', 'main', 'server', 'protocol') if u.find_spec(n)])"
    assert run(bare_python, code, tmp_path) == "[]"


def test_an_engines_module_of_the_same_name_is_its_own(bare_python: str, tmp_path: Path) -> None:
    (tmp_path / "protocol.py").write_text("whose = 'the engine'")
    code = f"sys.path.insert(0, {str(tmp_path)!r})\nimport protocol, bullpen.zygote.protocol as ours\n"
    code += "print(protocol.whose, ours.MAX_MESSAGE > 0)"
    assert run(bare_python, code, tmp_path) == "the engine True"


def test_the_folder_it_is_started_in_does_not_count(
    start_zygote: Callable[..., RunningZygote], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bullpen", "asyncio", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    zygote = start_zygote(environment=WITHOUT)
    assert zygote.connect().status()["warm"]


def test_it_is_the_same_module_in_a_spawned_process(tmp_path: Path) -> None:
    """``multiprocessing`` runs the main module again in each process that it spawns: no zygote may come of it."""
    code = (
        "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    pool = multiprocessing.get_context('spawn').Pool(1)\n"
        "    print(pool.apply(abs, (-3,)))\n"
        "    pool.terminate()"
    )
    program = tmp_path / "program.py"
    program.write_text(f"import runpy\nrunpy.run_path({BOOT!r}, run_name='__mp_main__')\n{code}")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("3", 0), done.stderr
