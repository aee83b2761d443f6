"""Why engines ended: real logs, texts of failures that take a GPU, exit codes, and any bytes."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bullpen.engines.causes import CAUSES
from bullpen.engines.crash import SENTENCE_LIMIT, CrashClass, Failure, classify
from bullpen.engines.redact import redact

SAMPLES = Path(__file__).parent / "samples"
NAMES = sorted(path.stem for path in SAMPLES.glob("*.log"))


def sample(name: str) -> bytes:
    return (SAMPLES / f"{name}.log").read_bytes()


def explain(exit_code: int | None, log: bytes, **known: object) -> Failure:
    failure = classify(exit_code, log, **known)  # type: ignore[arg-type]
    assert failure is not None
    return failure


def check(failure: Failure, kind: CrashClass, facts: tuple[str, ...]) -> None:
    assert failure.kind is kind, failure
    assert [fact for fact in facts if fact not in failure.message] == [], failure
    assert len(failure.message) <= SENTENCE_LIMIT


C = CrashClass


@pytest.mark.parametrize(
    ("name", "exit_code", "kind", "facts"),
    [
        ("bad_choice", 2, C.BAD_OPTION, ("--dtype", "'float12'", "'bfloat16'")),
        ("bad_json", 2, C.BAD_OPTION, ("--compilation-config", "Invalid JSON", "column 2")),
        ("unknown_flag", 2, C.BAD_OPTION, ("--no-such-flag",)),
        ("max_model_len", 1, C.BAD_OPTION, ("--max-model-len 100000", "512 tokens", "lower it")),
        ("quantization", 1, C.BAD_OPTION, ("--quantization awq", "start without it")),
        ("remote_code", 1, C.BAD_OPTION, ("--trust-remote-code",)),
        ("sleep_mode_on_cpu", 1, C.BAD_OPTION, ("--enable-sleep-mode",)),
        ("no_folder", 1, C.MISSING_MODEL, ("/models/nope", "no such folder")),
        ("folder_without_config", 1, C.MISSING_MODEL, ("/models/empty", "config.json")),
        ("no_weights", 1, C.MISSING_MODEL, ("/models/noweights", "no weights")),
        ("damaged_weights", 1, C.MISSING_MODEL, ("the model", "damaged", "fetch")),
        ("offline_name", 1, C.MISSING_MODEL, ("downloads are turned off", "HF_HUB_OFFLINE")),
        ("no_network", 1, C.MISSING_MODEL, ("the Hub cannot be reached",)),
        ("unknown_name", 1, C.MISSING_MODEL, ("the Hub knows no model acme/no-such-model", "HF_TOKEN")),
        ("unknown_revision", 1, C.MISSING_MODEL, ("revision nope", "--revision")),
        ("gated", 1, C.GATED_MODEL, ("acme/gated-model is gated", "HF_TOKEN")),
        ("unknown_architecture", 1, C.UNSUPPORTED_MODEL, ("'FancyForCausalLM'", "newer vLLM")),
        ("port_in_use", 1, C.PORT_IN_USE, ("its port is in use",)),
        ("no_cache_blocks", 1, C.OUT_OF_MEMORY, ("KV cache", "--gpu-memory-utilization")),
        ("cpu_kv_too_large", 1, C.OUT_OF_MEMORY, ("the host has 5.42 of 6.84 GiB", "10240.0 GiB")),
        ("core_killed", 0, C.ENGINE_DIED, ("without a word", "out-of-memory killer")),
        ("core_killed_starting", 1, C.ENGINE_DIED, ("without a word", "out-of-memory killer")),
        ("worker_killed", 0, C.ENGINE_DIED, ("VllmWorker-0", "SIGKILL", "out-of-memory killer")),
        ("worker_killed_starting", 1, C.ENGINE_DIED, ("without a word",)),
        ("request_crashed_core", 0, C.ERROR, ("Unsupported CPU attention configuration: head_dim=16",)),
        ("sim_start", 1, C.ERROR, ("RuntimeError: the simulated engine fails to start",)),
        ("sim_core_killed", 0, C.ENGINE_DIED, ("EngineCore", "SIGKILL")),
    ],
)
def test_real_failures(name: str, exit_code: int, kind: CrashClass, facts: tuple[str, ...]) -> None:
    check(explain(exit_code, sample(name)), kind, facts)


@pytest.mark.parametrize("name", ["stopped", "compiled_start", "eager_start", "gpu_start"])
def test_a_normal_end_is_no_failure(name: str) -> None:
    assert classify(0, sample(name)) is None


def test_the_callers_own_words_fill_the_sentence() -> None:
    assert explain(1, sample("port_in_use"), port=18544).message.startswith("port 18544 is in use")
    assert "acme/large is not in this machine's cache" in explain(1, sample("no_network"), model="acme/large").message
    assert "of acme/{0}%s is damaged" in explain(1, sample("damaged_weights"), model="acme/{0}%s").message


OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 3 has a total capacity of 79.25 GiB"
    " of which 133.88 MiB is free. Process 41231 has 61.02 GiB memory in use. Including non-PyTorch memory, this"
    " process has 18.08 GiB memory in use."
)
GPU_FAILURES = [
    (OUT_OF_MEMORY, C.OUT_OF_MEMORY, ("GPU 3", "224.00 MiB", "133.88 MiB of 79.25 GiB", "--gpu-memory-utilization")),
    (
        f"{OUT_OF_MEMORY}\n\nThe above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "/opt/venv/vllm/v1/worker/gpu_model_runner.py", line 5991, in _d\n'
        "    raise RuntimeError(\nRuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy"
        " requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        C.OUT_OF_MEMORY,
        ("the sampler warmed up with 1024 requests", "--max-num-seqs"),
    ),
    ("torch.AcceleratorError: CUDA error: out of memory", C.OUT_OF_MEMORY, ("the accelerator ran out of memory",)),
    (
        "ValueError: Free memory on device cuda:0 (3.21/79.25 GiB) on startup is less than desired GPU memory"
        " utilization (0.92, 72.91 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        C.OUT_OF_MEMORY,
        ("cuda:0 has 3.21 of 79.25 GiB free", "0.92", "72.91 GiB"),
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is"
        " needed, which is larger than the available KV cache memory (9.31 GiB). Based on the available memory, the"
        " estimated maximum model length is 76256. Try increasing `gpu_memory_utilization` …",
        C.OUT_OF_MEMORY,
        ("131072 tokens", "16.00 GiB", "9.31 GiB", "--max-model-len 76256"),
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is"
        " needed, which is larger than the available KV cache memory (0.01 GiB). Try increasing …",
        C.OUT_OF_MEMORY,
        ("131072 tokens", "lower --max-model-len"),
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you"
        " tried to allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)",
        C.OUT_OF_MEMORY,
        ("the host ran out of memory", "32.00 GiB"),
    ),
    ("MemoryError", C.OUT_OF_MEMORY, ("the host ran out of memory",)),
    (
        "RuntimeError: Insufficient space in /dev/shm for the message queue: 160 MiB required, 64 MiB free. Increase",
        C.OUT_OF_MEMORY,
        ("/dev/shm", "64 MiB free", "160 MiB", "--shm-size"),
    ),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device\n"
        "Search for `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/ for more information.",
        C.DRIVER,
        ("this GPU's architecture",),
    ),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU",
        C.DRIVER,
        ("too old", "CUDA 12.2"),
    ),
    (
        "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        C.DRIVER,
        ("too old", "update the driver"),
    ),
    ("vllm.third_party.pynvml.NVMLError_LibRmVersionMismatch: Driver/library version mismatch", C.DRIVER, ("restart",)),
    ("RuntimeError: No CUDA GPUs are available", C.DRIVER, ("nvidia-smi", "CUDA_VISIBLE_DEVICES")),
    (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling"
        " NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
        C.DRIVER,
        ("fabric manager",),
    ),
    (
        "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`",
        C.DRIVER,
        ("no accelerator",),
    ),
    (
        "ValueError: The quantization method modelopt is not supported for the current GPU. Minimum capability: 89."
        " Current capability: 75.",
        C.UNSUPPORTED_MODEL,
        ("modelopt", "75", "89"),
    ),
    ("OSError: [Errno 28] No space left on device", C.ERROR, ("disk is full", "HF_HOME")),
    (
        "RuntimeError: CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be",
        C.ERROR,
        ("RuntimeError: CUDA error: an illegal memory access was encountered",),
    ),
    ("AssertionError", C.ERROR, ("AssertionError",)),
]
ROOT = "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: invalid header length"


def worker_failing_with(exception: str) -> bytes:
    """A real failure of a worker, which its core and the server wrapped, with another exception at its root."""
    log = sample("damaged_weights").decode()
    line = next(line for line in log.split("\n") if ROOT in line)
    header = line[: line.index(ROOT)]
    return log.replace(line, "\r\n".join(header + part for part in exception.split("\n"))).encode()


@pytest.mark.parametrize(("exception", "kind", "facts"), GPU_FAILURES)
def test_failures_that_take_a_gpu(exception: str, kind: CrashClass, facts: tuple[str, ...]) -> None:
    check(explain(1, worker_failing_with(exception)), kind, facts)


@pytest.mark.parametrize(("exception", "kind", "facts"), GPU_FAILURES)
def test_the_same_failures_in_the_server_itself(exception: str, kind: CrashClass, facts: tuple[str, ...]) -> None:
    traceback = f'Traceback (most recent call last):\n  File "/x.py", line 1, in main\n    main()\n{exception}\n'
    check(explain(1, traceback.encode()), kind, facts)


def test_the_root_survives_in_its_wrapper() -> None:
    """Where the worker's own traceback is no longer in the tail."""
    log = sample("cpu_kv_too_large")
    core = log[log.index(b"(EngineCore pid=9154) ERROR") :]
    assert b"Worker pid" not in core
    check(explain(1, core), C.OUT_OF_MEMORY, ("10240.0 GiB",))


