"""Makes the text of completions at the scheduler's pace, whole or token by token, and counts it."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from bullpen.sim import answers, words
from bullpen.sim.metrics import Metrics
from bullpen.sim.requests import ApiError, GenerateRequest, Json, internal_error
from bullpen.sim.scheduler import EngineDeadError, Generation, Scheduler


class Writer:
    """Writes answers for one model, whose context holds `max_model_len` tokens.

    What `is_wrong` says when tokens are made decides whether they are what the model should say.
    """

    def __init__(
        self, model: str, max_model_len: int, scheduler: Scheduler, metrics: Metrics, is_wrong: Callable[[], bool]
    ) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._scheduler = scheduler
        self._metrics = metrics
        self._is_wrong = is_wrong

    def check(self, request: GenerateRequest) -> None:
        """Refuse what cannot be written. Raises ApiError, EngineDeadError."""
        if self._scheduler.dead:
            raise EngineDeadError
        longest = max(prompt.tokens for prompt in request.prompts)
        if longest + request.max_tokens > self._max_model_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._max_model_len} tokens. However, you requested "
                f"{request.max_tokens} output tokens and your prompt contains {longest} input tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens.",
                parameter="max_tokens",
            )

    async def whole(self, answer: answers.Answer) -> Json:
        """Wait until the whole text is made. Raises EngineDeadError."""
        request = answer.request
        with self._generation(request) as generation:
            made = await generation.advance(request.max_tokens)
            wrong = self._is_wrong()
            texts = ["".join(islice(self._text(text, wrong), made)) for text in _choices(request)]
            return answer.whole(texts, made, generation.finish_reason or "abort")

    async def stream(self, answer: answers.Answer) -> AsyncGenerator[bytes, None]:
        """Write server-sent events, one for each token of each choice."""
        request = answer.request
        pairs = [(self._text(text, False), self._text(text, True)) for text in _choices(request)]
        try:
            with self._generation(request) as generation:
                sent = 0
                while generation.finish_reason is None or sent < generation.made:
                    made = await generation.advance(sent + 1)
                    wrong = self._is_wrong()
                    for piece in answer.opening() if sent == 0 else ():
                        yield _event(piece)
                    for position in range(sent, made):
                        reason = "length" if position + 1 == request.max_tokens else None
                        for index, pair in enumerate(pairs):
                            tokens = [next(text) for text in pair]
                            yield _event(answer.piece(index, tokens[wrong], reason, position + 1))
                    sent = made
                if sent < request.max_tokens:
                    for index in range(len(pairs)):
                        yield _event(answer.piece(index, "", "abort", sent))
                if request.include_usage:
                    yield _event(answer.usage_piece(sent))
        except EngineDeadError as error:
            yield _event(answers.error(internal_error(error)))
        yield b"data: [DONE]\n\n"

    def _text(self, prompt: str, wrong: bool) -> Iterator[str]:
        return words.wrong_completion() if wrong else words.completion(self._model, prompt)

    @contextmanager
    def _generation(self, request: GenerateRequest) -> Iterator[Generation]:
        """A place with the scheduler; the request is counted when it ends, however it ends."""
        self._metrics.prompt_tokens += sum(prompt.tokens for prompt in request.prompts)
        with self._scheduler.generation(request.max_tokens) as generation:
            try:
                yield generation
            finally:
                self._metrics.generation_tokens += generation.made * len(request.prompts) * request.choices
                self._metrics.finished("error" if self._scheduler.dead else generation.finish_reason or "abort")


def _choices(request: GenerateRequest) -> list[str]:
    """What each choice is an answer to; the first of a prompt is what it would be alone."""
    return [
        f"{prompt.text} {number}" if number else prompt.text
        for prompt in request.prompts
        for number in range(request.choices)
    ]


def _event(content: Json) -> bytes:
    return b"data: %b\n\n" % json.dumps(content, separators=(",", ":")).encode()
