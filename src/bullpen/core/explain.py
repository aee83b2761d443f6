"""Why an instance is as it is: for ``explain``, in words."""

from __future__ import annotations

from typing import Any

from bullpen.core.instance import Depth, Instance, State
from bullpen.core.judging import why_not
from bullpen.core.laddering import due
from bullpen.core.operation import Operation
from bullpen.core.profile import Verdict
from bullpen.core.public import activity, depth_name, timestamp
from bullpen.core.roster import Roster


def explain(roster: Roster, instance: Instance, now: float) -> dict[str, Any]:
    """Everything that was decided about an instance and what comes next, as JSON data."""
    operation = roster.operation(instance.id)
    return {
        "instance_id": instance.id,
        "state": str(instance.state),
        "summary": summary(instance, operation),
        "activity": None if operation is None else activity(operation),
        "waits_for": (operation.waits_for or None) if operation is not None else None,
        "next_step": next_step(roster, instance, now),
        "works": verdicts(roster, instance),
        "notes": [{"at": timestamp(note.at), "text": note.text} for note in instance.notes],
    }


def verdicts(roster: Roster, instance: Instance) -> dict[str, Any]:
    """Whether each depth of the engine's own sleep works, as JSON data."""
    found = roster.conduct(instance).verdicts
    return {depth_name(depth): works(instance, found.get(int(depth))) for depth in (Depth.LEVEL_1, Depth.LEVEL_2)}


def works(instance: Instance, verdict: Verdict | None) -> dict[str, Any] | None:
    """Whether a depth of sleep works, as JSON data; None where that was never tried."""
    if verdict is not None:
        return {"works": verdict.works, "why": verdict.why, "at": timestamp(verdict.at)}
    if instance.can_sleep or instance.served is None:
        return None
    return {"works": False, "why": why_not(instance), "at": None}


def summary(instance: Instance, operation: Operation | None) -> str:
    """One sentence: what it is, and why."""
    if operation is not None and operation.waits_for:
        return f"It is {instance.state} and waits {operation.waits_for}, to {operation.doing}: {operation.reason}."
    if operation is not None:
        return f"It is {instance.state}; under way: {operation.doing}, {operation.stage} ({operation.reason})."
    if instance.error is not None:
        return f"It is {instance.state}: {instance.error.message}"
    last = f" Last: {instance.reason}." if instance.reason else ""
    return f"It is {described(instance)}.{last}"


def described(instance: Instance) -> str:
    """Its state, and how deep it sleeps."""
    if instance.state is not State.SLEEPING:
        return str(instance.state)
    return "sleeping (emulated)" if instance.depth is Depth.STOPPED else f"sleeping at level {int(instance.depth)}"


def next_step(roster: Roster, instance: Instance, now: float) -> dict[str, Any] | None:
    """The next step down the ladder, if nobody uses it."""
    step = due(roster, instance)
    if step is None or instance.state not in (State.READY, State.SLEEPING) or roster.operation(instance.id) is not None:
        return None
    depth, after = step
    idle = max(0.0, now - instance.last_used) if instance.last_used is not None else 0.0
    return {
        "to": "emulated" if depth is Depth.STOPPED and instance.emulates_sleep else depth_name(depth),
        "in_seconds": round(max(0.0, after - idle), 1),
        "why": f"unless a request comes: {after:g} s without one",
    }
