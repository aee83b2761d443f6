"""A leased process: what it takes on when it becomes a server, and that nothing of the zygote's is left in it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bullpen.zygote import protocol
from bullpen.zygote.client import Process, ZygoteClient, ZygoteError
from tests.zygote.running import SCRIPTED, RunningZygote, lines, open_descriptors, wait_end, wait_for

Scripted = tuple[RunningZygote, ZygoteClient]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """One zygote for all, started in an environment with marks to look for."""
    environment = {"FROM_ZYGOTE": "1", "OVERRULED": "zygote", "TZ": "UTC"}
    folder = tmp_path_factory.mktemp("zygote")
    with RunningZygote(folder, "--spares", "0", program=SCRIPTED, environment=environment) as zygote:
        yield zygote, zygote.connect()


def run(scripted: Scripted, log: Path, code: str, **start: Any) -> Process:
    zygote, client = scripted
    return zygote.run(code, log, zygote.lease(client), **start)


def answer(scripted: Scripted, log: Path, code: str, **start: Any) -> Any:
    """What a server computes as ``answer``; it then waits to be looked at."""
    process = run(scripted, log, f"import json, os\n{code}\nprint(json.dumps(answer), flush=True)\nwait()", **start)
    found = json.loads(lines(log)[0])
    os.kill(process.pid, signal.SIGTERM)
    wait_end(process.pidfd)
    return found


# -- before the start --------------------------------------------------------------------------------------------------


def test_checks_are_answered_until_the_start(scripted: Scripted) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    assert process.check(["ok"]) == {"ok": True, "threads": 1}
    assert process.check(["no"]) == {"ok": False, "error": "nothing but ok will do"}
    assert process.check(["exit"]) == {"ok": False, "error": "SystemExit: 0"}
    protocol.send(process.channel, {"op": "check"})
    assert protocol.receive(process.channel) == ({"ok": False, "error": "KeyError: 'argv'"}, [])
    protocol.send(process.channel, {"op": "dance"})
    assert protocol.receive(process.channel) == ({"error": "unknown request"}, [])
    protocol.send(process.channel, {"op": "start", "argv": []})
    assert protocol.receive(process.channel) == ({"error": "unknown request"}, []), "a start without a log is none"
    assert process.check(["ok"])["ok"]


def test_it_has_nothing_of_the_zygotes_open(scripted: Scripted) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    assert process.check(["ok"])["ok"]
    kept = open_descriptors(process.pid)
    assert len(kept) == 4
    assert [kept[number] for number in (0, 1, 2)] == [os.devnull, str(zygote.output), str(zygote.output)]
    assert next(target for number, target in kept.items() if number > 2).startswith("socket:")


def test_it_keeps_what_a_management_library_has_open(tmp_path: Path) -> None:
    """NVML goes on using its descriptors in the fork; closed, their numbers would be somebody else's soon."""
    device = tmp_path / "nvidiactl"
    device.touch()
    folder = tmp_path / "zygote"
    folder.mkdir()
    with RunningZygote(folder, "--management-device", str(device), program=SCRIPTED) as zygote:
        log = tmp_path / "log"
        process = zygote.run("print('up'); wait()", log)
        lines(log)
        assert process.how in ("spare", "fork")
        assert sorted(open_descriptors(process.pid).values()) == sorted([os.devnull, str(log), str(log), str(device)])


def test_it_ends_with_its_channel(scripted: Scripted) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    process.channel.close()
    wait_end(process.pidfd)


def test_junk_ends_it(scripted: Scripted) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    process.channel.send(b"junk")
    wait_end(process.pidfd)


# -- what it becomes ---------------------------------------------------------------------------------------------------


