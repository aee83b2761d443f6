"""An instance as the outside sees it: the wire's words, no secrets."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from bullpen.core import redact
from bullpen.core.instance import Config, Depth, Instance, State
from bullpen.core.operation import Operation


def status(instance: Instance) -> str:
    """The wire's coarse word: ``running`` while the server process lives, else ``stopped``."""
    return "running" if instance.running else "stopped"


def public(
    instance: Instance, word: str | None = None, operation: Operation | None = None, now: float | None = None
) -> dict[str, Any]:
    """The instance as JSON data.

    Args:
        instance: which one.
        word: replaces ``status`` where a reply says what was done.
        operation: what is being done with it.
        now: what ``remaining_seconds`` counts from.
    """
    config = instance.config
    document: dict[str, Any] = {
        "status": word or status(instance),
        "instance_id": instance.id,
        "revision": instance.revision,
        "options": redact.options(config.options, config.argv),
    }
    if config.env_vars is not None:
        document["env_vars"] = redact.environment(config.env_vars)
    if config.gpu_uuids is not None:
        document["gpu_uuids"] = list(config.gpu_uuids)
    if config.annotations is not None:
        document["annotations"] = dict(config.annotations)
    document |= wishes(config)
    document |= {
        "engine": config.engine,
        "state": str(instance.state),
        "model": instance.served.model if instance.served else None,
        "served_model_names": list(instance.served.served_model_names) if instance.served else [],
        "url": instance.address.url if instance.address else None,
        "pid": None if instance.state is State.SLEEPING and not instance.running else instance.pid,
        "start": instance.how,
        "created_at": timestamp(instance.created_at),
        "ready_at": timestamp(instance.ready_at),
        "waited_seconds": waited_seconds(instance),
        "phases": phase_seconds(instance),
    }
    if instance.state is State.STARTING:
        document |= {"phase": instance.phase or "start", "progress": round(instance.progress, 3)}
        document["remaining_seconds"] = remaining_seconds(instance, now)
    document |= sleep_of(instance)
    if operation is not None:
        document["activity"] = activity(operation)
    if instance.ended_at is not None and instance.state is not State.SLEEPING:
        document |= {"ended_at": timestamp(instance.ended_at), "exit_code": instance.exit_code}
    if instance.error is not None:
        document["error"] = {"class": str(instance.error.kind), "message": instance.error.message}
    if instance.reason is not None:
        document["reason"] = instance.reason
    return document


def activity(operation: Operation) -> dict[str, Any]:
    """What is being done with an instance, as JSON data."""
    return {
        "doing": str(operation.doing),
        "stage": str(operation.stage),
        "since": timestamp(operation.since),
        "reason": operation.reason,
        "waits_for": operation.waits_for or None,
    }


def wishes(config: Config) -> dict[str, Any]:
    """The fields about accelerators and sleep that were given."""
    ladder = config.ladder
    given: dict[str, Any] = {
        "gpus": config.gpus,
        "gpu_share": config.gpu_share,
        "sleep": config.sleep,
        "sleep_after": ladder.sleep_after,
        "discard_after": ladder.discard_after,
        "stop_after": ladder.stop_after,
        "pin": ladder.pin or None,
        "priority": ladder.priority or None,
    }
    if config.warm_up is not None:
        given["warm_up"] = {"path": config.warm_up.path, "body": json.loads(config.warm_up.body)}
    return {name: value for name, value in given.items() if value is not None}


def sleep_of(instance: Instance) -> dict[str, Any]:
    """What there is to say about sleep and memory."""
    document: dict[str, Any] = {"can_sleep": instance.can_sleep or instance.emulates_sleep}
    if instance.gpus:
        document["assigned_gpus"] = list(instance.gpus)
    if instance.state is State.SLEEPING and instance.depth is Depth.STOPPED:
        document["sleep_emulated"] = True
    elif instance.state is State.SLEEPING:
        document["sleep_level"] = int(instance.depth)
    if instance.last_used is not None:
        document["last_used_at"] = timestamp(instance.last_used)
    memory = {
        depth_name(Depth(depth)): {"gpu_mib": held.gpu, "host_mib": held.host}
        for depth, held in sorted(instance.memory.items())
        if depth != Depth.STOPPED
    }
    if memory:
        document["memory"] = memory
    if instance.free_before:
        document["free_before_mib"] = dict(instance.free_before)
    return document


def depth_name(depth: Depth) -> str:
    """The wire's word for a depth."""
    return depth.name.lower()


def remaining_seconds(instance: Instance, now: float | None) -> float | None:
    """How long the start should still take, going by earlier ones; None where there were none."""
    if now is None or instance.expected_ready_at is None:
        return None
    return round(max(0.0, instance.expected_ready_at - now), 2)


def waited_seconds(instance: Instance) -> float | None:
    """From the request until its process became the server: long where the engine was still being imported."""
    started = instance.phase_started.get("start")
    return None if started is None else round(max(0.0, started - instance.created_at), 3)


def phase_seconds(instance: Instance) -> dict[str, float]:
    """When each phase of the start began, in seconds after the process became the server."""
    begun = instance.phase_started
    origin = begun.get("start", instance.created_at)
    return {phase: round(max(0.0, at - origin), 3) for phase, at in begun.items()}


def timestamp(seconds: float | None) -> str | None:
    """A time as RFC 3339 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
