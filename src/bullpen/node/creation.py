"""The steps of a create that may wait: have the options checked, hold a port, turn the process into the server."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from bullpen.core import effects as fx
from bullpen.core import events as ev
from bullpen.core import redact
from bullpen.core.fleet import Fleet
from bullpen.core.instance import Config, Instance, Served
from bullpen.engines.base import Place
from bullpen.engines.registry import ENGINES
from bullpen.engines.weights import model_folder, weight_mib
from bullpen.errors import BullpenError, InvalidRequestError, LaunchError
from bullpen.node.handle import Handle
from bullpen.node.packets import ProcessEndedError
from bullpen.node.ports import resolve
from bullpen.node.resources import Resources
from bullpen.node.trees import read_process
from bullpen.node.zygote import Leased, ZygoteEndedError

logger = logging.getLogger("bullpen")

LEASE_ATTEMPTS = 3
OOM_SCORE = 200
"""Instances go before the daemon and its zygotes when the kernel must choose."""

SET_BY_THE_BOOK = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""Where an instance claims accelerators, its own values were checked to mean the same ones; ours are spelt as every
engine reads them."""

CreateEffect = fx.Check | fx.HoldPort | fx.Start
"""The steps of a create that may wait."""


class Creation:
    """Carries out the steps of creates.

    Args:
        fleet: read for what an effect is about.
        handles: where the process of a create is kept.
        submit: takes the next event.
        follow_exit: sees to it that the end of a server process is reported.
    """

    def __init__(
        self,
        fleet: Fleet,
        resources: Resources,
        handles: dict[str, Handle],
        submit: Callable[[ev.Event], None],
        follow_exit: Callable[[str, Handle], None],
    ) -> None:
        self._fleet = fleet
        self._resources = resources
        self._handles = handles
        self._submit = submit
        self._follow_exit = follow_exit
        self._folder = current_folder()
        self._steps: dict[type, Callable[[Instance, Any], Coroutine[Any, Any, None]]] = {
            fx.Check: self._check,
            fx.HoldPort: self._hold_port,
            fx.Start: self._start,
        }

    def _report(self, instance: Instance, event: ev.Event) -> None:
        """Submit what a step has come to, unless the instance is gone: another one may have its id by now."""
        if self._fleet.instances.get(instance.id) is instance:
            self._submit(event)

    def _is_current(self, instance: Instance, attempt: int) -> bool:
        """Whether an instance is still there, and still at the start that a step was for."""
        return self._fleet.instances.get(instance.id) is instance and instance.attempt == attempt

    async def step(self, effect: CreateEffect) -> None:
        """Do one step of a create; whatever goes wrong ends in a refusal, so that its caller gets an answer."""
        instance = self._fleet.instances.get(effect.id)
        if instance is None:
            return
        attempt = instance.attempt
        problem: BullpenError
        try:
            await self._steps[type(effect)](instance, effect)
            return
        except BullpenError as error:
            problem = error
        except Exception as error:
            logger.exception("creating %s failed; this is a bug in Bullpen", effect.id)
            problem = LaunchError(f"creating it failed inside Bullpen ({type(error).__name__}); its log has more")
        if self._is_current(instance, attempt):
            self._submit(ev.Refused(effect.id, problem))

    async def _check(self, instance: Instance, effect: CreateEffect) -> None:
        """Raises InvalidRequestError where the engine refuses, LaunchError where no process can be had."""
        attempt = instance.attempt
        leased, answer = await self._lease_and_check(instance.config)
        process = read_process(leased.pid)
        called_off = not self._is_current(instance, attempt) or not self._fleet.awaits(instance.id, ev.Checked)
        if called_off or process is None:
            leased.give_back()
            raise LaunchError("the process that was to become the server has ended; try again")
        self._handles[instance.id] = Handle(leased, leased.pidfd)
        if leased.reason:
            logger.warning("instance %s starts in a fresh interpreter: %s", instance.id, leased.reason)
        served = Served(
            model=answer["model"],
            served_model_names=tuple(answer["served_model_names"]),
            port=answer["port"],
            host=answer["host"],
            uds=answer["uds"],
            tls=answer["tls"],
            version=answer.get("version") or "",
            cannot_sleep=answer.get("sleep"),
            sleep_enabled=bool(answer.get("sleep_enabled")),
            utilization=utilization(answer, instance.config),
            devices=answer.get("devices") or 1,
            pooling=bool(answer.get("pooling")),
            weights_mib=await asyncio.to_thread(weights_on_disk, answer["model"], instance.config),
            kv_mib=(answer.get("kv_bytes") or 0) >> 20 or None,
        )
        self._submit(ev.Checked(instance.id, served, leased.pid, process.start_ticks, leased.how))

    async def check(self, config: Config) -> None:
        """Have the engine read options, in a process that is given back."""
        leased, _ = await self._lease_and_check(config)
        leased.give_back()

    async def _lease_and_check(self, config: Config) -> tuple[Leased, dict[str, Any]]:
        """A process, and what the engine's parser says in it; where zygote or process dies just then, from another."""
        for _ in range(LEASE_ATTEMPTS - 1):
            with suppress(ZygoteEndedError, ProcessEndedError):
                return await self._try_lease_and_check(config)
        return await self._try_lease_and_check(config)

    async def _try_lease_and_check(self, config: Config) -> tuple[Leased, dict[str, Any]]:
        early = ENGINES[config.engine].early_environment(config.env_vars or {})
        zygote = self._resources.zygotes.get(config.engine, early)
        try:
            leased = await zygote.lease()
        except ZygoteEndedError:
            await zygote.gone.wait()
            raise
        try:
            question = {"op": "check", "argv": config.argv}
            answer = await leased.channel.ask(question, seconds=leased.answer_seconds)
            if not answer.get("ok"):
                raise InvalidRequestError(redact.sentence(one_sentence(answer["error"]), config.argv))
        except BaseException:
            leased.give_back()
            raise
        return leased, answer

    async def _hold_port(self, instance: Instance, effect: CreateEffect) -> None:
        """Raises ConflictError, InvalidRequestError or LaunchError where the port cannot be had."""
        assert isinstance(effect, fx.HoldPort) and instance.served is not None
        address = await resolve(instance.served.host or self._resources.settings.instance_host)
        if self._fleet.instances.get(effect.id) is instance:
            port = self._resources.ports.hold(instance.key, effect.port, address, effect.avoid)
            self._submit(ev.PortReady(effect.id, port))

    async def _start(self, instance: Instance, effect: CreateEffect) -> None:
        """Raises LaunchError where the process cannot become the server."""
        handle = self._handles[instance.id]
        await self._become_server(instance, handle)
        self._report(instance, ev.Started(instance.id))
        self._follow_exit(instance.id, handle)

    async def _become_server(self, instance: Instance, handle: Handle) -> None:
        assert handle.leased is not None and instance.served is not None and instance.address is not None
        engine = ENGINES[instance.config.engine]
        place = self._place(instance)
        user = {
            name: value
            for name, value in (instance.config.env_vars or {}).items()
            if not instance.gpus or name not in SET_BY_THE_BOOK
        }
        log = self._resources.logs.create(instance.key, instance.id)
        handle.log_start = os.fstat(log).st_size
        try:
            make_folder(place)
            cgroup = self._resources.cgroups.create(instance.key)
            answer = await handle.leased.channel.ask(
                {
                    "op": "start",
                    "argv": engine.command_line(instance.config.argv, instance.served.host is not None, place),
                    "env": {**engine.environment(place, user), **self._mock_environment(instance)},
                    "user_env": dict(user),
                    "cwd": self._folder,
                    "title": f"bullpen: {instance.id} {instance.served.model}",
                    "cgroup": str(cgroup) if cgroup else None,
                    "oom_score_adj": OOM_SCORE,
                },
                (log,),
            )
        finally:
            os.close(log)
            handle.leased.channel.close()
        if not answer.get("ok"):
            raise LaunchError(f"the process cannot become the server: {answer.get('error')}")
        self._resources.cgroups.confirm(instance.key, handle.leased.pid)

    def _place(self, instance: Instance) -> Place:
        assert instance.address is not None
        folder = self._resources.state.instance_folder(instance.key)
        named = {gpu.uuid: gpu.visible for gpu in self._resources.gpus.list()}
        return Place(
            instance.address.host,
            instance.address.port,
            folder,
            visible_devices=tuple(named[uuid] for uuid in instance.gpus) if instance.gpus else None,
            sleep=instance.can_sleep,
            share=instance.config.gpu_share,
        )

    def _mock_environment(self, instance: Instance) -> dict[str, str]:
        """Where a simulator notes what it holds of GPUs that do not exist."""
        if not self._resources.settings.mock_gpus or not instance.gpus:
            return {}
        return {"BULLPEN_MOCK_GPU_DIR": str(self._resources.state.mock_gpus)}


