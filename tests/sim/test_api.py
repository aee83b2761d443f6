"""vLLM's HTTP API as the simulator answers it."""

import base64
import json
import math
import struct
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam

from tests.sim.simulator import Simulator, wait_for

Stream = list[dict[str, object]]


def events(simulator: Simulator, path: str, **body: object) -> Stream:
    """The pieces of a streamed answer."""
    with simulator.http.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error(answer: httpx.Response, status: int) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    fields = answer.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["code"] == status
    assert isinstance(fields, dict)
    return fields


def test_health_version_and_models(shared: Simulator) -> None:
    health = shared.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert shared.http.get("/version").json() == {"version": "sim"}
    models = shared.http.get("/v1/models").json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["one", "two"]
    assert models["data"][0]["owned_by"] == "bullpen-sim"
    assert models["data"][0]["root"] == "test/model"
    assert models["data"][0]["max_model_len"] == 4096
    assert health.headers["server"] == "bullpen-sim"


def test_a_completion_is_a_function_of_the_prompt(shared: Simulator) -> None:
    first, again = shared.complete("hello you"), shared.complete("hello you", model="two")
    other = shared.complete("hello me")
    texts = [answer["choices"][0]["text"] for answer in (first, again, other)]  # type: ignore[index]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].split()) == 16
    assert first["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert first["usage"] == {"prompt_tokens": 2, "total_tokens": 18, "completion_tokens": 16}
    assert (first["model"], again["model"]) == ("one", "two")
    assert first["id"] != again["id"]


def test_fewer_tokens_are_a_beginning(shared: Simulator) -> None:
    texts = [shared.complete("x", max_tokens=size)["choices"][0]["text"] for size in (1, 40, 300)]  # type: ignore[index]
    assert [len(text.split()) for text in texts] == [1, 40, 300]
    assert texts[2].startswith(texts[1])
    assert texts[1].startswith(texts[0])


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [(["a", "b c"], (2, 3)), ([1, 2, 3], (1, 3)), ([[1], [2, 3]], (2, 3)), ("\ud800 \u00e9", (1, 2))],
)
def test_prompts_of_every_kind(shared: Simulator, prompt: object, counts: tuple[int, int]) -> None:
    body = json.dumps({"prompt": prompt, "max_tokens": 2})
    answer = shared.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).json()
    choices, tokens = counts
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 2 * choices


def test_a_streamed_completion_is_the_whole_one_in_pieces(shared: Simulator) -> None:
    whole = shared.complete(["a", "b"], max_tokens=20)
    pieces = events(shared, "/v1/completions", prompt=["a", "b"], max_tokens=20, stream_options={"include_usage": True})
    usage = pieces.pop()
    assert (usage["usage"], usage["choices"]) == (whole["usage"], [])
    choices = [piece["choices"][0] for piece in pieces]  # type: ignore[index]
    assert len(choices) == 40
    for expected in whole["choices"]:  # type: ignore[attr-defined]
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine] == [None] * 19 + ["length"]
    assert len({piece["id"] for piece in pieces}) == 1


def test_usage_in_every_piece_is_that_of_its_prompt(shared: Simulator) -> None:
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = events(shared, "/v1/completions", prompt=["a", "b c"], max_tokens=3, stream_options=wanted)
    seen = {(piece["choices"][0]["index"], *piece["usage"].values()) for piece in pieces}  # type: ignore[index,attr-defined]
    assert seen == {(index, size, size + made, made) for index, size in enumerate((1, 2)) for made in (1, 2, 3)}
    assert list(pieces[0]["usage"]) == ["prompt_tokens", "total_tokens", "completion_tokens"]  # type: ignore[call-overload]
    assert last["usage"] == {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}
    messages = [{"role": "user", "content": "hi"}]
    *chat, last = events(
        shared, "/v1/chat/completions", messages=messages, max_completion_tokens=2, stream_options=wanted
    )
    assert [piece["usage"]["completion_tokens"] for piece in chat] == [0, 1, 2]  # type: ignore[index]
    assert chat[-1]["usage"] == last["usage"] and last["choices"] == []


def test_usage_in_every_piece_needs_usage_at_all(shared: Simulator) -> None:
    for wanted in ({"continuous_usage_stats": True}, {"include_usage": False, "continuous_usage_stats": True}):
        pieces = events(shared, "/v1/completions", prompt="a", max_tokens=2, stream_options=wanted)
        assert len(pieces) == 2 and not any("usage" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": -1}, "temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)"),
        ({"temperature": 3}, "temperature must be in [0, 2], got 3.0. (parameter=temperature, value=3.0)"),
        ({"top_p": 5}, "top_p must be in (0, 1], got 5.0. (parameter=top_p, value=5.0)"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"),
        ({"n": -2}, "n must be at least 1, got -2."),
        ({"n": 3, "temperature": 0}, "n must be 1 when using greedy sampling, got 3."),
        ({"structured_outputs": {"regex": "[a"}}, "Failed to transform regex into a grammar: "),
    ],
)
def test_refusals_are_in_vllms_words(shared: Simulator, fields: dict[str, object], sentence: str) -> None:
    fields = error(shared.http.post("/v1/completions", json={"prompt": "x", **fields}), 400)
    assert str(fields["message"]).startswith(sentence)


