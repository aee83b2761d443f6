"""The demo's pieces that need no engine. The whole of it runs in ``tests/real``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bullpen.demo import models, processes
from bullpen.demo.chat import printable
from bullpen.demo.checks import DemoError, deadline, expect
from bullpen.demo.main import bullpen_command, next_steps, run
from bullpen.demo.report import branches


def test_a_tree_is_drawn() -> None:
    """Branches end where their parent's last child is."""
    assert branches([0, 1, 2, 2, 1, 2]) == ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", "   └─ "]


def test_random_text_does_not_reach_the_terminal_as_it_is() -> None:
    """Control characters, other scripts and half characters are shown as dots."""
    assert printable("a b\x1b[2J\n\u06a6\N{REPLACEMENT CHARACTER}~") == "a b·[2J···~"


def test_the_models_are_kept_in_the_users_cache() -> None:
    """``--cache``, else ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    assert models.cache_folder(Path("/x/y"), {"XDG_CACHE_HOME": "/c"}) == Path("/x/y")
    assert models.cache_folder(None, {"XDG_CACHE_HOME": "/c"}) == Path("/c/bullpen/demo")
    assert models.cache_folder(None, {}) == Path.home() / ".cache" / "bullpen" / "demo"


def test_what_the_demo_starts_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's daemon settings and what would overrule the demo's options stay out."""
    for name in ("BULLPEN_PORT", "VLLM_ACCESS_KEY", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "8")
    environment = models.environment(BULLPEN_HOST="here")
    assert environment["BULLPEN_HOST"] == "here"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"BULLPEN_PORT", "VLLM_ACCESS_KEY", "VLLM_CPU_KVCACHE_SPACE"} & set(environment)


def test_each_build_of_vllm_gets_options_that_fit() -> None:
    """float32 on the CPU, a small share of memory on a GPU; the model under its folder's name on both."""
    on_cpu = models.Engine("python", "0.32.0+cpu").options(Path("/m/tiny-a"))
    on_gpu = models.Engine("python", "0.32.0").options(Path("/m/tiny-a"))
    assert on_cpu[:3] == on_gpu[:3] == ("/m/tiny-a", "--served-model-name", "tiny-a")
    assert on_cpu[-2:] == ("--dtype", "float32")
    assert on_gpu[-2] == "--gpu-memory-utilization"


def test_what_comes_next_works_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bullpen by its full path where the shell would not find it; the model with all that the demo gave it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    assert bullpen_command() == f"'{tmp_path}/my env/python' -m bullpen"
    (tmp_path / "my env").mkdir()
    (tmp_path / "my env" / "bullpen").touch()
    assert bullpen_command() == f"'{tmp_path}/my env/bullpen'"
    (tmp_path / "bullpen").touch(0o755)
    assert bullpen_command() == "bullpen"
    engine, model = models.Engine("python", "0.32.0+cpu"), Path("/m/tiny-a")
    run_command = next_steps("bullpen", engine, model)[1][0]
    assert shlex.split(run_command) == ["bullpen", "run", "/m/tiny-a", "--", *engine.options(model)[1:]]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """One sentence with the option's name, before any program runs."""
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match=r"cannot be kept in .*/file/x \(Not a directory\).* --cache"):
        models.make_models(models.Engine("/nowhere", "0.32.0"), tmp_path / "file" / "x")


def test_a_step_that_lasts_too_long_is_given_up() -> None:
    """The reason is in the text; a step that ends in time is left alone."""
    with pytest.raises(DemoError, match="the nap takes longer than 0 s"), deadline(0.05, "the nap"):
        time.sleep(30)
    with deadline(30, "nothing"):
        pass
    with pytest.raises(DemoError, match="broken promise"):
        expect(False, "broken promise")


def test_a_helper_that_fails_is_quoted() -> None:
    """The last line that a program wrote says what to look for."""
    with pytest.raises(DemoError, match=r"run to fail, ended with exit code 1: .*no disk"):
        models.run(sys.executable, "-c", "import sys; sys.exit('first\\nno disk')", what="to fail", seconds=30)
    with pytest.raises(DemoError, match="/nowhere cannot be run to start: No such file"):
        models.run("/nowhere", what="to start", seconds=30)


def test_who_is_left_is_found_and_can_be_ended(tmp_path: Path) -> None:
    """By session, and by a file that is open below the folder; a process that has ended is not left."""
    with (tmp_path / "output").open("wb") as output:
        program = subprocess.Popen(["sleep", "60"], stdout=output, start_new_session=True)
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert processes.leftovers(set(), tmp_path) == [f"{program.pid} (sleep)"]
        assert len(processes.leftovers({stranger.pid}, tmp_path)) == 2
        assert processes.kill_sessions({program.pid, stranger.pid}, 10)
        assert processes.leftovers({program.pid, stranger.pid}, tmp_path) == []
    finally:
        for each in (program, stranger):
            each.kill()
            each.wait(10)


def test_memory_of_a_tree() -> None:
    """A process and its child, with what each has for itself and what they share."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert program.stdout is not None and program.stdout.readline() == b"1\n"
        tree = processes.read_tree(program.pid)
        assert [process.depth for process in tree] == [0, 1]
        assert tree[0].pid == program.pid
        assert all(0 < process.private <= process.pss < process.private + process.shared for process in tree)
        assert processes.total_pss(tree) == tree[0].pss + tree[1].pss
        assert processes.is_below(program.pid, Path(sys.executable).name)
        assert not processes.is_below(program.pid, "bullpen: spare")
    finally:
        assert program.stdin is not None
        program.stdin.close()
        program.wait(10)
        assert program.stdout is not None
        program.stdout.close()


def test_without_vllm_the_demo_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one sentence, and one document for programs; nothing was started or written."""
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    monkeypatch.setenv("BULLPEN_ENGINE_PYTHON", str(empty))
    assert run(cache=tmp_path / "cache", keep=False, json_output=False) == 1
    assert "make install" in capsys.readouterr().out
    assert run(cache=tmp_path / "cache", keep=False, json_output=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"] and "vLLM is not installed" in document["error"]
    assert not (tmp_path / "cache").exists()