def utilization(answer: Mapping[str, Any], config: Config) -> float | None:
    """The share of each accelerator that a server will take: its options' word, else the share that it claims."""
    given = answer.get("utilization_given", answer.get("utilization") is not None)
    share: float | None = answer.get("utilization")
    return share if given or config.gpu_share is None else config.gpu_share


def weights_on_disk(model: str, config: Config) -> int | None:
    """The size of a model's weights in MiB, for an estimate before its first start; None where they are not here."""
    folder = model_folder(model, {**os.environ, **(config.env_vars or {})})
    return None if folder is None else weight_mib(folder)


def current_folder() -> str:
    """Where relative paths in options begin: the daemon's folder, or the root where that was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def make_folder(place: Place) -> None:
    """Make an instance's own folder.

    Raises:
        LaunchError: it cannot be made.
    """
    try:
        place.folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as problem:
        raise LaunchError(f"the folder {place.folder} cannot be made: {problem.strerror}; make room there") from problem


def one_sentence(error: str) -> str:
    """A parser's message on one line, without what pydantic adds for programmers and without values that it quotes."""
    lines = [line.partition(" [type=")[0].strip() for line in error.splitlines()]
    kept = [line for line in lines if line and not line.startswith("For further information")]
    text = " ".join(kept)
    head, unknown, words = text.partition("unrecognized arguments: ")
    if unknown:
        flags = [word.partition("=")[0] for word in words.split() if word.startswith("-")]
        text = head + unknown + (" ".join(flags) or "words that are no options")
    return text[:500]
