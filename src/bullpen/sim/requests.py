"""What a request body must look like: JSON in, a checked request or an ApiError out."""

import json
import math
import re
from dataclasses import dataclass

from bullpen.sim.words import tokens

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
MAX_CHOICES = 16384

Json = dict[str, object]


class ApiError(Exception):
    """A request that is answered with an error status; `kind` and `parameter` are the API's `type` and `param`."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.parameter = parameter


def internal_error(error: Exception) -> ApiError:
    """The error answer for what went wrong in the engine."""
    return ApiError(500, str(error), "InternalServerError")


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, and how many tokens it has."""

    text: str
    tokens: int


@dataclass(frozen=True)
class GenerateRequest:
    """A request for a completion or a chat completion; `model` is None where the body names none.

    Each prompt is answered `choices` times: those of the first come first, then those of the second, and so on. A
    stream ends with the usage where `include_usage` says so, and has it in every piece with `continuous_usage`.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    choices: int
    max_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request for embeddings; with `base64` the vectors are wanted as little-endian 32-bit floats."""

    model: str | None
    inputs: tuple[Prompt, ...]
    base64: bool


@dataclass(frozen=True)
class TokenizeRequest:
    """A request for the tokens of a text."""

    model: str | None
    text: str
    return_token_strings: bool


def parse_body(content_type: str, body: bytes) -> Json:
    """Read a JSON object from a request body. Raises ApiError."""
    if content_type.lower().split(";", maxsplit=1)[0].strip() != "application/json":
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed", "Bad Request")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"JSON decode error: {error}", "Bad Request", "body") from None
    if not isinstance(data, dict):
        raise ApiError(400, "Input should be a valid dictionary", "Bad Request", "body")
    return data


