"""The phases of a start, told apart by the lines that vLLM writes to its log while it goes through them.

The order is vLLM's own, 0.30 to 0.32, on GPUs and on the CPU: the model is compiled while its memory use is measured,
so before the KV cache is made; CUDA graphs are captured after; the API server speaks of chat templates and addresses
last. A start shows only some of the phases, and the reader never goes back to an earlier one: what such a line would
say belongs to the phase that is under way.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from bullpen.engines import logline


class Phase(StrEnum):
    """What a starting server is doing, in the order in which it happens.

    `download` is begun by a model that is named and not a folder: vLLM silences the Hub's progress bars while it
    looks for the files and fetches those that are missing. `graph_capture` is that of CUDA graphs, `tokenizer` is all
    that the API server does before it has an address. `ready` is what the log says; the server's own health check
    decides.
    """

    CONFIGURATION = "configuration"
    DOWNLOAD = "download"
    WEIGHTS = "weights"
    COMPILATION = "compilation"
    KV_CACHE = "kv_cache"
    WARMUP = "warmup"
    GRAPH_CAPTURE = "graph_capture"
    TOKENIZER = "tokenizer"
    BIND = "bind"
    READY = "ready"


_ORDER = {phase: place for place, phase in enumerate(Phase)}

# Where each phase begins on a scale from 0 to 1. Shares of a usual start of a large model, not a promise of time:
# a start that skips a phase jumps over its share.
_BEGINS = {
    Phase.CONFIGURATION: 0.0,
    Phase.DOWNLOAD: 0.08,
    Phase.WEIGHTS: 0.3,
    Phase.COMPILATION: 0.6,
    Phase.KV_CACHE: 0.75,
    Phase.WARMUP: 0.8,
    Phase.GRAPH_CAPTURE: 0.85,
    Phase.TOKENIZER: 0.95,
    Phase.BIND: 0.97,
    Phase.READY: 1.0,
}


@dataclass(frozen=True, slots=True)
class PhaseSeen:
    """The log has come to a phase, or further in it; `fraction` is 0 to 1, None where the engine does not say."""

    phase: Phase
    fraction: float | None


def overall(phase: Phase, fraction: float | None) -> float:
    """How far a start has come, 0 to 1. It never falls from one phase to the next, nor as a phase's fraction grows."""
    begin = _BEGINS[phase]
    if phase is Phase.READY:
        return begin
    later = list(Phase)[_ORDER[phase] + 1]
    return begin + (_BEGINS[later] - begin) * min(1.0, max(0.0, fraction or 0.0))


class PhaseReader:
    """Reads the log of one start, in pieces of any size. Not thread-safe; never raises on any bytes."""

    # All that is looked for stands at the beginning of a line, so of a longer one only this much is kept.
    LINE_LIMIT = 4096

    def __init__(self) -> None:
        self._partial = b""
        self._seen: PhaseSeen | None = None
        self._model_is_named = False
        self._cache_made = False

    @property
    def phase(self) -> Phase | None:
        """The phase that is under way; None before the engine's first line."""
        return self._seen.phase if self._seen else None

    @property
    def progress(self) -> float:
        """How far the start has come, 0 to 1; it never falls."""
        return overall(self._seen.phase, self._seen.fraction) if self._seen else 0.0

    def feed(self, data: bytes) -> list[PhaseSeen]:
        """Take the next bytes of the log; return each step that they show, oldest first.

        A line counts once its line break has come (for a progress bar: the carriage return of its next state), so
        the pieces in which the log arrives change nothing. After `ready` nothing is read any more.
        """
        if self.phase is Phase.READY:
            return []
        *lines, rest = data.replace(b"\r", b"\n").split(b"\n")
        seen = []
        for line in lines:
            line, self._partial = (self._partial + line)[: self.LINE_LIMIT], b""
            if line and (step := self._step(logline.plain(line))):
                seen.append(step)
        self._partial = (self._partial + rest)[: self.LINE_LIMIT]
        return seen

    def _step(self, line: str) -> PhaseSeen | None:
        read = logline.parse(line)
        found = self._find(read.text)
        if found is None and self._seen is None and read.place:
            found = PhaseSeen(Phase.CONFIGURATION, None)  # any line of vLLM's logger: it is imported and running
        if found is None or not self._is_further(found):
            return None
        self._seen = found
        return found

    def _find(self, text: str) -> PhaseSeen | None:
        if bar := _WEIGHTS_BAR.match(text):
            return PhaseSeen(Phase.WEIGHTS, min(int(bar["percent"]), 100) / 100)
        if bar := _DOWNLOAD_BAR.match(text):
            percent = bar["percent"]
            return PhaseSeen(Phase.DOWNLOAD, min(int(percent), 100) / 100 if percent else None)
        for pattern, act in _LINES:
            if match := pattern.match(text):
                return act(self, match)
        return None

    def _is_further(self, found: PhaseSeen) -> bool:
        now = self._seen
        if now is None or _ORDER[found.phase] != _ORDER[now.phase]:
            return now is None or _ORDER[found.phase] > _ORDER[now.phase]
        return found.fraction is not None and (now.fraction is None or found.fraction > now.fraction)

    def _engine(self, match: re.Match[str]) -> PhaseSeen:
        self._model_is_named = _is_named(match["model"])
        return PhaseSeen(Phase.CONFIGURATION, None)

    def _loading(self, match: re.Match[str]) -> PhaseSeen:
        if model := match["model"]:
            self._model_is_named = _is_named(model)
        return PhaseSeen(Phase.DOWNLOAD if self._model_is_named else Phase.WEIGHTS, None)

    def _cache_size(self, match: re.Match[str]) -> PhaseSeen:
        self._cache_made = True
        return PhaseSeen(Phase.KV_CACHE, None)

    def _capture(self, match: re.Match[str]) -> PhaseSeen:
        # Some graphs are captured twice, first to learn how much memory they will leave to the KV cache.
        return PhaseSeen(Phase.GRAPH_CAPTURE if self._cache_made else Phase.KV_CACHE, None)