def failing(process: str, marker: str, *exceptions: str) -> str:
    """A failure as one process logs it: a marker, then exceptions each of which was raised from the one before."""
    blocks = [f'Traceback (most recent call last):\n  File "/x.py", line 1, in f\n    f()\n{e}\n' for e in exceptions]
    chain = "\nThe above exception was the direct cause of the following exception:\n\n"
    lines = f"{marker}\n{chain.join(blocks)}".split("\n")
    return "".join(f"({process}) ERROR 11-20 23:10:33 [a.py:1] {line}\r\n" for line in lines)


CORE_FAILED, WORKER_FAILED = "EngineCore failed to start.", "WorkerProc failed to start."
WRAPPED = "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace"


def test_of_a_chain_the_last_exception_is_quoted() -> None:
    log = failing("EngineCore pid=9", CORE_FAILED, "KeyError: 'inner'", "RuntimeError: outer words")
    check(explain(1, log.encode()), C.ERROR, ("RuntimeError: outer words",))


def test_a_known_cause_anywhere_in_the_chain_is_found() -> None:
    log = failing("EngineCore pid=9", CORE_FAILED, "torch.OutOfMemoryError: CUDA out of memory. x", "RuntimeError: y")
    check(explain(1, log.encode()), C.OUT_OF_MEMORY, ("the accelerator",))