def test_it_leads_a_session_and_has_three_descriptors(scripted: Scripted, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = run(scripted, log, "print('up'); wait()")
    assert lines(log) == ["up"], "print reaches the log at once"
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
    assert open_descriptors(process.pid) == {0: os.devnull, 1: str(log), 2: str(log)}


def test_signals_are_those_of_a_fresh_interpreter(scripted: Scripted, tmp_path: Path) -> None:
    """The zygote handles some, and its engine one more; none of it is left."""
    found = answer(
        scripted,
        tmp_path / "log",
        "import signal\n"
        "handled = {n: signal.getsignal(n) for n in signal.valid_signals()}\n"
        "odd = {n: str(getattr(h, '__name__', h)) for n, h in handled.items() if h is not signal.SIG_DFL}\n"
        "wakeup = signal.set_wakeup_fd(-1)\n"
        "answer = [odd, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), wakeup]",
    )
    ignored = str(signal.Handlers.SIG_IGN)
    names = {int(number): name for number, name in found[0].items()}
    assert names == {signal.SIGINT: "default_int_handler", signal.SIGPIPE: ignored, signal.SIGXFSZ: ignored}
    assert found[1:] == [[], -1]


def test_environment_folder_and_variables_of_the_user(scripted: Scripted, tmp_path: Path) -> None:
    found = answer(
        scripted,
        tmp_path / "log",
        "import time\n"
        "names = ('FROM_ZYGOTE', 'OVERRULED', 'NEW', 'TZ')\n"
        "answer = [[os.environ.get(name) for name in names], os.getcwd(), user['NEW'], time.tzname[0]]",
        env={"OVERRULED": "start", "NEW": "käse=1", "TZ": "XYZ-3"},
        cwd=str(tmp_path),
    )
    assert found == [["1", "start", "käse=1", "XYZ-3"], str(tmp_path), "käse=1", "XYZ"]


def test_a_title_for_ps(scripted: Scripted, tmp_path: Path) -> None:
    process = run(scripted, tmp_path / "log", "print('up'); wait()", title="bullpen: käse model")
    lines(tmp_path / "log")
    name = Path(f"/proc/{process.pid}/comm").read_bytes()
    assert name.startswith("bullpen: käse".encode()[:13])


def start(process: Process, **fields: Any) -> protocol.Message:
    """Send a ``start`` as it stands in the protocol and return the answer."""
    message = {"op": "start", "argv": ["print('up'); wait()"], "env": {}, "cwd": "/", "title": "t", **fields}
    log = fields.pop("log", None) or os.open(os.devnull, os.O_WRONLY)
    protocol.send(process.channel, message, (log,))
    os.close(log)
    received = protocol.receive(process.channel)
    assert received is not None
    return received[0]


@pytest.mark.skipif(not os.access("/proc/self/oom_score_adj", os.W_OK), reason="the kernel has no such file here")
def test_it_goes_first_when_memory_runs_out(scripted: Scripted) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    assert start(process, oom_score_adj=321) == {"ok": True}
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "321"


def test_a_cgroup_that_cannot_be_entered_stops_nothing(scripted: Scripted, tmp_path: Path) -> None:
    zygote, client = scripted
    assert start(zygote.lease(client), cgroup=str(tmp_path / "none")) == {"ok": True}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"cwd": "/nowhere/at/all"}, "FileNotFoundError"),
        ({"env": {"A=B": "1"}}, "ValueError"),
        ({"env": {"A": "nul\0nul"}}, "ValueError"),
    ],
)
def test_what_it_cannot_become_is_answered(scripted: Scripted, fields: dict[str, Any], error: str) -> None:
    zygote, client = scripted
    process = zygote.lease(client)
    answered = start(process, **fields)
    assert answered["ok"] is False
    assert error in answered["error"]
    wait_end(process.pidfd)


def test_the_client_says_why_it_cannot_become_a_server(scripted: Scripted, tmp_path: Path) -> None:
    zygote, client = scripted
    with pytest.raises(ZygoteError, match="cannot become the server: FileNotFoundError"):
        zygote.run("", tmp_path / "log", zygote.lease(client), cwd="/nowhere/at/all")


# -- its output --------------------------------------------------------------------------------------------------------


