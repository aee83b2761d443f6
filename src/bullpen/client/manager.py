"""The asynchronous client of a box that serves models: launches by REST, inference by gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, cast, overload

import httpx

from bullpen.client import messages, wire
from bullpen.client.batch import BatchProgress, BatchReport, run_batch_by
from bullpen.client.batch_ways import way_to
from bullpen.client.errors import InvalidRequest
from bullpen.client.inference import Address, Inference
from bullpen.client.launches import (
    ChatAnswer,
    Completion,
    Finished,
    LaunchResponse,
    LogsResponse,
    SystemStatsResponse,
    Token,
)
from bullpen.client.lifecycle import Run
from bullpen.client.messages import CompleteOptions, FineOptions, Sampling, SeveralSampling
from bullpen.client.models import Event, Instance, InstanceList, Swapped
from bullpen.client.rest import Rest, segment
from bullpen.client.target import find
from bullpen.client.waiting import Progress, wait_until_ready


class VLLMManager:
    """A client of one daemon::

        async with VLLMManager("http://your-server:8000") as manager:
            async with manager.run("meta-llama/Llama-3.1-8B-Instruct") as launch:
                result = await manager.complete(launch.launch_id, prompt="Once upon a time", max_tokens=128)
                print(result.text)

    Every method raises `ClientError`; `bullpen.client.errors` and `bullpen.client.launch_errors` list its kinds. Calls
    that may be sent twice are tried again when a connection is lost. `SyncVLLMManager` is the same without ``await``.

    Args:
        base_url: the daemon's; see `bullpen.client.target` for where it comes from when it is None.
        grpc_address: ``host:port`` of its gRPC server, or ``https://host:port`` where that speaks TLS; None: the port
            after that of ``base_url`` (8001 where that names none), by TLS where ``base_url`` begins with ``https:``.
        access_key: the key; likewise.
        timeout: seconds that the daemon may take to answer a REST call.
        grpc_ca: a PEM file with the certificates that may vouch for the gRPC server, such as its own; with it TLS is
            spoken in any case. None: those that gRPC knows.
        limit_response: refuse gRPC messages of more than 4 MiB.
        retry_seconds: how long a call is tried again after its connection was lost.
        transport: how REST calls travel, for tests; None: over the network.
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
        self.target = find(base_url, access_key)
        self._rest = Rest(self.target, timeout, retry_seconds, transport)
        address = Address.find(self.target.url, grpc_address)
        if grpc_ca is not None:
            address = address.vouched_for(grpc_ca)
        self._inference = Inference(address, self.target.access_key, retry_seconds, limit_response=limit_response)

    @property
    def grpc_address(self) -> str:
        """Where inference goes to, ``host:port``."""
        return self._inference.address.target

    # -- launches ----------------------------------------------------------------------------------------------

    async def launch(
        self,
        model: str,
        *,
        task: str = "generate",
        gpu_ids: Sequence[int] | None = None,
        extra_kwargs: Mapping[str, Any] | None = None,
        gpu_count: int | None = None,
        gpu_share: float | None = None,
    ) -> LaunchResponse:
        """Launch a model. It is being loaded when this returns; it keeps its GPUs until it is stopped.

        Args:
            model: a name on the Hugging Face hub, or a path on the server.
            task: ``generate`` or ``embed``.
            gpu_ids: indices of the GPUs; None: all, unless `gpu_count` says how many.
            extra_kwargs: arguments of ``vllm.LLM``, such as ``{"max_model_len": 4096}``.
            gpu_count: how many GPUs of the server's choice.
            gpu_share: the share of each GPU that it takes, above 0 to 1; None: it takes them alone.
        """
        body = messages.launch_body(model, task, gpu_ids, extra_kwargs, gpu_count, gpu_share)
        return await self._rest.ask_for(LaunchResponse, "POST", "/launch", body=body, repeatable=False)

    async def status(self, launch_id: str) -> LaunchResponse:
        """How a launch is."""
        return await self._rest.ask_for(LaunchResponse, "GET", f"/status/{segment(launch_id)}")

    async def list_launches(self) -> list[LaunchResponse]:
        """The launches that have not ended, oldest first."""
        return await self._rest.ask_for(list[LaunchResponse], "GET", "/launch")

    async def stop(self, launch_id: str) -> LaunchResponse:
        """Stop a launch, whatever it is doing. An ended one is left as it is.

        Its GPUs are free when this returns, unless its state is ``stopping``: then processes of it have not ended in
        5 s, and keep them until they do.
        """
        return await self._rest.ask_for(LaunchResponse, "POST", f"/stop/{segment(launch_id)}")

    async def logs(self, launch_id: str, offset: int = 0) -> LogsResponse:
        """A piece of a launch's log from a byte on; the next one begins at its ``next_offset``."""
        params = {"offset": str(offset)}
        return await self._rest.ask_for(LogsResponse, "GET", f"/logs/{segment(launch_id)}", params=params)

    async def follow_logs(
        self, launch_id: str, offset: int = 0, *, poll_interval: float = 1.0
    ) -> AsyncGenerator[LogsResponse]:
        """The log from a byte on, piece by piece, and what is written then, until the launch has ended."""
        while True:
            # Asked before the log is read, so that nothing is missed that was written up to the end.
            has_ended = (await self.status(launch_id)).state.ended
            while (piece := await self.logs(launch_id, offset)).content:
                yield piece
                offset = piece.next_offset
            if has_ended:
                return
            await asyncio.sleep(poll_interval)

    async def stats(self) -> SystemStatsResponse:
        """The load, memory and GPUs of the server's host."""
        return await self._rest.ask_for(SystemStatsResponse, "GET", "/stats")

    async def wait_until_ready(
        self,
        launch_id: str,
        *,
        poll_interval: float = 2.0,
        timeout: float | None = None,
        on_progress: Progress | None = None,
    ) -> LaunchResponse:
        """Wait until a launch is ready.

        Args:
            launch_id: which one.
            poll_interval: seconds between two looks at a server that does not tell of changes by itself.
            timeout: seconds to wait at most; None or 0: as long as it takes.
            on_progress: called with the launch as it is, and whenever its state, phase or progress changes.

        Raises:
            LaunchFailed: it ended; also a RuntimeError.
            LaunchTimedOut: it is not ready in time; also a TimeoutError.
        """
        return await wait_until_ready(
            self._rest, launch_id, poll_interval=poll_interval, timeout=timeout, on_progress=on_progress
        )

    @asynccontextmanager
    async def run(
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
    ) -> AsyncIterator[LaunchResponse]:
        """Launch a model, wait until it is ready, and stop it when the block is left, however that happens.

        A block that is cancelled is left when the launch is stopped, and no sooner. A process that is killed leaves no
        block: its launch stays.

        Args:
            model, task, gpu_ids, extra_kwargs, gpu_count, gpu_share: as for `launch`.
            ready_timeout, ready_poll_interval, on_progress: as for `wait_until_ready`.
        """
        run = Run(
            self,
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
            yield await run.begin()
        except BaseException as problem:
            await run.end(problem)
            raise
        await run.end()

    # -- inference ---------------------------------------------------------------------------------------------

    async def embed(self, launch_id: str, texts: Sequence[str], *, timeout: float | None = None) -> list[list[float]]:
        """The vectors of texts, in their order.

        Args:
            launch_id: a launch with the task ``embed``.
            texts: at least one.
            timeout: seconds that the server may take; None: as long as it takes.
        """
        answer = await self._inference.ask(messages.embed(launch_id, texts), timeout)
        return [list(embedding.values) for embedding in answer.embeddings]

    async def embed_stream(
        self, launch_id: str, texts: Sequence[str], *, timeout: float | None = None
    ) -> AsyncGenerator[list[float]]:
        """The same, one vector after the other."""
        call = messages.embed(launch_id, texts, streamed=True)
        async with aclosing(self._inference.stream(call, timeout)) as answers:
            async for embedding in answers:
                yield list(embedding.values)

    @overload
    async def complete(
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
    async def complete(
        self,
        launch_id: str,
        prompts: Sequence[str],
        max_tokens: int | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[FineOptions],
    ) -> list[Completion]: ...

    async def complete(
        self,
        launch_id: str,
        prompts: Sequence[str] | None = None,
        max_tokens: int | None = None,
        *,
        prompt: str | None = None,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[FineOptions],
    ) -> Completion | list[Completion]:
        """The completion of one prompt, or those of several in their order.

        With nothing but what `CompleteOptions` has, the service of the earlier system is asked, which tells no
        ``finish_reason``; with ``model`` or any other option Bullpen's own.

        Args:
            launch_id: a launch with the task ``generate``.
            prompts: several texts...
            max_tokens: how long each may become; None: the server's default.
            prompt: ... or one text.
            model: a name that the launch serves, as of a LoRA adapter; None: its own.
            timeout: seconds that the server may take; None: as long as it takes.
            **options: see `FineOptions`.
        """
        if (prompt is None) == (prompts is None):
            raise InvalidRequest("give either prompt, one text, or prompts, a list of texts", field="prompt")
        messages.check_options(options, FineOptions)
        wanted = [prompt] if prompt is not None else prompts or []
        if model is None and messages.is_plain(options):
            call = messages.complete(launch_id, wanted, max_tokens, cast(CompleteOptions, options))
            answer = await self._inference.ask(call, timeout)
            found = [messages.read_completion(one) for one in answer.completions]
        else:
            call = messages.complete_each(launch_id, wanted, model, {**options, "max_tokens": max_tokens})
            async with aclosing(self._inference.stream(call, timeout)) as answers:
                done = [one async for one in answers]
            found = [messages.read_completion(one) for one in sorted(done, key=lambda one: one.index)]
        return found if prompt is None else found[0]

    async def complete_stream(
        self,
        launch_id: str,
        prompts: Sequence[str],
        max_tokens: int | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[CompleteOptions],
    ) -> AsyncGenerator[Completion]:
        """The completions of several prompts in their order, one whole completion after the other."""
        call = messages.complete(launch_id, prompts, max_tokens, options, streamed=True)
        async with aclosing(self._inference.stream(call, timeout)) as answers:
            async for completion in answers:
                yield messages.read_completion(completion)

    async def complete_each(
        self,
        launch_id: str,
        prompts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SeveralSampling],
    ) -> AsyncGenerator[Finished]:
        """The completions of several prompts, each as soon as it is done; it says which prompt it belongs to.

        Args:
            launch_id: a launch with the task ``generate``.
            prompts: the texts.
            model: a name that the launch serves, as of a LoRA adapter; None: its own.
            timeout: seconds that the server may take; None: as long as it takes.
            **sampling: see `SeveralSampling`.
        """
        call = messages.complete_each(launch_id, prompts, model, sampling)
        async with aclosing(self._inference.stream(call, timeout)) as answers:
            async for completion in answers:
                yield Finished(completion.index, messages.read_completion(completion), completion.choice)

    async def chat(
        self,
        launch_id: str,
        conversation: Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> ChatAnswer:
        """The answer in a conversation.

        Args:
            launch_id: a launch with the task ``generate``.
            conversation: ``[{"role": "user", "content": "Hello"}]``.
            model, timeout: as for `complete_each`.
            **sampling: see `Sampling`.
        """
        return messages.read_chat(
            await self._inference.ask(messages.chat(launch_id, conversation, model, sampling), timeout)
        )

    async def stream(
        self,
        launch_id: str,
        *,
        prompt: str | None = None,
        conversation: Sequence[Mapping[str, str]] | None = None,
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Token]:
        """The completion of a prompt, or the answer in a conversation, piece by piece while it is written.

        Leaving off early (close the iterator, as `contextlib.aclosing` does) ends the work on the server as well.
        """
        if (prompt is None) == (conversation is None):
            raise InvalidRequest("give either prompt, one text, or conversation, its messages", field="prompt")
        if prompt is not None:
            call = messages.complete_each(launch_id, [prompt], model, sampling, streamed=True)
        else:
            call = messages.chat(launch_id, conversation or [], model, sampling, streamed=True)
        async with aclosing(self._inference.stream(call, timeout)) as answers:
            async for piece in answers:
                yield messages.read_token(piece)

    async def batch(
        self,
        launch_id: str,
        source: Path | str,
        output: Path | str,
        *,
        model: str | None = None,
        in_flight: int = 64,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> BatchReport:
        """Send a file of requests to a launch's own OpenAI server; see `bullpen.client.batch.run_batch`.

        Where that server cannot be reached from here, the daemon hands the requests on to it.

        Args:
            launch_id: which one.
            source: the requests.
            output: the results.
            model: a name that the launch serves; None: its own, whatever the requests say.
            in_flight: how many requests are with it at a time.
            on_progress: called whenever results were written.
        """
        launch = await self.status(launch_id)
        instance = await self.instance(launch.instance_id or launch_id)
        async with way_to(instance, self.target, self._inference.address) as way:
            return await run_batch_by(
                way,
                source,
                output,
                model=model or next(iter(instance.served_model_names), launch.model),
                in_flight=in_flight,
                on_progress=on_progress,
            )

    # -- instances ---------------------------------------------------------------------------------------------

    async def instances(self) -> InstanceList:
        """All instances; launches are among them."""
        return InstanceList.read(await self._rest.ask_object("GET", wire.INSTANCES))

    async def instance(self, instance_id: str) -> Instance:
        """One instance."""
        return await self._instance("GET", wire.instance_path(instance_id))

    async def sleep(
        self, instance_id: str, level: int | None = None, drain: float | None = None, refuse: bool = False
    ) -> Instance:
        """Put an instance to sleep; see `BullpenClient.sleep`."""
        params = wire.sleep_params(level, drain, refuse=refuse)
        return await self._instance("POST", f"{wire.instance_path(instance_id)}/sleep", params=params, patient=True)

    async def wake(self, instance_id: str) -> Instance:
        """Have an instance ready, whether it sleeps, was stopped or has failed; see `BullpenClient.wake`."""
        return await self._instance("POST", f"{wire.instance_path(instance_id)}/wake", patient=True)

    async def swap(
        self,
        incoming: str | Mapping[str, Any],
        out: str | Sequence[str] = "auto",
        sleep_level: int | None = None,
        drain: float | None = None,
        refuse: bool = False,
    ) -> Swapped:
        """Have one instance ready in the place of others, or have all as it was; see `BullpenClient.swap`."""
        body = wire.swap_body(incoming, out, sleep_level, drain, refuse=refuse)
        document = await self._rest.ask_object("POST", wire.SWAP, body=body, patient=True, repeatable=False)
        return wire.read_swapped(self.target, document)

    async def watch(self, since: int | None = None, fine: bool = False) -> AsyncGenerator[Event]:
        """What happens to instances; see `BullpenClient.watch`.

        Where the connection is lost, it goes on after the last event once the daemon is back. What finer events would
        have told meanwhile is not told again.

        Raises:
            RevisionGone: events were missed; list the instances, then watch anew.
        """
        async with aclosing(self._rest.follow(since, fine=fine)) as events:
            async for event in events:
                yield event

    async def _instance(self, method: str, path: str, **call: Any) -> Instance:
        return wire.read_instance(self.target, await self._rest.ask_object(method, path, **call))

    # -- the connections ---------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the connections; what streams ends."""
        await self._rest.close()
        await self._inference.close()

    async def __aenter__(self) -> Self:
        """Be one's own context."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()
