"""The two ends of `run`: a launch that is ready, and one that is stopped again whatever happened in between."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bullpen.client.launch_errors import NotFound
from bullpen.client.launches import LaunchResponse
from bullpen.client.waiting import Progress

if TYPE_CHECKING:
    from bullpen.client.manager import VLLMManager


async def begin(
    manager: VLLMManager,
    model: str,
    *,
    ready_timeout: float,
    ready_poll_interval: float,
    on_progress: Progress | None,
    **fields: Any,
) -> LaunchResponse:
    """Launch a model and wait until it is ready; where that fails nothing is left behind."""
    launching = asyncio.create_task(manager.launch(model, **fields))
    try:
        launch = await asyncio.shield(launching)
    except asyncio.CancelledError as problem:
        # The server may have made the launch by now, and only its answer tells the id to stop.
        with suppress(Exception):
            await end(manager, (await launching).launch_id, problem)
        raise
    try:
        return await manager.wait_until_ready(
            launch.launch_id, timeout=ready_timeout, poll_interval=ready_poll_interval, on_progress=on_progress
        )
    except BaseException as problem:
        await end(manager, launch.launch_id, problem)
        raise


async def end(manager: VLLMManager, launch_id: str, problem: BaseException | None = None) -> None:
    """Stop a launch. Where ``problem`` is why, a stop that fails is a note to it, and hides nothing."""
    try:
        with suppress(NotFound):  # someone removed it
            await manager.stop(launch_id)
    except Exception as second:
        if problem is None:
            raise
        problem.add_note(f"launch {launch_id} could not be stopped either, so it may still hold its GPUs: {second}")
