"""The demo's own daemon: started as a program, talked to over REST, ended by a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bullpen.client import BullpenClient, Instance
from bullpen.client.errors import ClientError
from bullpen.demo import chat, processes
from bullpen.demo.checks import DemoError, deadline, expect
from bullpen.demo.cold import tail
from bullpen.demo.models import Engine, environment

ANSWER_SECONDS = 30.0
WARM_SECONDS = 900.0
START_SECONDS = 300.0
STOP_SECONDS = 60.0
SPARE_SECONDS = 5.0
SPARE_TITLE = "bullpen: spare"
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

    instance: Instance
    created: float
    ready: float
    first_token: float

    @property
    def name(self) -> str:
        """Its id, which is its model's name too."""
        return self.instance.instance_id

    @property
    def url(self) -> str:
        """Where it answers."""
        return str(self.instance.url)


class Daemon:
    """A daemon in a folder of its own.

    Args:
        engine: what it forks.
        folder: for its state and its output.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.folder = folder
        self._output = folder / "daemon.log"
        self._begun = time.monotonic()
        settings = {"BULLPEN_HOST": "127.0.0.1", "BULLPEN_PORT": "0", "BULLPEN_STATE_DIR": str(folder)}
        settings |= {"BULLPEN_ENGINE": "vllm", "BULLPEN_ENGINE_PYTHON": engine.python}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bullpen.launcher"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(**settings),
                # A Ctrl-C at the terminal is for the demo, which then ends the daemon in order.
                start_new_session=True,
            )
        self._sessions = {self._process.pid}
        self._client: BullpenClient

    # -- its start ----------------------------------------------------------------------------------------------

    def wait_until_it_answers(self) -> float:
        """Wait for ``/health``; return the seconds since its start.

        Raises:
            DemoError: it ends, or takes too long.
        """
        file = self.folder / "url"
        with deadline(ANSWER_SECONDS, "the daemon's start"):
            while not (file.exists() and (url := file.read_text())):
                self._check_alive()
                time.sleep(PAUSE)
        self._client = BullpenClient(url)
        expect(self._client.health() == {"status": "OK"}, "the daemon's /health does not say OK")
        return time.monotonic() - self._begun

    def wait_until_warm(self, show: Show) -> float:
        """Wait until it can fork; return the seconds since its start.

        Raises:
            DemoError: the engine cannot be imported, or that takes too long.
        """
        with deadline(WARM_SECONDS, "importing vLLM"):
            while not (state := self._client.ready()).ready:
                self._check_alive()
                for zygote in state.zygotes:
                    expect(zygote.state != "broken", f"the engine cannot be imported: {zygote.error}")
                    done = f"{zygote.done}/{zygote.total}" if zygote.total else ""
                    show(f"{done} {zygote.module or ''}", zygote.done / max(1, zygote.total))
                time.sleep(PAUSE)
        return time.monotonic() - self._begun

    def _check_alive(self) -> None:
        code = self._process.poll()
        expect(code is None, f"the daemon ended with status {code}; its output ends:\n{tail(self._output)}")

    # -- instances ----------------------------------------------------------------------------------------------

    def start(self, name: str, options: str, show: Show) -> Started:
        """Create an instance, follow its phases and ask it for a first token.

        Raises:
            DemoError: one of that fails.
        """
        begun = time.monotonic()
        with deadline(START_SECONDS, f"the start of {name}"):
            reply = self._client.create(options, instance_id=name)
            created = time.monotonic() - begun
            instance = self._wait_until_ready(name, show)
            ready = time.monotonic() - begun
            chat.ask(str(instance.url), name, tokens=1)
            first_token = time.monotonic() - begun
        expect(reply.status == "started", f"the reply to the create says {reply.status}, not started")
        expect(instance.start in ("spare", "fork"), f"{name} was started by {instance.start}, which is not a fork")
        return Started(instance, created, ready, first_token)

    def _wait_until_ready(self, name: str, show: Show) -> Instance:
        try:
            return self._client.wait_until_ready(
                name, on_change=lambda instance: show(instance.phase or "", instance.progress or 0.0)
            )
        except ClientError as problem:
            raise DemoError(f"{name} did not start: {problem}; its log ends:\n{self.log(name)[-2000:]}") from problem

    def log(self, name: str) -> str:
        """An instance's log."""
        return b"".join(chunk.data for chunk in self._client.log_chunks(name)).decode(errors="replace")

    def delete(self, started: Started) -> float:
        """Delete an instance; return the seconds that took.

        Raises:
            DemoError: it cannot be, or a process of it is left when the reply comes.
        """
        begun = time.monotonic()
        with deadline(STOP_SECONDS, f"the end of {started.name}"):
            reply = self._client.delete(started.name)
        seconds = time.monotonic() - begun
        left = [process.pid for process in processes.in_sessions({started.instance.pid})]
        expect(reply.status == "terminated", f"the reply to the delete says {reply.status}, not terminated")
        expect(not left, f"{started.name} is deleted and these processes of it live: {left}")
        return seconds

    def tree(self) -> list[processes.Process]:
        """The daemon and all below it, once the next spare is there.

        It is looked at anew then: a fork in the middle of it would have pages counted for one sharer too few.
        """
        patience = time.monotonic() + SPARE_SECONDS
        while not processes.is_below(self._process.pid, SPARE_TITLE) and time.monotonic() < patience:
            time.sleep(PAUSE)
        found = processes.read_tree(self._process.pid)
        self._sessions |= processes.sessions_of(found)
        return found

    # -- its end ------------------------------------------------------------------------------------------------

    def end(self) -> float:
        """End the daemon by SIGTERM; return the seconds that took.

        Raises:
            DemoError: it does not end, or leaves a process behind.
        """
        self.tree()
        begun = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        with deadline(STOP_SECONDS, "the daemon's end"):
            code = self._process.wait()
        seconds = time.monotonic() - begun
        expect(code == 0, f"the daemon ended with status {code}; its output ends:\n{tail(self._output)}")
        patience = time.monotonic() + SPARE_SECONDS
        while (left := processes.leftovers(self._sessions, self.folder)) and time.monotonic() < patience:
            time.sleep(PAUSE)  # a spare ends when it sees that its zygote has
        expect(not left, f"the daemon has ended and left behind: {', '.join(left)}")
        return seconds

    def __enter__(self) -> Daemon:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing running, whatever happened."""
        if self._process.poll() is None:
            self._sessions |= processes.sessions_of(processes.read_tree(self._process.pid))
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        processes.kill_sessions(self._sessions, STOP_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PAUSE)
