"""The zygote as a process: who may talk to it, what it tells, what it gives, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.zygote import protocol
from bullpen.zygote.client import ZygoteClient, ZygoteError
from tests.zygote.running import (
    SECONDS,
    RunningZygote,
    children_of,
    kill,
    lines,
    next_event,
    open_descriptors,
    threads_of,
    wait_end,
    wait_for,
)

Start = Callable[..., RunningZygote]


def slow_modules(folder: Path, count: int, seconds: float = 0.2) -> list[str]:
    """Arguments that make a scripted zygote take its time to warm."""
    for number in range(count):
        text = f"open({str(folder / f'began{number}')!r}, 'w'); import time; time.sleep({seconds})"
        (folder / f"slow{number}.py").write_text(text)
    return ["--path", str(folder), *(word for number in range(count) for word in ("--import", f"slow{number}"))]


# -- what it tells -----------------------------------------------------------------------------------------------------


def test_status_says_what_is_warm(start_zygote: Start) -> None:
    zygote = start_zygote()
    status = zygote.connect().status()
    assert status["warm"] is True
    assert status["pid"] == zygote.pid
    assert status["facts"]["version"]
    assert status["failed"] == {}
    assert status["modules"] > 0
    assert status["seconds"] > 0


def test_modules_are_told_one_by_one(start_scripted: Start, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("1 / 0")
    zygote = start_scripted(*slow_modules(tmp_path, 3), "--import", "wrong")
    client = zygote.connect()
    told = [next_event(client, "module")]
    while told[-1]["done"] < 4:
        told.append(next_event(client, "module"))
    assert len(told) >= 2, "it connected while the first or the second was being imported"
    assert [(event["name"], event["done"]) for event in told] == [
        ("slow0", 1),
        ("slow1", 2),
        ("slow2", 3),
        ("wrong", 4),
    ][-len(told) :]
    assert {event["total"] for event in told} == {4}
    assert told[-2]["seconds"] >= 0.2
    assert (told[-2]["error"], told[-1]["error"]) == (None, "ZeroDivisionError: division by zero")
    warm = next_event(client, "warm")
    assert warm["failed"] == {"wrong": "ZeroDivisionError: division by zero"}
    late = zygote.connect()
    assert next_event(late, "warm") == warm
    assert late.status()["failed"] == warm["failed"]


def test_a_module_that_spoils_forking_is_named(start_scripted: Start, tmp_path: Path) -> None:
    (tmp_path / "rude.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, name='rude', daemon=True).start()"
    )
    client = start_scripted("--path", str(tmp_path), "--import", "rude").connect()
    assert client.status()["failed"] == {"rude": "Python thread rude runs beside the main one"}


@pytest.mark.parametrize(
    ("trouble", "error"), [("broken", "no engine here"), ("exit", "the engine gave up")], ids=["import", "exit"]
)
def test_an_engine_that_cannot_be_imported_is_told_and_ends_the_zygote(
    start_scripted: Start, tmp_path: Path, trouble: str, error: str
) -> None:
    zygote = start_scripted("--trouble", trouble, *slow_modules(tmp_path, 1))
    client = zygote.connect()
    with pytest.raises(ZygoteError, match=error):
        client.lease()
    assert zygote.process.wait(SECONDS) == 3
    assert error in zygote.output.read_text()


def test_a_request_that_nobody_knows_is_answered(start_zygote: Start) -> None:
    client = start_zygote().connect()
    protocol.send(client.socket, {"op": "dance", "id": 7})
    while (received := protocol.receive(client.socket)) is not None and "id" not in received[0]:
        pass
    assert received is not None
    assert received[0] == {"id": 7, "error": "unknown request 'dance'"}


# -- who may talk to it ------------------------------------------------------------------------------------------------


def test_junk_costs_its_sender_the_connection_and_nobody_else(start_zygote: Start) -> None:
    zygote = start_zygote("--spares", "0")
    good, bad = zygote.connect(), zygote.connect()
    good.status()
    before = open_descriptors(zygote.pid)
    socket.send_fds(bad.socket, [b"junk"], [0, 1, 2])
    wait_for(lambda: bad.socket.recv(100_000) == b"")
    assert good.status()["warm"]
    assert len(open_descriptors(zygote.pid)) == len(before) - 1


def test_descriptors_that_nobody_asked_for_are_closed(start_zygote: Start) -> None:
    zygote = start_zygote("--spares", "0")
    client = zygote.connect()
    client.status()
    before = open_descriptors(zygote.pid)
    for number in range(50):
        protocol.send(client.socket, {"op": "status", "id": f"extra {number}"}, (0, 1))
    client.status()
    assert open_descriptors(zygote.pid) == before


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_is_dropped(start_zygote: Start, tmp_path: Path) -> None:
    """The folder would keep it out already, so the connection is made before its maker becomes somebody else."""
    zygote = start_zygote()
    zygote.connect().status()
    program = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.settimeout(10)\n"
        "folder = os.open(os.path.dirname(sys.argv[1]), os.O_PATH)\n"
        "os.fchdir(folder); os.seteuid(int(sys.argv[2]))\n"
        "sock.connect(os.path.basename(sys.argv[1]))\n"
        "print(len(sock.recv(100000)))\n"
    )
    zygote.path.chmod(0o777)
    zygote.path.parent.chmod(0o711)
    for uid, expected in ((12345, "0"), (0, None)):
        run = subprocess.run(
            [sys.executable, "-c", program, str(zygote.path), str(uid)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert (run.stdout.strip() == "0") is (expected == "0"), run.stdout


def test_a_client_that_never_reads_holds_nobody_up(start_zygote: Start) -> None:
    zygote = start_zygote("--spares", "0")
    deaf, good = zygote.connect(), zygote.connect()
    good.status()
    for number in range(2000):  # more answers than a socket takes
        protocol.send(deaf.socket, {"op": "status", "id": number})
        if number % 100 == 0:
            good.status()
    assert good.status()["warm"]
    answered: list[int] = []
    while len(answered) < 2000:
        received = protocol.receive(deaf.socket)
        assert received is not None
        if "id" in received[0]:
            answered.append(received[0]["id"])
    assert answered == list(range(2000))


# -- what it gives -----------------------------------------------------------------------------------------------------


def test_spares_are_given_first_and_made_again(start_zygote: Start) -> None:
    zygote = start_zygote("--spares", "2")
    client = zygote.connect()
    client.status()
    spares = wait_for(lambda: found if len(found := children_of(zygote.pid)) == 2 else None)
    leased = [zygote.lease(client) for _ in range(3)]
    assert [process.how for process in leased] == ["spare", "spare", "fork"]
    assert {process.pid for process in leased[:2]} == spares
    wait_for(lambda: len(children_of(zygote.pid)) == 5)


def test_a_spare_that_dies_is_replaced_and_never_given(start_zygote: Start) -> None:
    zygote = start_zygote()
    client = zygote.connect()
    client.status()
    (spare,) = wait_for(lambda: children_of(zygote.pid))
    pidfd = os.pidfd_open(spare)
    kill(pidfd, wait=True)
    process = zygote.lease(client)
    assert process.pid != spare
    assert process.check(["--model", "m"])["ok"]
    wait_for(lambda: len(children_of(zygote.pid)) == 2)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("python-thread", "Python thread busybody runs beside the main one"),
        ("native-thread", "1 native thread runs beside the main one"),
        ("device", "{device} is open"),
    ],
)
def test_what_must_not_fork_gives_a_fresh_interpreter(
    start_scripted: Start, tmp_path: Path, trouble: str, reason: str
) -> None:
    device = tmp_path / "nvidia-uvm"
    device.touch()
    zygote = start_scripted("--trouble", trouble, "--device", str(device))
    process = zygote.lease()
    assert (process.how, process.reason) == ("spawn", reason.format(device=device))
    assert process.check(["--model", "m"])["model"] == "m"
    argv = ["--model", "m", "--uds", str(tmp_path / "http.sock")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process.start(argv, {"BULLPEN_SIM_START_SECONDS": "0"}, output.fileno())
    assert health(tmp_path / "http.sock") == 200
    assert "simulator" in log.read_text()
    assert set(open_descriptors(process.pid)) >= {0, 1, 2}
    assert os.getsid(process.pid) == process.pid


def health(path: Path) -> int:
    """What a server on a Unix socket answers, once it does."""

    def ask() -> int | None:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(SECONDS)
                sock.connect(str(path))
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return int(sock.recv(100).split()[1])
        except OSError:
            return None

    return wait_for(ask)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("code = 7", 7),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit", 0),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.abort()", -6),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_ends_are_told_as_they_were(scripted: tuple[RunningZygote, ZygoteClient], code: str, status: int) -> None:
    zygote, client = scripted
    log = zygote.output.with_name(f"{abs(hash(code))}.log")
    process = zygote.run(code, log, zygote.lease(client))
    event = next_event(client, "exit")
    assert (event["pid"], event["status"]) == (process.pid, status)
    if "1 / 0" in code:
        assert "ZeroDivisionError" in log.read_text()


def test_only_who_leased_a_process_hears_of_its_end(scripted: tuple[RunningZygote, ZygoteClient]) -> None:
    zygote, client = scripted
    other = zygote.connect()
    first, second = zygote.lease(client), zygote.lease(other)
    os.kill(first.pid, signal.SIGKILL)
    assert next_event(client, "exit")["pid"] == first.pid
    os.kill(second.pid, signal.SIGKILL)
    assert next_event(other, "exit")["pid"] == second.pid


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """One scripted zygote for all tests that leave it as it was, and a client."""
    from tests.zygote.running import SCRIPTED

    with RunningZygote(tmp_path_factory.mktemp("zygote"), "--spares", "0", program=SCRIPTED) as zygote:
        yield zygote, zygote.connect()


# -- how it lasts and ends ---------------------------------------------------------------------------------------------


def test_a_burst_of_leases(start_zygote: Start) -> None:
    """Asked for fifty at once, it gives fifty, in order, each alive and of its own."""
    zygote = start_zygote()
    client = zygote.connect()
    client.status()
    for number in range(50):
        protocol.send(client.socket, {"op": "lease", "id": f"burst {number}"})
    given: list[tuple[int, socket.socket]] = []
    while len(given) < 50:
        received = protocol.receive(client.socket)
        assert received is not None
        message, descriptors = received
        assert message["id"] == f"burst {len(given)}"
        channel = socket.socket(fileno=descriptors[0])
        zygote.pidfds.append(descriptors[1])
        given.append((message["pid"], channel))
    assert len({pid for pid, _ in given}) == 50
    for pid, channel in given:
        channel.settimeout(SECONDS)
        protocol.send(channel, {"op": "check", "argv": ["--model", "m"]})
        answer = protocol.receive(channel)
        assert answer is not None
        assert answer[0]["ok"], pid
        channel.close()
    for pidfd in zygote.pidfds:
        wait_end(pidfd)


def test_it_stays_as_it_is_over_many_leases(start_zygote: Start) -> None:
    zygote = start_zygote()
    client = zygote.connect()
    client.status()

    def use(count: int) -> None:
        for _ in range(count // 25):
            processes = [client.lease() for _ in range(25)]
            for process in processes:
                process.channel.close()
            for process in processes:
                wait_end(process.pidfd)
                os.close(process.pidfd)
        while protocol_events(client):
            pass

    def rest() -> None:
        wait_for(lambda: len(children_of(zygote.pid)) == 1)
        client.status()  # what it was about when the spare appeared, it has done

    use(50)
    rest()
    descriptors, memory = open_descriptors(zygote.pid), resident(zygote.pid)
    use(450)
    rest()
    assert threads_of(zygote.pid) == 1
    assert len(open_descriptors(zygote.pid)) == len(descriptors)
    assert resident(zygote.pid) < memory + 1024, "KiB"


def protocol_events(client: ZygoteClient) -> bool:
    """Read what the zygote told unasked; False where there is nothing."""
    client.socket.setblocking(False)
    try:
        return protocol.receive(client.socket) is not None
    except BlockingIOError:
        return False
    finally:
        client.socket.settimeout(SECONDS)


def resident(pid: int) -> int:
    """A process's memory in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def test_spares_end_with_the_zygote_and_servers_do_not(start_scripted: Start, tmp_path: Path) -> None:
    zygote = start_scripted("--spares", "2")
    client = zygote.connect()
    server = zygote.run("print('here', flush=True); wait()", tmp_path / "log", zygote.lease(client))
    lines(tmp_path / "log")
    wait_for(lambda: len(children_of(zygote.pid)) == 3)
    spares = {pid: os.pidfd_open(pid) for pid in children_of(zygote.pid) - {server.pid}}
    leased = zygote.lease(client)
    zygote.process.kill()
    zygote.process.wait(SECONDS)
    del spares[leased.pid]
    for pidfd in spares.values():
        wait_end(pidfd)
        os.close(pidfd)
    assert leased.check(["ok"])["ok"], "what was given away is its holder's"
    signal.pidfd_send_signal(server.pidfd, 0)
    os.kill(server.pid, signal.SIGTERM)
    wait_end(server.pidfd)