def rpc_request(body: bytes) -> Json:
    """Check the body of `POST /collective_rpc`, whatever its content type. Raises ApiError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"JSON decode error: {error}", "Bad Request") from None
    if not isinstance(data, dict):
        raise ApiError(400, "Request body must be a JSON object", "Bad Request")
    if data.get("method") is None:
        raise ApiError(400, "Missing 'method' in request body", "Bad Request")
    return data


def completion_request(body: Json) -> GenerateRequest:
    """Check the body of `POST /v1/completions`. Raises ApiError."""
    prompt = body.get("prompt")
    if prompt is None or prompt == "":
        raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty.", parameter="prompt")
    return _generate_request(body, _prompts(prompt, "prompt"), ("max_tokens",))


def chat_request(body: Json) -> GenerateRequest:
    """Check the body of `POST /v1/chat/completions`. Raises ApiError."""
    text = _conversation(body.get("messages"))
    return _generate_request(body, (Prompt(text, len(tokens(text))),), ("max_completion_tokens", "max_tokens"))


def embedding_request(body: Json) -> EmbeddingRequest:
    """Check the body of `POST /v1/embeddings`. Raises ApiError."""
    encoding = body.get("encoding_format") or "float"
    if encoding not in {"float", "base64"}:
        raise _wrong("encoding_format", "Input should be 'float' or 'base64'")
    return EmbeddingRequest(_text(body, "model"), _prompts(body.get("input"), "input"), encoding == "base64")


def tokenize_request(body: Json) -> TokenizeRequest:
    """Check the body of `POST /tokenize`, which holds a prompt or a conversation. Raises ApiError."""
    text = _conversation(body["messages"]) if "messages" in body else _text(body, "prompt")
    if text is None:
        raise _wrong("prompt", "Field required")
    return TokenizeRequest(_text(body, "model"), text, _flag(body, "return_token_strs"))


def _generate_request(body: Json, prompts: tuple[Prompt, ...], limits: tuple[str, ...]) -> GenerateRequest:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "Input should be a valid dictionary")
    max_tokens = next((limit for name in limits if (limit := _integer(body, name)) is not None), DEFAULT_MAX_TOKENS)
    if max_tokens < 1:
        raise _out_of_range("max_tokens", "must be at least 1", max_tokens)
    _check_regex(body)
    include_usage = _flag(options or {}, "include_usage")
    return GenerateRequest(
        model=_text(body, "model"),
        prompts=prompts,
        choices=_choices(body),
        max_tokens=max_tokens,
        stream=_flag(body, "stream"),
        include_usage=include_usage,
        continuous_usage=_flag(options or {}, "continuous_usage_stats") and include_usage,
    )


def _choices(body: Json) -> int:
    """How many answers each prompt gets, of a sampling that can be."""
    temperature, top_p, choices = _number(body, "temperature"), _number(body, "top_p"), _integer(body, "n")
    if temperature is not None and not math.isfinite(temperature):
        raise _out_of_range("temperature", "must be a finite number", temperature)
    if temperature is not None and temperature < 0:
        raise _out_of_range("temperature", "must be non-negative", temperature)
    if temperature is not None and temperature > 2:
        raise _out_of_range("temperature", "must be in [0, 2]", temperature)
    if top_p is not None and not 0 < top_p <= 1:
        raise _out_of_range("top_p", "must be in (0, 1]", top_p)
    if choices is None:
        return 1
    if choices < 1:
        raise ApiError(400, f"n must be at least 1, got {choices}.")
    if choices > MAX_CHOICES:
        advice = "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        raise ApiError(400, f"n must be at most {MAX_CHOICES}, got {choices}. {advice}")
    if temperature == 0 and choices > 1:
        raise ApiError(400, f"n must be 1 when using greedy sampling, got {choices}.")
    return choices


def _check_regex(body: Json) -> None:
    """Refuse a pattern for the answer that is none. Others change nothing: what is written is words all the same."""
    wanted = body.get("structured_outputs")
    pattern = _text(wanted, "regex") if isinstance(wanted, dict) else None
    try:
        re.compile(pattern or "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ApiError(400, f"Failed to transform regex into a grammar: {error}") from None


def _prompts(value: object, name: str) -> tuple[Prompt, ...]:
    """A text, token numbers, or a list of either."""
    if isinstance(value, str):
        return (Prompt(value, len(tokens(value))),)
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS and not _is_integer(value[0]):
            raise ApiError(400, f"{name} has {len(value)} entries; at most {MAX_PROMPTS} are allowed", parameter=name)
        if all(_is_integer(item) for item in value):
            return (Prompt(" ".join(map(str, value)), len(value)),)
        if all(isinstance(item, str) or (isinstance(item, list) and all(map(_is_integer, item))) for item in value):
            return tuple(prompt for item in value for prompt in _prompts(item or "", name))
    raise _wrong(name, "Input should be a text, a list of token numbers, or a non-empty list of these")


def _conversation(messages: object) -> str:
    """The text of a conversation, roles included."""
    if not isinstance(messages, list):
        raise _wrong("messages", "Field required" if messages is None else "Input should be a valid list")
    if not messages:
        raise ApiError(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")
    lines = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong("messages", "Each message should be a dictionary with a role")
        lines.append(f"{message['role']}: {_content(message.get('content'))}")
    return "\n".join(lines)


def _content(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong("messages", "The content of a message should be a text or a list of parts")
    return " ".join(map(_part, content))


def _part(part: object) -> str:
    """A part of a message as text; what is no text (an image, say) counts as the JSON that it is."""
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else json.dumps(part)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _wrong(name, "Input should be a valid integer")


def _number(body: Json, name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise _wrong(name, "Input should be a valid number")


def _text(body: Json, name: str) -> str | None:
    value = body.get(name)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(name, "Input should be a valid string")


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(name, "Input should be a valid boolean")


def _out_of_range(name: str, rule: str, value: float) -> ApiError:
    return ApiError(400, f"{name} {rule}, got {value}. (parameter={name}, value={value})", parameter=name)


def _wrong(name: str, message: str) -> ApiError:
    return ApiError(400, f"body.{name}: {message}", "Bad Request", f"body.{name}")
