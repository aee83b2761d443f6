"""The book: who owns which accelerator, awake, on the way, or asleep on it, and whether another fits.

It is drawn up anew from the instances whenever it is needed, so it cannot disagree with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bullpen.core.devices import Gpu
from bullpen.errors import ConflictError

WHOLE = 1.0
ROUNDING = 1e-9
"""Shares are decimal fractions that a user adds up in the head; three thirds are a whole."""


class Hold(StrEnum):
    """How an instance has an accelerator."""

    AWAKE = "awake"
    """Its memory is in use there, or may be."""
    COMING = "coming"
    """It will be; nobody else may come between."""
    ASLEEP = "asleep"
    """It left there what a sleeper cannot give back."""


@dataclass(frozen=True)
class Claim:
    """One instance's claim on its accelerators.

    Attributes:
        share: of each; None takes it alone.
        mib: what it holds, or will hold, on each; None where nobody knows.
    """

    id: str
    gpus: tuple[str, ...]
    hold: Hold
    share: float | None = None
    mib: int | None = None


class Book:
    """The claims on a node's accelerators at one moment."""

    def __init__(self, gpus: Sequence[Gpu], claims: Iterable[Claim]) -> None:
        self.gpus = {gpu.uuid: gpu for gpu in gpus}
        self.claims = [claim for claim in claims if claim.gpus]

    def on(self, uuid: str, *holds: Hold) -> list[Claim]:
        """The claims on one accelerator, of these kinds or of all."""
        return [claim for claim in self.claims if uuid in claim.gpus and (not holds or claim.hold in holds)]

    def rivals(
        self, uuid: str, share: float | None, but: Collection[str] = (), holds: Collection[Hold] | None = None
    ) -> list[Claim]:
        """Those on an accelerator that leave no room for a further share of it; none where there is room.

        Args:
            uuid: the accelerator.
            share: what is asked for; None for all of it.
            but: instances that do not count.
            holds: what counts; awake and coming by default.
        """
        counted = (Hold.AWAKE, Hold.COMING) if holds is None else holds
        others = [claim for claim in self.on(uuid, *counted) if claim.id not in but]
        if share is None or any(claim.share is None for claim in others):
            return others
        taken = sum(claim.share or 0.0 for claim in others)
        return others if taken + share > WHOLE + ROUNDING else []

    def refusal(self, uuids: Iterable[str], share: float | None, but: Collection[str] = ()) -> ConflictError | None:
        """Why these accelerators cannot be had, owners named; None where they can."""
        for uuid in uuids:
            rivals = self.rivals(uuid, share, but)
            if rivals:
                return ConflictError(taken(uuid, share, rivals))
        return None

    def crowding(self, uuids: Iterable[str], mib: int | None, but: Collection[str] = ()) -> ConflictError | None:
        """Why so much memory cannot fit beside what is known of the others; None where it may."""
        if mib is None:
            return None
        for uuid in uuids:
            others = [claim for claim in self.on(uuid) if claim.id not in but]
            held = sum(claim.mib or 0 for claim in others)
            total = self.gpus[uuid].memory_mib
            if mib + held > total:
                return ConflictError(
                    f"GPU {uuid} has {total} MiB; {mib} are needed and {held} are kept by {named(others)};"
                    " delete one of them, or start this one with a smaller --gpu-memory-utilization"
                )
        return None

    def place(self, count: int, share: float | None, but: Collection[str] = ()) -> tuple[str, ...] | ConflictError:
        """Choose accelerators: for a share, those that it fills up most; alone, those with the fewest sleepers.

        Returns:
            Their UUIDs, or why there are not enough.
        """
        # CUDA shows a server one MIG device at most.
        fitting = [gpu for gpu in self.gpus.values() if count == 1 or gpu.parent is None]
        free = [gpu for gpu in fitting if not self.rivals(gpu.uuid, share, but)]
        if len(free) < count:
            return ConflictError(self._too_few(count, share, len(free), but))
        free.sort(key=lambda gpu: (-self._taken(gpu.uuid) if share else 0.0, len(self.on(gpu.uuid)), gpu.index))
        return tuple(gpu.uuid for gpu in sorted(free[:count], key=lambda gpu: gpu.index))

    def _taken(self, uuid: str) -> float:
        return sum(claim.share or WHOLE for claim in self.on(uuid, Hold.AWAKE, Hold.COMING))

    def _too_few(self, count: int, share: float | None, free: int, but: Collection[str]) -> str:
        if count > len(self.gpus):
            return f"{count} GPUs are asked for and this host has {len(self.gpus)}"
        owners = "; ".join(
            f"{uuid}: {named(rivals)}" for uuid in self.gpus if (rivals := self.rivals(uuid, share, but))
        )
        return f"{count} GPUs are asked for and {free} are free ({owners}); put one of the owners to sleep, or swap"


def taken(uuid: str, share: float | None, rivals: Sequence[Claim]) -> str:
    """The sentence for an accelerator that others have."""
    if share is not None and all(claim.share is not None for claim in rivals):
        rest = WHOLE - sum(claim.share or 0.0 for claim in rivals)
        return (
            f"GPU {uuid} has a share of {max(0.0, rest):.2g} left, {share:.2g} is asked for; {named(rivals)} have the"
            " rest: put one to sleep, swap, or choose another GPU"
        )
    coming = "" if rivals[0].hold is Hold.AWAKE else ", which is on its way there"
    return (
        f"GPU {uuid} belongs to instance {rivals[0].id!r}{coming}; delete that one, put it to sleep, swap with it, or"
        " choose another GPU"
    )


def named(claims: Sequence[Claim]) -> str:
    """Instances by name."""
    return ", ".join(repr(claim.id) for claim in claims) or "nobody"
