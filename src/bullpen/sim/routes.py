"""Which reply belongs to which request: vLLM's routes, as far as the simulator has them."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from bullpen.sim import answers
from bullpen.sim.engine import Engine
from bullpen.sim.engine_child import KV_CACHE_TOKENS
from bullpen.sim.http import Request, Response, Stream
from bullpen.sim.log import Log
from bullpen.sim.metrics import CONTENT_TYPE, Metrics
from bullpen.sim.options import SimOptions
from bullpen.sim.requests import (
    ApiError,
    Json,
    chat_request,
    completion_request,
    embedding_request,
    internal_error,
    parse_body,
    rpc_request,
    tokenize_request,
)
from bullpen.sim.scheduler import EngineDeadError, Scheduler
from bullpen.sim.settings import Settings
from bullpen.sim.writer import Writer

VERSION = "sim"

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_SLEEP_MODES = ("abort", "wait", "keep")

_T = TypeVar("_T")
_Handler = Callable[[Request], Awaitable[Response | Stream]]


class Routes:
    """Answers requests; an instance is the handler of an HTTP server."""

    def __init__(self, options: SimOptions, settings: Settings, engine: Engine, scheduler: Scheduler, log: Log) -> None:
        self._options = options
        self._settings = settings
        self._engine = engine
        self._scheduler = scheduler
        self._log = log
        self._metrics = Metrics(options.served_model_names[0])
        self._max_model_len = options.max_model_len or KV_CACHE_TOKENS
        self._writer = Writer(options.model, self._max_model_len, scheduler, self._metrics, lambda: engine.is_wrong)
        self._keys = options.api_key or ((settings.api_key,) if settings.api_key else ())
        self._created = int(time.time())
        self._tasks: set[asyncio.Task[object]] = set()
        self._table: dict[str, tuple[str, _Handler]] = {
            "/health": ("GET", self._health),
            "/version": ("GET", self._version),
            "/metrics": ("GET", self._show_metrics),
            "/tokenize": ("POST", self._tokenize),
            "/v1/models": ("GET", self._models),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/embeddings": ("POST", self._embeddings),
        }
        if settings.development_mode:
            self._table["/sleep"] = ("POST", self._sleep)
            self._table["/wake_up"] = ("POST", self._wake_up)
            self._table["/is_sleeping"] = ("GET", self._is_sleeping)
            self._table["/collective_rpc"] = ("POST", self._collective_rpc)
            self._table["/reset_prefix_cache"] = ("POST", self._reset_prefix_cache)
            self._table["/reset_mm_cache"] = ("POST", self._reset)
            self._table["/reset_encoder_cache"] = ("POST", self._reset)

    async def __call__(self, request: Request) -> Response | Stream:
        """Answer one request; what goes wrong becomes an answer too."""
        if request.path.startswith(_GUARDED) and not self._has_key(request):
            return _json({"error": "Unauthorized"}, 401)
        if request.path not in self._table:
            return _json({"detail": "Not Found"}, 404)
        method, handler = self._table[request.path]
        if request.method != method:
            return _json({"detail": "Method Not Allowed"}, 405, {"allow": method})
        try:
            return await handler(request)
        except ApiError as error:
            return _json(answers.error(error), error.status)
        except EngineDeadError as error:
            return _json(answers.error(internal_error(error)), 500)

    def _has_key(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return not self._keys or request.method == "OPTIONS" or (scheme.lower() == "bearer" and key in self._keys)

    async def _health(self, request: Request) -> Response:
        return Response(503 if self._scheduler.dead or self._settings.fails("health") else 200)

    async def _version(self, request: Request) -> Response:
        return _json({"version": VERSION})

    async def _models(self, request: Request) -> Response:
        options = self._options
        return _json(answers.models(options.served_model_names, options.model, self._max_model_len, self._created))

    async def _show_metrics(self, request: Request) -> Response:
        page = self._metrics.render(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            sleep_level=self._engine.sleep_level,
        )
        return Response(200, page.encode(), CONTENT_TYPE)

    async def _tokenize(self, request: Request) -> Response:
        wanted = tokenize_request(_body(request))
        self._model(wanted.model)
        return _json(answers.tokenization(wanted, self._max_model_len))

    async def _completions(self, request: Request) -> Response | Stream:
        wanted = completion_request(_body(request))
        return await self._generate(answers.CompletionAnswer(wanted, self._model(wanted.model)))

    async def _chat(self, request: Request) -> Response | Stream:
        wanted = chat_request(_body(request))
        return await self._generate(answers.ChatAnswer(wanted, self._model(wanted.model)))

    async def _generate(self, answer: answers.Answer) -> Response | Stream:
        self._fail_if_asked()
        self._writer.check(answer.request)
        if answer.request.stream:
            return Stream(self._writer.stream(answer), "text/event-stream; charset=utf-8")
        return _json(await self._writer.whole(answer))

    async def _embeddings(self, request: Request) -> Response:
        wanted = embedding_request(_body(request))
        name = self._model(wanted.model)
        self._fail_if_asked()
        with self._scheduler.generation(total=1) as generation:
            await generation.advance(1)
            if generation.finish_reason == "abort":
                self._metrics.finished("abort")
                raise ApiError(500, "The request was aborted.", "InternalServerError")
        self._metrics.finished("stop")
        self._metrics.prompt_tokens += sum(text.tokens for text in wanted.inputs)
        return _json(answers.embeddings(wanted, self._options.model, name, self._engine.is_wrong))

    async def _sleep(self, request: Request) -> Response:
        level = request.query.get("level", ["1"])[-1]
        mode = request.query.get("mode", ["abort"])[-1]
        if level not in {"0", "1", "2"}:
            raise ApiError(400, "Input should be 0, 1 or 2", "Bad Request", "query.level")
        if mode not in _SLEEP_MODES:
            raise ApiError(400, "Input should be 'abort', 'wait' or 'keep'", "Bad Request", "query.mode")
        await self._operate("sleep", self._engine.sleep(int(level), mode))
        return _json({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, request: Request) -> Response:
        tags = request.query.get("tags")
        self._log.info(f"wake up the engine with tags: {tags}", where="api_router.py:53")
        awake = await self._operate("wake", self._engine.wake(tags))
        return _json({"status": "awake" if awake else "sleeping", "tags": tags})

    async def _is_sleeping(self, request: Request) -> Response:
        return _json({"is_sleeping": await self._engine.is_sleeping()})

    async def _collective_rpc(self, request: Request) -> Response:
        body = rpc_request(request.body)
        if body["method"] != "reload_weights":
            message = f"Call to collective_rpc method failed: 'Worker' object has no attribute {body['method']!r}"
            raise ApiError(500, message, "InternalServerError")
        try:
            await self._engine.reload_weights()
        except RuntimeError as error:
            raise internal_error(error) from None
        return _json({"results": [None]})

    async def _reset_prefix_cache(self, request: Request) -> Response:
        return _json({"success": not self._scheduler.running})

    async def _reset(self, request: Request) -> Response:
        return Response(200)

    async def _operate(self, name: str, operation: Coroutine[object, object, _T]) -> _T:
        """Do a sleep-mode operation to its end, whether or not the client waits for it."""

        async def measured() -> _T:
            with self._metrics.operation(name):
                return await operation

        task = asyncio.create_task(measured())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except RuntimeError as error:
            raise internal_error(error) from None

    def _model(self, name: str | None) -> str:
        """The served name that a request means. Raises ApiError."""
        names = self._options.served_model_names
        if name and name not in names:
            aliases = f" Valid aliases: {', '.join(names)}." if len(names) > 1 else ""
            raise ApiError(404, f"The model `{name}` does not exist.{aliases}", "NotFoundError", "model")
        return name or names[0]

    def _fail_if_asked(self) -> None:
        if self._settings.fails("request"):
            self._metrics.finished("error")
            message = "the simulated engine fails this request because BULLPEN_SIM_FAIL=request asks for it"
            raise ApiError(500, message, "InternalServerError")


def _body(request: Request) -> Json:
    return parse_body(request.headers.get("content-type", ""), request.body)


def _json(content: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, separators=(",", ":")).encode()
    return Response(status, body, "application/json", headers or {})
