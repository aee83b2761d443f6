"""The command line: what is understood, what is taken as it comes, what is refused."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.sim.options import OptionsError, parse


@pytest.mark.parametrize(
    "line",
    [
        "--model m --port 81",
        "--model=m --port=81",
        "m --port 81",
        "--port 81 m",
        "--enforce-eager m --port 81",
        "--no-enable-prefix-caching m --port 81",
        "--port 81 -- m",
        "--max_num_seqs 4 m --port 81",
        "--unheard-of --port 81 --model m",
        "-tp 2 --port 81 -O3 m",
        "--port 80 --model m --port 81",
        "m --model other --port 81",
        "--seed -1 m --port 81",
        "--chat-template '{{ x }}' m --port 81",
        "--hf-overrides.a.b_c 3 m --port 81",
        """--speculative-config '{"a": [1]}' m --port 81""",
    ],
)
def test_model_and_port_are_found(line: str) -> None:
    options = parse(shlex.split(line))
    assert (options.model, options.port) == ("m", 81)


def test_defaults() -> None:
    options = parse(["m"])
    assert options.host is None
    assert options.port is None
    assert options.uds is None
    assert options.max_model_len is None
    assert options.served_model_names == ("m",)
    assert options.api_key == ()
    assert not options.enable_sleep_mode


def test_flags_that_are_understood() -> None:
    line = "m --host ::1 --served_model_name a b --api-key k1 k2 --enable-sleep-mode --uds /run/x --max-model-len 8K"
    options = parse(line.split())
    assert options.host == "::1"
    assert options.served_model_names == ("a", "b")
    assert options.api_key == ("k1", "k2")
    assert options.enable_sleep_mode
    assert options.uds == "/run/x"
    assert options.max_model_len == 8192
    assert not parse(["m", "--enable-sleep-mode", "--no-enable-sleep-mode"]).enable_sleep_mode


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("1k", 1000), ("1.5k", 1500), ("2M", 2**21), ("auto", None)]
)
def test_max_model_len(text: str, tokens: int | None) -> None:
    assert parse(["m", "--max-model-len", text]).max_model_len == tokens


@pytest.mark.parametrize(
    ("line", "devices", "utilization", "pooling"),
    [
        ("m", 1, None, False),
        ("m -tp 2 --gpu-memory-utilization 0.5", 2, 0.5, False),
        ("m --tensor_parallel_size=2 -pp 3 -dp 4 --runner pooling", 24, None, True),
        ("m --device-memory-utilization 1 --runner generate", 1, 1, False),
        ("m --pipeline-parallel-size 2 --convert embed", 2, None, True),
        ("m --task embed", 1, None, True),
        ("m --task generate", 1, None, False),
        ("m -tp 4 --tensor-parallel-size 2", 2, None, False),
    ],
)
def test_what_the_model_needs_and_is(line: str, devices: int, utilization: float | None, pooling: bool) -> None:
    options = parse(line.split())
    assert (options.devices, options.utilization, options.pooling) == (devices, utilization, pooling)


def test_secrets_are_not_kept_for_the_log() -> None:
    options = parse(["m", "--api-key", "sesame", "--hf-token=token", "--dtype", "float32"])
    given = dict(options.given)
    assert given == {"api_key": "***", "hf_token": "***", "dtype": "float32", "model": "m"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no model given"),
        ("--port 80", "no model given"),
        ("--model=", "no model given"),
        ("m --port abc", "--port: invalid int value: 'abc'"),
        ("m --port ''", "--port: invalid int value"),
        ("m --port 70000", "70000 is no port number"),
        ("m --port -1", "-1 is no port number"),
        ("m --port", "--port: expected one value"),
        ("m --port --host x", "--port: expected one value"),
        ("m --api-key", "--api-key: expected at least one value"),
        ("m n", "unrecognized arguments: n"),
        ("m --enforce-eager=yes", "--enforce-eager: takes no value"),
        ("m --max-model-len lots", "--max-model-len: 'lots'"),
        ("m --max-model-len 0", "--max-model-len: '0'"),
        ("m --compilation-config {bad", "--compilation-config: the value is not valid JSON"),
        ("m --hf-overrides='{\"a\": }'", "--hf-overrides: the value is not valid JSON"),
        ("m -cc {", "-cc: the value is not valid JSON"),
        ("m -tp 0", "--tensor-parallel-size: '0' is no number of devices"),
        ("m -dp two", "--data-parallel-size: 'two'"),
        ("m --gpu-memory-utilization 1.5", "--gpu-memory-utilization: '1.5'"),
        ("m --gpu-memory-utilization nan", "--gpu-memory-utilization: 'nan'"),
        ("m --help", "--help starts no server"),
        ("--version", "--version starts no server"),
    ],
)
def test_what_is_refused(line: str, message: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse(shlex.split(line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deeply_nested_json_is_refused_and_not_a_crash() -> None:
    with pytest.raises(OptionsError, match="not valid JSON"):
        parse(["m", "--hf-overrides", '{"a":' * 200_000])


KNOWN = frozenset({"--dtype", "--enforce-eager", "--hf_overrides", "-tp", "-O"})


@pytest.mark.parametrize(
    "line",
    [
        "m --dtype x --no-enforce-eager --hf-overrides.a.b 1 -tp 2 -O3 --model n --port 1 --uds u",
        "m --hf_overrides {} --served_model_name x --enable_sleep_mode --api-key k --max-model-len 4 --host h",
    ],
)
def test_known_flags_are_accepted(line: str) -> None:
    assert parse(line.split(), KNOWN).model in {"m", "n"}


@pytest.mark.parametrize(
    "flag", ["--nonsense", "--nonsense=1", "--no-nonsense", "--nonsense.a", "-x", "--trust-remote-code"]
)
def test_other_flags_are_refused_where_the_known_ones_are_given(flag: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse(["m", flag], KNOWN)
    assert str(caught.value) == f"unrecognized arguments: {flag}"


@given(st.lists(st.text(max_size=12) | st.sampled_from(["--model", "--port", "-O", "--", "m", "--a.b", "--no-x", "{"])))
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    try:
        options = parse(argv)
    except OptionsError as error:
        assert str(error)
    else:
        assert options.model
        assert options.served_model_names