def test_a_worker_that_lost_its_peer_is_not_the_root() -> None:
    log = failing("Worker_TP1 pid=3", WORKER_FAILED, "ValueError: the true reason")
    log += failing("Worker_TP0 pid=2", WORKER_FAILED, "torch.distributed.DistBackendError: NCCL error in: x, remote")
    log += failing("EngineCore pid=9", CORE_FAILED, WRAPPED)
    check(explain(1, log.encode()), C.ERROR, ("ValueError: the true reason",))


def test_lines_of_two_workers_may_be_mixed() -> None:
    first = failing("Worker_TP0 pid=2", WORKER_FAILED, "ValueError: the true reason").splitlines(keepends=True)
    second = failing("Worker_TP1 pid=3", WORKER_FAILED, "ValueError: the true reason").splitlines(keepends=True)
    mixed = "".join(line for pair in zip(first, second, strict=True) for line in pair)
    log = mixed + failing("EngineCore pid=9", CORE_FAILED, WRAPPED)
    check(explain(1, log.encode()), C.ERROR, ("ValueError: the true reason",))


def test_an_old_exception_is_not_the_cause() -> None:
    old = b"INFO:     x\nERROR:    Exception in ASGI application\nTraceback (most recent call last):\n"
    old += b'  File "/x.py", line 1, in f\nMemoryError\n' + b"INFO:     GET /health\n" * 200
    check(explain(3, old), C.ERROR, ("exit code 3", "its log shows no error"))
    check(explain(0, old + sample("core_killed")), C.ENGINE_DIED, ("without a word",))
    survived = failing("Worker pid=2", "WorkerProc hit an exception.", "ValueError: a wake failed").encode()
    log = survived + b"INFO:     GET /health\n" * 200 + sample("core_killed")
    check(explain(0, log), C.ENGINE_DIED, ("without a word",))


