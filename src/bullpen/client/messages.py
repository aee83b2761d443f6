"""What launches and inference send: bodies and messages made from Python values, and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, get_type_hints

from bullpen.client.errors import ClientError, InvalidRequest
from bullpen.client.launches import ChatAnswer, Completion, Token, TokenLogprob, TopLogprob
from bullpen.client.wire import json_body

LAUNCHES = "/vllm_bootstrap.InferenceService"
INFERENCE = "/bullpen.v1.Inference"
HALF = re.compile(r"[\ud800-\udfff]")
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


class CompleteOptions(TypedDict, total=False):
    """How a text is written, as far as every service says it; None is the same as leaving it out.

    At most one of ``json_schema``, ``regex``, ``grammar`` (EBNF) and ``choice`` says what the text must look like.
    """

    temperature: float | None
    top_p: float | None
    json_schema: str | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None


class FineOptions(CompleteOptions, total=False):
    """The same and all the rest, named as the OpenAI API and vLLM name it.

    ``logprobs`` is how many of the likeliest tokens to list beside each chosen one; 0 for the chosen one alone.
    """

    top_k: int | None
    min_p: float | None
    stop: Sequence[str] | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None


class Sampling(FineOptions, total=False):
    """The same, and how long the text may become; what is left out is the server's choice."""

    max_tokens: int | None


class SeveralSampling(Sampling, total=False):
    """The same, and how many texts each prompt is completed with."""

    n: int | None


VALUES = {
    1: "a number",
    2: "a number",
    3: "a whole number of at most 64 bits",
    5: "a whole number from -2147483648 to 2147483647",
    8: "True or False",
}
"""What the types of protobuf hold, by their numbers; the others here are texts."""
OPTIONS = {"json": "json_schema", "values": "choice"}
"""Options that the messages have under another name."""


def launch_body(
    model: str,
    task: str,
    gpu_ids: Sequence[int] | None,
    extra_kwargs: Mapping[str, Any] | None,
    gpu_count: int | None,
    gpu_share: float | None,
) -> bytes:
    """The body of a launch; what is None is left out.

    Raises:
        InvalidRequest: something in it cannot be sent.
    """
    if not isinstance(extra_kwargs, Mapping | None):
        raise InvalidRequest("extra_kwargs is a dict of arguments of vllm.LLM", field="extra_kwargs")
    if not isinstance(gpu_ids, Iterable | None):
        raise InvalidRequest("gpu_ids is a list of indices; put the one into a list", field="gpu_ids")
    optional = {
        "gpu_ids": None if gpu_ids is None else list(gpu_ids),
        "extra_kwargs": None if extra_kwargs is None else dict(extra_kwargs),
        "gpu_count": gpu_count,
        "gpu_share": gpu_share,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return json_body({"model": model, "task": task, **given})


def texts(given: Sequence[str], field: str) -> list[str]:
    """The texts of a request.

    Raises:
        InvalidRequest: it is one text, of which each character would count as one, or something in it is no text.
    """
    if isinstance(given, str):
        raise InvalidRequest(f"{field} is a list of texts; put the one text into a list", field=field)
    if not isinstance(given, Iterable):
        raise InvalidRequest(f"{field} is a list of texts, and not {given!r:.50}", field=field)
    return [text(one, f"{field}[{place}]", field) for place, one in enumerate(given)]


def text(given: Any, name: str, field: str) -> str:
    """One text.

    Raises:
        InvalidRequest: it is none, or holds half a character, which no server could read.
    """
    if not isinstance(given, str):
        raise InvalidRequest(f"{name} is a text, and not {given!r:.50}", field=field)
    if not given.isascii() and HALF.search(given):
        raise InvalidRequest(
            f"{name} holds half a character (a lone surrogate), as reading a file in the wrong encoding leaves it; "
            "read it as UTF-8, or leave that out",
            field=field,
        )
    return given


def constraint(given: Mapping[str, Any]) -> dict[str, Any]:
    """The one thing that says what the text must look like, if any.

    Raises:
        InvalidRequest: there are several.
    """
    found = {name: given[name] for name in CONSTRAINTS if given.get(name) not in (None, [])}
    if len(found) > 1:
        raise InvalidRequest(f"only one of {', '.join(found)} can say what the text must look like", field="choice")
    return found


def check_options(given: Mapping[str, Any], known: type) -> None:
    """Make sure that there are such options.

    Raises:
        InvalidRequest: there are not.
    """
    names = get_type_hints(known)
    for name in given:
        if name not in names:
            raise InvalidRequest(f"there is no option {name!r} here; there are {', '.join(sorted(names))}", field=name)


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether the launches' service, which the earlier system has too, can say these options."""
    return all(name in CompleteOptions.__annotations__ for name, value in options.items() if value is not None)


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
    check_options(options, CompleteOptions)
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
    launch_id: str, prompts: Sequence[str], model: str | None, sampling: Mapping[str, Any], *, streamed: bool = False
) -> Call:
    """Completions of prompts in the order in which they are done, each whole or piece by piece."""
    check_options(sampling, Sampling if streamed else SeveralSampling)
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
    check_options(sampling, Sampling)
    kinds = load().v1
    message = build(
        kinds.ChatRequest,
        instance_id=launch_id,
        messages=[chat_message(one, place) for place, one in enumerate(conversation)],
        model=model,
        sampling=sampling_message(sampling),
    )
    if streamed:
        return Call(f"{INFERENCE}/StreamChat", message, kinds.ChatDelta)
    return Call(f"{INFERENCE}/Chat", message, kinds.ChatResponse)