def test_sampling_that_can_be_changes_nothing(shared: Simulator) -> None:
    fields = {"temperature": 0, "top_p": 1, "n": 1, "structured_outputs": {"regex": "a+", "json": None}}
    assert shared.complete("x", **fields)["choices"] == shared.complete("x")["choices"]


def test_several_choices_of_each_prompt(shared: Simulator) -> None:
    alone = [shared.complete(prompt, max_tokens=4)["choices"][0]["text"] for prompt in ("a", "b")]  # type: ignore[index]
    whole = shared.complete(["a", "b"], max_tokens=4, n=3)
    texts = [choice["text"] for choice in whole["choices"]]  # type: ignore[attr-defined]
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))  # type: ignore[attr-defined]
    assert [texts[0], texts[3]] == alone and len(set(texts)) == 6
    assert whole["usage"] == {"prompt_tokens": 2, "total_tokens": 26, "completion_tokens": 24}
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = events(shared, "/v1/completions", prompt=["a", "b"], max_tokens=4, n=3, stream_options=wanted)
    choices = [piece["choices"][0] for piece in pieces]  # type: ignore[index]
    assert ["".join(one["text"] for one in choices if one["index"] == index) for index in range(6)] == texts
    assert last["usage"] == whole["usage"]
    assert pieces[-1]["usage"] == {"prompt_tokens": 1, "total_tokens": 5, "completion_tokens": 4}


def test_several_choices_of_a_chat(shared: Simulator) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body: dict[str, object] = {"messages": messages, "max_tokens": 2, "n": 2}
    whole = shared.http.post("/v1/chat/completions", json=body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    first, second, *pieces = (piece["choices"][0] for piece in events(shared, "/v1/chat/completions", **body))  # type: ignore[index]
    assert [(one["index"], one["delta"]["role"]) for one in (first, second)] == [(0, "assistant"), (1, "assistant")]
    for index in range(2):
        assert "".join(one["delta"]["content"] for one in pieces if one["index"] == index) == texts[index]
    assert texts[0] != texts[1]


def test_chat(shared: Simulator) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = shared.http.post("/v1/chat/completions", json={"messages": messages, "max_completion_tokens": 5}).json()
    choice = whole["choices"][0]
    assert whole["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 5
    opening, *pieces = events(shared, "/v1/chat/completions", messages=messages, max_tokens=5)
    deltas = [piece["choices"][0] for piece in pieces]  # type: ignore[index]
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}  # type: ignore[index]
    assert "".join(piece["delta"]["content"] for piece in deltas) == choice["message"]["content"]
    assert deltas[-1]["finish_reason"] == "length"


def test_the_openai_client_understands_the_answers(shared: Simulator) -> None:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="any", max_retries=0) as client:
        parts: list[ChatCompletionContentPartParam] = [
            {"type": "text", "text": "hi"},
            {"type": "image_url", "image_url": {"url": "data:,"}},
        ]
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": parts}]
        whole = client.chat.completions.create(model="one", messages=messages, max_tokens=4)
        with client.chat.completions.create(model="one", messages=messages, max_tokens=4, stream=True) as stream:
            pieces = [piece.choices[0].delta.content or "" for piece in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        assert len(pieces) == 5
        vectors = client.embeddings.create(model="one", input=["a", "b"])
        assert [len(item.embedding) for item in vectors.data] == [32, 32]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="x")


def test_embeddings(shared: Simulator) -> None:
    answers = [
        shared.http.post("/v1/embeddings", json={"input": ["a b", "c"], "encoding_format": encoding}).json()
        for encoding in ("float", "base64")
    ]
    vectors = [item["embedding"] for item in answers[0]["data"]]
    assert [len(vector) for vector in vectors] == [32, 32]
    assert vectors[0] != vectors[1]
    assert math.isclose(math.hypot(*vectors[0]), 1)
    packed = struct.unpack("<32f", base64.b64decode(answers[1]["data"][0]["embedding"]))
    assert packed == pytest.approx(vectors[0])
    assert answers[0]["usage"]["prompt_tokens"] == 3


def test_tokenize(shared: Simulator) -> None:
    answer = shared.http.post("/tokenize", json={"prompt": "a b a", "return_token_strs": True}).json()
    assert (answer["count"], answer["max_model_len"], answer["token_strs"]) == (3, 4096, ["a", "b", "a"])
    first, second, third = answer["tokens"]
    assert first == third != second
    chat = shared.http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert (chat["count"], chat["token_strs"]) == (2, None)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
