"""Known failures of vLLM and of what it stands on: the text that gives each away, and what to tell the user.

A table in order: the first row whose pattern is found wins, so the one with more to say stands before the general one.
A sentence is filled from the pattern's named groups; `{model}` and `{port}` are known to every row. A group called
`bytes` comes out in GiB, one called `cuda` as 12.2 for a driver's 12020. The texts are those of vLLM 0.30 to 0.32,
torch, transformers and huggingface_hub.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class CrashClass(StrEnum):
    """Why an instance ended, as a word for programs."""

    OUT_OF_MEMORY = "out_of_memory"
    """The accelerator's memory or the host's did not suffice; the sentence says which."""
    PORT_IN_USE = "port_in_use"
    BAD_OPTION = "bad_option"
    """The engine refuses an option, or two together, or one with this model or machine."""
    MISSING_MODEL = "missing_model"
    """There is no such model, or its files are incomplete, damaged or out of reach."""
    UNSUPPORTED_MODEL = "unsupported_model"
    """The model is there, and this engine or this accelerator cannot run it."""
    GATED_MODEL = "gated_model"
    DRIVER = "driver"
    """The accelerator or its driver is absent, broken or does not fit the engine's build."""
    KILLED = "killed"
    """The server process was ended by a signal from outside."""
    NATIVE_CRASH = "native_crash"
    """A process of the engine crashed in native code."""
    ENGINE_DIED = "engine_died"
    """A process behind the server ended without saying why, and the server with it."""
    START_TIMEOUT = "start_timeout"
    STUCK = "stuck"
    """Processes outlive SIGKILL."""
    UNKNOWN = "unknown"
    """Nobody saw the end."""
    ERROR = "error"
    """Anything else; the sentence quotes the engine."""


@dataclass(frozen=True)
class Cause:
    """A row of the table."""

    kind: CrashClass
    pattern: re.Pattern[str]
    sentence: str


_FIELD_LIMIT = 100


def find(text: str, known: Mapping[str, str]) -> tuple[CrashClass, str] | None:
    """The first row found in a text, and its sentence; `known` gives `model` and `port`. None where no row fits."""
    for cause in CAUSES:
        if match := cause.pattern.search(text):
            found = {name: value for name, value in match.groupdict().items() if value}
            fields = {name: _shown(name, value) for name, value in {**known, **found}.items()}
            return cause.kind, cause.sentence.format_map(fields)
    return None


def _shown(name: str, value: str) -> str:
    if name == "bytes":
        return f"{int(value) / 2**30:.2f} GiB"
    if name == "cuda":
        return f"{int(value) // 1000}.{int(value) % 1000 // 10}"
    value = " ".join(value.split())
    return value if len(value) <= _FIELD_LIMIT else value[: _FIELD_LIMIT - 1] + "…"


def _rows(kind: CrashClass, *rows: tuple[str, str]) -> list[Cause]:
    return [Cause(kind, re.compile(pattern), sentence) for pattern, sentence in rows]


_GIB = r"[\d.]{1,20}"
_SIZE = r"[\d.]{1,20} \w{1,5}"
_TOO_LONG = (
    rf"max seq len \((?P<length>\d{{1,12}})\), \((?P<wanted>{_GIB}) GiB KV cache is needed, which is larger than the"
    rf" available KV cache memory \((?P<free>{_GIB}) GiB\)"
)
_ON_NODE = rf"Available memory on node (?P<node>\d{{1,4}}) \((?P<free>{_GIB})/(?P<total>{_GIB}) GiB\)"

