"""What `run` does: a launch that is ready for a while, and stopped again whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bullpen.client.errors import TimedOut
from bullpen.client.launch_errors import NotFound
from bullpen.client.launches import LaunchResponse
from bullpen.client.waiting import Progress

if TYPE_CHECKING:
    from bullpen.client.manager import VLLMManager

STOP_SECONDS = 60.0
"""How long a launch that is not needed any more may take to be stopped, lost connections and all."""


class Run:
    """One launch, from `begin` to `end`; `end` is to be called whatever became of `begin`.

    Args:
        manager: the client.
        model, fields: as for `VLLMManager.launch`.
        ready_timeout, ready_poll_interval, on_progress: as for `VLLMManager.wait_until_ready`.
    """

    def __init__(
        self,
        manager: VLLMManager,
        model: str,
        *,
        ready_timeout: float,
        ready_poll_interval: float,
        on_progress: Progress | None,
        **fields: Any,
    ) -> None:
        self._manager = manager
        self._model = model
        self._fields = fields
        self._timeout = ready_timeout
        self._poll_interval = ready_poll_interval
        self._on_progress = on_progress
        self._launching: asyncio.Task[LaunchResponse] | None = None

    async def begin(self) -> LaunchResponse:
        """Launch the model and wait until it is ready."""
        self._launching = asyncio.create_task(self._manager.launch(self._model, **self._fields))
        # The server may have made the launch before this is cancelled, and only its answer tells the id to stop.
        launch = await asyncio.shield(self._launching)
        return await self._manager.wait_until_ready(
            launch.launch_id, timeout=self._timeout, poll_interval=self._poll_interval, on_progress=self._on_progress
        )

    async def end(self, problem: BaseException | None = None) -> None:
        """Stop the launch, if there is one. It is seen through even where this is cancelled again and again.

        Args:
            problem: why it ends. A stop that fails is a note to it, and hides nothing.
        """
        try:
            await see_through(self._stop, STOP_SECONDS)
        except Exception as second:
            if problem is None:
                raise
            problem.add_note(f"{self._name} could not be stopped either, so it may still hold its GPUs: {second}")

    @property
    def _name(self) -> str:
        launching = self._launching
        if launching is None or not launching.done() or launching.cancelled() or launching.exception() is not None:
            return f"the launch of {self._model}"
        return f"launch {launching.result().launch_id}"

    async def _stop(self) -> None:
        if self._launching is None:
            return
        await asyncio.wait([self._launching])
        if self._launching.cancelled() or self._launching.exception() is not None:
            return
        with suppress(NotFound):  # someone removed it
            await self._manager.stop(self._launching.result().launch_id)


async def see_through(work: Callable[[], Coroutine[Any, Any, None]], seconds: float) -> None:
    """Have something done to its end, and only then be cancelled, if so.

    A cancelled scope of anyio's, as web frameworks have them, cancels at each step anew, so the work is a task of its
    own. Where all tasks are cancelled, as `asyncio.run` does at its end, it is begun again.

    Raises:
        TimedOut: it takes longer than so many seconds.
        CancelledError: this was cancelled meanwhile; the work is done.
    """
    end = asyncio.get_running_loop().time() + seconds
    cancelled: asyncio.CancelledError | None = None
    task = asyncio.create_task(work())
    while not task.done() and (left := end - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError as problem:
            cancelled = problem
        if task.done() and task.cancelled():
            task = asyncio.create_task(work())
    failure: BaseException | None
    if task.done():
        failure = task.exception()
    else:
        task.cancel()
        failure = TimedOut(f"it was not done within {seconds:g} s; `bullpen ps` on the server shows whether it is now")
    if cancelled is not None:
        if failure is not None:
            cancelled.add_note(f"a launch could not be stopped, so it may still hold its GPUs: {failure}")
        raise cancelled
    if failure is not None:
        raise failure
