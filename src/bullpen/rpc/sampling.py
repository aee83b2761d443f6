"""Sampling parameters of our own service, as the OpenAI API of vLLM has them; and the log probabilities it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bullpen.proto import v1 as pb
from bullpen.rpc.upstream import Json

_UNCHANGED = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "n",
    "ignore_eos",
    "min_tokens",
)


def completion_parameters(sampling: pb.Sampling) -> Json:
    """The parameters that are set, for `/v1/completions`."""
    wanted: Json = {name: getattr(sampling, name) for name in _UNCHANGED if sampling.HasField(name)}
    if sampling.stop:
        wanted["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        wanted["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        wanted["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    outputs = sampling.structured_outputs
    kind = outputs.WhichOneof("kind")
    if kind is not None:
        value = list(outputs.choice.values) if kind == "choice" else getattr(outputs, kind)
        wanted["structured_outputs"] = {kind: value}
    return wanted


def chat_parameters(sampling: pb.Sampling) -> Json:
    """The parameters that are set, for `/v1/chat/completions`, which has other words for two of them."""
    wanted = completion_parameters(sampling)
    if "max_tokens" in wanted:
        wanted["max_completion_tokens"] = wanted.pop("max_tokens")
    if "logprobs" in wanted:
        wanted["top_logprobs"] = wanted.pop("logprobs")
        wanted["logprobs"] = True
    return wanted


def completion_logprobs(parts: Iterable[Json]) -> Iterator[pb.TokenLogprob]:
    """The log probabilities of a completion, token by token."""
    for part in parts:
        likeliest = part.get("top_logprobs") or [None] * len(part["tokens"])
        for token, logprob, top in zip(part["tokens"], part["token_logprobs"], likeliest, strict=True):
            listed = [pb.TopLogprob(token=other, logprob=value) for other, value in (top or {}).items()]
            yield pb.TokenLogprob(token=token, logprob=logprob, top=listed)


def chat_logprobs(content: Json | None) -> Iterator[pb.TokenLogprob]:
    """The log probabilities of a chat's answer, token by token."""
    for part in (content or {}).get("content") or ():
        listed = [pb.TopLogprob(token=top["token"], logprob=top["logprob"]) for top in part.get("top_logprobs") or ()]
        yield pb.TokenLogprob(token=part["token"], logprob=part["logprob"], top=listed)
