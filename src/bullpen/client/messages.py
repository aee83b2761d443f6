"""What launches and inference send: bodies and messages made from Python values, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from bullpen.client.errors import ClientError
from bullpen.client.launches import ChatAnswer, Completion, Token
from bullpen.errors import InvalidRequestError

LAUNCHES = "/vllm_bootstrap.InferenceService"
INFERENCE = "/bullpen.v1.Inference"
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


class CompleteOptions(TypedDict, total=False):
    """How a text is written, as far as `VLLMManager.complete` says it; None is the same as leaving it out.

    At most one of ``json_schema``, ``regex``, ``grammar`` (EBNF) and ``choice`` says what the text must look like.
    """

    temperature: float | None
    top_p: float | None
    json_schema: str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None


class Sampling(TypedDict, total=False):
    """How a text is written, named as the OpenAI API and vLLM name it; what is left out is the server's choice.

    At most one of ``json_schema``, ``regex``, ``grammar`` (EBNF) and ``choice`` says what the text must look like.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: Sequence[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    logit_bias: Mapping[int, float]
    json_schema: str
    regex: str
    grammar: str
    choice: Sequence[str]


def launch_body(
    model: str,
    task: str,
    gpu_ids: Sequence[int] | None,
    extra_kwargs: Mapping[str, Any] | None,
    gpu_count: int | None,
    gpu_share: float | None,
) -> bytes:
    """The body of a launch; what is None is left out."""
    optional = {
        "gpu_ids": None if gpu_ids is None else list(gpu_ids),
        "extra_kwargs": None if extra_kwargs is None else dict(extra_kwargs),
        "gpu_count": gpu_count,
        "gpu_share": gpu_share,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return json.dumps({"model": model, "task": task, **given}).encode()


def texts(given: Sequence[str], field: str) -> Sequence[str]:
    """The texts of a request.

    Raises:
        InvalidRequestError: it is one text, of which each character would count as one.
    """
    if isinstance(given, str):
        raise InvalidRequestError(f"{field} is a list of texts; put the one text into a list", field=field)
    return given


def constraint(given: Mapping[str, Any]) -> dict[str, Any]:
    """The one thing that says what the text must look like, if any.

    Raises:
        InvalidRequestError: there are several.
    """
    found = {name: given[name] for name in CONSTRAINTS if given.get(name) not in (None, [])}
    if len(found) > 1:
        raise InvalidRequestError(
            f"only one of {', '.join(found)} can say what the text must look like", field="choice"
        )
    return found


def unconstrained(given: Mapping[str, Any]) -> dict[str, Any]:
    """What says how the text is chosen, and not what it must look like."""
    return {name: value for name, value in given.items() if name not in CONSTRAINTS}


class Call(NamedTuple):
    """What is sent: the path of a method, a message, and the class of the messages that answer it."""

    method: str
    message: Any
    answer: Any


def embed(launch_id: str, given: Sequence[str], *, streamed: bool = False) -> Call:
    """Embeddings of texts."""
    kinds = load().bootstrap
    message = build(kinds.EmbedRequest, launch_id=launch_id, texts=texts(given, "texts"))
    if streamed:
        return Call(f"{LAUNCHES}/EmbedStream", message, kinds.Embedding)
    return Call(f"{LAUNCHES}/Embed", message, kinds.EmbedResponse)


def complete(
    launch_id: str,
    prompts: Sequence[str],
    max_tokens: int | None,
    options: CompleteOptions,
    *,
    streamed: bool = False,
) -> Call:
    """Completions of prompts, each whole."""
    kinds, wanted = load().bootstrap, constraint(options)
    message = build(
        kinds.CompleteRequest,
        launch_id=launch_id,
        prompts=texts(prompts, "prompts"),
        max_tokens=max_tokens,
        guided_decoding=build(kinds.GuidedDecodingParams, **wanted) if wanted else None,
        **unconstrained(options),
    )
    if streamed:
        return Call(f"{LAUNCHES}/CompleteStream", message, kinds.Completion)
    return Call(f"{LAUNCHES}/Complete", message, kinds.CompleteResponse)


def complete_each(
    launch_id: str, prompts: Sequence[str], model: str | None, sampling: Sampling, *, streamed: bool = False
) -> Call:
    """Completions of prompts in the order in which they are done, each whole or piece by piece."""
    kinds = load().v1
    message = build(
        kinds.CompleteRequest,
        instance_id=launch_id,
        prompts=texts(prompts, "prompts"),
        model=model,
        sampling=sampling_message(sampling),
    )
    if streamed:
        return Call(f"{INFERENCE}/StreamComplete", message, kinds.CompletionDelta)
    return Call(f"{INFERENCE}/Complete", message, kinds.Completion)


def chat(
    launch_id: str,
    conversation: Sequence[Mapping[str, str]],
    model: str | None,
    sampling: Sampling,
    *,
    streamed: bool = False,
) -> Call:
    """The answer in a conversation, whole or piece by piece."""
    kinds = load().v1
    message = build(
        kinds.ChatRequest,
        instance_id=launch_id,
        messages=[build(kinds.ChatMessage, **one) for one in conversation],
        model=model,
        sampling=sampling_message(sampling),
    )
    if streamed:
        return Call(f"{INFERENCE}/StreamChat", message, kinds.ChatDelta)
    return Call(f"{INFERENCE}/Chat", message, kinds.ChatResponse)


def relay(instance_id: str, path: str, body: bytes) -> Call:
    """One request of the OpenAI API, as it is."""
    kinds = load().v1
    message = build(kinds.RelayRequest, instance_id=instance_id, path=path, body=body)
    return Call(f"{INFERENCE}/Relay", message, kinds.RelayResponse)


def sampling_message(sampling: Sampling) -> Any:
    """The message that says how a text is written."""
    kinds, wanted = load().v1, constraint(sampling)
    if "choice" in wanted:
        wanted = {"choice": build(kinds.StructuredOutputs.Choice, values=wanted["choice"])}
    elif "json_schema" in wanted:
        wanted = {"json": wanted["json_schema"]}
    structured = build(kinds.StructuredOutputs, **wanted) if wanted else None
    return build(kinds.Sampling, structured_outputs=structured, **unconstrained(sampling))


def read_completion(message: Any) -> Completion:
    """A completion by the launches' service, or by Bullpen's own."""
    usage = getattr(message, "usage", message)
    return Completion(message.text, usage.prompt_tokens, usage.completion_tokens)


def read_chat(message: Any) -> ChatAnswer:
    """The answer in a conversation."""
    choice, usage = message.choices[0], message.usage
    return ChatAnswer(
        choice.message.content, choice.reasoning, choice.finish_reason, usage.prompt_tokens, usage.completion_tokens
    )


def read_token(message: Any) -> Token:
    """A piece of a completion, or of an answer in a conversation."""
    usage = message.usage
    text, reasoning = (message.text, "") if hasattr(message, "text") else (message.content, message.reasoning)
    return Token(text, reasoning, message.finish_reason, usage.prompt_tokens, usage.completion_tokens)


def load() -> Any:
    """The generated messages.

    Raises:
        ClientError: protobuf is not installed.
    """
    from bullpen import proto

    try:
        _ = proto.v1
    except ImportError as problem:
        raise ClientError(f"inference needs grpcio ({problem}); install bullpen-client[grpc]") from problem
    return proto


def build(kind: Any, **fields: Any) -> Any:
    """A message; what is None is left out.

    Raises:
        InvalidRequestError: it has no such field, or a value is of the wrong kind.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return kind(**given)
    except (TypeError, ValueError) as problem:
        raise InvalidRequestError(f"{kind.__name__}: {problem}", field="sampling") from problem
