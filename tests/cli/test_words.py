"""How things are put, and that nothing is put where there is no room."""

import shlex
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.cli import words
from bullpen.cli.table import GAP, Context, layout
from bullpen.client import Instance, ZygoteState
from bullpen.core.request import check_id

NOW = Context(datetime(2026, 1, 1, tzinfo=UTC), {"GPU-0": 0, "GPU-1": 1})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 ms"),
        (0.0254, "25 ms"),
        (0.0999, "0.10 s"),
        (0.414, "0.41 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"),
        (11_400, "3 h 10 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (5.4, "5s"), (119, "119s"), (120, "2m"), (7_200, "2h"), (172_800, "2d")]
)
def test_age(seconds: float, text: str) -> None:
    assert words.age(seconds) == text


def test_phases_last_until_the_next_one() -> None:
    begun = {"start": 0.0, "configuration": 0.25, "kv_cache": 1.0}
    assert words.phase_durations(begun, 1.5) == [("process", 0.25), ("configuration", 0.75), ("KV cache", 0.5)]
    assert words.phase_durations({**begun, "ready": 2.0}, 2.0)[-1] == ("KV cache", 1.0)
    assert words.phase_durations({}, 1.0) == []


@given(st.text(), st.integers(1, 30))
def test_shortened_text_is_short_and_keeps_its_end(text: str, width: int) -> None:
    short = words.shorten(text, width)
    assert len(short) <= width
    assert text.endswith(short.lstrip(words.ELLIPSIS)) or words.ELLIPSIS in text


@given(st.text(), st.integers(0, 3))
def test_name_made_from_a_model_is_a_free_id(model: str, others: int) -> None:
    taken: set[str] = set()
    for _ in range(others + 1):
        name = words.name_for(model, taken)
        assert name not in taken
        check_id(name)
        taken.add(name)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("facebook/opt-125m", "opt-125m"),
        ("/models/tiny a/", "tiny-a"),
        ("unsloth/x-GGUF:Q4_K_M", "x-GGUF-Q4_K_M"),
        ("...", "model"),
        ("watch", "watch-2"),
    ],
)
def test_name_is_the_models_own(model: str, name: str) -> None:
    assert words.name_for(model, ()) == name


def test_curl_quotes_what_it_must() -> None:
    instance = Instance.read({"instance_id": "a", "url": "http://127.0.0.1:1", "served_model_names": ['it\'s "x"']})
    command = shlex.split(words.curl(instance))
    assert command[1] == "http://127.0.0.1:1/v1/completions"
    assert '"model": "it\'s \\"x\\""' in command[-1]


def test_curl_reaches_sockets_and_knows_keys() -> None:
    document = {"instance_id": "a", "url": "http+unix:///run/a b.sock", "options": "--api-key ***", "model": "m"}
    command = shlex.split(words.curl(Instance.read(document)))
    assert command[1:4] == ["--unix-socket", "/run/a b.sock", "http://localhost/v1/completions"]
    assert "Authorization: Bearer YOUR_KEY" in command


def test_warming_says_how_far() -> None:
    zygote = ZygoteState(engine="vllm", state="warming", module="torch", done=3, total=9)
    assert words.warming(zygote) == "engine vllm is being imported: at torch, 3 of 9"
    assert "no such file" in words.warming(ZygoteState(engine="vllm", state="broken", error="no such file"))


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"state": "ready"}, "ready"),
        ({"state": "sleeping", "sleep_level": 2}, "sleeping 2"),
        ({"state": "sleeping", "sleep_emulated": True}, "sleeping (emulated)"),
        ({"state": "sleeping"}, "sleeping"),
    ],
)
def test_state_says_how_deep_it_sleeps(document: dict[str, Any], text: str) -> None:
    assert words.state(Instance.read({"instance_id": "a", **document})) == text


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"state": "ready"}, "is ready"),
        ({"state": "sleeping", "sleep_level": 1}, "sleeps at level 1"),
        ({"state": "sleeping", "sleep_emulated": True}, "sleeps (emulated)"),
        ({"state": "sleeping"}, "sleeps"),
    ],
)
def test_what_an_instance_has_become(document: dict[str, Any], text: str) -> None:
    assert words.has_become(Instance.read({"instance_id": "a", **document})) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (3.4, "3 s"), (59.4, "59 s"), (125, "2 min 5 s")])