def _is_named(model: str) -> bool:
    """Whether a model is an `organisation/name` of the Hub, as far as can be told without looking at the disk."""
    return not model.startswith(("/", "./", "../", "~")) and "://" not in model


def _says(phase: Phase, fraction: float | None = None) -> Callable[[PhaseReader, re.Match[str]], PhaseSeen]:
    seen = PhaseSeen(phase, fraction)
    return lambda reader, match: seen


# "Loading safetensors checkpoint shards:  40% Completed | 2/5 [00:01<00:02, 1.5it/s]"
_WEIGHTS_BAR = re.compile(
    r"(?:Loading (?:safetensors|pt|np_cache) |Multi-thread loading )[^:%|]{1,80}: +(?P<percent>\d{1,3})%"
)
# "Fetching 5 files:  40%|####" counts whole files; a bar of one file says nothing about the others.
_DOWNLOAD_BAR = re.compile(
    r"(?:Fetching \d+ files: +(?P<percent>\d{1,3})%|Downloading bytes: |Reconstructing \("
    r"|[^\s:|]{1,200}\.(?:safetensors|bin|pt|pth|gguf): )"
)

_TAG = r"(?:\[\w{1,40}\] )?"  # which part of a model is compiled
_LINES: tuple[tuple[re.Pattern[str], Callable[[PhaseReader, re.Match[str]], PhaseSeen]], ...] = tuple(
    (re.compile(pattern), act)
    for pattern, act in (
        (r"Initializing a V1 LLM engine .{0,200}?with config: model='(?P<model>[^']{0,1000})'", PhaseReader._engine),
        (r"Starting to load model (?P<model>.{1,1000}?)\.\.\.$", PhaseReader._loading),
        (r"Loading model from scratch(?P<model>)\.\.\.", PhaseReader._loading),
        (r"Time spent downloading weights for ", _says(Phase.DOWNLOAD, 1.0)),
        (r"Filesystem type for checkpoints: ", _says(Phase.WEIGHTS)),
        (r"Loading weights with ", _says(Phase.WEIGHTS)),
        (r"(?:Loading weights|Model loading) took ", _says(Phase.WEIGHTS, 1.0)),
        (r"Warming up model for the compilation", _says(Phase.COMPILATION)),
        (
            rf"{_TAG}(?:Starting torch\.compile|Using cache directory: |Dynamo bytecode transform time: "
            r"|Directly load (?:AOT compilation|the compiled graph)|Compiling a graph for compile range "
            r"|Cache the graph of compile range |saved AOT compiled function |vLLM's torch\.compile cache is disabled"
            r"|torch\.compile took |Initial profiling/warmup run took )",
            _says(Phase.COMPILATION),
        ),
        (r"Warming up done\.", _says(Phase.COMPILATION, 1.0)),
        (r"Profiling CUDA graph memory: |Available KV cache memory: ", _says(Phase.KV_CACHE)),
        (r"(?:Explicitly|Auto) set \([^)]{1,80}\) GiB for KV cache ", _says(Phase.KV_CACHE)),
        (r"Initial free memory [\d.]{1,20} GiB, reserved [\d.]{1,20} GiB memory for KV Cache", _says(Phase.KV_CACHE)),
        (r"[A-Z][\w +]{0,40} KV cache size: ", PhaseReader._cache_size),
        (r"Capturing |Graph capturing finished ", PhaseReader._capture),
        (r"Compile and warming up model for size |JIT kernel warmup ", _says(Phase.WARMUP)),
        (r"(?:Skipping|Running) FlashInfer autotun", _says(Phase.WARMUP)),
        (r"init engine \(profile, create kv cache, warmup model\) took ", _says(Phase.WARMUP, 1.0)),
        (r"Supported tasks: |Detected the chat template content format", _says(Phase.TOKENIZER)),
        (r"Starting vLLM server on |Available routes are:", _says(Phase.BIND)),
        (r"Started server process |Waiting for application startup\.", _says(Phase.BIND)),
        (r"Application startup complete\.", _says(Phase.READY, 1.0)),
    )
)