_MEMORY = _rows(
    CrashClass.OUT_OF_MEMORY,
    (
        r"out of memory occurred when warming up (?P<what>\w{1,20}) with (?P<requests>\d{1,9}) dummy requests",
        "the accelerator ran out of memory while the {what} warmed up with {requests} requests;"
        " lower --max-num-seqs or --gpu-memory-utilization",
    ),
    (
        rf"(?:CUDA|HIP|XPU) out of memory\. Tried to allocate (?P<wanted>{_SIZE})\. GPU (?P<gpu>\d{{1,3}}) has a total"
        rf" capacity of (?P<total>{_SIZE}) of which (?P<free>{_SIZE}) is free",
        "GPU {gpu} ran out of memory: {wanted} more were wanted and {free} of {total} were free; put other models on it"
        " to sleep, lower --gpu-memory-utilization or --max-model-len, or use more GPUs (--tensor-parallel-size)",
    ),
    (
        r"(?:CUDA|HIP|XPU) out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
        r"|CUBLAS_STATUS_ALLOC_FAILED|not enough GPU memory",
        "the accelerator ran out of memory; put other models on it to sleep, lower --gpu-memory-utilization or"
        " --max-model-len, or use more GPUs (--tensor-parallel-size)",
    ),
    (
        rf"Free memory on device (?P<device>[\w:]{{1,20}}) \((?P<free>{_GIB})/(?P<total>{_GIB}) GiB\) on startup is"
        rf" less than desired GPU memory utilization \((?P<share>{_GIB}), (?P<wanted>{_GIB}) GiB\)",
        "{device} has {free} of {total} GiB free and --gpu-memory-utilization {share} asks for {wanted} GiB; put other"
        " models on it to sleep, end what else uses it, or lower --gpu-memory-utilization",
    ),
    (
        r"No available memory for the cache blocks",
        "no memory is left for the KV cache; raise --gpu-memory-utilization (or --kv-cache-memory-bytes"
        " where it is set), or use more GPUs (--tensor-parallel-size)",
    ),
    (
        _TOO_LONG + r"\. Based on the available memory, the estimated maximum model length is (?P<fits>\d{1,12})",
        "the KV cache of one request of {length} tokens takes {wanted} GiB and {free} GiB are left for it; set"
        " --max-model-len {fits} or less, or raise --gpu-memory-utilization",
    ),
    (
        _TOO_LONG,
        "the KV cache of one request of {length} tokens takes {wanted} GiB and {free} GiB are left for it; lower"
        " --max-model-len or raise --gpu-memory-utilization",
    ),
    (
        rf"{_ON_NODE} on startup is less than desired CPU memory utilization \((?P<share>{_GIB}), (?P<wanted>{_GIB})",
        "the host has {free} of {total} GiB free on memory node {node} and --gpu-memory-utilization {share}, which"
        " counts for the CPU too, asks for {wanted} GiB; lower it or set --kv-cache-memory-bytes",
    ),
    (
        rf"{_ON_NODE} on kv cache allocation is less than requested memory for kv \((?P<wanted>{_GIB})",
        "the host has {free} of {total} GiB free on memory node {node} and the KV cache asks for {wanted} GiB; lower"
        " --kv-cache-memory-bytes or --gpu-memory-utilization",
    ),
    (
        r"can't allocate memory: you tried to allocate (?P<bytes>\d{1,20}) bytes",
        "the host ran out of memory: {bytes} more were wanted; put other models to sleep or stop them, or lower"
        " --kv-cache-memory-bytes",
    ),
    (
        r"Insufficient space in (?P<place>[\w/.-]{1,100}) for [^:]{1,100}: (?P<wanted>\d{1,12}) MiB required,"
        r" (?P<free>\d{1,12}) MiB free",
        "the host's shared memory {place} has {free} MiB free and {wanted} MiB are needed; enlarge it (a container's"
        " --shm-size, or --ipc=host)",
    ),
    (
        r"Unable to allocate (?P<wanted>[\d.]{1,20} \w{1,5}) for an array",
        "the host ran out of memory: {wanted} more were wanted; put other models to sleep or stop them",
    ),
    (
        r"\bMemoryError\b|Cannot allocate memory|std::bad_alloc",
        "the host ran out of memory; put other models to sleep or stop them, or lower --kv-cache-memory-bytes",
    ),
)

_PORT = _rows(
    CrashClass.PORT_IN_USE,
    (
        r"error while attempting to bind on address \('[^']{0,100}', (?P<number>\d{1,5})[^)]{0,40}\): address already",
        "port {number} is in use by another program; choose another --port, or leave it out and get a free one",
    ),
    (
        r"failed to listen on any local network address|port: \d{1,5}, useIpv6",
        "a port that the engine uses inside itself is in use by another program; start the instance again",
    ),
    (
        r"\[Errno 98\]|Address already in use|EADDRINUSE",
        "{port} is in use by another program; choose another --port, or leave it out and get a free one",
    ),
    (
        r"\[Errno 99\]|Cannot assign requested address",
        "the address of --host is none of this machine's, so {port} cannot be opened there; correct or drop --host",
    ),
)

