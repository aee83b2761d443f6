"""A world for the fleet to act on: it carries out effects in virtual time, as ``bullpen.node`` does in real time.

Whatever takes time is outstanding until a test lets it come to something (`outcomes`), in any order. The trees are the
truth: which engine is awake, what memory it holds. After every event `truth` checks what must hold whatever happened,
and every effect checks what it relies on.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import ENDED, TRANSITIONS, Depth, Instance, State
from bullpen.core.operation import Operation
from bullpen.core.profile import Profile
from bullpen.core.roster import Limits
from bullpen.errors import LaunchError
from tests.core import carrying, outcomes, truth
from tests.core.host import (
    CAPACITY,
    DEVICES,
    GPUS,
    LIMITS,
    Handle,
    Request,
    Task,
    Tree,
    Wish,
    configuration,
    copied,
    known,
)


class DaemonKilledError(Exception):
    """The daemon ends between two effects."""


class World:
    """A daemon on a host. Its methods are what may happen; outcomes are in `tests.core.outcomes`."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.clock = 0.0
        """A clock that nobody sets; timers and deadlines go by it."""
        self.offset = 1000.0
        self.foreign = dict.fromkeys(GPUS, 0)
        """MiB that other programs hold of each accelerator."""
        self.trees: list[Tree] = []
        self.wishes: dict[str, Wish] = {}
        self.journal: dict[str, Instance] = {}
        self.profiles: dict[str, Profile] = {}
        self.swaps: list[Mapping[str, Any]] = []
        """Those that the journal knows to be under way."""
        self.logged_revision = 0
        self.disk_full = False
        self.obliging = False
        """Whether everything works that is still outstanding at its deadline."""
        self.effects_until_death: int | None = None
        self.requests: dict[int, Request] = {}
        self.replies: dict[int, fx.Reply] = {}
        self.seen: dict[str, str] = {}
        """What a watcher knows: the last event of each instance that was not deleted."""
        self.seen_revision = 0
        self.last_hold: fx.HoldPort | None = None
        self._numbers = 0
        self._boot(revision=0)

    def _boot(self, revision: int) -> None:
        profiles = copy.deepcopy(self.profiles)
        self.fleet = Fleet(gpus=DEVICES, limits=self.limits, profiles=profiles, revision=revision)
        self.handles: dict[str, Handle] = {}
        self.tasks: list[Task] = []
        self.unsaved: set[str] = set()
        self.unanswered: set[int] = set()
        self.deleted: set[str] = set()
        self.effects_until_death = None
        self.running_swaps: dict[int, Mapping[str, Any]] = {}
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self.adopting = False

    @property
    def now(self) -> float:
        """What the fleet takes for the time."""
        return self.clock + self.offset

    # -- requests ----------------------------------------------------------------------------------------------

    def create(self, instance_id: str, wish: Wish) -> int:
        key = self._ask("create", instance_id, wish)
        self.submit(ev.Create(self._numbers, instance_id, key, configuration(wish), at_once=wish.at_once))
        return self._numbers

    def stop(self, instance_id: str, timeout: float = 10.0, *, keep: bool = False) -> int:
        self._ask("end" if keep else "stop", instance_id)
        self.submit(ev.Stop(self._numbers, instance_id, timeout, keep=keep))
        return self._numbers

    def sleep(self, instance_id: str, depth: Depth | None = None, *, refuse: bool = False) -> int:
        self._ask("sleep", instance_id)
        self.submit(ev.Sleep(self._numbers, instance_id, depth, 5.0, refuse))
        return self._numbers

    def wake(self, instance_id: str) -> int:
        self._ask("wake", instance_id)
        self.submit(ev.Wake(self._numbers, instance_id))
        return self._numbers

    def swap(
        self, incoming: str, outgoing: tuple[str, ...] | None, depth: Depth | None = None, wish: Wish | None = None
    ) -> int:
        """``wish``: what comes in is to be created."""
        key = self._ask("swap", incoming, wish)
        number, config = self._numbers, None if wish is None else configuration(wish)
        before = truth.Auto(self, incoming, config) if outgoing is None else None
        event = ev.Swap(number, incoming, outgoing, depth, 5.0, False, key if config else None, config)
        self.submit(event)
        begun = truth.swap_of(self, number)
        if begun is not None:
            self.requests[number].outgoing = begun.outgoing
        if before is not None:
            before.check(begun, self.replies.get(number))
        return number

    def _ask(self, kind: str, instance_id: str, wish: Wish | None = None) -> str:
        self._numbers += 1
        key = f"key-{self._numbers}"
        if wish is not None:
            self.wishes[key] = wish
        instance, handle = self.fleet.instances.get(instance_id), self.handles.get(instance_id)
        over = instance is not None and instance.ended_at is not None
        over = over and instance is not None and instance.state in (*ENDED, State.SLEEPING)
        if over and handle is not None and handle.tree is not None and handle.tree.told:
            assert handle.reported
        self.requests[self._numbers] = Request(instance_id, kind, instance is not None, over)
        self.unanswered.add(self._numbers)
        return key

    def daemon_ends(self) -> None:
        """The beginning of a shutdown: what is not listed yet is refused."""
        for instance in list(self.fleet.instances.values()):
            if not instance.listed:
                self.submit(ev.Refused(instance.id, LaunchError("this daemon is ending")))

    # -- the host ----------------------------------------------------------------------------------------------

    def end_server(self, handle: Handle, *, children_too: bool) -> None:
        """A server process ends, whatever for; the daemon hears of it later."""
        assert handle.tree is not None
        handle.tree.server = False
        handle.tree.children = handle.tree.children and not children_too

    def let_time_pass(self, seconds: float) -> None:
        """Timers fire, and what had a deadline has come to nothing by then."""
        end = self.clock + seconds
        while due := min(self._due(), key=lambda one: one[:3], default=None):
            if due[0] > end:
                break
            self.clock = max(self.clock, due[0])
            if due[3] is not None:
                outcomes.run_out(self, due[3])
            else:
                del self.handles[due[1]].timers[due[2]]
                self.submit(ev.TimerFired(due[1], due[2]))
        self.clock = end

    def _due(self) -> Iterator[tuple[float, str, str, Task | None]]:
        for instance_id, handle in self.handles.items():
            for name, at in handle.timers.items():
                yield at, instance_id, name, None
        for task in self.tasks:
            if task.until is not None:
                yield task.until, task.instance.id, task.kind, task

    def free(self, uuid: str, but: Tree | None = None) -> int:
        """MiB that an accelerator has free."""
        held = sum(tree.holds(uuid) for tree in self.trees if tree is not but)
        return CAPACITY - held - self.foreign[uuid]

    def save_again(self) -> None:
        for instance_id in list(self.unsaved):
            self.unsaved.discard(instance_id)
            if instance_id in self.fleet.instances:
                self._save(instance_id)

    # -- what is outstanding -----------------------------------------------------------------------------------

    def tasks_of(self, *kinds: str) -> list[Task]:
        self.tasks = [task for task in self.tasks if task.kind != "watch" or self._is_watched(task)]
        return [task for task in self.tasks if task.kind in kinds]

    def _is_watched(self, task: Task) -> bool:
        instance = task.instance
        current = self.fleet.instances.get(instance.id) is instance and instance.attempt == task.attempt
        return current and instance.state is State.STARTING

    def servers(self) -> list[Handle]:
        """Those whose end would be reported, and that live."""
        return [handle for handle in self._followed().values() if handle.tree is not None and handle.tree.server]

    def unreported(self) -> list[str]:
        return [
            i
            for i, handle in self._followed().items()
            if handle.tree is not None and not handle.tree.server and not handle.reported
        ]

    def _followed(self) -> dict[str, Handle]:
        # The end of a process is followed once it was told to become the server, or is being killed.
        return {i: one for i, one in self.handles.items() if one.killing or (one.tree is not None and one.tree.told)}

    def kills(self) -> list[str]:
        return [instance_id for instance_id, handle in self.handles.items() if handle.killing]

    def is_current(self, task: Task) -> bool:
        """Whether the fleet still has the very instance that a task was for."""
        return self.fleet.instances.get(task.instance.id) is task.instance

    # -- the end of the daemon, and the next one --------------------------------------------------------------

    def kill_daemon(self, fate: str = "works") -> None:
        """kill -9 of the daemon; the next one adopts what is left. ``fate``: what comes of calls to engines."""
        for task in self.tasks_of("sleep", "wake"):
            outcomes.leave(task, fate)
            if task.tree is not None and task.kind == "wake":
                task.tree.gate_open = False  # nobody was there any more to open it
        for tree in self.trees:
            tree.server = tree.server and tree.told
        saved = sorted(self.journal.values(), key=lambda instance: instance.created_at)
        revision = max([self.logged_revision, *(instance.revision for instance in saved)])
        missed = revision != self.seen_revision
        # One whose end was told and not written down any more is there again, until it is deleted again.
        returns = any(instance.key in self.deleted for instance in saved)
        swaps = list(self.swaps)
        self._boot(revision)
        self.adopting, self.seen_revision = True, revision
        for entry in saved:
            self._adopt(copied(entry))
        for swap in swaps:
            self._carry_out(self.fleet.restore_swap(swap, self.now))
        self.adopting = False
        if missed or returns:  # the watcher lists
            self.seen = {instance.id: known(instance) for instance in self.fleet.listed()}
        truth.verify(self)

    def _adopt(self, instance: Instance) -> None:
        tree = next((tree for tree in self.trees if tree.key == instance.key and tree.server), None)
        if tree is not None and instance.listed:
            self.handles[instance.id] = Handle(tree)
        self._carry_out(self.fleet.restore(instance, self.now, alive=tree is not None))

    # -- carrying out ------------------------------------------------------------------------------------------

    def submit(self, event: ev.Event) -> None:
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._handling = False
        truth.verify(self)

    def _handle(self, event: ev.Event) -> None:
        before = {instance.id: instance for instance in self.fleet.instances.values()}
        states = {i: instance.state for i, instance in before.items()}
        doing = self.operations()
        effects = self.fleet.handle(event, self.now)
        for i, instance in before.items():
            once = {states[i], *TRANSITIONS[states[i]]}
            assert instance.state in once.union(*(TRANSITIONS[state] for state in once)), "two steps at most"
        for i, operation in self.operations().items():
            if doing.get(i) is not operation:
                truth.check_begun(self, self.fleet.instances[i], operation)
        self._carry_out(effects)

    def operations(self) -> dict[str, Operation]:
        """What the fleet is doing, by instance."""
        return {instance.id: operation for instance, operation in self.fleet.roster.operations()}

    def _carry_out(self, effects: list[fx.Effect]) -> None:
        for effect in effects:
            if self.effects_until_death is not None:
                self.effects_until_death -= 1
                if self.effects_until_death < 0:
                    raise DaemonKilledError
            if isinstance(effect, fx.Save):
                if not self._save(effect.id):
                    return
            else:
                getattr(carrying, f"do_{type(effect).__name__}")(self, effect)

    def _save(self, instance_id: str) -> bool:
        instance = self.fleet.instances.get(instance_id)
        if instance is None:
            return True  # it is gone by what was decided after that
        assert instance.key not in self.deleted
        if not self.disk_full:
            self.journal[instance_id] = copied(instance)
            self.unsaved.discard(instance_id)
            return True
        if instance.listed:
            self.unsaved.add(instance_id)
            return True
        self.submit(ev.Refused(instance_id, LaunchError("the journal cannot be written")))
        return False

    def begin(self, kind: str, effect: Any, seconds: float | None = None) -> Task:
        instance, handle = self.fleet.instances[effect.id], self.handles.get(effect.id)
        until = None if seconds is None else self.clock + seconds
        tree = handle.tree if handle is not None else None
        task = Task(kind, instance, effect, instance.attempt, instance.depth, tree, until, moves=instance.moves)
        self.tasks.append(task)
        return task

    @property
    def settled(self) -> bool:
        """Whether no event is being handled, so that everything must be right."""
        return not (self.adopting or self._handling)
