"""Requests read in parts: the same as in one go, in steps of bounded size; and those that are none."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from bullpen.proto import bootstrap, v1
from bullpen.rpc import messages
from bullpen.rpc.messages import MOST_FIELDS, parsed, parts
from bullpen.rpc.methods import UNREADABLE
from bullpen.rpc.turns import LARGE, Turns
from bullpen.sim import words
from tests.rpc.rounds import counted
from tests.rpc.serving import BOOTSTRAP, INFERENCE, MODEL, Rpc, raw, refused

BROKEN = b"\x0a\xff\xff\xff\x7fx"


def example(texts: list[str]) -> v1.CompleteRequest:
    sampling = v1.Sampling(temperature=0.5, seed=-7, stop=texts[:3], logit_bias={5: 1.5, 1 << 20: -2})
    return v1.CompleteRequest(instance_id="ü", prompts=texts, model="m", sampling=sampling)


@given(st.lists(st.text(max_size=40), max_size=60), st.integers(1, 50), st.integers(1, 9))
def test_the_parts_are_the_message(texts: list[str], large: int, fields: int) -> None:
    whole = example(texts)
    data = whole.SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "LARGE", large)
        patch.setattr(messages, "MOST_FIELDS", fields)
        found = list(parts(data))
    assert b"".join(found) == data
    read = v1.CompleteRequest()
    for part in found:
        read.MergeFromString(part)
    assert read == whole


@given(st.binary(max_size=60), st.integers(1, 8))
def test_what_is_no_message_is_none_in_parts_either(data: bytes, large: int) -> None:
    def read(pieces: list[bytes]) -> v1.CompleteRequest | None:
        message = v1.CompleteRequest()
        try:
            for piece in pieces:
                message.MergeFromString(piece)
        except DecodeError:
            return None
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "LARGE", large)
        assert read(list(parts(data))) == read([data])


def test_a_number_without_end_is_left_to_the_reader_at_once() -> None:
    data = b"\x80" * 1_000_000
    assert list(parts(data)) == [data]


@pytest.mark.parametrize("texts", [["x"] * 100_000, ["x" * 10_000] * 200, ["x" * (3 * LARGE)] * 3])
async def test_no_step_is_long(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    request = bootstrap.EmbedRequest(launch_id="emb", texts=texts)
    data = request.SerializeToString()
    longest = max(map(len, texts)) + 16
    for part in parts(data):
        assert len(part) < LARGE + longest
        assert len(bootstrap.EmbedRequest.FromString(part).texts) <= MOST_FIELDS
    steps: list[int] = []
    async with counted() as rounds:

        class Recorded:
            def __init__(self) -> None:
                self.message = bootstrap.EmbedRequest()

            def MergeFromString(self, part: bytes) -> None:
                steps.append(rounds.count)
                self.message.MergeFromString(part)

        kind: Any = Recorded
        assert (await parsed(kind, data, Turns())).message == request
    assert len(steps) == len(list(parts(data))) > 1
    assert len(set(steps)) == len(steps)


async def test_a_large_request_is_answered_as_a_small_one(rpc: Rpc) -> None:
    texts = [f"text {number} " + "x" * 200 for number in range(2500)]
    request = bootstrap.EmbedRequest(launch_id="emb", texts=texts)
    assert request.ByteSize() > LARGE
    vectors = [list(found.values) for found in (await rpc.embed(request)).embeddings]
    exact = [list(bootstrap.Embedding(values=words.vector(MODEL, text)).values) for text in texts]
    assert vectors == exact


@pytest.mark.parametrize("data", [BROKEN, b"\x0a\x02\xff\xff", b"\x0a\x01x" * LARGE + BROKEN])
async def test_what_cannot_be_read_is_told(rpc: Rpc, data: bytes) -> None:
    for method in ("Embed", "Complete"):
        call = raw(rpc.channel.unary_unary, BOOTSTRAP + method)
        assert await refused(call(data)) == (grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)
    for method in ("Chat", "Relay"):
        call = raw(rpc.channel.unary_unary, INFERENCE + method)
        assert await refused(call(data)) == (grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)
    for method in (BOOTSTRAP + "EmbedStream", INFERENCE + "StreamComplete"):
        call = raw(rpc.channel.unary_stream, method)
        assert await refused(call(data)) == (grpc.StatusCode.INVALID_ARGUMENT, UNREADABLE)
