"""How things are put to people: times, phases, names, a ready-made request. No I/O."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bullpen.client import Instance, Readiness, ZygoteState

PHASES: Mapping[str, str] = {
    "start": "process",
    "kv_cache": "KV cache",
    "graph_capture": "graph capture",
    "warmup": "warm-up",
}
"""What phases are called where that is not their own name."""
COLOURS: Mapping[str, str] = {
    "ready": "green",
    "failed": "red",
    "starting": "cyan",
    "stopping": "yellow",
    "sleeping": "blue",
}
"""The states that have a colour."""
LONGEST_NAME = 60
ELLIPSIS = "…"


def duration(seconds: float) -> str:
    """A time span, as exact as it is short: ``25 ms``, ``0.41 s``, ``12.3 s``, ``2 min 5 s``, ``3 h 10 min``."""
    if seconds < 0.0995:
        return f"{1000 * max(0.0, seconds):.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def age(seconds: float) -> str:
    """A time span in a word: ``12s``, ``3m``, ``5h``, ``4d``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def state(instance: Instance) -> str:
    """The state, and of a sleep its kind: ``ready``, ``sleeping 1``, ``sleeping (emulated)``."""
    if instance.state != "sleeping":
        return instance.state
    if instance.sleep_emulated:
        return "sleeping (emulated)"
    return f"sleeping {instance.sleep_level or ''}".rstrip()


def has_become(instance: Instance) -> str:
    """The state as a verb: ``is ready``, ``sleeps at level 1``, ``sleeps (emulated)``."""
    if instance.state != "sleeping":
        return f"is {instance.state}"
    if instance.sleep_emulated:
        return "sleeps (emulated)"
    return f"sleeps at level {instance.sleep_level}" if instance.sleep_level else "sleeps"


def level(depth: str) -> str:
    """What a depth of sleep is called: ``level 1`` for ``level_1``."""
    return depth.replace("_", " ")


def doing(instance: Instance) -> str:
    """What is being done with an instance, or what it waits for; empty where nothing is."""
    activity = instance.activity
    if activity is None:
        return ""
    return f"waits {activity.waits_for}" if activity.waits_for else activity.stage


def so_far(seconds: float) -> str:
    """How long something has lasted, in whole seconds: it still goes on."""
    return f"{max(0.0, seconds):.0f} s" if seconds < 59.5 else duration(seconds)


def mib(amount: float) -> str:
    """An amount of memory: ``512 MiB``, ``79.3 GiB``."""
    return f"{amount:.0f} MiB" if amount < 1024 else f"{amount / 1024:.1f} GiB"


def time_left(seconds: float | None) -> str:
    """How long something should still take; empty where that is not known, or it should be over already."""
    if seconds is None or seconds <= 0:
        return ""
    return f"about {max(1, round(seconds))} s left" if seconds < 60 else f"about {duration(seconds)} left"


def phase(name: str) -> str:
    """What a phase is called."""
    return PHASES.get(name, name)


def phase_durations(begun: Mapping[str, float], until: float) -> list[tuple[str, float]]:
    """Each phase with its length in seconds, from when each began; the last one has lasted ``until`` now."""
    steps = sorted(begun.items(), key=lambda step: step[1])
    ends = [*(at for _, at in steps), until][1:]
    return [(phase(name), max(0.0, end - at)) for (name, at), end in zip(steps, ends, strict=True) if name != "ready"]


def shorten(text: str, width: int) -> str:
    """A text at most so wide; of a path or a model's name the end says most, so the beginning goes."""
    return text if len(text) <= width else ELLIPSIS + text[len(text) - max(0, width - 1) :]


def name_for(model: str, taken: Collection[str]) -> str:
    """An id for an instance of a model that nobody has: ``opt-125m``, ``opt-125m-2``."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("._-")[:LONGEST_NAME]
    base = base or "model"
    if base not in taken and base != "watch":
        return base
    return next(name for number in count(2) if (name := f"{base}-{number}") not in taken)


def how_made(start: str | None) -> str:
    """How an instance's process was made."""
    return {"spare": "from a spare", "fork": "forked warm", "spawn": "in a fresh interpreter"}.get(start or "", "")


def warming(zygote: ZygoteState) -> str:
    """What an engine is doing that cannot fork yet."""
    if zygote.state == "broken":
        return f"engine {zygote.engine} cannot be used: {zygote.error}"
    module = f"at {zygote.module}, {zygote.done} of {zygote.total}" if zygote.module else "this takes a while"
    return f"engine {zygote.engine} is being imported: {module}"


def launching(readiness: Readiness) -> list[str]:
    """What creates have to wait for, and how many do; nothing where they need not."""
    lines = [
        warming(zygote)
        for zygote in readiness.zygotes
        if zygote.state != "warm" and (zygote.engine == readiness.engine or zygote.state == "warming")
    ]
    if readiness.waiting:
        one = readiness.waiting == 1
        lines.append(f"{readiness.waiting} {'create waits' if one else 'creates wait'} to be started")
    return lines


def curl(instance: Instance) -> str:
    """A command that asks an instance for a completion, in two lines."""
    name = next(iter(instance.served_model_names), instance.model or "")
    body = json.dumps({"model": name, "prompt": "Hello", "max_tokens": 16}, ensure_ascii=False)
    url, socket = instance.url or "", ""
    if "+unix://" in url:
        scheme, _, path = url.partition("+unix://")
        url, socket = f"{scheme}://localhost", f"--unix-socket {shlex.quote(path)} "
    insecure = "-k " if url.startswith("https:") else ""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if "--api-key" in instance.options else ""
    return (
        f"curl {insecure}{socket}{shlex.quote(url + '/v1/completions')} -H 'Content-Type: application/json'{key} \\\n"
        f"  -d {shlex.quote(body)}"
    )
