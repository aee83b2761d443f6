"""What is remembered of a model on this machine: how much memory it takes, how long it takes, which sleep works."""

from __future__ import annotations

from dataclasses import dataclass, field

from bullpen.core.instance import Depth, Instance, Memory


@dataclass(frozen=True)
class Verdict:
    """Whether a depth of sleep works for a model, by the last time that it was tried."""

    works: bool
    why: str
    at: float


@dataclass
class Profile:
    """What is remembered under one key.

    Attributes:
        memory: by depth, as measured the last time.
        phases: when each phase of the last start began, in seconds after its beginning; ``ready`` is its end.
        verdicts: by depth.
    """

    memory: dict[int, Memory] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def works(self, depth: Depth) -> bool:
        """Whether nothing speaks against a depth of sleep."""
        verdict = self.verdicts.get(int(depth))
        return verdict is None or verdict.works

    def expected_ready_in(self, phase: str | None, elapsed: float, in_phase: float) -> float | None:
        """Seconds until a start is ready, going by the last one; None where there was none.

        Args:
            phase: what it is doing.
            elapsed: seconds since it began.
            in_phase: seconds since the phase began.
        """
        total = self.phases.get("ready")
        if total is None:
            return None
        if phase not in self.phases:
            return max(0.0, total - elapsed)
        later = [at for at in self.phases.values() if at > self.phases[phase]]
        length = min(later, default=total) - self.phases[phase]
        return total - self.phases[phase] - min(in_phase, length)


def profile_key(instance: Instance, gpu_name: str | None) -> str:
    """What memory and times depend on: what sleep depends on, how many accelerators, what share, how large a KV cache.

    Two instances of one key are taken to behave alike.
    """
    served = instance.served
    share = instance.config.gpu_share or (served.utilization if served else None)
    cache = served.kv_mib if served else None
    parts = (
        str(len(instance.gpus)),
        "" if share is None else f"{share:g}",
        "" if cache is None else str(cache),
    )
    return "|".join((conduct_key(instance, gpu_name), *parts))


def conduct_key(instance: Instance, gpu_name: str | None) -> str:
    """What it depends on whether sleep works: engine, its version, model, accelerator."""
    served = instance.served
    parts = (
        instance.config.engine,
        served.version if served else "",
        served.model if served else "",
        gpu_name or "cpu",
    )
    return "|".join(part.replace("|", "_") for part in parts)
