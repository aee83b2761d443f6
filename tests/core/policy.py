"""The policy of the ladder, written down a second time and in another way: by looking at every choice there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def right_choice(ranked: Sequence[T], fits: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...] | None:
    """Who must go: of all choices after which it fits, the one whose worst loss is smallest, then its second worst,
    and so on; as few as needed follows from that. None where it does not fit although all go.

    Args:
        ranked: those that may go, the one that is missed least first.
    """
    choices = [
        chosen for count in range(len(ranked) + 1) for chosen in itertools.combinations(ranked, count) if fits(chosen)
    ]
    if not choices:
        return None
    return min(choices, key=lambda chosen: sorted((ranked.index(one) for one in chosen), reverse=True))
