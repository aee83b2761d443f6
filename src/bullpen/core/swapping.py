"""Swap: one call that puts some instances to sleep and has another one ready in their place, or leaves all as it was.

A swap begins operations of `sleeping` and `launching` and looks at what has become of them after every event
(`advance`), so it cannot miss one. Its stages: out → in → done; or, where something goes wrong, back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.devices import resolve
from bullpen.core.instance import ENDED, Config, Instance, State
from bullpen.core.laddering import in_order
from bullpen.core.launching import Launching
from bullpen.core.operation import Doing, Stage
from bullpen.core.roster import Roster
from bullpen.core.sleeping import Sleeping
from bullpen.core.stopping import Stopping
from bullpen.errors import BullpenError, ConflictError, EngineError, InvalidRequestError, NotFoundError

SWAPPED = "swapped"


class SwapStage(StrEnum):
    """How far a swap is."""

    OUT = "out"
    IN = "in"
    BACK = "back"
    DONE = "done"


@dataclass
class SwapState:
    """A swap under way.

    Attributes:
        request: who is answered; None where that caller's daemon has ended.
        incoming: what comes in; ``created`` says that the swap made it.
        outgoing: what goes to sleep; those of them that slept before are not in it.
        begun: when each stage began.
        error: why it goes back.
        undone: whether what came in is taken back, as far as it has to be.
        woken: those that were told to come back.
        order: what was asked for, until those that go have been told.
    """

    number: int
    request: int | None
    incoming: str
    created: bool
    outgoing: tuple[str, ...]
    stage: SwapStage = SwapStage.OUT
    begun: dict[str, float] = field(default_factory=dict)
    error: BullpenError | None = None
    undone: bool = False
    woken: set[str] = field(default_factory=set)
    order: ev.Swap | None = None

    def document(self) -> dict[str, Any]:
        """The swap as JSON data."""
        origin = self.begun.get("out", 0.0)
        return {
            "swap": self.number,
            "in": self.incoming,
            "out": list(self.outgoing),
            "stage": str(self.stage),
            "stages": {stage: round(at - origin, 4) for stage, at in self.begun.items()},
            "error": None if self.error is None else str(self.error),
        }


class Swapping:
    """Carries swaps through."""

    def __init__(self, roster: Roster, sleeping: Sleeping, launching: Launching, stopping: Stopping) -> None:
        self._roster = roster
        self._sleeping = sleeping
        self._launching = launching
        self._stopping = stopping
        self.swaps: dict[int, SwapState] = {}

    # -- the request -------------------------------------------------------------------------------------------

    def swap(self, event: ev.Swap, now: float) -> list[fx.Effect]:
        """Somebody asks for a swap: check all of it, then begin with all of it, or refuse and change nothing."""
        taken = None if event.config is None else self._launching.taken(event.incoming)
        if taken is not None:
            return self._refuse(event, taken, now)
        outgoing = self._outgoing(event)
        if isinstance(outgoing, BullpenError):
            return self._refuse(event, outgoing, now)
        problem = self._refusal(event, outgoing)
        if problem is not None:
            return self._refuse(event, problem, now)
        number = self._roster.next_number()
        awake = tuple(one for one in outgoing if self._roster.instances[one].state is State.READY)
        swap = SwapState(number, event.request, event.incoming, event.config is not None, awake, order=event)
        swap.begun["out"] = now
        begun = self._begin_in(event, swap, now)
        if event.incoming not in self._roster.instances:  # the create was refused, and the swap with it
            return [replace(effect, request=event.request) for effect in begun if isinstance(effect, fx.Reply)]
        self.swaps[number] = swap
        return [self._saved(swap), fx.PublishSwap(swap.document()), *begun]

    def _refuse(self, event: ev.Swap, problem: BullpenError, now: float) -> list[fx.Effect]:
        instance = self._roster.instances.get(event.incoming)
        if instance is not None:
            instance.note(now, f"asked to be swapped in, refused: {problem}", refusal=True)
        return [fx.Reply(event.request, error=problem)]

    def _begin_in(self, event: ev.Swap, swap: SwapState, now: float) -> list[fx.Effect]:
        """Begin with what comes in: it gets as far as it can without what the others still have."""
        if event.config is not None:
            assert event.key is not None
            create = ev.Create(ev.NOBODY, event.incoming, event.key, event.config)
            return self._launching.create(create, now, swap=swap.number, but=swap.outgoing)
        instance = self._roster.instances[event.incoming]
        if instance.state is State.READY:
            return []
        return self._sleeping.begin_wake(instance, now, reason="swapped in", swap=swap.number, but=swap.outgoing)

    def _outgoing(self, event: ev.Swap) -> tuple[str, ...] | BullpenError:
        """What is to go: as asked, or as the policy has it."""
        if event.outgoing is None:
            return self._victims(event)
        for one in event.outgoing:
            instance = self._roster.instances.get(one)
            if instance is None or not instance.listed:
                return NotFoundError(f"no instance {one!r}")
            if one == event.incoming:
                return InvalidRequestError(f"{one!r} cannot both come in and go out", field="out")
        return tuple(dict.fromkeys(event.outgoing))

    def _refusal(self, event: ev.Swap, outgoing: Sequence[str]) -> BullpenError | None:
        promised = {one for swap in self.swaps.values() if swap.order is not None for one in swap.outgoing}
        for one in promised.intersection((event.incoming, *outgoing)):
            return ConflictError(f"instance {one!r} is about to go out in another swap; ask again when that is done")
        for one in outgoing:
            instance = self._roster.instances[one]
            asleep = instance.state is State.SLEEPING or instance.state in ENDED
            if asleep and self._roster.operation(one) is None:
                continue
            error = self._sleeping.refusal(instance)
            if error is not None:
                return error
        if event.config is not None:
            return None  # the create says itself
        instance = self._roster.instances.get(event.incoming)  # type: ignore[assignment]
        if instance is None or not instance.listed:
            return NotFoundError(f"no instance {event.incoming!r}")
        if self._roster.operation(instance.id) is not None:
            return ConflictError(f"instance {instance.id!r} is {instance.state} and busy; ask again when it is done")
        if instance.state is State.READY:
            return None
        return self._sleeping.wake_refusal(instance, tuple(outgoing))

    def _victims(self, event: ev.Swap) -> tuple[str, ...] | BullpenError:
        """Who must go for what comes in: as few as can be, those first that the ladder would take first."""
        gone = [one for one in in_order(self._roster.instances.values()) if self._may_go(one, event.incoming)]
        misfit = self._misfit(event, [one.id for one in gone])
        if isinstance(misfit, ConflictError):
            return ConflictError("; ".join([str(misfit), *self._why_they_stay(event)]))
        if misfit is not None:
            return misfit
        for one in reversed(gone):
            others = [other for other in gone if other is not one]
            if self._misfit(event, [other.id for other in others]) is None:
                gone = others
        return tuple(one.id for one in gone)

    def _may_go(self, instance: Instance, incoming: str) -> bool:
        awake = instance.listed and instance.state is State.READY
        return awake and instance.id != incoming and self._sleeping.refusal(instance) is None

    def _misfit(self, event: ev.Swap, gone: Collection[str]) -> BullpenError | None:
        """Why what comes in would not fit after others are gone; None where it would."""
        if event.config is not None:
            claim = self._launching.claim(event.config, gone)
            return claim if isinstance(claim, BullpenError) else None
        instance = self._roster.get(event.incoming)
        if instance.state is State.READY:
            return None
        return self._sleeping.wake_refusal(instance, tuple(gone))

    def _why_they_stay(self, event: ev.Swap) -> list[str]:
        """Why those do not go that stand in the way even when all go that may."""
        book, incoming = self._roster.book(), self._roster.instances.get(event.incoming)
        config = event.config or (incoming.config if incoming is not None else Config("", ()))
        wanted = book.gpus if config.gpus else [resolve(self._roster.gpus, one).uuid for one in config.gpu_uuids or ()]
        owners = {claim.id for uuid in wanted for claim in book.rivals(uuid, config.gpu_share, (event.incoming,))}
        staying = [self._roster.instances[one] for one in sorted(owners)]
        pinned_or_busy = (one for one in staying if one.config.ladder.pin or not self._may_go(one, event.incoming))
        return [self._why_it_stays(one) for one in pinned_or_busy]

    def _why_it_stays(self, instance: Instance) -> str:
        if instance.config.ladder.pin:
            return f"{instance.id!r} is pinned: name it in `out` to send it away"
        return f"{instance.id!r} cannot go: {self._sleeping.refusal(instance) or instance.state}"

    # -- on the way --------------------------------------------------------------------------------------------

    def waits(self, instance: Instance, number: int | None) -> str | None:
        """Why what comes in has to wait; None where it need not."""
        swap = self.swaps.get(number or 0)
        if swap is None or swap.incoming != instance.id or swap.stage is not SwapStage.OUT:
            return None
        return f"for {', '.join(map(repr, swap.outgoing))} to sleep"

    def advance(self, now: float) -> list[fx.Effect]:
        """Take every swap as far as it can go."""
        effects: list[fx.Effect] = []
        for swap in list(self.swaps.values()):
            step = {
                SwapStage.OUT: self._advance_out,
                SwapStage.IN: self._advance_in,
                SwapStage.BACK: self._advance_back,
            }
            effects += step[swap.stage](swap, now)
        return effects

    def _advance_out(self, swap: SwapState, now: float) -> list[fx.Effect]:
        lost = self._lost_incoming(swap)
        if lost is not None:
            return self._turn_back(swap, lost, now)
        if swap.order is not None:
            operation = self._roster.operation(swap.incoming)
            if operation is not None and operation.stage is Stage.PREPARING:
                return []
            if begun := self._begin_out(swap, swap.order, now):
                return begun
        for one in swap.outgoing:
            instance, operation = self._roster.instances.get(one), self._roster.operation(one)
            if instance is not None and operation is not None and operation.doing is not Doing.SLEEP:
                return self._turn_back(swap, EngineError(f"{one!r} does not sleep: {last_note(instance)}"), now)
            if operation is not None:
                return []
            if instance is None or instance.state is State.STOPPING:
                continue  # deleted meanwhile: it is out
            asleep = instance.state is State.SLEEPING or (instance.state is State.STOPPED and instance.error is None)
            if not asleep:
                return self._turn_back(swap, EngineError(f"{one!r} does not sleep: {last_note(instance)}"), now)
        return self._enter(swap, SwapStage.IN, now)

    def _begin_out(self, swap: SwapState, order: ev.Swap, now: float) -> list[fx.Effect]:
        """Tell those that go; not before what comes in has a process that understands its options: until then they
        serve, and where it never comes to that, nothing has changed."""
        swap.order = None
        effects: list[fx.Effect] = []
        for one in swap.outgoing:
            instance = self._roster.instances.get(one)
            if instance is None or instance.state is not State.READY or self._roster.operation(one) is not None:
                continue  # the next look at it says what that means
            depth = self._sleeping.depth_for(instance, order.depth)
            reason = f"makes room for {swap.incoming!r} (swap)"
            effects += self._sleeping.begin(
                instance, depth, now, reason=reason, drain=order.drain, refuse=order.refuse, swap=swap.number
            )
        return effects

    def _lost_incoming(self, swap: SwapState) -> BullpenError | None:
        refusal = self._roster.refusals.pop(swap.number, None)
        if refusal is not None:
            return refusal
        instance = self._roster.instances.get(swap.incoming)
        if instance is None or self._roster.pending[swap.incoming].stops:
            return ConflictError(f"{swap.incoming!r} was deleted meanwhile")
        if self._roster.operation(swap.incoming) is not None or instance.state is State.READY:
            return None
        return EngineError(f"{swap.incoming!r} is {instance.state}: {last_note(instance)}")

    def _advance_in(self, swap: SwapState, now: float) -> list[fx.Effect]:
        lost = self._lost_incoming(swap)
        if lost is not None:
            return self._turn_back(swap, lost, now)
        instance = self._roster.instances[swap.incoming]
        if self._roster.operation(swap.incoming) is not None:
            return []
        swap.stage, swap.begun["done"] = SwapStage.DONE, now
        del self.swaps[swap.number]
        document = swap.document()
        if swap.outgoing:
            instance.note(now, f"swapped in for {', '.join(map(repr, swap.outgoing))}")
        reply = [] if swap.request is None else [fx.Reply(swap.request, instance, SWAPPED, details=document)]
        return [fx.SaveSwap(swap.number, None), fx.PublishSwap(document), *reply]

    def _enter(self, swap: SwapState, stage: SwapStage, now: float) -> list[fx.Effect]:
        swap.stage, swap.begun[str(stage)] = stage, now
        return [self._saved(swap), fx.PublishSwap(swap.document())]

    def _saved(self, swap: SwapState) -> fx.SaveSwap:
        document: Mapping[str, Any] = {
            "incoming": swap.incoming,
            "created": swap.created,
            "outgoing": list(swap.outgoing),
        }
        return fx.SaveSwap(swap.number, document)

    # -- back --------------------------------------------------------------------------------------------------

    def restore(self, saved: Mapping[str, Any], now: float) -> list[fx.Effect]:
        """Take back a swap that an earlier daemon did not bring to its end."""
        number = self._roster.next_number()
        swap = SwapState(number, None, saved["incoming"], saved["created"], tuple(saved["outgoing"]))
        swap.begun["out"] = now
        self.swaps[number] = swap
        return self._turn_back(swap, EngineError("the daemon ended in the middle of it"), now)

    def _turn_back(self, swap: SwapState, error: BullpenError, now: float) -> list[fx.Effect]:
        """Something went wrong: have what there was before."""
        swap.error = error
        return [*self._enter(swap, SwapStage.BACK, now), *self._undo_in(swap, now)]

    def _undo_in(self, swap: SwapState, now: float) -> list[fx.Effect]:
        """Take back what came in, as far as it came."""
        swap.undone = True
        instance = self._roster.instances.get(swap.incoming)
        operation = self._roster.operation(swap.incoming)
        ending = instance is not None and instance.state is State.STOPPING
        if instance is None or (ending and not (swap.created and instance.listed)):
            return []
        if swap.created:
            if not instance.listed:
                return self._launching.fail(instance, ConflictError(f"the swap was taken back: {swap.error}"), now)
            return self._stopping.stop(ev.Stop(ev.NOBODY, instance.id, 0.0), now)
        if operation is not None and operation.stage in (Stage.PREPARING, Stage.QUEUED):
            return self._sleeping.cannot_have(instance, ConflictError(f"the swap was taken back: {swap.error}"), now)
        swap.undone = instance.state is not State.READY and operation is None
        return []

    def _advance_back(self, swap: SwapState, now: float) -> list[fx.Effect]:
        instance = self._roster.instances.get(swap.incoming)
        if self._roster.operation(swap.incoming) is not None:
            return []  # it ends first, one way or the other
        if instance is not None and (instance.state is State.STOPPING or self._roster.pending[instance.id].killing):
            return []  # until its processes are gone, its accelerators are no one else's
        if not swap.undone and instance is not None and instance.state is State.READY and not self._fits(swap):
            swap.undone = True
            if self._sleeping.refusal(instance) is not None:
                return self._stopping.stop(ev.Stop(ev.NOBODY, instance.id, 0.0), now)
            depth = self._sleeping.depth_for(instance, None)
            return self._sleeping.begin(instance, depth, now, reason="the swap was taken back", drain=0.0)
        swap.undone = True
        effects, waiting = self._wake_again(swap, now)
        return effects if waiting else [*effects, *self._finish_back(swap, now)]

    def leave_stopped(self, instance_id: str) -> list[fx.Effect]:
        """Somebody asks an instance to stop and stay so: no swap brings it back."""
        effects: list[fx.Effect] = []
        for swap in self.swaps.values():
            if instance_id in swap.outgoing:
                swap.outgoing = tuple(one for one in swap.outgoing if one != instance_id)
                effects.append(self._saved(swap))
        return effects

    def _fits(self, swap: SwapState) -> bool:
        """Whether what came in may stay beside all that is to come back."""
        book = self._roster.book()
        outgoing = [one for one in (self._roster.instances.get(i) for i in swap.outgoing) if one is not None]
        return all(
            claim.id != swap.incoming
            for one in outgoing
            for uuid in one.gpus
            for claim in book.rivals(uuid, one.config.gpu_share, but=(one.id,))
        )

    def _wake_again(self, swap: SwapState, now: float) -> tuple[list[fx.Effect], bool]:
        """Begin to wake what slept for the swap; and whether anything is still on its way."""
        effects: list[fx.Effect] = []
        waiting = False
        for one in swap.outgoing:
            instance = self._roster.instances.get(one)
            if instance is None or instance.state in (State.READY, State.STOPPING):
                waiting = waiting or (instance is not None and self._roster.operation(one) is not None)
                continue
            if self._roster.operation(one) is not None or self._roster.pending[one].killing:
                waiting = True
            elif one not in swap.woken and self._sleeping.wake_refusal(instance) is None:
                swap.woken.add(one)
                reason = f"the swap was taken back: {swap.error}"
                effects += self._sleeping.begin_wake(instance, now, reason=reason)
                waiting = True
        return effects, waiting

    def _finish_back(self, swap: SwapState, now: float) -> list[fx.Effect]:
        del self.swaps[swap.number]
        states = {one: self._state(one) for one in swap.outgoing}
        out = ", ".join(map(repr, swap.outgoing))
        restored = ", ".join(f"{one!r} is {state}" for one, state in states.items()) or "nothing had changed"
        swap.stage, swap.begun["done"] = SwapStage.DONE, now
        for one in (swap.incoming, *swap.outgoing):
            if (instance := self._roster.instances.get(one)) is not None:
                instance.note(now, f"a swap of {swap.incoming!r} for {out or 'nobody'} was taken back: {swap.error}")
        document = swap.document()
        told: list[fx.Effect] = [fx.SaveSwap(swap.number, None), fx.PublishSwap(document)]
        if swap.request is None:
            return told
        assert swap.error is not None
        if isinstance(swap.error, InvalidRequestError):
            return [*told, fx.Reply(swap.request, error=swap.error)]
        error = type(swap.error)(f"the swap was taken back: {swap.error}; now {restored}")
        return [*told, fx.Reply(swap.request, error=error)]

    def _state(self, instance_id: str) -> str:
        instance = self._roster.instances.get(instance_id)
        return "gone" if instance is None else str(instance.state)


def last_note(instance: Instance) -> str:
    """Why an instance is as it is: its failure, or the newest thing that was decided about it."""
    if instance.error is not None:
        return instance.error.message
    return instance.notes[-1].text if instance.notes else str(instance.state)
