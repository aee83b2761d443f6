"""The phases of a start, read from real logs and from any bytes."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.engines.phases import Phase, PhaseReader, PhaseSeen, overall

SAMPLES = Path(__file__).parent / "samples"
HEADER = b"(EngineCore pid=7) INFO 11-20 22:51:01 [core.py:402] "

CONFIGURATION, DOWNLOAD, WEIGHTS, COMPILATION, KV_CACHE, WARMUP, GRAPHS, TOKENIZER, BIND, READY = Phase


def read(log: bytes) -> list[PhaseSeen]:
    return PhaseReader().feed(log)


def sample(name: str) -> bytes:
    return (SAMPLES / f"{name}.log").read_bytes()


def steps(*pairs: tuple[Phase, float | None]) -> list[PhaseSeen]:
    return [PhaseSeen(*pair) for pair in pairs]


END = ((KV_CACHE, None), (WARMUP, 1.0), (TOKENIZER, None), (BIND, None), (READY, 1.0))
LOADED = ((WEIGHTS, None), (WEIGHTS, 0.0), (WEIGHTS, 1.0))


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("eager_start", steps((CONFIGURATION, None), (DOWNLOAD, None), *LOADED, *END)),
        (
            "compiled_start",
            steps((CONFIGURATION, None), *LOADED, (COMPILATION, None), (COMPILATION, 1.0), *END),
        ),
        (
            "gpu_start",
            steps(
                (CONFIGURATION, None),
                *((DOWNLOAD, fraction) for fraction in (None, 0.0, 0.25, 1.0)),
                *((WEIGHTS, fraction) for fraction in (None, 0.0, 0.25, 0.5, 1.0)),
                (COMPILATION, None),
                (KV_CACHE, None),
                (WARMUP, None),
                (GRAPHS, None),
                *END[2:],
            ),
        ),
        ("no_cache_blocks", steps((CONFIGURATION, None), *LOADED, (KV_CACHE, None))),
        ("port_in_use", steps((CONFIGURATION, None))),
        ("unknown_flag", []),
    ],
)
def test_what_real_starts_show(name: str, seen: list[PhaseSeen]) -> None:
    assert read(sample(name)) == seen


def test_the_simulators_log_reads_like_vllms() -> None:
    phases = [seen.phase for seen in read(sample("sim_core_killed"))]
    assert phases[0] is CONFIGURATION and phases[-1] is READY
    assert {WEIGHTS, KV_CACHE, WARMUP, BIND} <= set(phases)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"Starting to load model acme/large...", PhaseSeen(DOWNLOAD, None)),
        (b"Starting to load model /models/large...", PhaseSeen(WEIGHTS, None)),
        (b"Starting to load model s3://bucket/large...", PhaseSeen(WEIGHTS, None)),
        (b"Time spent downloading weights for acme/large: 80.123456 seconds", PhaseSeen(DOWNLOAD, 1.0)),
        (b"Using cache directory: /c for vLLM's torch.compile", PhaseSeen(COMPILATION, None)),
        (b"[backbone] Starting torch.compile", PhaseSeen(COMPILATION, None)),
        (b"[eagle_head] Directly load AOT compilation from path /c", PhaseSeen(COMPILATION, None)),
        (b"Available KV cache memory: 52.31 GiB", PhaseSeen(KV_CACHE, None)),
        (b"GPU + host KV cache size: 1,024 tokens, Maximum concurrency", PhaseSeen(KV_CACHE, None)),
        (
            b"Initial free memory 78.1 GiB, reserved 8.0 GiB memory for KV Cache as specified by",
            PhaseSeen(KV_CACHE, None),
        ),
        (b"Compile and warming up model for size 8192", PhaseSeen(WARMUP, None)),
        (b"JIT kernel warmup starting.", PhaseSeen(WARMUP, None)),
        (b"The user wrote: Application startup complete.", PhaseSeen(CONFIGURATION, None)),
    ],
)
def test_single_lines_of_vllms_logger(line: bytes, seen: PhaseSeen) -> None:
    assert read(HEADER + line + b"\n") == [seen]


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"Loading safetensors checkpoint shards:  40% Completed | 2/5 [00:01<00:02,  1.5it/s]", (WEIGHTS, 0.4)),
        (b"Loading safetensors checkpoint shards (eager):   0% Completed | 0/5 [00:00<?, ?it/s]", (WEIGHTS, 0.0)),
        (b"Loading pt checkpoint shards:  99% Completed | 99/100", (WEIGHTS, 0.99)),
        (b"Multi-thread loading shards:  25% Completed | 1/4", (WEIGHTS, 0.25)),
        (b"Loading safetensors using Runai Model Streamer:   7% Completed | 20/291", (WEIGHTS, 0.07)),
        (b"Fetching 5 files:  60%|######    | 3/5 [00:10<00:05,  3.3s/it]", (DOWNLOAD, 0.6)),
        (b"model-00001-of-00004.safetensors:  12%|#2  | 0.6G/4.98G [00:05<00:40, 110MB/s]", (DOWNLOAD, None)),
        (b"INFO:     Application startup complete.", (READY, 1.0)),
    ],
)
def test_single_lines_without_vllms_header(line: bytes, seen: tuple[Phase, float | None]) -> None:
    assert read(line + b"\n") == [PhaseSeen(*seen)]


@pytest.mark.parametrize(
    "line",
    [
        b"config.json: 100%|##########| 855/855 [00:00<00:00, 6.32MB/s]",
        b"Triton is installed, but doesn't include CPU backend. Disabling Triton.",
        b'INFO:     127.0.0.1:34948 - "GET /health HTTP/1.1" 200 OK',
        b"prompt: 'Loading safetensors checkpoint shards:  40% Completed'",
        b"Loading safetensors checkpoint shards",
        b"",
    ],
)
def test_lines_that_say_nothing(line: bytes) -> None:
    assert read(line + b"\n") == []


def test_a_progress_bar_is_read_at_each_carriage_return() -> None:
    reader = PhaseReader()
    bar = b"\rLoading safetensors checkpoint shards:  %2d%% Completed | 1/5"
    assert reader.feed(bar % 20) == []
    assert reader.feed(bar % 40) == steps((WEIGHTS, 0.2))
    assert reader.feed(b"\n") == steps((WEIGHTS, 0.4))
    assert reader.progress == overall(WEIGHTS, 0.4)


def test_a_second_model_does_not_turn_the_bar_back() -> None:
    """A drafter for speculative decoding is loaded after the model, with a bar of its own."""
    bar = b"Loading safetensors checkpoint shards: %3d%% Completed | x\n"
    assert read(b"".join(bar % percent for percent in (50, 100, 0, 50, 100))) == steps((WEIGHTS, 0.5), (WEIGHTS, 1.0))


def test_graphs_captured_for_measuring_belong_to_the_cache() -> None:
    capture = b"\rCapturing CUDA graphs (FULL):  50%|#####     | 1/2 [00:00<00:00]\n"
    size = HEADER + b"GPU KV cache size: 131,072 tokens, Maximum concurrency\n"
    assert read(capture + size + capture) == steps((KV_CACHE, None), (GRAPHS, None))


def test_headers_of_every_make() -> None:
    """Coloured, behind a user's prefix, with the process alone as up to 0.30, and with the path of a debug log."""
    for header in (
        b"\x1b[32mINFO\x1b[0m 11-20 22:51:01 [core.py:402] ",
        b"node-3 (Worker_TP0 pid=7) INFO 11-20 22:51:01 [core.py:402] ",
        b"(Worker_TP0 pid=7) INFO 11-20 22:51:01 [v1/worker/gpu_worker.py:402] ",
        b"\x1b[0;36m(Worker pid=7)\x1b[0;0m INFO 11-20 22:51:01 [core.py:402] ",
    ):
        assert read(header + b"Available KV cache memory: 1 GiB\n") == steps((KV_CACHE, None)), header
    assert read(b"(APIServer pid=7) INFO:     Application startup complete.\n") == steps((READY, 1.0))