def test_everything_that_is_printed_is_in_the_log(scripted: Scripted, tmp_path: Path) -> None:
    """Python, C code that buffers, children and their children, whatever the locale says."""
    log = tmp_path / "log"
    process = run(
        scripted,
        log,
        "import ctypes, os, subprocess, sys\n"
        "print('käse from Python')\n"
        "sys.stderr.write('error\\n')\n"
        "os.system('echo child; (sleep 0.2; echo grandchild >&2) &')\n"
        "ctypes.CDLL(None).puts(b'buffered in C')\n"
        "sys.stdout.write('no end of line')",
    )
    wait_end(process.pidfd)
    wait_for(lambda: "grandchild" in log.read_text())
    text = log.read_text()
    assert text.startswith("käse from Python\nerror\nchild\n")
    assert [text.count(part) for part in ("buffered in C\n", "no end of line", "grandchild\n")] == [1, 1, 1]


def test_the_zygotes_own_output_is_not_printed_again(scripted: Scripted, tmp_path: Path) -> None:
    zygote, _ = scripted
    before = zygote.output.read_text()
    log = tmp_path / "log"
    wait_end(run(scripted, log, "print('mine')").pidfd)
    assert log.read_text() == "mine\n"
    assert zygote.output.read_text() == before


def test_a_pipe_can_be_the_log(scripted: Scripted) -> None:
    zygote, client = scripted
    reader, writer = os.pipe()
    process = zygote.lease(client)
    process.start(["print('through a pipe')"], {}, writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        assert pipe.read() == "through a pipe\n"


# -- what forks must not share -----------------------------------------------------------------------------------------


def test_random_numbers_differ(scripted: Scripted, tmp_path: Path) -> None:
    drawn = [
        answer(
            scripted,
            tmp_path / f"log{number}",
            "import random\nanswer = [random.random(), random.SystemRandom().random()]",
        )
        for number in range(3)
    ]
    assert len({first for first, _ in drawn}) == 3


def test_numpy_is_seeded_anew(scripted: Scripted, tmp_path: Path) -> None:
    """numpy's name is looked up where it was imported; here stands something of that name."""
    from bullpen.zygote import child

    seeds: list[int] = []
    fake = SimpleNamespace(seed=seeds.append)
    patch = pytest.MonkeyPatch()
    try:
        patch.setitem(sys.modules, "numpy.random", fake)
        child.reseed()
        child.reseed()
    finally:
        patch.undo()
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_warm_heap_is_frozen(scripted: Scripted, tmp_path: Path) -> None:
    """What was imported ahead is not touched by collections, so that its pages stay shared."""
    frozen, after = answer(
        scripted,
        tmp_path / "log",
        "import gc\nfirst = gc.get_freeze_count()\ngc.collect()\nanswer = [first, gc.get_freeze_count()]",
    )
    assert frozen == after > 1000


def test_variables_for_the_import_are_set_before_it(scripted: Scripted, tmp_path: Path) -> None:
    assert answer(scripted, tmp_path / "log", "answer = os.environ['BULLPEN_TEST_EARLY']") == "1"


def test_a_signal_in_the_first_moment_is_its_own(scripted: Scripted) -> None:
    """SIGTERM right after the lease ends the process that it was sent to, and leaves the zygote alone."""
    zygote, client = scripted
    for _ in range(20):
        process = zygote.lease(client)
        signal.pidfd_send_signal(process.pidfd, signal.SIGTERM)
        wait_end(process.pidfd)
        process.channel.close()
    assert client.status()["warm"]


def test_a_server_cannot_reach_the_zygote(scripted: Scripted, tmp_path: Path) -> None:
    """Its process has no socket at all, so it cannot ask for processes in the zygote's name."""
    found = answer(
        scripted,
        tmp_path / "log",
        "import stat\n"
        "answer = []\n"
        "for number in range(256):\n"
        "    try:\n"
        "        answer.append(stat.S_ISSOCK(os.fstat(number).st_mode))\n"
        "    except OSError:\n"
        "        pass",
    )
    assert found == [False, False, False]