def test_the_end_of_a_stopped_engine_is_no_failure() -> None:
    stopping = b"(APIServer pid=1) INFO 11-20 23:10:33 [launcher.py:254] [shutdown] API server: shutdown triggered\n"
    assert classify(0, stopping + sample("core_killed")) is None
    assert classify(0, sample("core_killed") + stopping) is not None


@pytest.mark.parametrize("name", NAMES)
def test_headers_do_not_matter(name: str) -> None:
    """Up to 0.30 vLLM marks bare lines, a traceback's too, with their process; a terminal gets colours."""
    log = sample(name)
    exit_code = 2 if name in ("bad_choice", "bad_json", "unknown_flag") else 1
    expected = classify(exit_code, log)
    marked = re.sub(rb"(?m)^(?!\()(?=.)", b"(APIServer pid=1) ", log.replace(b"\r", b""))
    assert classify(exit_code, marked) == expected
    coloured = re.sub(rb"(?m)^(\(\w+ pid=\d+\)) (INFO|ERROR)", b"\x1b[0;36m\\1\x1b[0;0m \x1b[31m\\2\x1b[0m", log)
    assert classify(exit_code, coloured) == expected


@pytest.mark.parametrize(
    ("exit_code", "kind", "facts"),
    [
        (-9, C.KILLED, ("SIGKILL", "out-of-memory killer", "dmesg")),
        (-15, C.KILLED, ("SIGTERM", "outside")),
        (-2, C.KILLED, ("SIGINT",)),
        (-4, C.NATIVE_CRASH, ("SIGILL", "--dtype float32")),
        (-6, C.NATIVE_CRASH, ("SIGABRT",)),
        (-7, C.NATIVE_CRASH, ("SIGBUS", "/dev/shm")),
        (-11, C.NATIVE_CRASH, ("SIGSEGV",)),
        (-64, C.KILLED, ("SIGRTMAX",)),
        (-99, C.KILLED, ("signal 99",)),
        (139, C.NATIVE_CRASH, ("SIGSEGV",)),
        (137, C.KILLED, ("SIGKILL",)),
        (250, C.ERROR, ("exit code 250",)),
        (3, C.ERROR, ("exit code 3",)),
        (None, C.UNKNOWN, ("nobody was watching",)),
    ],
)
def test_exit_codes_without_a_cause_in_the_log(exit_code: int | None, kind: CrashClass, facts: tuple[str, ...]) -> None:
    check(explain(exit_code, b""), kind, facts)
    check(explain(exit_code, sample("eager_start")), kind, facts)


def test_an_end_without_a_log_is_told_from_one_without_an_error() -> None:
    assert "wrote nothing" in explain(3, b"\r\n").message
    assert "shows no error" in explain(3, b"hello").message


def test_an_unseen_exit_is_explained_by_its_log_where_that_can() -> None:
    check(explain(None, sample("gated")), C.GATED_MODEL, ("acme/gated-model",))
    check(explain(None, sample("unknown_flag")), C.BAD_OPTION, ("--no-such-flag",))
    check(explain(None, sample("request_crashed_core")), C.ERROR, ("head_dim=16",))
    request = b'Traceback (most recent call last):\n  File "/x.py", line 1, in f\nValueError: one bad request\n'
    check(explain(None, sample("eager_start") + request), C.UNKNOWN, ("its log does not say why",))


def test_a_signal_after_the_engines_own_failure_does_not_hide_it() -> None:
    check(explain(-9, sample("cpu_kv_too_large")), C.OUT_OF_MEMORY, ("10240.0 GiB",))


def test_a_kill_is_not_blamed_on_the_kernel_where_it_killed_nothing() -> None:
    check(explain(-9, b"", oom_kills=0), C.KILLED, ("SIGKILL", "by somebody", "has killed nothing"))
    check(explain(-9, b"", oom_kills=1), C.KILLED, ("SIGKILL", "most likely by the kernel"))
    check(explain(-9, b""), C.KILLED, ("SIGKILL", "most likely by the kernel"))
    assert classify(0, sample("stopped"), oom_kills=0) is None