def test_a_leased_process_ends_with_its_holder(start_zygote: Start, tmp_path: Path) -> None:
    zygote = start_zygote("--spares", "0")
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from bullpen.zygote.client import ZygoteClient\n"
        "process = ZygoteClient(Path(sys.argv[1])).lease()\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    zygote.connect().status()
    with subprocess.Popen(
        [sys.executable, "-c", program, str(zygote.path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        pidfd = os.pidfd_open(int(holder.stdout.readline()))
        holder.kill()
    wait_end(pidfd)
    os.close(pidfd)
    wait_for(lambda: not children_of(zygote.pid))


def test_sigterm_ends_it_and_removes_its_socket(start_zygote: Start) -> None:
    zygote = start_zygote()
    zygote.connect().status()
    zygote.process.terminate()
    assert zygote.process.wait(SECONDS) == 0
    assert not zygote.path.exists()


def test_it_ends_with_its_last_client_where_told_so(start_zygote: Start) -> None:
    zygote = start_zygote("--exit-with-client")
    first = zygote.connect()
    first.status()
    second = zygote.connect()
    second.status()
    first.close()
    assert second.status()["warm"]
    second.close()
    assert zygote.process.wait(SECONDS) == 0


def test_without_that_it_outlives_them(start_zygote: Start) -> None:
    zygote = start_zygote()
    first = zygote.connect()
    first.status()
    first.close()
    assert zygote.connect().status()["warm"]


@pytest.mark.parametrize("how", ["client", "signal"])
def test_it_ends_while_it_still_warms(start_scripted: Start, tmp_path: Path, how: str) -> None:
    """Its ten modules take 5 s; nobody waits for them any more after the first."""
    zygote = start_scripted("--exit-with-client", *slow_modules(tmp_path, 10, 0.5))
    client = zygote.connect()
    next_event(client, "module")
    if how == "client":
        client.close()
    else:
        zygote.process.terminate()
    assert zygote.process.wait(SECONDS) == 0
    assert not (tmp_path / "began9").exists()


def test_a_client_that_hung_up_before_it_was_accepted_counts(start_scripted: Start, tmp_path: Path) -> None:
    zygote = start_scripted("--exit-with-client", *slow_modules(tmp_path, 2, 0.3))
    zygote.connect().close()
    assert zygote.process.wait(SECONDS) == 0


def test_a_folder_of_its_own_is_removed_at_the_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bullpen.zygote", "--engine", "sim"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        path = Path(said.split()[-1])
        assert said.startswith("bullpen zygote: engine sim, listening on ")
        assert path.parent.stat().st_mode & 0o777 == 0o700
        client = ZygoteClient(path)
        client.socket.settimeout(SECONDS)
        leased = client.lease()
        kill(leased.pidfd)
        client.close()
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    command = [sys.executable, "-m", "bullpen.zygote", "--engine", "sim", "--socket", str(tmp_path / "sock")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 2
    assert "must belong to you and have mode 0700" in run.stderr


def test_the_client_program_starts_one_server(start_zygote: Start, tmp_path: Path) -> None:
    zygote = start_zygote()
    zygote.connect().status()
    command = [sys.executable, "-m", "bullpen.zygote.client", str(zygote.path), "--"]
    run = subprocess.run([*command, "--port", "x"], capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 2
    assert "port" in run.stderr or "model" in run.stderr
    options = ["--model", "m", "--uds", str(tmp_path / "http.sock")]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert health(tmp_path / "http.sock") == 200
        client.send_signal(signal.SIGINT)
        output, said = client.communicate(timeout=SECONDS)
    assert client.returncode == 0
    assert "simulator" in output
    assert json.loads(said.split()[1]) > 0


def test_no_such_client(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        ZygoteClient(tmp_path / "nobody.sock")
