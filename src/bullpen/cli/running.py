"""The course of ``bullpen run``: create, show the start, stay, and what Ctrl-C does in between."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rich.console import Console

from bullpen.cli import words
from bullpen.cli.common import INTERRUPTED, complain, print_json
from bullpen.cli.progress import StartDisplay
from bullpen.cli.tail import last_lines
from bullpen.client import BullpenClient, ClientError, ConnectionFailed, Event, Instance, Refused
from bullpen.errors import BullpenError

LOOK_SECONDS = 0.25
"""How often the engine's warmth is asked for while a create waits for it."""
LAST_LINES = 15
UNEXPLAINED = ("error", "unknown")
"""The classes of failures of which the log may tell more than the daemon's sentence."""


@dataclass(frozen=True)
class Request:
    """What is to be run; ``wishes`` are the fields of a create about GPUs and sleep."""

    model: str
    options: str
    instance_id: str | None = None
    env_vars: Mapping[str, str] | None = None
    gpu_uuids: Sequence[str] | None = None
    engine: str | None = None
    wishes: Mapping[str, Any] = field(default_factory=dict)


class Running:
    """One ``bullpen run``.

    Args:
        client: of the daemon.
        request: what is to be run.
        console: for what people read.
        detach: return as soon as it is ready.
        json_output: print the last that is known of the instance, as JSON, at the end.
    """

    def __init__(
        self, client: BullpenClient, request: Request, console: Console, *, detach: bool, json_output: bool
    ) -> None:
        self._client = client
        self._request = request
        self._console = console
        self._detach = detach
        self._json = json_output
        self._creating: Future[Instance] = Future()
        self._name = request.instance_id
        self._last: Mapping[str, Any] = {}

    def go(self) -> int:
        """Do it all; return the exit code."""
        try:
            code = self._run()
        except KeyboardInterrupt:
            code = self._interrupted()
            self._print_last()
            # Ctrl-C may have come anywhere, within a lock too: what is left to tidy up could wait for ever.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        self._print_last()
        return code

    def _print_last(self) -> None:
        if self._json and self._last:
            print_json(self._last)

    def _run(self) -> int:
        display = StartDisplay(self._console, self._request.instance_id or words.name_for(self._request.model, ()))
        threading.Thread(target=self._create, daemon=True).start()
        with display:
            instance = self._wait_until_created(display)
            display.rename(instance.instance_id)
            try:
                ended = self._stay(instance, display)
            except ConnectionFailed as problem:
                raise ConnectionFailed(f"{problem}; {goes_on(instance)}") from problem
        return 0 if ended is None else self._say_end(ended)

    # -- create ------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        try:
            self._creating.set_result(self._try_names())
        except BaseException as problem:
            self._creating.set_exception(problem)

    def _try_names(self) -> Instance:
        if self._request.instance_id is not None:
            return self._create_as(self._request.instance_id)
        taken = {instance.instance_id for instance in self._client.list().instances}
        name = words.name_for(self._request.model, taken)
        try:
            return self._create_as(name)
        except Refused as problem:
            if problem.status != 409:
                raise
            # Perhaps somebody was quicker with this name; if it is about something else, it will be said again.
            return self._create_as(f"{name}-{secrets.token_hex(2)}")

    def _create_as(self, name: str) -> Instance:
        request, self._name = self._request, name
        return self._client.create(
            request.options,
            instance_id=name,
            env_vars=request.env_vars,
            gpu_uuids=request.gpu_uuids,
            engine=request.engine,
            **request.wishes,
        )

    def _wait_until_created(self, display: StartDisplay) -> Instance:
        while True:
            try:
                return self._creating.result(LOOK_SECONDS)
            except NotYet:
                if self._creating.done():
                    raise
            with suppress(ClientError):  # the create will tell
                display.warming(self._client.ready())

    # -- start and stay ----------------------------------------------------------------------------------------

    def _stay(self, instance: Instance, display: StartDisplay) -> Event | None:
        """Show the instance until it ends, and return that event; None where it is left alone."""
        was_ready = False
        display.update(instance)
        self._last = instance.document
        for event in self._client.follow(instance.instance_id):
            if event.instance is None:
                continue
            instance, self._last = event.instance, event.instance.document
            if event.type == "DELETED" or instance.ended:
                return event
            if instance.state == "ready" and not was_ready:
                was_ready = True
                display.ready(instance, *where(instance))
                if self._detach:
                    return None
            display.update(instance)
        raise ConnectionFailed(f"the daemon at {self._client.url} is ending")

    def _say_end(self, event: Event) -> int:
        instance = event.instance
        assert instance is not None
        if event.type == "DELETED":
            early = not instance.ready_at
            self._say(f"{instance.instance_id} was stopped{' before it was ready' if early else ''}.")
            return int(early)
        if instance.state == "failed" or instance.error is not None:
            self._say_failure(instance)
            return 1
        self._say(f"{instance.instance_id} has ended by itself.")
        return 0

    def _say_failure(self, instance: Instance) -> None:
        name, error = instance.instance_id, instance.error
        if error is None or error.kind in UNEXPLAINED:
            with suppress(BullpenError):
                for line in last_lines(self._client, name, LAST_LINES):
                    print(f"  | {line}", file=sys.stderr)
        sentence = error.message if error is not None else "nobody saw why"
        ways = f"`bullpen logs {name}` has the log, `bullpen stop {name}` removes it"
        complain(f"{name} {'failed' if instance.ready_at else 'did not start'}: {sentence} ({ways})")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    # -- Ctrl-C ------------------------------------------------------------------------------------------------

    def _interrupted(self) -> int:
        """Offer to stop the instance. From here on, Ctrl-C ends the command at once."""
        signal.signal(signal.SIGINT, end_at_once)
        goes_on = f"It goes on; `bullpen stop {self._name or 'ID'}` stops it."
        if not sys.stdin.isatty():
            self._say(goes_on)
            return INTERRUPTED
        self._console.print("Stop it? [Y/n] ", end="")
        answer = sys.stdin.readline()
        if not answer or answer.strip().lower() not in ("", "y", "yes"):
            self._say(goes_on)
            return INTERRUPTED
        try:
            if not self._creating.done():
                self._say("It will be stopped as soon as its process is there …")
            stopped = self._client.delete(self._creating.result().instance_id)
        except BullpenError as problem:
            self._say(f"There is nothing to stop: {problem}")
        else:
            self._last = stopped.document
            self._say(f"{stopped.instance_id} stopped.")
        return INTERRUPTED


def where(instance: Instance) -> tuple[str, ...]:
    """Where an instance answers, how to ask it, and how to go on."""
    name = instance.instance_id
    ways = f"`bullpen logs -f {name}` shows its log, `bullpen stop {name}` stops it."
    return f"\nIt answers at {instance.url}\n", words.curl(instance), f"\n{ways}\n"


def goes_on(instance: Instance) -> str:
    """What becomes of a server whose daemon is gone."""
    return (
        f"unless that daemon stopped it, {instance.instance_id} goes on at {instance.url},"
        " and the next `bullpen serve` adopts it"
    )


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End without waiting for anything."""
    sys.stdout.flush()
    os.write(2, b"\nLeft as it is; `bullpen ps` shows it.\n")
    os._exit(INTERRUPTED)