def chat_message(given: Mapping[str, str], place: int) -> Any:
    """One message of a conversation.

    Raises:
        InvalidRequest: it is none.
    """
    kind, name = load().v1.ChatMessage, f"conversation[{place}]"
    fields = kind.DESCRIPTOR.fields_by_name
    if not isinstance(given, Mapping) or not set(given) <= set(fields):
        raise InvalidRequest(f"{name} is a dict with {', '.join(fields)}, and not {given!r:.80}", field="conversation")
    if not isinstance(given.get("content", ""), str):
        raise InvalidRequest(
            f"the content of {name} is one text; what has several parts, as images, goes to the launch's own "
            "OpenAI server",
            field="conversation",
        )
    return kind(**{key: text(value, f"the {key} of {name}", "conversation") for key, value in given.items()})


def relay(instance_id: str, path: str, body: bytes) -> Call:
    """One request of the OpenAI API, as it is."""
    kinds = load().v1
    message = build(kinds.RelayRequest, instance_id=instance_id, path=path, body=body)
    return Call(f"{INFERENCE}/Relay", message, kinds.RelayResponse)


def sampling_message(sampling: Mapping[str, Any]) -> Any:
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
    if not hasattr(message, "usage"):
        return Completion(message.text, message.prompt_tokens, message.completion_tokens)
    usage = message.usage
    return Completion(
        message.text, usage.prompt_tokens, usage.completion_tokens, message.finish_reason, read_logprobs(message)
    )


def read_chat(message: Any) -> ChatAnswer:
    """The answer in a conversation."""
    choice, usage = message.choices[0], message.usage
    return ChatAnswer(
        choice.message.content,
        choice.reasoning,
        choice.finish_reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        read_logprobs(choice),
    )


def read_token(message: Any) -> Token:
    """A piece of a completion, or of an answer in a conversation."""
    usage = message.usage
    written, reasoning = (message.text, "") if hasattr(message, "text") else (message.content, message.reasoning)
    return Token(
        written,
        reasoning,
        message.finish_reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        read_logprobs(message),
    )


def read_logprobs(message: Any) -> tuple[TokenLogprob, ...]:
    """How likely the tokens of a message were."""
    return tuple(
        TokenLogprob(
            one.token,
            one.logprob if one.HasField("logprob") else None,
            tuple(TopLogprob(other.token, other.logprob) for other in one.top),
        )
        for one in message.logprobs
    )


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
        InvalidRequest: a value is of the wrong kind.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return kind(**given)
    except (TypeError, ValueError) as problem:
        for name, value in given.items():
            raise_if_wrong(kind, name, value)
        raise InvalidRequest(f"this cannot be sent: {problem}") from problem


def raise_if_wrong(kind: Any, name: str, value: Any) -> None:
    """Say what is wrong with a field of a message, if it is that one."""
    try:
        kind(**{name: value})
    except (TypeError, ValueError) as problem:
        option = OPTIONS.get(name, name)
        wanted = f"{option} is {described(kind.DESCRIPTOR.fields_by_name[name])}, and not {value!r:.50}"
        raise InvalidRequest(wanted, field=option) from problem


def described(field: Any) -> str:
    """What a field of a message may hold."""
    if field.message_type is not None:
        return "a dict of whole numbers and numbers"
    one = VALUES.get(field.type, "a text")
    # An attribute of that name is to come, and the older one to go.
    is_repeated = getattr(field, "is_repeated", None)
    return (
        f"a list, each {one}" if (field.label == field.LABEL_REPEATED if is_repeated is None else is_repeated) else one
    )