_GATED_ADVICE = (
    "{model} is gated on the Hub; ask for access on its page there, and give the instance a token of an account that"
    " has it (HF_TOKEN)"
)
_GATED = _rows(
    CrashClass.GATED_MODEL,
    (
        r"access a gated repo\.\s{1,3}Make sure to have access to it at https?://[^/\s]{1,100}/"
        r"(?P<model>[\w-]{1,100}/[\w.-]{1,100}?)\.?\s",
        _GATED_ADVICE,
    ),
    (
        r"access a gated repo|Cannot access gated repo|is a gated repository|GatedRepoError"
        r"|is restricted\. You must have access|is restricted and you are not in the authorized list",
        _GATED_ADVICE,
    ),
)

_UNKNOWN_ADVICE = (
    "the Hub knows no model {model}; correct --model, and for a private one give the instance a token (HF_TOKEN)"
)
_MODEL = _rows(
    CrashClass.MISSING_MODEL,
    (
        r"Repo id must (?:be in the form|use alphanumeric)[^\n]{0,200}?: '(?P<model>[^'\n]{1,400})'",
        "there is no model {model}: no such folder, and no name that the Hub could know; correct --model",
    ),
    (
        r"Invalid repository ID or local directory specified: '(?P<model>[^'\n]{1,400})'",
        "{model} holds no model: a folder needs a config.json (or Mistral's params.json), and on the Hub there must be"
        " one of this name; correct --model",
    ),
    (
        r"Cannot find any (?:safetensors )?model weights with `(?P<model>[^`\n]{1,400})`",
        "{model} has no weights that the engine can read; fetch the model again, or set --load-format for the files"
        " that it has",
    ),
    (
        r"outgoing traffic has been disabled|OfflineModeIsEnabled",
        "{model} is not in this machine's cache and downloads are turned off; fetch it first, or start without"
        " HF_HUB_OFFLINE",
    ),
    (
        r"(?<!\S)(?P<revision>\S{1,100}+) is not a valid git identifier",
        "{model} has no revision {revision} on the Hub; correct --revision",
    ),
    (
        r"Revision Not Found for url",
        "{model} has no such revision on the Hub; correct --revision",
    ),
    (
        r"(?<!\S)(?P<model>\S{1,200}+) is not a local folder and is not a valid model identifier",
        _UNKNOWN_ADVICE,
    ),
    (
        r"Repository Not Found for url|RepositoryNotFoundError",
        _UNKNOWN_ADVICE,
    ),
    (
        r"We couldn't connect to '|error happened while trying to locate the file|check your internet connection",
        "{model} is not in this machine's cache and the Hub cannot be reached; fetch the model first, or mend the"
        " network",
    ),
    (
        r"does not appear to have a file named |Entry Not Found for url",
        "{model} is incomplete, a file of it is missing; fetch it again",
    ),
    (
        r"SafetensorError|Error while deserializing header|invalid load key",
        "a weights file of {model} is damaged or half downloaded; fetch the model again",
    ),
    (
        r"Can't load (?P<what>tokenizer|the configuration) (?:for|of) '",
        "{what} of {model} cannot be loaded; check that its files are complete, or name one with --tokenizer or"
        " --hf-config-path",
    ),
)

_UNSUPPORTED = _rows(
    CrashClass.UNSUPPORTED_MODEL,
    (
        r"Model architectures \[(?P<architecture>[^\]]{1,200})\] (?:are not supported for now|failed to be inspected)",
        "the engine does not know the architecture {architecture} of {model}; a newer vLLM may, or another model has to"
        " do",
    ),
    (
        r"Model architecture (?P<architecture>\w{1,100}) is not supported in-tree anymore",
        "the engine needs a plugin for the architecture {architecture} of {model}; its log names it",
    ),
    (
        r"model type `?(?P<architecture>[\w-]{1,100})`? but Transformers does not recognize this architecture",
        "the engine does not know the architecture {architecture} of {model}; a newer transformers or vLLM may",
    ),
    (
        r"quantization method (?P<method>[\w-]{1,60}) is not supported for the current GPU\. Minimum capability:"
        r" (?P<wanted>\d{1,4})\. Current capability: (?P<found>\d{1,4})",
        "this GPU cannot run the quantization {method} of {model}: it has compute capability {found}, and {wanted} is"
        " needed; choose another quantization or GPU",
    ),
    (
        r"Quantization scheme is not supported for the current GPU",
        "this GPU cannot run the quantization of {model}; choose another quantization or GPU",
    ),
)

