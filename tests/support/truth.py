"""The daemon's book held against this machine: processes, the memory of mock GPUs, and what each server says itself.

Nothing here uses Bullpen's own code. A server's processes are known by their output, which is the instance's log.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOG = re.compile(r"[0-9a-f]+\.log")
"""An instance's log; those of zygotes have other names."""
Document = dict[str, Any]


def call(url: str, method: str = "GET", body: object = None, seconds: float = 30.0) -> tuple[int, Any]:
    """One HTTP request on a connection of its own; status and JSON, or text where it is none.

    Raises:
        OSError, http.client.HTTPException: no answer came.
    """
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    with closing(http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=seconds)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json"} if data else {})
        reply = connection.getresponse()
        text = reply.read().decode()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text


def stat_of(pid: int) -> list[str] | None:
    """The fields of a process's ``stat`` from its state on; None where it is gone or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def trees(state_dir: Path) -> dict[str, set[int]]:
    """The living processes of all servers of a state directory, by log."""
    logs = str(state_dir.resolve() / "logs") + "/"
    found: dict[str, set[int]] = defaultdict(set)
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            output = os.readlink(f"/proc/{name}/fd/1").removesuffix(" (deleted)")
            if output.startswith(logs) and LOG.fullmatch(output.removeprefix(logs)) and stat_of(int(name)):
                found[output].add(int(name))
    return dict(found)


def held(state_dir: Path) -> dict[int, dict[int, int]]:
    """MiB that living processes hold, by GPU and pid."""
    found: dict[int, dict[int, int]] = {}
    for folder in (state_dir / "mock-gpus").iterdir():
        of_gpu = found.setdefault(int(folder.name), {})
        for file in folder.iterdir():
            with suppress(OSError, ValueError):
                if file.name.isdecimal() and (mib := int(file.read_text())) and stat_of(int(file.name)):
                    of_gpu[int(file.name)] = mib
    return found


@dataclass
class Reality:
    """What was found at one moment, and what is wrong with the book."""

    state_dir: Path
    awake_mib: int
    asleep_mib: int
    documents: list[Document]
    gpus: list[Document]
    complaints: list[str] = field(default_factory=list)
    trees: dict[str, set[int]] = field(init=False)
    held: dict[int, dict[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        """Look at the machine, then compare."""
        self.trees, self.held = trees(self.state_dir), held(self.state_dir)
        for document in self.documents:
            self._compare(document)
        self._find_strangers()
        for gpu in self.gpus:
            self._compare_gpu(gpu)

    def _expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.complaints.append(text)

    def _tree(self, document: Document) -> set[int]:
        return next((pids for pids in self.trees.values() if document["pid"] in pids), set())

    def _held_by(self, document: Document, pids: set[int]) -> list[int]:
        """MiB on each of its GPUs."""
        gpus = [int(uuid.removeprefix("GPU-")) for uuid in document.get("assigned_gpus", [])]
        return [sum(mib for pid, mib in self.held[gpu].items() if pid in pids) for gpu in gpus]

    def _compare(self, document: Document) -> None:
        name, state, pids = document["instance_id"], document["state"], self._tree(document)
        self._expect("activity" not in document, f"{name}: something is still under way: {document.get('activity')}")
        self._expect(state in ("ready", "sleeping", "stopped", "failed"), f"{name} is still {state}")
        lives = state == "ready" or "sleep_level" in document
        self._expect(document["status"] == ("running" if lives else "stopped"), f"{name}: {state}, {document}")
        if not lives:
            self._expect(not pids, f"{name} is {state}, and {pids} live")
            self._expect(state != "failed" or bool(document.get("error")), f"{name} has failed and does not say why")
            return
        self._expect(len(pids) >= 2, f"{name} is {state}, and of its processes only {pids} live")
        asleep, mode = says(document)
        self._expect(asleep == (state == "sleeping"), f"{name} is {state}, and its engine says is_sleeping={asleep}")
        self._expect((mode == "open") == (state == "ready"), f"{name} is {state}, and its gate is {mode}")
        expected = self.awake_mib if state == "ready" else self.asleep_mib
        for mib in self._held_by(document, pids):
            self._expect(mib == expected, f"{name} is {state}, and holds {mib} MiB")

    def _find_strangers(self) -> None:
        known = {document["pid"]: document["instance_id"] for document in self.documents if document["pid"]}
        for log, pids in self.trees.items():
            owners = [known[pid] for pid in pids if pid in known]
            self._expect(len(owners) == 1, f"processes {pids} ({Path(log).name}) belong to {owners or 'no instance'}")
        ours = {pid for pids in self.trees.values() for pid in pids}
        for gpu, of_gpu in self.held.items():
            self._expect(of_gpu.keys() <= ours, f"strangers hold memory on GPU {gpu}: {of_gpu}")

    def _compare_gpu(self, gpu: Document) -> None:
        here = [one for one in self.documents if gpu["uuid"] in one.get("assigned_gpus", [])]
        awake = sorted(one["instance_id"] for one in here if one["state"] == "ready")
        asleep = sorted(one["instance_id"] for one in here if "sleep_level" in one)
        claimed = {kind: sorted(claim["instance_id"] for claim in gpu[kind]) for kind in ("awake", "coming", "asleep")}
        name = f"GPU {gpu['index']}"
        self._expect(
            claimed == {"awake": awake, "coming": [], "asleep": asleep}, f"{name}: {claimed}, not {awake}, {asleep}"
        )
        of_gpu = self.held[gpu["index"]]
        self._expect(len(awake) <= 1, f"{name}: {awake} are awake")
        self._expect(gpu["foreign"] == [] and gpu["problem"] is None, f"{name}: {gpu['foreign']}, {gpu['problem']}")
        free = gpu["memory_mib"] - sum(of_gpu.values())
        self._expect(gpu["free_mib"] == free, f"{name}: {gpu['free_mib']} MiB are free, not {free} ({of_gpu})")


def says(document: Document) -> tuple[bool | None, str]:
    """What a server says itself: whether it sleeps (one that has no sleep mode does not), and its gate's mode."""
    try:
        status, sleeping = call(f"{document['url']}/is_sleeping", seconds=5)
        _, gate = call(f"{document['url']}/bullpen/gate", seconds=5)
        return status == 200 and sleeping["is_sleeping"], gate["mode"]
    except (OSError, http.client.HTTPException, KeyError, TypeError) as problem:
        return None, f"{type(problem).__name__}: {problem}"


