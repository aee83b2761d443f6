"""What there is on a host: process trees, what a daemon holds of them, and what it has under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from bullpen.core import effects as fx
from bullpen.core.instance import Instance, State


@dataclass(eq=False)
class Tree:
    """The processes of one instance, as the kernel knows them."""

    gpus: frozenset[str]
    told: bool = False
    """Whether it was told to become the server; until then it ends with the daemon."""
    port: int | None = None
    server: bool = True
    children: bool = False

    @property
    def alive(self) -> bool:
        return self.server or self.children


@dataclass(eq=False)
class Handle:
    """What the daemon holds of an instance's process."""

    tree: Tree | None = None
    reported: bool = False
    """Whether the fleet was told of the server's end."""
    held_port: int | None = None
    killing: bool = False
    timers: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Task:
    """A check, a hold of a port, a start or a watch that has not come to anything yet."""

    kind: str
    instance: Instance
    hold: fx.HoldPort | None = None
    phase: int = 0


@dataclass(frozen=True)
class Wish:
    """What the options of a create say."""

    port: int | None = None
    uds: str | None = None
    gpus: tuple[str, ...] = ()


@dataclass
class Request:
    """A request, and what must be true of its answer."""

    id: str
    create: bool
    exists: bool
    """Whether there was an instance of that id when it came."""
    over: bool
    """Whether that one had ended and the fleet knew."""


def known(instance: Instance) -> str:
    """What a watcher must have heard of an instance: that it is there, or that its server has ended."""
    return "CREATED" if instance.running or instance.state is State.STOPPING else "STOPPED"