_OPTION = _rows(
    CrashClass.BAD_OPTION,
    (
        r"max_model_len \((?P<asked>\d{1,12})\) is greater than the derived max_model_len"
        r" \((?:max_position_embeddings|[\w.]{1,60})=(?P<most>\d{1,12})",
        "--max-model-len {asked} is more than the {most} tokens that {model} was made for; lower it (or set"
        " VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if you know that the model can do more)",
    ),
    (
        r"trust_remote_code=True",
        "{model} brings code of its own, which the engine runs only with --trust-remote-code; look at that code before"
        " you allow it",
    ),
    (
        r"Sleep mode is not supported on current platform",
        "--enable-sleep-mode does not work on this machine's accelerator; start without it",
    ),
    (
        r"Cannot find the config file for (?P<method>[\w-]{1,60})",
        "--quantization {method} does not fit {model}, which has no such quantization; start without it",
    ),
    (
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0",
        "this GPU has no bfloat16; start with --dtype half",
    ),
    (
        r"World size \((?P<wanted>\d{1,6})\) is larger than the number of available GPUs \((?P<found>\d{1,6})\)",
        "the options ask for {wanted} GPUs and the instance has {found}; lower --tensor-parallel-size or"
        " --pipeline-parallel-size, or give it more GPUs",
    ),
    (
        r"supplied chat template \((?P<file>[^)\n]{1,400})\) looks like a file path, but it failed to be opened",
        "--chat-template {file} cannot be opened; correct the path",
    ),
)

_DRIVER = _rows(
    CrashClass.DRIVER,
    (
        r"Driver/library version mismatch|NVML/RM version mismatch|NVMLError_LibRmVersionMismatch",
        "the NVIDIA driver in the kernel and its libraries are of different versions; restart the machine, or load the"
        " new kernel module",
    ),
    (
        r"NVIDIA driver on your system is too old \(found version (?P<cuda>\d{1,9})\)",
        "the NVIDIA driver is too old for this build of torch (it offers CUDA {cuda}); update the driver, or install"
        " vLLM for an older CUDA",
    ),
    (
        r"CUDA driver version is insufficient for CUDA runtime version",
        "the NVIDIA driver is too old for this build of vLLM; update the driver, or install vLLM for an older CUDA",
    ),
    (
        r"no kernel image is available for execution on the device|is not compatible with the current PyTorch",
        "this build of vLLM has no code for this GPU's architecture; install a build that has",
    ),
    (
        r"Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device is detected"
        r"|libcuda\.so\.1: cannot open shared object|NVML Shared Library Not Found|Driver Not Loaded",
        "no NVIDIA GPU or driver is there for the engine; check nvidia-smi, the container's GPU access and"
        " CUDA_VISIBLE_DEVICES",
    ),
    (
        r"Failed to infer device type",
        "the engine finds no accelerator that it was built for; check the driver (nvidia-smi), or install the CPU build"
        " of vLLM",
    ),
    (
        r"Error 802: |system not yet initialized",
        "the GPUs are not ready; on machines with NVSwitch, start NVIDIA's fabric manager (nvidia-fabricmanager)",
    ),
    (
        r"Error 80[34]: |unsupported display driver / cuda driver combination|forward compatibility was attempted",
        "the CUDA libraries that the engine finds do not fit the NVIDIA driver; take CUDA's compat folder out of"
        " LD_LIBRARY_PATH or update the driver",
    ),
    (
        r"uncorrectable ECC error|GPU is lost|has fallen off the bus|devices? is/are busy or unavailable"
        r"|\(s\) is/are busy or unavailable",
        "the GPU fails or is held exclusively by another program; look at nvidia-smi and dmesg, and reset the GPU",
    ),
)

_DISK = _rows(
    CrashClass.ERROR,
    (
        r"\[Errno 28\]|No space left on device",
        "a disk is full; make room where models and caches are kept (HF_HOME, VLLM_CACHE_ROOT) and on /dev/shm",
    ),
)

CAUSES: tuple[Cause, ...] = (*_MEMORY, *_PORT, *_GATED, *_MODEL, *_UNSUPPORTED, *_OPTION, *_DRIVER, *_DISK)
