"""What others have found out about the sleep of a model: remembered as what the fleet has seen itself."""

from __future__ import annotations

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.instance import Instance
from bullpen.core.profile import Verdict
from bullpen.core.roster import Roster
from bullpen.errors import ConflictError


def judge(roster: Roster, event: ev.Judge, now: float) -> list[fx.Effect]:
    """Remember what somebody has found out; the last one who tried a depth is right, as among the fleet's own verdicts.

    Raises:
        NotFoundError: there is none of that id.
        ConflictError: it was not started so that it could be at that depth.
    """
    instance = roster.get(event.id)
    if not instance.can_sleep:
        raise ConflictError(
            f"instance {instance.id!r} cannot sleep at level {int(event.depth)}, so nobody can have tried that with it:"
            f" {why_not(instance)}"
        )
    saved = roster.judge(instance, event.depth, Verdict(event.works, event.why, now))
    return [saved, fx.Reply(event.request, instance, "judged")]


def why_not(instance: Instance) -> str:
    """Why an instance does not have its engine's own sleep."""
    told = instance.served.cannot_sleep if instance.served else None
    return told or "it was started without the engine's sleep"
