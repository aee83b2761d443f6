"""What a request may say. The tables over HTTP stand in ``tests/web``."""

from __future__ import annotations

import shlex
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.core.request import check_id, check_variables, read_config, split_options
from bullpen.errors import InvalidRequestError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ANYTHING = st.text(st.characters(), max_size=40)


@given(st.lists(TEXT, max_size=8))
def test_words_survive_a_shell_s_quoting(words: list[str]) -> None:
    assert split_options(shlex.join(words)) == tuple(words)


@given(ANYTHING)
def test_options_are_split_or_refused(options: str) -> None:
    try:
        words = split_options(options)
    except InvalidRequestError as problem:
        assert problem.field == "options"
        assert options not in str(problem), "a refusal does not echo"
    else:
        assert not any("\0" in word for word in words)


@pytest.mark.parametrize("options", ["--model 'm", '--model "m', "--model m\\", "m\0", "m \ud800"])
def test_options_that_no_command_line_can_be(options: str) -> None:
    with pytest.raises(InvalidRequestError, match="options"):
        split_options(options)


@given(st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=128))
def test_id_of_the_right_letters(instance_id: str) -> None:
    if instance_id.startswith(".") or instance_id == "watch":
        with pytest.raises(InvalidRequestError):
            check_id(instance_id)
    else:
        assert check_id(instance_id) == instance_id


@pytest.mark.parametrize("instance_id", ["", "a/b", "a b", "ä", "a\n", "a" * 129, "..", ".a", "watch"])
def test_what_is_no_id(instance_id: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_id(instance_id)
    assert caught.value.field == "instance_id"


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), ("", ""), (1, "1"), (1.5, "1.5"), (True, "true"), (False, "false")],
)
def test_values_become_text(value: Any, text: str) -> None:
    assert check_variables({"A": value}) == {"A": text}


@pytest.mark.parametrize(
    "variables",
    [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, {"A": None}, {"A": ["x"]}, {"A": "\udc80"}, {"A": 1e999}],
)
def test_variables_that_no_environment_can_hold(variables: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_variables(variables)
    assert caught.value.field == "env_vars"


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH", "BASH_ENV", "LD_LIBRARY_PATH"])
def test_variables_that_change_how_programs_load_need_an_allowance(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"--allow-env {name}"):
        check_variables({name: "x"})
    assert check_variables({name: "x"}, allowed=[name]) == {name: "x"}


def test_gpu_named_twice() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_config("m", gpu_uuids=["GPU-0", "GPU-0"], engine="sim")
    assert caught.value.field == "gpu_uuids"


def test_configuration_keeps_what_was_given_and_what_was_not() -> None:
    bare = read_config("--model m", engine="sim")
    assert (bare.options, bare.argv) == ("--model m", ("--model", "m"))
    assert (bare.env_vars, bare.gpu_uuids, bare.annotations) == (None, None, None)
    full = read_config("m", env_vars={}, gpu_uuids=[], annotations={}, engine="sim", face="v1")
    assert (full.env_vars, full.gpu_uuids, full.annotations, full.face) == ({}, (), {}, "v1")


@pytest.mark.parametrize(
    "path",
    [
        "/sleep?level=1",
        "/bullpen/gate?mode=refuse",
        "/collective_rpc",
        "/v1/../sleep",
        "/v1/%2e%2e/sleep",
        "/v1",
        "",
        "/",
    ],
)
def test_warm_up_reaches_the_model_alone(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="begins with /v1/"):
        read_config("--model m", engine="sim", warm_up={"path": path, "body": {}})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sleep": "off", "sleep_after": 5}, "sleep_after"),
        ({"sleep": "off", "discard_after": "1h"}, "discard_after"),
        ({"sleep_after": "10m", "stop_after": "5m"}, "stop_after"),
        ({"sleep_after": "soon"}, "sleep_after"),
        ({"gpus": 1, "gpu_uuids": ["0"]}, "gpus"),
        ({"gpu_share": 0.5}, "gpu_share"),
        ({"gpus": 1, "gpu_share": 1.5}, "gpu_share"),
    ],
)
def test_wishes_that_contradict_themselves(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_config("--model m", engine="sim", **fields)
    assert refused.value.field == field


def test_lengths_of_time() -> None:
    ladder = read_config("--model m", engine="sim", sleep_after="90s", discard_after="1h30m", stop_after=7200).ladder
    assert (ladder.sleep_after, ladder.discard_after, ladder.stop_after) == (90.0, 5400.0, 7200.0)