@pytest.mark.parametrize(
    ("lines", "kind", "facts"),
    [
        (b"Fatal Python error: Illegal instruction\n", C.NATIVE_CRASH, ("SIGILL", "--dtype float32")),
        (b"!!!!!!! Segfault encountered !!!!!!!\n", C.NATIVE_CRASH, ("SIGSEGV",)),
        (b"terminate called after throwing an instance of 'std::bad_alloc'\n", C.OUT_OF_MEMORY, ("the host",)),
    ],
)
def test_what_native_code_leaves_behind(lines: bytes, kind: CrashClass, facts: tuple[str, ...]) -> None:
    check(explain(1, lines), kind, facts)
    check(explain(1, lines + sample("core_killed_starting")), kind, facts)


def test_a_child_crash_in_native_code_is_told_from_a_kill() -> None:
    log = sample("worker_killed").replace(b"(exit code: -9)", b"(exit code: -11)")
    check(explain(0, log), C.NATIVE_CRASH, ("VllmWorker-0", "SIGSEGV"))
    started = sample("core_killed_starting").replace(b"proc(s): {}", b"proc(s): {'EngineCore': -4}")
    check(explain(1, started), C.NATIVE_CRASH, ("EngineCore", "SIGILL"))


def test_uvicorn_and_torch_name_their_own_ports() -> None:
    log = b"ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8123): address already in use\n"
    check(explain(1, log, port=9), C.PORT_IN_USE, ("port 8123",))
    store = "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address."
    store += " port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
    check(explain(1, worker_failing_with(store)), C.PORT_IN_USE, ("inside itself", "start the instance again"))


def test_options_of_the_configuration_are_told_from_other_values() -> None:
    place = '  File "/opt/venv/vllm/{}", line 7, in check\n    raise ValueError(\n'
    log = "Traceback (most recent call last):\n" + place + "ValueError: these two do not go together\n"
    check(explain(1, log.format("engine/arg_utils.py").encode()), C.BAD_OPTION, ("these two do not go together",))
    check(explain(1, log.format("model_executor/x.py").encode()), C.ERROR, ("ValueError: these two do not",))


def test_a_terminated_start_is_told_as_one() -> None:
    log = b'Traceback (most recent call last):\n  File "/x.py", line 1, in f\nKeyboardInterrupt: terminated\n'
    check(explain(1, log), C.KILLED, ("SIGTERM",))


# -- secrets ---------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "Ab3" * 11
KEY = "s3cr3tKeyOfTheHouse"
BEARERS = [
    TOKEN,
    f"--api-key {KEY}",
    f"--api-key={KEY}",
    f"--api-key first {KEY} --port 8000",
    f"--api_key {KEY}",
    f"['--model', 'm', '--api-key', '{KEY}', '--port', '1']",
    f"--hf-token {KEY}",
    f"--hf-token='{KEY}'",
    f"{{'api_key': ['{KEY}'], 'port': 1}}",
    f'{{"hf_token": "{KEY}"}}',
    f"api_key='{KEY}', port=1",
    f"api_key=['a', '{KEY}'",
    f"HF_TOKEN={KEY}",
    f"VLLM_API_KEY={KEY} python",
    f"Authorization: Bearer {KEY}",
    f"https://user:{KEY}@proxy.example/",
]


@pytest.mark.parametrize("text", BEARERS)
def test_secrets_are_never_quoted(text: str) -> None:
    for log in (
        f'Traceback (most recent call last):\n  File "/x.py", line 1, in f\nRuntimeError: cannot use {text}\n',
        f"(APIServer pid=1) ERROR 11-20 23:10:33 [a.py:1] cannot use {text}\n",
        f"api_server.py: error: argument --foo: cannot use {text}\n",
    ):
        for exit_code in (1, 2):
            message = explain(exit_code, log.encode()).message
            assert KEY not in message and TOKEN not in message


@pytest.mark.parametrize("length", [*range(150, 210), *range(260, 300)])
def test_a_cut_does_not_leave_half_a_token(length: int) -> None:
    log = f'Traceback (most recent call last):\n  File "/x.py", line 1, in f\nE: {"x" * length} {TOKEN}\n'
    assert TOKEN[:6] not in explain(1, log.encode()).message