def test_time_that_has_passed_so_far(seconds: float, text: str) -> None:
    assert words.so_far(seconds) == text


def test_doing_is_what_it_waits_for_else_the_stage() -> None:
    activity = {"doing": "wake", "stage": "queued", "reason": "asked to", "waits_for": "for 'b' on GPU 0"}
    assert words.doing(Instance.read({"instance_id": "a", "activity": activity})) == "waits for 'b' on GPU 0"
    assert words.doing(Instance.read({"instance_id": "a", "activity": {**activity, "waits_for": None}})) == "queued"
    assert words.doing(Instance.read({"instance_id": "a"})) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, ""), (-3, ""), (0.2, "about 1 s left"), (12.4, "about 12 s left"), (95, "about 1 min 35 s left")],
)
def test_time_left_is_told_only_where_it_is_known(seconds: float | None, text: str) -> None:
    assert words.time_left(seconds) == text


@pytest.mark.parametrize(("mib", "text"), [(0, "0 MiB"), (1023, "1023 MiB"), (81920, "80.0 GiB")])
def test_amount_of_memory(mib: int, text: str) -> None:
    assert words.mib(mib) == text


instances = st.builds(
    lambda name, model, state, url: Instance.read(
        {
            "instance_id": name,
            "assigned_gpus": ["GPU-0", "GPU-1"],
            "sleep_emulated": True,
            "model": model,
            "state": state,
            "url": url,
            "phase": "configuration",
            "created_at": "2025-12-31T23:00:00+00:00",
            "pid": 4194304,
            "engine": "vllm",
        }
    ),
    st.text("abc-", min_size=1, max_size=128),
    st.text("xyz/", max_size=200),
    st.sampled_from(["starting", "ready", "sleeping", "failed"]),
    st.sampled_from([None, "http://127.0.0.1:20000", "http://[fd00::1234:5678]:20000"]),
)


@given(st.lists(instances, min_size=1, max_size=4), st.integers(60, 250))
def test_table_fits_every_terminal(listed: list[Instance], width: int) -> None:
    columns = layout(listed, NOW, width)
    assert sum(one.width for one in columns) + GAP * (len(columns) - 1) <= width
    assert [one.column.heading for one in columns][:3] == ["ID", "MODEL", "STATE"]
    full = layout(listed, NOW, None)
    assert all(one.width == max(map(len, [one.column.heading, *one.cells])) for one in full)


def test_usual_table_has_the_url_at_80_columns() -> None:
    document = {"instance_id": "Llama-3.1-70B-Instruct", "model": "meta-llama/Llama-3.1-70B-Instruct", "state": "ready"}
    listed = [
        Instance.read({**document, "url": "http://127.0.0.1:20000", "pid": 1, "created_at": "2025-12-31T23:00:00Z"})
    ]
    headings = [one.column.heading for one in layout(listed, NOW, 80)]
    assert "URL" in headings and "PID" not in headings
    assert "PID" in [one.column.heading for one in layout(listed, NOW, 120)]


def test_table_tells_levels_gpus_and_memory_at_80_columns() -> None:
    document = {
        "instance_id": "Llama-3.1-70B-Instruct",
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "state": "sleeping",
        "sleep_level": 1,
        "assigned_gpus": ["GPU-1", "GPU-0", "GPU-gone"],
        "memory": {"awake": {"gpu_mib": 70000, "host_mib": 1}, "level_1": {"gpu_mib": 1500, "host_mib": 2}},
        "url": "http://127.0.0.1:20000",
    }
    columns = {one.column.heading: one.cells for one in layout([Instance.read(document)], NOW, 80)}
    assert columns["STATE"] == ["sleeping 1"] and columns["GPU"] == ["1,0,GPU-gone"]
    assert columns["GPU MiB"] == ["1500"]