def compare(url: str, state_dir: Path, awake_mib: int, asleep_mib: int) -> list[str]:
    """What is wrong with the book of the daemon at ``url``, one sentence each."""
    _, listed = call(f"{url}/v2/vllm/instances")
    _, report = call(f"{url}/v2/vllm/gpus")
    return Reality(state_dir, awake_mib, asleep_mib, listed["instances"], report["gpus"]).complaints


def both_awake(state_dir: Path, asleep_mib: int) -> Iterator[str]:
    """GPUs on which two processes hold more than a sleeper may, at the same moment, one sentence each."""
    for folder in (state_dir / "mock-gpus").iterdir():
        first = awake_on(folder, asleep_mib)
        if len(first) < 2:
            continue
        # A file that is the same before and after the others were read was so all the while.
        again = awake_on(folder, asleep_mib)
        same = {pid: mib for pid, (mib, at) in first.items() if again.get(pid) == (mib, at)}
        if len(same) >= 2:
            yield f"GPU {folder.name}: {same} are awake side by side"


def awake_on(folder: Path, asleep_mib: int) -> Mapping[int, tuple[int, int]]:
    """Living processes that hold more than a sleeper: MiB, and when that was written."""
    found = {}
    for file in folder.iterdir():
        with suppress(OSError, ValueError):
            if file.name.isdecimal() and (mib := int(file.read_text())) > asleep_mib and stat_of(int(file.name)):
                found[int(file.name)] = mib, file.stat().st_mtime_ns
    return found
