"""The synchronous twin of `VLLMManager`: the same methods, carried out by an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, overload

import httpx

from bullpen.client.errors import ClientError
from bullpen.client.launches import Completion, LaunchResponse
from bullpen.client.lifecycle import Run
from bullpen.client.manager import VLLMManager
from bullpen.client.messages import FineOptions
from bullpen.client.waiting import Progress

P = ParamSpec("P")
T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own, for callers that have none."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bullpen-client", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done; return what comes of it. An interrupt ends that first, and waits for its end.

        Raises:
            ClientError: the thread has ended, is another process's, or it is this one.
        """
        if not self.can_wait:
            work.close()
            if self._pid != os.getpid():
                raise ClientError("this client was made before the process was forked; make one in each process")
            raise ClientError("this client was closed, or is asked by its own callback; make another one for that")
        tasks: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: ended.set())

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # the interrupt came before it was begun
                work.close()
                ended.set()

        try:
            self._loop.call_soon_threadsafe(start)
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            outlast(ended)
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError:
            raise ClientError("this client was closed in the middle of a call") from None

    @property
    def can_wait(self) -> bool:
        """Whether the thread lives, in this process, and is another one than this."""
        return self._thread.is_alive() and not self._loop.is_closed() and threading.current_thread() is not self._thread

    def end(self) -> None:
        """End the thread and what it is doing."""
        if self.can_wait:
            self.wait(end_tasks())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def outlast(ended: threading.Event) -> None:
    """Wait for an end through any number of interrupts; what was cancelled ends soon, or stops a launch first."""
    while not ended.is_set():
        with suppress(KeyboardInterrupt):
            ended.wait()


async def end_tasks() -> None:
    """Cancel all that this loop is doing beside this, and see it end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def waiting(
    method: Callable[Concatenate[VLLMManager, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncVLLMManager, P], T]:
    """The method that waits for what the asynchronous one does."""

    @wraps(method)
    def call(self: SyncVLLMManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.wait(method(self._manager, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[VLLMManager, P], AsyncGenerator[T]],
) -> Callable[Concatenate[SyncVLLMManager, P], Generator[T]]:
    """The method that iterates over what the asynchronous one gives. Closing the iterator closes that one too."""

    @wraps(method)
    def call(self: SyncVLLMManager, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        source = method(self._manager, *args, **kwargs)
        try:
            while (found := self._thread.wait(next_of(source))) is not None:
                yield found[0]
        finally:
            if self._thread.can_wait:  # an iterator may also be dropped after the client was closed
                self._thread.wait(close(source))

    return call


async def close(source: AsyncGenerator[Any]) -> None:
    """Close an iterator."""
    await source.aclose()


async def next_of(source: AsyncGenerator[T]) -> tuple[T] | None:
    """The next item, None where there is none (a StopIteration could not leave a coroutine)."""
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return None


class SyncVLLMManager:
    """`VLLMManager` without ``await``; the same arguments, methods and errors. Safe to use from several threads::

        with SyncVLLMManager("http://your-server:8000") as manager:
            with manager.run("meta-llama/Llama-3.1-8B-Instruct") as launch:
                for piece in manager.stream(launch.launch_id, prompt="Once upon a time", max_tokens=128):
                    print(piece.text, end="")

    Callbacks are called in the client's own thread.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        grpc_address: str | None = None,
        access_key: str | None = None,
        timeout: float = 30.0,
        grpc_ca: Path | str | None = None,
        limit_response: bool = False,
        retry_seconds: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._manager = VLLMManager(
            base_url,
            grpc_address=grpc_address,
            access_key=access_key,
            timeout=timeout,
            grpc_ca=grpc_ca,
            limit_response=limit_response,
            retry_seconds=retry_seconds,
            transport=transport,
        )
        self._thread = LoopThread()

    launch = waiting(VLLMManager.launch)
    status = waiting(VLLMManager.status)
    list_launches = waiting(VLLMManager.list_launches)
    stop = waiting(VLLMManager.stop)
    logs = waiting(VLLMManager.logs)
    follow_logs = iterating(VLLMManager.follow_logs)
    stats = waiting(VLLMManager.stats)
    wait_until_ready = waiting(VLLMManager.wait_until_ready)

    embed = waiting(VLLMManager.embed)
    embed_stream = iterating(VLLMManager.embed_stream)
    complete_stream = iterating(VLLMManager.complete_stream)
    complete_each = iterating(VLLMManager.complete_each)
    chat = waiting(VLLMManager.chat)
    stream = iterating(VLLMManager.stream)
    batch = waiting(VLLMManager.batch)

    instances = waiting(VLLMManager.instances)
    instance = waiting(VLLMManager.instance)
    sleep = waiting(VLLMManager.sleep)
    wake = waiting(VLLMManager.wake)
    swap = waiting(VLLMManager.swap)
    watch = iterating(VLLMManager.watch)

    @overload
    def complete(
        self,
        launch_id: str,
        *,
        prompt: str,
        max_tokens: int | None = None,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[FineOptions],
    ) -> Completion: ...

    @overload
    def complete(
        self,
        launch_id: str,
        prompts: Sequence[str],
        max_tokens: int | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[FineOptions],
    ) -> list[Completion]: ...

    def complete(self, launch_id: str, *args: Any, **kwargs: Any) -> Completion | list[Completion]:
        """The completion of one prompt, or those of several; see `VLLMManager.complete`."""
        answer: Completion | list[Completion] = self._thread.wait(self._manager.complete(launch_id, *args, **kwargs))
        return answer

    @contextmanager
    def run(
        self,
        model: str,
        *,
        task: str = "generate",
        gpu_ids: Sequence[int] | None = None,
        extra_kwargs: Mapping[str, Any] | None = None,
        ready_timeout: float = 600.0,
        ready_poll_interval: float = 2.0,
        gpu_count: int | None = None,
        gpu_share: float | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[LaunchResponse]:
        """Launch a model, wait until it is ready, and stop it when the block is left; see `VLLMManager.run`."""
        # Not by `VLLMManager.run` itself: a KeyboardInterrupt of the block, thrown into the loop, would end the loop.
        run = Run(
            self._manager,
            model,
            task=task,
            gpu_ids=gpu_ids,
            extra_kwargs=extra_kwargs,
            gpu_count=gpu_count,
            gpu_share=gpu_share,
            ready_timeout=ready_timeout,
            ready_poll_interval=ready_poll_interval,
            on_progress=on_progress,
        )
        try:
            yield self._thread.wait(run.begin())
        except BaseException as problem:
            self._thread.wait(run.end(problem))
            raise
        self._thread.wait(run.end())

    @property
    def grpc_address(self) -> str:
        """Where inference goes to, ``host:port``."""
        return self._manager.grpc_address

    def close(self) -> None:
        """Close the connections and end the thread; what streams ends."""
        if self._thread.can_wait:
            self._thread.wait(self._manager.close())
            self._thread.end()

    def __enter__(self) -> Self:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()
