"""What the gRPC face needs to know of the node, and all that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from bullpen.core.instance import Address

Task = Literal["generate", "embed"]


@dataclass(frozen=True)
class Served:
    """A launch as callers see it, at this moment.

    Attributes:
        state: `bootstrapping`, `ready`, `stopping`, `stopped` or `failed`.
        address: where its OpenAI server answers; None before it has one.
        served_model_name: the name by which requests ask for its model.
        api_key: what its OpenAI server asks for; never a caller's own.
    """

    launch_id: str
    state: str
    task: Task
    address: Address | None
    served_model_name: str
    api_key: str | None = field(default=None, repr=False)


class InstanceFinder(Protocol):
    """Finds what calls are for."""

    def find(self, launch_id: str) -> Served | None:
        """The launch of this id, as it is now; None where there is none. Called for every request: keep it quick."""