def test_nothing_is_read_after_ready() -> None:
    reader = PhaseReader()
    reader.feed(b"INFO:     Application startup complete.\n")
    assert reader.feed(sample("gpu_start")) == []
    assert (reader.phase, reader.progress) == (READY, 1.0)


def test_a_line_without_end_takes_no_memory() -> None:
    reader = PhaseReader()
    for _ in range(100):
        reader.feed(b"x" * 100_000)
    assert len(reader._partial) <= PhaseReader.LINE_LIMIT
    assert reader.feed(b"\nINFO:     Application startup complete.\n") == steps((READY, 1.0))


def test_overall_runs_from_0_to_1() -> None:
    values = [overall(phase, fraction) for phase in Phase for fraction in (None, 0.0, 0.5, 1.0)]
    assert values == sorted(values)
    assert values[0] == 0.0 and values[-1] == 1.0
    assert overall(WEIGHTS, 7.0) == overall(COMPILATION, None)
    assert overall(WEIGHTS, -1.0) == overall(WEIGHTS, None)


LINES = sample("gpu_start").splitlines(keepends=True) + sample("compiled_start").splitlines(keepends=True)
logs = st.lists(
    st.one_of(st.sampled_from(LINES), st.binary(max_size=60), st.sampled_from([b"\r", b"\n", b"\r\n", HEADER])),
    max_size=40,
).map(b"".join)


def cut(log: bytes, places: list[int]) -> Iterator[bytes]:
    bounds = [0, *sorted(place % (len(log) + 1) for place in places), len(log)]
    yield from (log[start:end] for start, end in pairwise(bounds))


@given(logs, st.lists(st.integers(0, 1 << 20), max_size=12))
def test_pieces_change_nothing(log: bytes, places: list[int]) -> None:
    whole, reader = read(log), PhaseReader()
    assert [seen for piece in cut(log, places) for seen in reader.feed(piece)] == whole


@given(st.lists(logs, max_size=8))
def test_a_start_only_goes_forward(pieces: list[bytes]) -> None:
    reader, order = PhaseReader(), list(Phase)
    before = (-1, -1.0)
    progress = reader.progress
    for piece in pieces:
        for seen in reader.feed(piece):
            now = (order.index(seen.phase), -0.5 if seen.fraction is None else seen.fraction)
            assert now > before
            assert 0.0 <= (seen.fraction or 0.0) <= 1.0
            before = now
        assert progress <= reader.progress <= 1.0
        progress = reader.progress
