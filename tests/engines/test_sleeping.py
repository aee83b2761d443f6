"""What an engine is told to make it sleep and wake, and how its answers are compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bullpen.engines import sleeping
from bullpen.engines.base import Place
from bullpen.engines.registry import ENGINES
from bullpen.engines.sleeping import Call, canary, canary_answer, deepen_calls, same_answer, sleep_calls, wake_calls
from bullpen.engines.vllm import GATE
from bullpen.zygote.worlds.vllm import devices, no_sleep_with

VLLM, SIM = ENGINES["vllm"], ENGINES["sim"]
BOTH = pytest.mark.parametrize("engine", ["vllm", "sim"])


def paths(calls: tuple[Call, ...]) -> list[str]:
    return [call.path for call in calls]


def place(
    *, devices: tuple[str, ...] | None = None, sleep: bool = False, share: float | None = None, port: int | None = 1
) -> Place:
    return Place("127.0.0.1", port, Path("/run/x"), devices, sleep, share)


# -- calls -----------------------------------------------------------------------------------------------------


def test_level_2_reads_the_weights_again_before_anything_can_be_computed() -> None:
    order = paths(wake_calls(2))
    weights, reload, cache = map(order.index, ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"])
    assert weights < reload < cache
    assert set(order[cache + 1 :]) == {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"}
    reloading = wake_calls(2)[reload].body
    assert reloading is not None and json.loads(reloading) == {"method": "reload_weights"}
    assert paths(wake_calls(1)) == ["/wake_up"]


@pytest.mark.parametrize("level", [1, 2])
def test_going_to_sleep_ends_what_is_left(level: int) -> None:
    assert sleep_calls(level) == (Call("POST", f"/sleep?level={level}&mode=abort"),)


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.30.0", "/wake_up"),
        ("0.30.2+cpu", "/wake_up"),
        ("0.31", "/wake_up?tags=weights"),
        ("0.32.0+cpu", "/wake_up?tags=weights"),
        ("0.33.0", "/wake_up?tags=weights"),
        ("1.0", "/wake_up?tags=weights"),
        ("0.31.dev12+gabc", "/wake_up?tags=weights"),
        ("", "/wake_up"),
        ("sim", "/wake_up"),
    ],
)
def test_a_sleeper_is_woken_to_sleep_deeper(version: str, first: str) -> None:
    assert paths(deepen_calls(version)) == [first, "/sleep?level=2&mode=abort"]


# -- canary ----------------------------------------------------------------------------------------------------


def embedding(*values: float) -> bytes:
    return json.dumps({"data": [{"embedding": values}]}).encode()


def test_a_canary_asks_for_one_token_or_an_embedding() -> None:
    call = canary("model", pooling=False)
    assert call.body is not None
    assert call.path == "/v1/completions"
    assert json.loads(call.body).items() >= {"model": "model", "max_tokens": 1, "temperature": 0}.items()
    call = canary("model", pooling=True)
    assert call.body is not None
    assert call.path == "/v1/embeddings"
    assert json.loads(call.body)["encoding_format"] == "float"


def test_texts_are_the_same_or_not() -> None:
    ten, other = (canary_answer(False, json.dumps({"choices": [{"text": t}]}).encode()) for t in (" ten", " tea"))
    assert ten == "text: ' ten'"
    assert same_answer(ten, ten)
    assert not same_answer(ten, other)


def test_tokens_without_text_are_told_apart_by_their_identifiers() -> None:
    one, two = (
        canary_answer(False, json.dumps({"choices": [{"text": "", "token_ids": [i]}]}).encode()) for i in (1, 2)
    )
    assert one == "text: '' [1]"
    assert not same_answer(one, two)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_embeddings_are_compared_in_proportion(scale: float) -> None:
    first = canary_answer(True, embedding(scale, -scale / 2, scale / 3))
    close = canary_answer(True, embedding(scale, -scale / 2.001, scale / 3))
    other = canary_answer(True, embedding(scale, -scale / 2.1, scale / 3))
    assert same_answer(first, close)
    assert not same_answer(first, other)
    assert not same_answer(first, canary_answer(True, embedding(scale, -scale / 2)))


def test_a_broken_embedding_is_like_no_other() -> None:
    broken = canary_answer(True, b'{"data": [{"embedding": [NaN, 1.0]}]}')
    assert not same_answer(broken, broken)
    zero = canary_answer(True, embedding(0.0, 0.0))
    assert not same_answer(zero, canary_answer(True, embedding(1.0, 0.0)))


def test_a_text_is_never_taken_for_an_embedding() -> None:
    assert not same_answer("text: '[1.0]'", canary_answer(True, embedding(1.0)))


def test_a_fingerprint_stays_short() -> None:
    assert len(canary_answer(True, embedding(*[0.123456789] * 5000))) < 20 * sleeping.EMBEDDING_VALUES


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [1]}', b'{"data": [{"embedding": ["x"]}]}', b"1"]
)
@pytest.mark.parametrize("pooling", [False, True])
def test_what_is_no_answer(body: bytes, pooling: bool) -> None:
    with pytest.raises(ValueError, match="no answer to a canary"):
        canary_answer(pooling, body)


# -- command line and environment ------------------------------------------------------------------------------


@BOTH
def test_an_instance_that_may_not_sleep_cannot(engine: str) -> None:
    line = ENGINES[engine].command_line(["--model", "m"], False, place())
    assert line[:6] == ["--model", "m", "--host", "127.0.0.1", "--port", "1"]
    assert "--enable-sleep-mode" not in line
    environment = ENGINES[engine].environment(place(), {})
    assert not {"VLLM_SERVER_DEV_MODE", "BULLPEN_DEV_ENDPOINTS", "CUDA_VISIBLE_DEVICES"} & set(environment)


@BOTH
def test_one_that_may_sleep_can(engine: str) -> None:
    line = ENGINES[engine].command_line(["m"], True, place(sleep=True))
    assert line.count("--enable-sleep-mode") == 1
    line = ENGINES[engine].command_line(["m", "--enable-sleep-mode"], True, place(sleep=True))
    assert line.count("--enable-sleep-mode") == 1
    environment = ENGINES[engine].environment(place(sleep=True), {"A": "b"})
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["BULLPEN_DEV_ENDPOINTS"] == "loopback"
    assert environment["A"] == "b"


@BOTH
@pytest.mark.parametrize("word", ["0", "1"])
def test_a_users_word_on_development_mode_counts(engine: str, word: str) -> None:
    environment = ENGINES[engine].environment(place(sleep=True), {"VLLM_SERVER_DEV_MODE": word})
    assert environment["VLLM_SERVER_DEV_MODE"] == word
    assert "BULLPEN_DEV_ENDPOINTS" not in environment


def test_only_vllm_needs_the_gate_named() -> None:
    assert VLLM.command_line(["m", "--middleware", "own.One"], True, place())[-2:] == ["--middleware", GATE]
    assert GATE not in SIM.command_line(["m"], True, place())


@BOTH
def test_a_share_of_memory(engine: str) -> None:
    line = ENGINES[engine].command_line(["m"], True, place(share=0.45))
    assert line[line.index("--gpu-memory-utilization") + 1] == "0.45"


@BOTH
@pytest.mark.parametrize(
    "said",
    [
        ["--gpu-memory-utilization", "0.2"],
        ["--gpu-memory-utilization=0.2"],
        ["--gpu_memory_utilization=0.2"],
        ["--gpu-mem", "0.2"],
    ],
)
def test_the_options_own_share_counts(engine: str, said: list[str]) -> None:
    line = ENGINES[engine].command_line(["m", *said], True, place(share=0.45))
    assert "0.45" not in line


@BOTH
def test_accelerators_are_named_as_nvml_counts_them(engine: str) -> None:
    environment = ENGINES[engine].environment(place(devices=("3", "MIG-1f")), {})
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,MIG-1f"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("argv", "environment", "key"),
    [
        ([], {}, None),
        (["--api-key", "a"], {}, "a"),
        (["--api-key=a"], {"VLLM_API_KEY": "b"}, "a"),
        (["--api_key", "a", "b"], {}, "a"),
        (["--api-k", "a", "--api-key", "b"], {}, "b"),
        (["--api-server-count", "2"], {"VLLM_API_KEY": "b"}, "b"),
        (["--api-key", ""], {"VLLM_API_KEY": ""}, None),
        (["--api-key"], {}, None),
    ],
)
def test_the_key_that_a_server_demands(argv: list[str], environment: dict[str, str], key: str | None) -> None:
    assert VLLM.api_key(argv, environment) == key


# -- what the options mean for vLLM's sleep and place ----------------------------------------------------------


def parsed(**given: object) -> argparse.Namespace:
    """Options as vLLM's parser reads them, with its defaults."""
    defaults: dict[str, object] = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
        "data_parallel_size_local": None,
        "data_parallel_rank": None,
        "data_parallel_external_lb": False,
        "nnodes": 1,
        "api_server_count": None,
        "load_format": "auto",
    }
    return argparse.Namespace(**defaults | given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "prefill_context_parallel_size": 2}, 12),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4}, 8),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 2}, 4),
        ({"data_parallel_size": 4, "data_parallel_size_local": 0}, 0),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_rank": 0}, 2),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_external_lb": True}, 2),
        ({"tensor_parallel_size": 16, "nnodes": 2}, 8),
        ({"tensor_parallel_size": 8, "data_parallel_size": 2, "nnodes": 4}, 4),
    ],
)
def test_how_many_accelerators(given: dict[str, object], expected: int) -> None:
    assert devices(parsed(**given)) == expected


def test_one_gate_or_no_sleep() -> None:
    assert no_sleep_with(parsed()) is None
    assert no_sleep_with(parsed(data_parallel_size=4, api_server_count=1)) is None
    for several in (parsed(data_parallel_size=2), parsed(api_server_count=2)):
        assert "--api-server-count 1" in str(no_sleep_with(several))


def test_weights_in_another_process_do_not_sleep() -> None:
    assert "ipc_cache" in str(no_sleep_with(parsed(load_format="ipc_cache")))
