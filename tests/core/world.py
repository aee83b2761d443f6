"""A world for the fleet to act on: it carries out effects in virtual time, as ``bullpen.node`` does in real time.

Whatever takes time is outstanding until a test lets it come to something, in any order. After every event the world
checks what must hold whatever happened (`World.verify`), and every effect checks what it relies on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core.fleet import Fleet
from bullpen.core.instance import ENDED, TRANSITIONS, Config, Instance, Served, State
from bullpen.engines.crash import CrashClass, Failure
from bullpen.errors import ConflictError, InvalidRequestError, LaunchError, NotFoundError, StuckError
from tests.core.host import Handle, Request, Task, Tree, Wish, known

START_TIMEOUT = 60.0
GPUS = ("GPU-0", "GPU-1")
FOREIGN_PORT = 7000
"""Another program has it."""
FIRST_PORT = 20_000


class DaemonKilledError(Exception):
    """The daemon ends between two effects."""


class World:
    """A daemon on a host. Its methods are what may happen."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.trees: dict[str, Tree] = {}
        self.wishes: dict[str, Wish] = {}
        self.journal: dict[str, Instance] = {}
        self.logged_revision = 0
        self.disk_full = False
        self.effects_until_death: int | None = None
        self.requests: dict[int, Request] = {}
        self.seen: dict[str, str] = {}
        """What a watcher knows: the last event of each instance that was not deleted."""
        self.seen_revision = 0
        self.last_hold: fx.HoldPort | None = None
        self._numbers = 0
        self._boot(revision=0)

    def _boot(self, revision: int) -> None:
        self.fleet = Fleet(gpus=GPUS, start_timeout=START_TIMEOUT, revision=revision)
        self.handles: dict[str, Handle] = {}
        self.tasks: list[Task] = []
        self.unsaved: set[str] = set()
        self.unanswered: set[int] = set()
        self.deleted: set[str] = set()
        self.effects_until_death = None
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._adopting = False

    # -- requests ----------------------------------------------------------------------------------------------

    def create(self, instance_id: str, wish: Wish) -> None:
        self._numbers += 1
        key = f"key-{self._numbers}"
        self.wishes[key] = wish
        self._ask(self._numbers, instance_id, create=True)
        self.submit(ev.Create(self._numbers, instance_id, key, Config("m", ("m",), gpu_uuids=wish.gpus or None)))

    def stop(self, instance_id: str, timeout: float = 10.0) -> None:
        self._numbers += 1
        self._ask(self._numbers, instance_id, create=False)
        self.submit(ev.Stop(self._numbers, instance_id, timeout))

    def _ask(self, number: int, instance_id: str, *, create: bool) -> None:
        instance, handle = self.fleet.instances.get(instance_id), self.handles.get(instance_id)
        over = instance is not None and instance.state in ENDED and instance.ended_at is not None
        if over and handle is not None and handle.tree is not None:
            assert handle.reported
        self.requests[number] = Request(instance_id, create, instance is not None, over)
        self.unanswered.add(number)

    def daemon_ends(self) -> None:
        """The beginning of a shutdown: what is not listed yet is refused."""
        for instance in list(self.fleet.instances.values()):
            if not instance.listed:
                self.submit(ev.Refused(instance.id, LaunchError("this daemon is ending")))

    # -- outcomes ----------------------------------------------------------------------------------------------

    def finish_check(self, task: Task, *, accepted: bool) -> None:
        self.tasks.remove(task)
        instance = task.instance
        if self.fleet.instances.get(instance.id) is not instance:
            return  # a leased process ends with its channel
        if not accepted:
            self.submit(ev.Refused(instance.id, InvalidRequestError("--frobnicate is no option")))
            return
        wish = self.wishes[instance.key]
        tree = self.trees[instance.key] = Tree(frozenset(wish.gpus))
        self.handles[instance.id] = Handle(tree)
        served = Served("m", ("m",), wish.port, None, wish.uds, tls=False)
        self.submit(ev.Checked(instance.id, served, pid=100, start_ticks=7, how="fork"))

    def finish_port(self, task: Task) -> None:
        self.tasks.remove(task)
        instance, hold = task.instance, task.hold
        if hold is None or self.fleet.instances.get(instance.id) is not instance:
            return
        taken = {handle.held_port for i, handle in self.handles.items() if i != instance.id}
        taken |= {tree.port for tree in self.trees.values() if tree.alive} | {FOREIGN_PORT}
        port = hold.port
        if port is None:
            port = next(number for number in range(FIRST_PORT, 30_000) if number not in hold.avoid | taken)
        if port in taken:
            self.submit(ev.Refused(instance.id, ConflictError("the port is in use")))
        else:
            self.handles[instance.id].held_port = port
            self.submit(ev.PortReady(instance.id, port))

    def finish_start(self, task: Task, *, works: bool, survives: bool) -> None:
        """The answer of a process that was told to become the server; without one, it may live on all the same."""
        self.tasks.remove(task)
        instance, tree = task.instance, self.trees[task.instance.key]
        works = works and tree.server
        if works:
            tree.children = True
        elif not survives:
            tree.server = False
        if self.fleet.instances.get(instance.id) is instance:
            refused = ev.Refused(instance.id, LaunchError("the process does not answer"))
            self.submit(ev.Started(instance.id) if works else refused)

    def show_phase(self, task: Task) -> None:
        task.phase += 1
        self.submit(ev.PhaseSeen(task.instance.id, f"phase {task.phase // 2}", task.phase / 100))

    def answer_probe(self, task: Task) -> None:
        self.tasks.remove(task)
        if self.fleet.instances.get(task.instance.id) is task.instance:
            self.handles[task.instance.id].held_port = None
            self.submit(ev.Answered(task.instance.id))

    def end_server(self, handle: Handle, *, children_too: bool) -> None:
        """A server process ends, whatever for; the daemon hears of it later."""
        assert handle.tree is not None
        handle.tree.server = False
        handle.tree.children = handle.tree.children and not children_too

    def report_exit(self, instance_id: str, code: int | None) -> None:
        handle = self.handles[instance_id]
        assert handle.tree is not None
        assert not handle.tree.server
        failure = None if code == 0 else Failure(CrashClass.KILLED, "it was killed")
        handle.reported, handle.held_port = True, None
        self.submit(ev.Exited(instance_id, code, failure))

    def finish_kill(self, instance_id: str, *, stuck: str | None = None) -> None:
        """A kill is over: nobody is left, or the "server" or a "child" is."""
        handle = self.handles[instance_id]
        tree = self.trees[self.fleet.instances[instance_id].key]
        if stuck is not None and tree.told and tree.alive:
            tree.server, tree.children = tree.server and stuck == "server", True
            self._end_kill(handle, ev.TreeStuck(instance_id, f"the {stuck}"))
            return
        tree.server = tree.children = False
        if handle.tree is not None and not handle.reported:
            self.report_exit(instance_id, -9)
        self._end_kill(handle, ev.TreeGone(instance_id))

    def _end_kill(self, handle: Handle, outcome: ev.Event) -> None:
        # While its outcome is handled the kill is not over yet: one asked for in answer to it would be lost.
        self.submit(outcome)
        handle.killing = False

    def let_time_pass(self, seconds: float) -> None:
        end = self.now + seconds
        while due := sorted((at, i, name) for i, name, at in self._timers() if at <= end):
            at, instance_id, name = due[0]
            self.now = max(self.now, at)
            del self.handles[instance_id].timers[name]
            self.submit(ev.TimerFired(instance_id, name))
        self.now = end

    def _timers(self) -> Iterator[tuple[str, str, float]]:
        for instance_id, handle in self.handles.items():
            for name, at in handle.timers.items():
                yield instance_id, name, at

    def save_again(self) -> None:
        for instance_id in list(self.unsaved):
            self.unsaved.discard(instance_id)
            if instance_id in self.fleet.instances:
                self._save(instance_id)

    # -- what is outstanding -----------------------------------------------------------------------------------

    def tasks_of(self, kind: str) -> list[Task]:
        self.tasks = [task for task in self.tasks if task.kind != "watch" or self._is_watched(task.instance)]
        return [task for task in self.tasks if task.kind == kind]

    def _is_watched(self, instance: Instance) -> bool:
        return self.fleet.instances.get(instance.id) is instance and instance.state is State.STARTING

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
        # The end of a process is followed once it is listed, or is being killed.
        return {i: handle for i, handle in self.handles.items() if self.fleet.instances[i].listed or handle.killing}

    def kills(self) -> list[str]:
        return [instance_id for instance_id, handle in self.handles.items() if handle.killing]

    # -- the end of the daemon, and the next one --------------------------------------------------------------

    def kill_daemon(self) -> None:
        """kill -9 of the daemon; the next one adopts what is left."""
        for tree in self.trees.values():
            tree.server = tree.server and tree.told
        saved = sorted(self.journal.values(), key=lambda instance: instance.created_at)
        revision = max([self.logged_revision, *(instance.revision for instance in saved)])
        missed = revision != self.seen_revision
        # One whose end was told and not written down any more is there again, until it is deleted again.
        returns = any(instance.key in self.deleted for instance in saved)
        self._boot(revision)
        self._adopting, self.seen_revision = True, revision
        for entry in saved:
            self._adopt(replace(entry, phase_started=dict(entry.phase_started)))
        self._adopting = False
        if missed or returns:  # the watcher lists
            self.seen = {instance.id: known(instance) for instance in self.fleet.listed()}
        self.verify()

    def _adopt(self, instance: Instance) -> None:
        tree = self.trees.get(instance.key)
        lives = tree is not None and tree.server
        if lives and instance.listed:
            self.handles[instance.id] = Handle(tree)
        effects = self.fleet.restore(instance)
        if not lives and instance.listed and instance.ended_at is None:
            self.submit(ev.Exited(instance.id, None, Failure(CrashClass.UNKNOWN, "it ended unseen")))
        else:
            self._carry_out(effects)

    # -- carrying out ------------------------------------------------------------------------------------------

    def submit(self, event: ev.Event) -> None:
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                known = {instance.id: instance for instance in self.fleet.instances.values()}
                states = {i: instance.state for i, instance in known.items()}
                effects = self.fleet.handle(self._events.popleft(), self.now)
                for i, instance in known.items():
                    assert instance.state is states[i] or instance.state in TRANSITIONS[states[i]]
                self._carry_out(effects)
        finally:
            self._handling = False
        self.verify()

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
                getattr(self, f"_do_{type(effect).__name__}")(effect)

    def _save(self, instance_id: str) -> bool:
        instance = self.fleet.instances[instance_id]
        assert instance.key not in self.deleted
        if not self.disk_full:
            self.journal[instance_id] = replace(instance, phase_started=dict(instance.phase_started))
            self.unsaved.discard(instance_id)
            return True
        if instance.listed:
            self.unsaved.add(instance_id)
            return True
        self.submit(ev.Refused(instance_id, LaunchError("the journal cannot be written")))
        return False

    def _do_Check(self, effect: fx.Check) -> None:
        self.tasks.append(Task("check", self.fleet.instances[effect.id]))

    def _do_HoldPort(self, effect: fx.HoldPort) -> None:
        self.last_hold = effect
        taken = {tree.port for tree in self.trees.values() if tree.alive} - {None}
        assert effect.port not in taken, "the fleet gave the port of a living tree to another instance"
        assert taken <= effect.avoid
        self.tasks.append(Task("port", self.fleet.instances[effect.id], effect))

    def _do_Start(self, effect: fx.Start) -> None:
        instance = self.fleet.instances[effect.id]
        tree = self.handles[effect.id].tree
        assert tree is not None
        assert instance.address is not None
        assert self.journal[effect.id].key == instance.key, "not saved before its start"
        for other in self.trees.values():
            assert other is tree or not other.alive or not other.gpus & tree.gpus, "two trees on one accelerator"
            assert not other.alive or other.port is None or other.port != instance.address.port, "two trees, one port"
        tree.told, tree.port = True, instance.address.port
        self.tasks.append(Task("start", instance))

    def _do_Discard(self, effect: fx.Discard) -> None:
        handle = self.handles.pop(effect.id, None)
        if handle is not None:
            assert handle.tree is not None
            assert not handle.tree.told, "it may be a server by now"
            handle.tree.server = False
        self._remove_files(effect.id, effect.key)

    def _do_Watch(self, effect: fx.Watch) -> None:
        self.tasks.append(Task("watch", self.fleet.instances[effect.id]))

    def _do_Terminate(self, effect: fx.Terminate) -> None:
        assert not self.handles[effect.id].reported, "a signal to nobody"

    def _do_KillTree(self, effect: fx.KillTree) -> None:
        assert effect.id in self.fleet.instances
        self.handles.setdefault(effect.id, Handle()).killing = True

    def _do_SetTimer(self, effect: fx.SetTimer) -> None:
        self.handles[effect.id].timers[effect.name] = self.now + effect.seconds

    def _do_ClearTimers(self, effect: fx.ClearTimers) -> None:
        if effect.id in self.handles:
            self.handles[effect.id].timers.clear()

    def _do_Publish(self, effect: fx.Publish) -> None:
        instance = effect.instance
        assert instance.listed
        assert instance.key not in self.deleted
        assert instance.revision == self.seen_revision + 1 == self.fleet.revision
        self.seen_revision = instance.revision
        if effect.kind == "DELETED":
            assert self.fleet.instances.get(instance.id) is not instance
            assert not self.trees[instance.key].alive, "said to be gone, and is not"
            self.deleted.add(instance.key)
        if not self._adopting:
            before = self.seen.pop(instance.id, None)
            follows = {"CREATED": (None,), "STOPPED": ("CREATED",), "DELETED": ("CREATED", "STOPPED")}
            assert before in follows[effect.kind]
        if effect.kind != "DELETED":
            self.seen[instance.id] = known(instance)
            assert effect.kind == "CREATED" or self.seen[instance.id] == "STOPPED"
        if not self.disk_full:
            self.logged_revision = instance.revision

    def _do_PublishState(self, effect: fx.PublishState) -> None:
        assert effect.instance.listed
        assert effect.instance.key not in self.deleted

    def _do_Forget(self, effect: fx.Forget) -> None:
        self.handles.pop(effect.id, None)
        self.unsaved.discard(effect.id)
        self._remove_files(effect.id, effect.key)

    def _remove_files(self, instance_id: str, key: str) -> None:
        assert instance_id not in self.fleet.instances
        assert not self.trees[key].alive if key in self.trees else True
        self.journal.pop(instance_id, None)

    def _do_Reply(self, effect: fx.Reply) -> None:
        self.unanswered.remove(effect.request)  # a KeyError is a second answer
        request = self.requests[effect.request]
        assert (effect.instance is None) is (effect.error is not None)
        if effect.instance is None:
            self._check_refusal(effect, request)
            return
        instance, tree = effect.instance, self.trees.get(effect.instance.key)
        assert instance.id == request.id
        if request.create:
            assert effect.status == "started"
            assert self.fleet.get(request.id) is instance
        else:
            assert effect.status == ("not_running" if request.over else "terminated")
            assert request.exists
            assert self.fleet.instances.get(request.id) is not instance
            assert tree is None or not tree.alive, "a stop was answered and the tree lives"

    def _check_refusal(self, effect: fx.Reply, request: Request) -> None:
        tree = self.trees.get(f"key-{effect.request}") if request.create else None
        if tree is not None:
            assert not tree.alive or self.fleet.get(request.id).key == f"key-{effect.request}"
        if not request.create:
            assert isinstance(effect.error, StuckError if request.exists else NotFoundError)

    # -- what must always hold ---------------------------------------------------------------------------------

    def verify(self) -> None:
        if self._adopting or self._handling:
            return
        instances = list(self.fleet.instances.values())
        for instance in instances:
            self._verify_instance(instance)
        holders = [instance for instance in instances if instance.state not in ENDED or not instance.tree_gone]
        gpus = [uuid for instance in holders for uuid in instance.config.gpu_uuids or ()]
        assert len(gpus) == len(set(gpus))
        assert set(gpus) == {uuid for uuid in GPUS if self.fleet.gpu_owner(uuid) is not None}
        ports = [instance.address.port for instance in holders if instance.address and instance.address.port]
        assert len(ports) == len(set(ports))
        keys = {instance.key for instance in instances}
        assert all(key in keys for key, tree in self.trees.items() if tree.told and tree.alive), "a tree without owner"
        listed = {instance.id: instance for instance in self.fleet.listed()}
        assert set(self.seen) == set(listed), "a watcher knows other instances than the list has"
        for instance_id, instance in listed.items():
            assert self.seen[instance_id] == known(instance)

    def _verify_instance(self, instance: Instance) -> None:
        handle = self.handles.get(instance.id)
        if instance.state in (State.STARTING, State.STOPPING):
            step = any(task.instance is instance for task in self.tasks if task.kind in ("check", "port", "start"))
            assert step or (handle is not None and (handle.killing or handle.timers)), "it waits for nothing"
        elif handle is not None:
            assert not handle.timers, "a timer for nothing"
        if instance.state is State.STARTING and instance.listed:
            assert handle is not None
            assert "start" in handle.timers
        if instance.listed and handle is not None and handle.tree is not None:
            assert instance.running is not handle.reported
        if instance.tree_gone and instance.key in self.trees:
            assert not self.trees[instance.key].alive or not self.trees[instance.key].told
