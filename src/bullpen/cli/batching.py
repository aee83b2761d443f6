"""The course of ``bullpen batch run``: find or launch the server, send, have it back where it ends, stop it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bullpen.cli import words
from bullpen.cli.batch_display import BatchDisplay
from bullpen.cli.common import INTERRUPTED, complain, in_background
from bullpen.cli.progress import StartDisplay
from bullpen.client import BullpenClient, ClientError, ConnectionFailed, Instance, InstanceFailed, Refused, VLLMManager
from bullpen.client.batch import BatchProgress, BatchReport, run_batch_by
from bullpen.client.batch_ways import Way, way_to
from bullpen.client.inference import Address
from bullpen.errors import BullpenError

MARK = "bullpen.batch"
"""The annotation of an instance that was launched for a job: the job's output. It is stopped when that job is done,
even if the command that launched it was killed."""
LOOK_SECONDS = 0.25
"""How often is looked at what somebody waits for."""
ENDING_SECONDS = 60.0
"""How long a server that has ended may be in its own way, or another one in its place."""
RESTARTS = 5
"""How often the server is started again without a success in between."""


@dataclass(frozen=True)
class Wanted:
    """Who shall do the job.

    Attributes:
        name: an instance's id, a model that is served, or one to be launched.
        folder: the same, by its full path if it is a folder.
        options: of ``vllm serve``, for a launch.
        gpus: for a launch.
        api_key: what its server wants to be asked with.
    """

    name: str
    folder: str
    options: Sequence[str] = ()
    gpus: int | None = None
    api_key: str | None = None


class Job:
    """One ``bullpen batch run``.

    Args:
        client: of the daemon.
        console: for what people read.
        source: the requests.
        output: the results.
        wanted: who shall do it.
        in_flight: how many requests are in flight.
        grpc_address: the daemon's gRPC server, where it is not at the port after its own.
    """

    def __init__(
        self,
        client: BullpenClient,
        console: Console,
        source: Path,
        output: Path,
        wanted: Wanted,
        in_flight: int,
        grpc_address: str | None = None,
    ) -> None:
        self._client = client
        self._console = console
        self._source = source
        self._output = output
        self._wanted = wanted
        self._in_flight = in_flight
        self._grpc_address = grpc_address
        self._instance: Instance | None = None
        self._launching: Future[Instance] | None = None
        self._has_mark = False
        self._display = BatchDisplay(console, source, output)

    def go(self, before: BatchProgress) -> BatchReport:
        """Do what is left of the job.

        Args:
            before: how far it is.
        """
        self._display.resume(before)
        if before.done == before.total:
            done = BatchReport(before.total, before.total, before.failed, 0.0)
            # Its server may be left from a run that was killed between its last result and the stop.
            with suppress(BullpenError):
                self._instance = self._find_own(self._client.list().instances)
            self._end()
        else:
            done = self._run()
        self._display.done(done)
        return done

    def summary(self, done: BatchReport) -> Mapping[str, Any]:
        """The job, for programs."""
        return {
            "input": str(self._source),
            "output": str(self._output),
            "model": self._wanted.name,
            "instance_id": None if self._instance is None else self._instance.instance_id,
            "total": done.total,
            "succeeded": done.total - done.failed,
            "failed": done.failed,
            "resumed": done.resumed,
            "seconds": round(done.seconds, 3),
        }

    def _run(self) -> BatchReport:
        try:
            instance = self._instance = self._find() or self._launch()
            with self._display:
                done = asyncio.run(self._send(instance))
        except KeyboardInterrupt:
            self._interrupted()
        except BaseException:
            self._end()
            raise
        self._end()
        return done

    # -- the server ------------------------------------------------------------------------------------------------

    def _find(self) -> Instance | None:
        """A server that is there, made ready; None where one must be launched."""
        wanted, instances = self._wanted, self._client.list().instances
        found = next((one for one in instances if one.instance_id == wanted.name), None)
        if found is None:
            found = self._find_own(instances)
            if found is not None and found.ended:  # it failed; its log has been there long enough
                self._client.delete(found.instance_id)
                found = None
        if found is None:
            names = {wanted.name, wanted.folder}
            serving = [one for one in instances if not one.ended and names & {one.model, *one.served_model_names}]
            found = min(serving, key=lambda one: one.state != "ready", default=None)
        if found is not None and (wanted.options or wanted.gpus) and not self._has_mark:
            self._say(f"{found.instance_id} serves {wanted.name} already; options for a launch are not used")
        return None if found is None else self._make_ready(found)

    def _find_own(self, instances: Sequence[Instance]) -> Instance | None:
        """What a run of this job has launched that was killed."""
        mark = str(self._output.absolute())
        found = next((one for one in instances if (one.annotations or {}).get(MARK) == mark), None)
        self._has_mark = found is not None
        return found

    def _make_ready(self, instance: Instance) -> Instance:
        name = instance.instance_id
        if instance.state == "ready":
            return instance
        self._instance = instance
        if instance.state == "starting":
            self._say(f"{name} is starting")
            return self._client.wait_until_ready(name)
        self._say(f"{name} {words.has_become(instance)}; it is being made ready")
        return self._client.wake(name)

    def _launch(self) -> Instance:
        taken = {instance.instance_id for instance in self._client.list().instances}
        name = words.name_for(self._wanted.name, taken)
        display, over = StartDisplay(self._console, name), threading.Event()
        self._launching = Future()
        try:
            with display:
                in_background(lambda: self._create(name), over)
                self._instance = self._wait_until_created(display)
                instance = self._client.wait_until_ready(name, on_change=display.update)
            display.ready(instance)
            return instance
        except InstanceFailed as problem:
            ways = f"`bullpen logs {name}` has the log, `bullpen stop {name}` removes it"
            self._has_mark = False  # so that there is a log to be read
            raise ClientError(f"{name} did not start: {problem} ({ways})") from problem
        finally:
            over.set()

    def _create(self, name: str) -> None:
        assert self._launching is not None
        wanted, gpus = self._wanted, self._wanted.gpus
        try:
            if gpus is None and self._client.gpus().gpus:
                gpus = 1
            options = shlex.join(["--model", wanted.folder, *wanted.options])
            mark = {MARK: str(self._output.absolute())}
            created = self._client.create(options, instance_id=name, annotations=mark, gpus=gpus)
        except BaseException as problem:
            self._launching.set_exception(problem)
        else:
            self._has_mark = True
            self._launching.set_result(created)

    def _wait_until_created(self, display: StartDisplay) -> Instance:
        assert self._launching is not None
        while True:
            try:
                return self._launching.result(LOOK_SECONDS)
            except NotYet:
                if self._launching.done():
                    raise
            with suppress(ClientError):  # the create will tell
                display.warming(self._client.ready())

    def _end(self) -> None:
        """Stop what was launched for this job."""
        instance = self._instance
        if instance is None or not self._has_mark:
            return
        name = instance.instance_id
        try:
            self._client.delete(name)
        except BullpenError as problem:
            complain(f"{name} was launched for this and could not be stopped: {problem}; `bullpen stop {name}` does it")
        else:
            self._say(f"{name} was launched for this and is stopped.")

    # -- the requests ----------------------------------------------------------------------------------------------

    async def _send(self, instance: Instance) -> BatchReport:
        names = instance.served_model_names
        model = self._wanted.name if self._wanted.name in names else next(iter(names), instance.model)
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it would write between the lines of the display
        target = self._client.target
        address = Address.find(target.url, self._grpc_address)
        async with (
            VLLMManager(target.url, access_key=target.access_key, retry_seconds=0.0) as manager,
            way_to(instance, target, address, api_key=self._wanted.api_key) as way,
        ):
            keeper = Keeper(manager, instance, way, self._display)
            return await run_batch_by(
                way,
                self._source,
                self._output,
                model=model,
                in_flight=self._in_flight,
                on_progress=self._display.update,
                restore=keeper.restore,
            )

    # -- Ctrl-C ----------------------------------------------------------------------------------------------------

    def _interrupted(self) -> None:
        """Say how to go on, stop what was launched, and end. From here on, Ctrl-C ends the command at once."""
        signal.signal(signal.SIGINT, end_at_once)
        if self._launching is not None:
            with suppress(BullpenError):
                self._instance = self._launching.result()
        self._end()
        complain(f"{self._display.so_far()}; run the same command again, and it goes on")
        sys.stdout.flush()
        sys.stderr.flush()
        # Ctrl-C may have come anywhere, within a lock too: what is left to tidy up could wait for ever.
        os._exit(INTERRUPTED)

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


class Keeper:
    """Has a job's server back when it ends.

    Args:
        manager: a client of the daemon that has it.
        instance: the server.
        way: is kept leading to it.
        display: is told of it.
    """

    def __init__(self, manager: VLLMManager, instance: Instance, way: Way, display: BatchDisplay) -> None:
        self._manager = manager
        self._name = instance.instance_id
        self._way = way
        self._display = display
        self._restarts = self._successes = 0

    async def restore(self) -> None:
        """Look after the server, and start it again if it has ended.

        Raises:
            ClientError: that does not help.
        """
        with suppress(ConnectionFailed):  # a daemon that is away takes no server along
            instance = await self._manager.instance(self._name)
            if instance.ended or instance.state == "sleeping":
                instance = await self._wake(instance)
            self._way.follow(instance)

    async def _wake(self, instance: Instance) -> Instance:
        name, successes = self._name, self._display.successes
        self._restarts = self._restarts + 1 if successes == self._successes else 1
        self._successes = successes
        if self._restarts > RESTARTS:
            raise ClientError(
                f"{name} has ended {RESTARTS} times without a single success in between; `bullpen logs {name}` may say"
                " why. Run the job again when that is mended: it goes on where it is"
            )
        why = f" ({instance.error.message})" if instance.error is not None else ""
        self._display.note(f"{name} {words.has_become(instance)}{why}; it is being made ready again")
        woken = await self._wake_when_ended(name)
        self._display.note(f"{name} is ready again")
        return woken

    async def _wake_when_ended(self, name: str) -> Instance:
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            try:
                return await self._manager.wake(name)
            except Refused as problem:
                # Processes that it had may still be ending, and so may whoever has its GPU.
                if problem.status != 409 or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(LOOK_SECONDS)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End without waiting for anything."""
    os.write(2, b"\nLeft as it is; `bullpen ps` shows what runs.\n")
    os._exit(INTERRUPTED)
