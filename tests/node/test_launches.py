"""What a launch says as options of a server, and a log in pieces that cut no character."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.core.instance import State
from bullpen.errors import LaunchRefusedError, NotFoundError
from bullpen.node.host_stats import limit_mib, total_mib
from bullpen.node.launch_options import Task, command_line
from bullpen.node.launches import Launches
from bullpen.node.logs import MAX_CHUNK, Logs, Piece


@pytest.mark.parametrize(
    ("task", "gpu_count", "extra_kwargs", "line"),
    [
        ("generate", 0, {}, "--model m"),
        ("generate", 2, {}, "--model m --tensor-parallel-size 2"),
        ("generate", 2, {"tensor_parallel_size": 1}, "--model m --tensor-parallel-size 1"),
        ("generate", 0, {"model": "other"}, "--model other"),
        ("embed", 1, {}, "--model m --tensor-parallel-size 1 --runner pooling --convert embed"),
        ("embed", 0, {"runner": "generate"}, "--model m --runner generate"),
        ("embed", 0, {"convert": "reward"}, "--model m --runner pooling --convert reward"),
        ("generate", 0, {"max_model_len": 256, "seed": -1}, "--model m --max-model-len 256 --seed=-1"),
        ("generate", 0, {"gpu_memory_utilization": 0.5}, "--model m --gpu-memory-utilization 0.5"),
        ("generate", 0, {"enforce_eager": True, "enable_lora": False}, "--model m --enforce-eager --no-enable-lora"),
        ("generate", 0, {"quantization": None, "lora_modules": []}, "--model m"),
        ("generate", 0, {"hf_overrides": {"a": [1, "x"]}}, """--model m --hf-overrides '{"a": [1, "x"]}'"""),
        ("generate", 0, {"served_model_name": ["one", "two"]}, "--model m --served-model-name one two"),
        ("generate", 0, {"dtype": "--host"}, "--model m --dtype=--host"),
        ("generate", 0, {"max-model-len": 1}, "--model m --max-model-len 1"),
    ],
)
def test_options_of_a_launch(task: Task, gpu_count: int, extra_kwargs: dict[str, Any], line: str) -> None:
    assert command_line("m", task, extra_kwargs, gpu_count) == shlex.split(line)


@pytest.mark.parametrize("name", ["", "two words", "-port", "--port", "port=1", "\u00fc", "1"])
def test_names_that_are_no_keywords(name: str) -> None:
    with pytest.raises(LaunchRefusedError, match="extra_kwargs"):
        command_line("m", "generate", {name: 1}, 0)


def test_a_value_that_json_does_not_have() -> None:
    with pytest.raises(LaunchRefusedError, match="--seed"):
        command_line("m", "generate", {"seed": float("nan")}, 0)


# -- logs ----------------------------------------------------------------------------------------------------------


class OneLog:
    """A supervisor with one instance, whose log a test writes."""

    def __init__(self, folder: Path) -> None:
        self.logs = Logs(folder, cap=0)
        self.instance = SimpleNamespace(id="a", key="key", state=State.READY)
        self.fleet = SimpleNamespace(get=self.get)

    def get(self, launch_id: str) -> SimpleNamespace:
        if launch_id != "a":
            raise NotFoundError("no")
        return self.instance

    def read_log(self, launch_id: str, start: int, end: int | None) -> Any:
        return self.logs.read("key", start, end)

    def write(self, data: bytes) -> None:
        self.logs.path("key").write_bytes(data)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> OneLog:
    return OneLog(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def launches(log: OneLog) -> Launches:
    return Launches(cast(Any, log))


def read_all(launches: Launches, offset: int = 0, most: int = MAX_CHUNK) -> tuple[str, int]:
    """The pieces of a log, put together, and how many there were."""
    text, count = "", 0
    while (piece := launches.read_log("a", offset)).content:
        assert offset <= piece.offset < piece.next_offset
        assert piece.next_offset - piece.offset <= most
        text, count, offset = text + piece.content, count + 1, piece.next_offset
    return text, count


@given(text=st.text(st.sampled_from("a\u00e4\u20ac\U0001f600\n")), size=st.integers(4, 9))
def test_pieces_put_together_are_the_log(log: OneLog, text: str, size: int) -> None:
    log.write(text.encode())
    assert read_all(Launches(cast(Any, log), size), most=size)[0] == text


@given(text=st.text(st.sampled_from("a\u00e4\u20ac\U0001f600"), min_size=1), data=st.data())
def test_an_offset_inside_a_character_moves_on(log: OneLog, launches: Launches, text: str, data: st.DataObject) -> None:
    whole = text.encode()
    log.write(whole)
    offset = data.draw(st.integers(0, len(whole)))
    piece = launches.read_log("a", offset)
    assert offset <= piece.offset <= offset + 3
    assert piece.content == whole[piece.offset :].decode(), "it begins with a whole character"
    assert whole[offset : piece.offset].decode(errors="ignore") == "", "and no whole one was passed over"


@given(whole=st.binary(max_size=30), size=st.integers(4, 9), offset=st.integers(0, 40))
def test_bytes_that_are_no_text_are_read_to_their_end(log: OneLog, whole: bytes, size: int, offset: int) -> None:
    log.write(whole)
    log.instance.state = State.STOPPED
    launches = Launches(cast(Any, log), size)
    while (piece := launches.read_log("a", offset)).next_offset < len(whole):
        assert piece.next_offset > offset
        offset = piece.next_offset
    log.instance.state = State.READY
    assert piece.next_offset == len(whole)


def test_a_character_that_is_not_all_written_comes_later(log: OneLog, launches: Launches) -> None:
    log.write(b"a\xe2\x82")
    assert launches.read_log("a", 0).content == "a"
    assert launches.read_log("a", 1) == Piece(1, b"")
    log.write(b"a\xe2\x82\xac")
    assert launches.read_log("a", 1).content == "\u20ac"
    log.write(b"a\xe2\x82")
    log.instance.state = State.FAILED
    assert launches.read_log("a", 1).content == "\ufffd", "nothing more is going to come"
    log.instance.state = State.READY


# -- memory --------------------------------------------------------------------------------------------------------


def test_a_limit_of_a_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bullpen.node.host_memory.limited_groups", lambda: [tmp_path])
    everything = total_mib()
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    assert (limit_mib(tmp_path), total_mib()) == (100, 100)
    (tmp_path / "memory.max").write_text("max\n")
    assert (limit_mib(tmp_path), total_mib()) == (None, everything)
