"""Waiting for a launch: told by the daemon's watch where it has one, else by asking now and then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from bullpen.client.errors import ClientError, ConnectionFailed, TimedOut
from bullpen.client.launch_errors import LaunchFailed, LaunchTimedOut
from bullpen.client.launches import LaunchResponse, LaunchState
from bullpen.client.rest import Rest, segment

Progress = Callable[[LaunchResponse], None]


class Changes:
    """Tells when an instance may have changed. What it has become is asked of the daemon each time."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._is_told = False

    async def listen(self, rest: Rest, instance_id: str, poll_interval: float) -> None:
        """Follow the daemon's watch, for good; end where it offers none."""
        while True:
            try:
                async with rest.watch(fine=True) as events:
                    self._is_told = True
                    async for event in events:
                        if event.instance is not None and event.instance.instance_id == instance_id:
                            self._changed.set()
            except (ConnectionFailed, TimedOut):
                pass
            except ClientError:
                return
            finally:
                self._is_told = False
                self._changed.set()
            await asyncio.sleep(poll_interval)

    async def next(self, poll_interval: float) -> None:
        """Wait for the next change, and ``poll_interval`` seconds at most where nobody tells of changes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._is_told else poll_interval):
                await self._changed.wait()
        self._changed.clear()


@asynccontextmanager
async def changes(rest: Rest, instance_id: str | None, poll_interval: float) -> AsyncIterator[Changes]:
    """The changes of an instance; a server that gives it no id has no watch."""
    found = Changes()
    listening = asyncio.create_task(found.listen(rest, instance_id, poll_interval)) if instance_id else None
    try:
        yield found
    finally:
        if listening is not None:
            listening.cancel()
            await asyncio.wait([listening])


async def wait_until_ready(
    rest: Rest, launch_id: str, *, poll_interval: float, timeout: float | None, on_progress: Progress | None
) -> LaunchResponse:
    """As `VLLMManager.wait_until_ready`."""
    launch: LaunchResponse | None = None

    async def look() -> LaunchResponse:
        nonlocal launch
        found = await rest.ask_for(LaunchResponse, "GET", f"/status/{segment(launch_id)}")
        if on_progress is not None and found != launch:
            on_progress(found)
        launch = found
        if found.state.ended:
            raise LaunchFailed(why_ended(found), found)
        return found

    try:
        async with asyncio.timeout(timeout or None) as deadline:
            current = await look()
            async with changes(rest, current.instance_id, poll_interval) as hints:
                while current.state != LaunchState.ready:
                    await hints.next(poll_interval)
                    current = await look()
            return current
    except TimeoutError as problem:
        if not deadline.expired():  # it is `on_progress`'s own
            raise
        raise LaunchTimedOut(why_late(launch_id, launch, timeout), launch) from problem


def why_ended(launch: LaunchResponse) -> str:
    """The sentence about a launch that ended before it was ready."""
    why = f" ({launch.error})" if launch.error else "; its log may say why"
    return f"Launch {launch.launch_id} reached terminal state: {launch.state.value}{why}"


def why_late(launch_id: str, launch: LaunchResponse | None, timeout: float | None) -> str:
    """The sentence about a launch that is not ready in time."""
    doing = "the server has not answered" if launch is None else f"state={launch.state.value}"
    if launch is not None and launch.phase is not None:
        doing += f", {launch.phase}" + (f" {launch.progress:.0%}" if launch.progress is not None else "")
    return f"Launch {launch_id} not ready after {timeout:g} s ({doing})"
