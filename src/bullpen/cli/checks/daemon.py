"""The daemon: its state directory, its port, the one that runs, and what an earlier one left."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from bullpen.cli.checks import GIB, Finding, Level, ok, problem, warning
from bullpen.cli.words import warming
from bullpen.client import BullpenClient, ClientError, ConnectionFailed, Unauthorized
from bullpen.client.target import find
from bullpen.errors import ConflictError, LaunchError
from bullpen.node.ports import bind
from bullpen.node.settings import Settings

ANSWER_SECONDS = 3.0
SHOWN = 8


def check_daemon(settings: Settings, url: str | None, access_key: str | None) -> list[Finding]:
    """All of it; only the daemon that ``url`` names where that is another host's, or does not answer."""
    running = check_running(url, access_key)
    if url and (any(finding.level is Level.PROBLEM for finding in running) or not is_local(url)):
        return running
    return [
        *check_state_dir(settings.state_dir),
        *(check_log_dir(settings.log_dir) if settings.log_dir is not None else []),
        check_own_port(url) if url else check_port(settings),
        *running,
        *check_left_over(settings.state_dir),
    ]


def is_local(url: str) -> bool:
    """Whether a URL leads to this host's loopback."""
    try:
        return find(url).is_local
    except ClientError:
        return False


def check_state_dir(folder: Path) -> list[Finding]:
    """Can the daemon keep its state?"""
    subject = "state directory"
    existing = nearest(folder)
    if not is_writable(existing):
        advice = f"make {existing} a folder that you can write to, or give another one with --state-dir"
        return [problem(subject, f"{folder} cannot be written", advice)]
    findings = [ok(subject, f"{folder}{'' if folder.exists() else ', made at the first start'}")]
    mode = stat.S_IMODE(existing.stat().st_mode)
    if existing == folder and mode & 0o077:
        advice = f"`chmod 700 {folder}`; the daemon does so when it starts"
        findings = [warning(subject, f"{folder} is open to others (mode {mode:04o})", advice)]
    advice = "logs and journal need room: remove something there, or give another place with --state-dir"
    return [*findings, check_room("disk", existing, advice)]


def check_log_dir(folder: Path) -> list[Finding]:
    """Can logs be kept where they are to be?"""
    subject = "folder for logs"
    existing = nearest(folder)
    if not is_writable(existing):
        advice = f"make {existing} a folder that you can write to, or give another one with --log-dir"
        return [problem(subject, f"{folder} cannot be written", advice)]
    advice = "logs need room: remove something there, or give another place with --log-dir"
    found = ok(subject, f"{folder}{'' if folder.exists() else ', made at the first start'}")
    return [found, check_room("disk for logs", existing, advice)]


def nearest(folder: Path) -> Path:
    """The folder itself, or what there is of its path."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def is_writable(existing: Path) -> bool:
    """Whether it is a folder in which this user can make files."""
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def check_room(subject: str, existing: Path, advice: str) -> Finding:
    """Is there room left on the disk of a folder?"""
    free = shutil.disk_usage(existing).free
    if free < GIB:
        return (problem if free < GIB // 16 else warning)(subject, f"{free >> 20} MiB are free", advice)
    return ok(subject, f"{free / GIB:.1f} GiB are free")


def check_port(settings: Settings) -> Finding:
    """Is the port free, or does a Bullpen answer there?"""
    subject = f"port {settings.port}"
    if settings.port == 0:
        return ok("port", "picked at the start")
    try:
        bind(settings.host, settings.port).close()
    except ConflictError:
        owner = who_listens(settings.port)
    except LaunchError as trouble:
        return problem(subject, str(trouble), "choose another --host or --port")
    else:
        return ok(subject, "free")
    if not is_bullpen(settings.host, settings.port):
        return problem(subject, f"taken by {owner}", "end that program, or choose another --port")
    return ok(subject, f"a Bullpen listens there ({owner})")


def check_own_port(url: str) -> Finding:
    """The port of a daemon on this host that has answered at a URL."""
    parts = urlsplit(find(url).url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return ok(f"port {port}", f"a Bullpen listens there ({who_listens(port)})")


def is_bullpen(host: str, port: int) -> bool:
    """Whether a daemon answers at the address that a daemon was told to listen on."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    place = f"[{reached}]" if ":" in reached else reached
    try:
        with BullpenClient(f"http://{place}:{port}", timeout=ANSWER_SECONDS) as client:
            return client.health().get("status") == "OK"
    except (ClientError, httpx.InvalidURL, UnicodeError):  # the latter two: it is no host's name
        return False


def who_listens(port: int) -> str:
    """The program that listens on a port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
    except psutil.Error:
        pass
    return "another program"


def check_running(url: str | None, access_key: str | None) -> list[Finding]:
    """Does a daemon answer, is it ready, how are its instances?"""
    try:
        with BullpenClient(url, access_key, timeout=ANSWER_SECONDS) as client:
            client.health()
            readiness, instances = client.ready(), client.list().instances
    except ConnectionFailed as trouble:
        if url:
            advice = "without --url and BULLPEN_URL, doctor looks at the daemon of this host"
            return [problem("daemon", str(trouble), advice)]
        return [ok("daemon", "none runs; `bullpen serve` starts one")]
    except Unauthorized as trouble:
        return [warning("daemon", str(trouble), "with the key, doctor can say more")]
    except ClientError as trouble:
        return [problem("daemon", str(trouble), "look at what listens there, and at what the daemon prints")]
    grpc = f", gRPC at port {readiness.grpc_port}" if readiness.grpc_port else ""
    findings = [ok("daemon", f"answers at {client.url}{grpc}{', ready' if readiness.ready else ', not ready yet'}")]
    for zygote in readiness.zygotes:
        if zygote.state == "broken":
            advice = "its zygote's log in the state directory may say why; start the daemon again when that is mended"
            findings.append(problem("engine", warming(zygote), advice))
        elif zygote.state == "warming":
            findings.append(ok("engine", warming(zygote)))
        else:
            findings.append(ok("engine", f"{zygote.engine} is warm, imported in {zygote.seconds:.1f} s"))
    if instances:
        states = Counter(instance.state for instance in instances)
        findings.append(ok("instances", ", ".join(f"{number} {state}" for state, number in sorted(states.items()))))
    for instance in instances:
        if instance.state == "failed" and instance.error is not None:
            name = instance.instance_id
            advice = f"`bullpen logs {name}` says more, `bullpen stop {name}` removes it"
            findings.append(warning(name, f"failed: {instance.error.message}", advice))
    return findings


def check_left_over(folder: Path) -> list[Finding]:
    """Where no daemon uses the state directory: do processes of an earlier one live on?"""
    if is_locked(folder / "daemon.pid"):
        return []
    logs = folder / "logs"
    elsewhere = {link.resolve() for link in logs.glob("*.log") if link.is_symlink()}
    outputs = {pid: output for pid in psutil.pids() if (output := output_of(pid)) is not None}
    pids = [pid for pid, output in outputs.items() if output.parent == logs or output in elsewhere]
    if not pids:
        return []
    shown = ", ".join(map(str, pids[:SHOWN])) + (" …" if len(pids) > SHOWN else "")
    text = f"{len(pids)} processes of an earlier daemon live on (pid {shown})"
    return [warning("processes", text, "`bullpen serve` takes them over again, then `bullpen stop --all` ends them")]


def is_locked(path: Path) -> bool:
    """Whether a daemon holds the lock file of its state directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def output_of(pid: int) -> Path | None:
    """The file that a process writes its output to, as the kernel names it."""
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/1"))
    except OSError:
        return None