def test_a_model_that_is_not_served(shared: Simulator, path: str) -> None:
    body = {"model": "none", "prompt": "x", "input": "x"}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "x"}]  # type: ignore[assignment]
    fields = error(shared.http.post(path, json=body), 404)
    assert (fields["type"], fields["param"]) == ("NotFoundError", "model")
    assert fields["message"] == "The model `none` does not exist. Valid aliases: one, two."


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": {}}, "body.prompt"),
        ("/v1/completions", {"prompt": []}, "body.prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "body.prompt"),
        ("/v1/completions", {"prompt": ["a"] * 1025}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "4"}, "body.max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": True}, "body.max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4096}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10**300}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "stream": 1}, "body.stream"),
        ("/v1/completions", {"prompt": "x", "stream_options": 1}, "body.stream_options"),
        ("/v1/completions", {"prompt": "x", "model": 1}, "body.model"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "x", "temperature": 2.5}, "temperature"),
        ("/v1/completions", {"prompt": "x", "temperature": 10**400}, "temperature"),
        ("/v1/completions", {"prompt": "x", "temperature": "hot"}, "body.temperature"),
        ("/v1/completions", {"prompt": "x", "top_p": 0}, "top_p"),
        ("/v1/completions", {"prompt": "x", "top_p": 5}, "top_p"),
        ("/v1/completions", {"prompt": "x", "n": 0}, None),
        ("/v1/completions", {"prompt": "x", "n": 20_000}, None),
        ("/v1/completions", {"prompt": "x", "n": 2, "temperature": 0}, None),
        ("/v1/completions", {"prompt": "x", "n": 1.5}, "body.n"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, None),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "top_p": -1}, "top_p"),
        ("/v1/chat/completions", {}, "body.messages"),
        ("/v1/chat/completions", {"messages": []}, None),
        ("/v1/chat/completions", {"messages": ["x"]}, "body.messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 1}]}, "body.messages"),
        ("/v1/embeddings", {}, "body.input"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "morse"}, "body.encoding_format"),
        ("/tokenize", {}, "body.prompt"),
    ],
)
def test_bodies_that_are_refused(shared: Simulator, path: str, body: object, parameter: str | None) -> None:
    assert error(shared.http.post(path, json=body), 400)["param"] == parameter


@pytest.mark.parametrize("body", ["", "{bad", "[1]", '"x"', "[" * 100_000, "\xff"])
def test_what_is_no_json_object_is_refused(shared: Simulator, body: str) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    error(shared.http.post("/v1/completions", content=body.encode("latin-1"), headers=headers), 400)


def test_a_body_must_say_that_it_is_json(shared: Simulator) -> None:
    answer = shared.http.post("/v1/completions", content=b'{"prompt": "x"}')
    assert "Only 'application/json' is allowed" in str(error(answer, 400)["message"])


def test_unknown_paths_and_methods(shared: Simulator) -> None:
    assert shared.http.get("/nope").status_code == 404
    assert shared.http.get("/nope").json() == {"detail": "Not Found"}
    wrong = shared.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json() == {"detail": "Method Not Allowed"}
    head = shared.http.head("/health")
    assert (head.status_code, head.content) == (405, b"")


def test_metrics_count(shared: Simulator) -> None:
    before = shared.metric("vllm:request_success_total", finished_reason="length", model_name="one")
    tokens = shared.metric("vllm:generation_tokens_total")
    shared.complete("a b c", max_tokens=7)
    events(shared, "/v1/completions", prompt="a b c", max_tokens=7)
    wait_for("both are counted", lambda: shared.metric("vllm:num_requests_running") == 0)
    assert shared.metric("vllm:request_success_total", finished_reason="length") == before + 2
    assert shared.metric("vllm:generation_tokens_total") == tokens + 14
    assert shared.metric("vllm:num_requests_waiting") == 0
    assert shared.metric("vllm:engine_sleep_state", sleep_state="awake") == 1


def test_keys(tmp_path: Path) -> None:
    with Simulator.serving(
        tmp_path, "--api-key", "k1", "k2", vllm_api_key="other", vllm_server_dev_mode=""
    ) as simulator:
        for header in ("", "Bearer", "Bearer x", "Basic k1", "Bearer other", "Bearer k1x"):
            answer = simulator.http.get("/v1/models", headers={"authorization": header})
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        for header in ("Bearer k1", "bearer k2"):
            assert simulator.http.get("/v1/models", headers={"authorization": header}).status_code == 200
        assert simulator.http.get("/health").status_code == 200
        assert simulator.http.get("/v1/nope").status_code == 401
        # Sleeping is for development mode only.
        assert simulator.http.post("/sleep").status_code == 404
        assert simulator.http.post("/wake_up").status_code == 404
        assert simulator.http.get("/is_sleeping").status_code == 404
        assert "k1" not in simulator.log