def test_a_refused_secret_and_stray_words_are_not_shown() -> None:
    check(explain(2, f"vllm serve: error: argument --api-key: {KEY}?\n".encode()), C.BAD_OPTION, ("--api-key",))
    assert KEY not in explain(2, f"vllm serve: error: argument --api-key: {KEY}?\n".encode()).message
    failure = explain(2, f"vllm serve: error: unrecognized arguments: --api-kee {KEY} --x={KEY}\n".encode())
    check(failure, C.BAD_OPTION, ("--api-kee, --x",))
    assert KEY not in failure.message


def test_ordinary_options_are_not_taken_for_secrets() -> None:
    text = "--max-num-batched-tokens 2048 --tokenizer x --ssl-keyfile k skip_tokenizer_init=False hf_overrides={}"
    assert redact(text) == text


# -- any bytes -------------------------------------------------------------------------------------------------------

PIECES = [line for name in NAMES for line in sample(name).splitlines(keepends=True)]
logs = st.lists(
    st.one_of(st.sampled_from(PIECES), st.binary(max_size=80), st.sampled_from([b"\r", b"\n", b"Traceback (most"])),
    max_size=60,
).map(b"".join)
exit_codes = st.one_of(st.none(), st.integers(-70, 260))


@given(exit_codes, logs, st.none() | st.text(max_size=400), st.none() | st.integers(0, 2))
@example(1, b"Traceback (most recent call last):\n" * 3, None, 0)
def test_it_never_raises_and_always_answers(
    code: int | None, log: bytes, model: str | None, oom_kills: int | None
) -> None:
    failure = classify(code, log, model=model, port=8000, oom_kills=oom_kills)
    if failure is None:
        assert code == 0
    else:
        assert 0 < len(failure.message) <= SENTENCE_LIMIT
        assert failure.message.isprintable()


@given(exit_codes, logs, logs, st.sampled_from(BEARERS), st.sampled_from(["", "X: ", "RuntimeError: ", "a", "\x00"]))
def test_no_bytes_around_a_secret_bring_it_out(
    code: int | None, before: bytes, after: bytes, text: str, lead: str
) -> None:
    traceback = b'Traceback (most recent call last):\n  File "/x.py", line 1, in f\n'
    log = before + b"\n" + traceback + f"{lead}{text}\n".encode() + after
    failure = classify(code, log)
    assert failure is None or (KEY not in failure.message and TOKEN not in failure.message)


@pytest.mark.parametrize(
    "unit",
    [
        *(b"a", b" ", b"(", b"'", b"\n", b"--a", b"://", b"hf_", b"[", b"1.", b"ERROR: ", b"(a pid=1) ", b"api_key='"),
        b"--api-key - ",
        b"CUDA out of memory. Tried to allocate 1 ",
        b"Traceback (most recent call last):\n",
        b'Traceback (most recent call last):\n  File "x", line 1\nE\nDuring handling of the above exception\n',
    ],
)
def test_no_text_takes_long(unit: bytes) -> None:
    """A pattern that goes back over its text takes minutes for one of these, and the test's deadline fails it."""
    log = unit * (65000 // len(unit))
    framed = b'Traceback (most recent call last):\n  File "/x.py", line 1, in f\nE: ' + log
    for tail in (log, framed, b"(Worker pid=1) ERROR 11-20 23:10:33 [a.py:1] " + log):
        for code in (1, 2):
            assert classify(code, tail) is not None


def test_only_the_last_64_kib_count() -> None:
    log = sample("gated") + b'INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK\n' * 2000
    check(explain(1, log), C.ERROR, ("exit code 1",))
    check(explain(1, b"x" * 5_000_000 + b"\n" + sample("gated")), C.GATED_MODEL, ())


def test_every_known_cause_has_advice_and_fits() -> None:
    known = {"model": "m" * 100, "port": "port 65535"}
    for cause in CAUSES:
        names = cause.pattern.groupindex
        sentence = cause.sentence.format_map({**known, **{name: "x" * 20 for name in names}})
        assert len(sentence) <= SENTENCE_LIMIT, sentence
        assert ";" in sentence and not sentence.endswith("."), sentence
