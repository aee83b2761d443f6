"""The demo's own daemon: started as a program, talked to over REST, ended by a signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from bullpen.demo import chat, processes
from bullpen.demo.cold import tail
from bullpen.demo.errors import DemoError, expect
from bullpen.demo.models import Engine, environment

INSTANCES = "/v2/vllm/instances"
ANSWER_SECONDS = 20.0
WARM_SECONDS = 900.0
START_SECONDS = 300.0
SPARE_SECONDS = 5.0
END_SECONDS = 30.0
PAUSE = 0.02

Show = Callable[[str, float], None]
"""Told what is going on and the progress, 0 to 1, again and again."""


@dataclass(frozen=True)
class Started:
    """A warm start.

    Attributes:
        instance: the instance as the daemon describes it, ready.
        created: seconds from the request to the reply that its process runs.
        ready: seconds from the request to the event that it is ready.
        first_token: seconds from the request to the end of a one-token chat completion.
    """

    instance: dict[str, Any]
    created: float
    ready: float
    first_token: float

    @property
    def name(self) -> str:
        """Its id, which is its model's name too."""
        return str(self.instance["instance_id"])

    @property
    def url(self) -> str:
        """Where it answers."""
        return str(self.instance["url"])


class Daemon:
    """A daemon in a folder of its own.

    Args:
        engine: what it forks.
        folder: for its state and its output.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "daemon.log"
        self._sessions: set[int] = set()
        self._begun = time.monotonic()
        settings = {"BULLPEN_HOST": "127.0.0.1", "BULLPEN_PORT": "0", "BULLPEN_STATE_DIR": str(folder)}
        settings |= {"BULLPEN_ENGINE": "vllm", "BULLPEN_ENGINE_PYTHON": engine.python}
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bullpen.launcher"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(**settings),
                # A Ctrl-C at the terminal is for the demo, which then ends the daemon in order.
                start_new_session=True,
            )
        self._sessions.add(self._process.pid)
        self._http = httpx.Client(timeout=ANSWER_SECONDS)
        self._kept = False

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it answers."""
        return str(self._http.base_url).rstrip("/")

    # -- its start ----------------------------------------------------------------------------------------------

    def wait_until_it_answers(self) -> float:
        """Wait for ``/health``; return the seconds since its start.

        Raises:
            DemoError: it ends, or takes too long.
        """
        file = self.folder / "url"
        while not (file.exists() and (url := file.read_text())):
            self._check(self._begun + ANSWER_SECONDS, "does not answer")
            time.sleep(PAUSE)
        self._http.base_url = httpx.URL(url)
        expect(self._get("/health") == {"status": "OK"}, "the daemon's /health does not say OK")
        return time.monotonic() - self._begun

    def wait_until_warm(self, show: Show) -> float:
        """Wait until it can fork; return the seconds since its start.

        Raises:
            DemoError: the engine cannot be imported, or that takes too long.
        """
        while True:
            state = self._get("/ready", 200, 503)
            zygote = state["zygotes"][0] if state["zygotes"] else {"state": "warming"}
            if state["ready"]:
                return time.monotonic() - self._begun
            expect(zygote["state"] != "broken", f"the engine cannot be imported: {zygote.get('error')}")
            done, total = zygote.get("done") or 0, zygote.get("total") or 0
            show(f"{zygote.get('module') or 'python'} {done}/{total}", done / total if total else 0.0)
            self._check(self._begun + WARM_SECONDS, "is not warm")
            time.sleep(PAUSE)

    def _check(self, deadline: float, what: str) -> None:
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"the daemon ended with status {code}; its output ends:\n{tail(self.output)}")
        if time.monotonic() > deadline:
            raise DemoError(f"the daemon {what} in time; its output ends:\n{tail(self.output)}")

    # -- instances ----------------------------------------------------------------------------------------------

    def start(self, name: str, options: str, show: Show) -> Started:
        """Create an instance, follow its phases and ask it for a first token.

        Raises:
            DemoError: one of that fails.
        """
        begun = time.monotonic()
        document = self._send("PUT", f"{INSTANCES}/{name}", 201, body={"options": options})
        created = time.monotonic() - begun
        expect(document["status"] == "started", f"the reply to the create says {document['status']}, not started")
        self._sessions.add(document["pid"])
        instance = self._wait_until_ready(name, show, begun + START_SECONDS)
        ready = time.monotonic() - begun
        chat.ask(instance["url"], name, tokens=1)
        return Started(instance, created, ready, time.monotonic() - begun)

    def _wait_until_ready(self, name: str, show: Show, deadline: float) -> dict[str, Any]:
        """Follow the watch; the heartbeat keeps the deadline in sight."""
        with self._http.stream("GET", f"{INSTANCES}/watch?events=all") as lines:
            for line in lines.iter_lines():
                event = json.loads(line)
                instance: dict[str, Any] = event["object"]
                if instance.get("instance_id") == name and event["type"] != "HEARTBEAT":
                    if instance["state"] == "ready":
                        return instance
                    expect(instance["state"] == "starting", self._why(instance))
                    show(instance["phase"], instance["progress"])
                expect(time.monotonic() < deadline, f"{name} is not ready after {START_SECONDS:.0f} s")
        raise DemoError(f"the watch ended before {name} was ready")

    def _why(self, instance: dict[str, Any]) -> str:
        error = instance.get("error") or {"message": "it gives no reason"}
        end = self.log(instance["instance_id"])[-1500:]
        return f"{instance['instance_id']} is {instance['state']}: {error['message']}; its log ends:\n{end}"

    def log(self, name: str) -> str:
        """An instance's log."""
        return self._http.get(f"{INSTANCES}/{name}/log").text

    def delete(self, name: str) -> float:
        """Delete an instance; return the seconds that took.

        Raises:
            DemoError: it cannot be, or a process of it is left when the reply comes.
        """
        pid = self._get(f"{INSTANCES}/{name}")["pid"]
        begun = time.monotonic()
        document = self._send("DELETE", f"{INSTANCES}/{name}", 200)
        seconds = time.monotonic() - begun
        expect(document["status"] == "terminated", f"the reply to the delete says {document['status']}, not terminated")
        left = processes.in_sessions({pid})
        expect(not left, f"{name} is deleted and process {left[0].pid if left else 0} of it lives")
        return seconds

    def tree(self) -> list[processes.Process]:
        """The daemon and all below it, once the next spare is there."""
        deadline = time.monotonic() + SPARE_SECONDS
        while True:
            found = processes.read_tree(self.pid)
            self._sessions |= processes.sessions_of(found)
            if any(process.title.startswith("bullpen: spare") for process in found) or time.monotonic() > deadline:
                return found
            time.sleep(PAUSE)

    # -- its end ------------------------------------------------------------------------------------------------

    def end(self) -> float:
        """End the daemon by SIGTERM; return the seconds that took.

        Raises:
            DemoError: it does not end, or leaves a process behind.
        """
        self.tree()
        begun = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired as problem:
            raise DemoError(f"the daemon has not ended {END_SECONDS:.0f} s after SIGTERM") from problem
        seconds = time.monotonic() - begun
        expect(code == 0, f"the daemon ended with status {code}; its output ends:\n{tail(self.output)}")
        left = processes.leftovers(self._sessions, self.folder)
        expect(not left, f"the daemon has ended and left behind: {', '.join(left)}")
        return seconds

    def keep(self) -> None:
        """Leave it and its instances running when the demo ends."""
        self._kept = True

    def _get(self, path: str, *expected: int) -> dict[str, Any]:
        return self._send("GET", path, *(expected or (200,)))

    def _send(self, method: str, path: str, *expected: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, json=body)
        except httpx.HTTPError as problem:
            raise DemoError(
                f"{method} {path}: {problem!r}; the daemon's output ends:\n{tail(self.output)}"
            ) from problem
        expect(reply.status_code in expected, f"{method} {path} was answered with {reply.status_code}: {reply.text}")
        document: dict[str, Any] = reply.json()
        return document

    def __enter__(self) -> Daemon:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing running, whatever happened."""
        self._http.close()
        if self._kept and error is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        processes.kill_sessions(self._sessions, END_SECONDS)
