"""An instance as the outside sees it: the wire's words, no secrets."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bullpen.core import redact
from bullpen.core.instance import Instance, State


def status(instance: Instance) -> str:
    """The wire's coarse word: ``running`` while the server process lives, else ``stopped``."""
    return "running" if instance.running else "stopped"


def public(instance: Instance, word: str | None = None) -> dict[str, Any]:
    """The instance as JSON data; ``word`` replaces ``status`` where a reply says what was done."""
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
    document |= {
        "engine": config.engine,
        "state": str(instance.state),
        "model": instance.served.model if instance.served else None,
        "served_model_names": list(instance.served.served_model_names) if instance.served else [],
        "url": instance.address.url if instance.address else None,
        "pid": instance.pid,
        "start": instance.how,
        "created_at": timestamp(instance.created_at),
        "ready_at": timestamp(instance.ready_at),
        "waited_seconds": waited_seconds(instance),
        "phases": phase_seconds(instance),
    }
    if instance.state is State.STARTING:
        document |= {"phase": instance.phase or "start", "progress": round(instance.progress, 3)}
    if instance.ended_at is not None:
        document |= {"ended_at": timestamp(instance.ended_at), "exit_code": instance.exit_code}
    if instance.error is not None:
        document["error"] = {"class": str(instance.error.kind), "message": instance.error.message}
    return document


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
