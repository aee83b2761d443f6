"""What is sent and what answers mean, without a connection."""

import json
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.client import Instance, InvalidRequest, Readiness, Refused, Unauthorized, UnexpectedAnswer, wire
from bullpen.client.target import Target

TARGET = Target("http://daemon:1")


@given(st.text(min_size=1).filter(lambda text: "/" not in text and text != "watch"))
def test_every_id_is_one_segment_of_the_path(instance_id: str) -> None:
    path = wire.instance_path(instance_id)
    sent = httpx.Request("GET", f"http://daemon{path}").url.raw_path.decode()
    prefix, _, segment = sent.rpartition("/")
    assert prefix == wire.INSTANCES
    assert unquote(segment) == instance_id.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("instance_id", ["", "watch", "a/b", "../../health"])
def test_id_that_leads_elsewhere_is_refused(instance_id: str) -> None:
    with pytest.raises(InvalidRequest):
        wire.instance_path(instance_id)


@given(st.data())
def test_events_arrive_in_pieces_of_any_size(data: st.DataObject) -> None:
    lines = [{"type": "STATE", "object": {"instance_id": f"ü{number}", "revision": number}} for number in range(4)]
    lines.append({"type": "HEARTBEAT", "object": {"revision": 9}})
    stream = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    reader = wire.EventReader(TARGET)
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert [event.revision for event in events] == [0, 1, 2, 3, 9]
    assert [event.instance.instance_id if event.instance else None for event in events] == [
        "ü0",
        "ü1",
        "ü2",
        "ü3",
        None,
    ]


def test_text_that_is_no_unicode_can_be_sent() -> None:
    body = wire.config_body("--model \udcff", env_vars={"A": "ü"}, gpu_uuids=None)
    assert json.loads(body) == {"options": "--model \udcff", "env_vars": {"A": "ü"}}


@pytest.mark.parametrize(
    ("detail", "sentence"),
    [
        ("no instance 'a'", "no instance 'a'"),
        ([{"type": "x", "loc": ["body", "options"], "msg": "bad"}], "options: bad"),
        ([{"loc": ["body", 3], "msg": "a"}, {"loc": ["body", "b"], "msg": "c"}], "3: a; b: c"),
    ],
)
def test_refusal_carries_the_servers_words(detail: object, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        wire.check(TARGET, httpx.Response(409, json={"detail": detail}), 200)
    assert (str(caught.value), caught.value.status) == (sentence, 409)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(404, json={"detail": "Not Found"}),  # any FastAPI application
        httpx.Response(404, text="<html>"),
        httpx.Response(307, headers={"location": "/"}),
        httpx.Response(500, json={"detail": [1]}),
        httpx.Response(502, json=[]),
    ],
)
def test_answer_of_another_program_is_told_from_a_refusal(response: httpx.Response) -> None:
    with pytest.raises(UnexpectedAnswer, match="is no Bullpen"):
        wire.check(TARGET, response, 200)


def test_missing_and_wrong_key_are_told_apart() -> None:
    with pytest.raises(Unauthorized, match="wants its access key"):
        wire.check(TARGET, httpx.Response(401, json={"detail": "x"}), 200)
    with pytest.raises(Unauthorized, match="does not accept"):
        wire.check(Target(TARGET.url, "wrong"), httpx.Response(401, json={"detail": "x"}), 200)


def test_unknown_fields_are_tolerated_and_kept() -> None:
    instance = Instance.read({"instance_id": "a", "novelty": [1], "error": {"class": "x", "message": "y"}})
    assert instance.document["novelty"] == [1]
    assert instance.error is not None and instance.error.message == "y"
    readiness = Readiness.read({"ready": False, "zygotes": [{"engine": "sim", "state": "warming", "new": 1}]})
    assert [zygote.state for zygote in readiness.zygotes] == ["warming"]
