"""The numbers that `/metrics` shows, under vLLM's names, in Prometheus' text format."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
_BUCKETS = (0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_Labels = tuple[tuple[str, str], ...]


class _Histogram:
    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.counts = [0] * len(_BUCKETS)

    def observe(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.counts = [count + (value <= limit) for count, limit in zip(self.counts, _BUCKETS, strict=True)]


class Metrics:
    """Counts requests, tokens and sleep operations of one server."""

    def __init__(self, model_name: str) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._finished = dict.fromkeys(_FINISH_REASONS, 0)
        self._durations: dict[str, _Histogram] = {}
        self._in_flight: dict[str, int] = {}
        self._engine: _Labels = (("engine", "0"), ("model_name", model_name))

    def finished(self, reason: str) -> None:
        """Count a request that ended for this reason (`length`, `stop`, `abort`, `error`)."""
        self._finished[reason] += 1

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Measure a sleep-mode operation (`sleep` or `wake`)."""
        self._in_flight[name] = self._in_flight.get(name, 0) + 1
        began = perf_counter()
        try:
            yield
        finally:
            self._in_flight[name] -= 1
            self._durations.setdefault(name, _Histogram()).observe(perf_counter() - began)

    def render(self, *, running: int, waiting: int, sleep_level: int | None) -> str:
        """The page; `sleep_level` is None while the engine is awake."""
        state = {"awake": sleep_level is None, "weights_offloaded": sleep_level == 1, "discard_all": sleep_level == 2}
        return "".join(
            (
                self._one("num_requests_running", "Number of requests in model execution batches.", running),
                self._one("num_requests_waiting", "Number of requests waiting to be processed.", waiting),
                self._each(
                    "engine_sleep_state",
                    "gauge",
                    "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
                    "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
                    (((*self._engine, ("sleep_state", name)), float(is_on)) for name, is_on in state.items()),
                ),
                self._one("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", 0),
                self._one("prompt_tokens_total", "Number of prefill tokens processed.", self.prompt_tokens),
                self._one("generation_tokens_total", "Number of generation tokens processed.", self.generation_tokens),
                self._each(
                    "request_success_total",
                    "counter",
                    "Count of successfully processed requests.",
                    (
                        ((("engine", "0"), ("finished_reason", reason), self._engine[1]), count)
                        for reason, count in self._finished.items()
                    ),
                ),
                self._operations(),
            )
        )

    def _operations(self) -> str:
        duration = "sleep_mode_operation_duration_seconds"
        text = _heading(duration, "histogram", "Duration of one sleep-mode operation.")
        for name, histogram in self._durations.items():
            operation = ("operation", name)
            for limit, count in zip(_BUCKETS, histogram.counts, strict=True):
                text += _sample(f"{duration}_bucket", (("le", str(limit)), operation), count)
            text += _sample(f"{duration}_bucket", (("le", "+Inf"), operation), histogram.count)
            text += _sample(f"{duration}_count", (operation,), histogram.count)
            text += _sample(f"{duration}_sum", (operation,), histogram.total)
        return text + self._each(
            "sleep_mode_operations_in_flight",
            "gauge",
            "Sleep-mode operations currently awaited.",
            (((("operation", name),), count) for name, count in self._in_flight.items()),
        )

    def _one(self, name: str, description: str, value: float) -> str:
        kind = "counter" if name.endswith("_total") else "gauge"
        return self._each(name, kind, description, [(self._engine, value)])

    @staticmethod
    def _each(name: str, kind: str, description: str, samples: Iterable[tuple[_Labels, float]]) -> str:
        return _heading(name, kind, description) + "".join(_sample(name, labels, value) for labels, value in samples)


def _heading(name: str, kind: str, description: str) -> str:
    return f"# HELP vllm:{name} {description}\n# TYPE vllm:{name} {kind}\n"


def _sample(name: str, labels: _Labels, value: float) -> str:
    text = ",".join(f'{label}="{_escape(content)}"' for label, content in labels)
    return f"vllm:{name}{{{text}}} {float(value)}\n"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
