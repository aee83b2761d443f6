"""vLLM's world: what to import ahead, how to read its command line, how to run its server.

Names inside vLLM move between versions. This file uses the highest stable entry, ``ServeSubcommand``, for the parser,
the checks and the server alike; what else depends on a version is in ``vllm_fork`` and in ``vllm_modules.txt``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bullpen.zygote.preload import PreloadReport, Progress, import_module, import_modules, read_names
from bullpen.zygote.worlds import OptionsError, vllm_fork

ENTRY_MODULES = ("torch", "vllm", "vllm.entrypoints.cli.serve")
"""Without these there is no server; a failure here breaks the zygote."""
LIKELY_MODULES = 100
"""How long the list of modules may turn out; it is known once vLLM has said its version."""
MODULE_LISTS = Path(__file__).with_name("vllm_modules")
"""What start-up imports lazily, learned for each version (``scripts/learn_modules.py``); a version without a list of
its own uses the nearest older one, or else the oldest."""

SINGLE_THREAD_AT_IMPORT = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Libraries that would start a pool of native threads when imported; unset again once they are."""


class VllmWorld:
    """vLLM as the zygote sees it."""

    early_environment: Mapping[str, str] = dict.fromkeys(SINGLE_THREAD_AT_IMPORT, "1")

    def __init__(self) -> None:
        self._parser: argparse.ArgumentParser | None = None
        self._torch_threads = 1

    def preload(
        self, report: PreloadReport, progress: Progress, modules: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Import vLLM and everything its start-up imports lazily, and build what every server builds anew."""
        self._import_torch(report, progress)
        import_modules(ENTRY_MODULES, report, progress, after=LIKELY_MODULES)
        broken = [module for module in report.modules if module.name in ENTRY_MODULES and module.error]
        if broken:
            raise ImportError(f"{broken[0].name} cannot be imported: {broken[0].error}")
        names = module_list(installed_version()) if modules is None else modules
        import_modules(names, report, progress, before=len(ENTRY_MODULES))
        self._parser = build_parser()
        vllm_fork.prepare_parent()
        for name in self.early_environment:
            os.environ.pop(name, None)
        return facts()

    def _import_torch(self, report: PreloadReport, progress: Progress) -> None:
        """Import torch first and keep it at one thread: a parallel operation before a fork hangs the child."""
        torch_report = import_module("torch")
        report.modules.append(torch_report)
        report.seconds += torch_report.seconds
        progress(torch_report, 1, len(ENTRY_MODULES) + LIKELY_MODULES)
        if torch_report.error:
            raise ImportError(f"torch cannot be imported: {torch_report.error}")
        import torch

        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def check(self, argv: Sequence[str]) -> dict[str, Any]:
        """Have vLLM's own parser and its checks read a command line; beside what every world answers:

        ``version``: of vLLM. ``sleep``: why this server could not sleep, None where it can. ``sleep_enabled``: whether
        the options ask for sleep mode. ``utilization``: the part of each accelerator's memory that it will use;
        ``utilization_given``: whether the options say so. ``devices``: the accelerators that it needs here.
        ``pooling``: whether the options ask for a model that embeds or classifies. ``kv_bytes``: the size of the KV
        cache in bytes where the options name one.
        """
        arguments = self._parse(argv)
        model = arguments.model_tag or arguments.model
        if not model:
            raise OptionsError("no model: give --model NAME, or the name as the first word")
        if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
            raise OptionsError(f"argument --model: there is nothing at {model}")
        names = arguments.served_model_name or [model]
        platform_cannot = no_sleep_here()
        if arguments.enable_sleep_mode and platform_cannot:
            # Else vLLM would say so much later, in the log of a server that ends.
            raise OptionsError(f"argument --enable-sleep-mode: leave it out: {platform_cannot}")
        return {
            "version": installed_version_text(),
            "model": model,
            "port": arguments.port,
            "host": arguments.host,
            "uds": arguments.uds,
            "tls": bool(arguments.ssl_certfile),
            "served_model_names": [names] if isinstance(names, str) else list(names),
            "sleep": platform_cannot or no_sleep_with(arguments),
            "sleep_enabled": bool(arguments.enable_sleep_mode),
            "utilization": arguments.gpu_memory_utilization,
            "utilization_given": arguments.utilization_given,
            "devices": devices(arguments),
            "pooling": arguments.runner == "pooling" or arguments.convert not in ("auto", "none"),
            "kv_bytes": arguments.kv_cache_memory_bytes,
        }

    def _parse(self, argv: Sequence[str]) -> argparse.Namespace:
        from vllm.entrypoints.cli.serve import ServeSubcommand

        assert self._parser is not None, "preload comes first"
        # The defaults are vLLM's own (a model of its choice, port 8000): what counts is what the user gave.
        self._parser.set_defaults(model=None, port=None)
        unsaid = argparse.Namespace(gpu_memory_utilization=None)
        try:
            arguments = self._parser.parse_args(list(argv), unsaid)
            arguments.utilization_given = arguments.gpu_memory_utilization is not None
            if not arguments.utilization_given:
                arguments.gpu_memory_utilization = self._parser.get_default("gpu_memory_utilization")
            chosen, arguments.port = arguments.port, arguments.port or 0
            ServeSubcommand().validate(arguments)
            arguments.port = chosen
        except SystemExit as end:
            raise OptionsError("this option prints something and ends; it starts no server") from end
        except (ValueError, TypeError, argparse.ArgumentTypeError, OSError) as problem:
            raise OptionsError(str(problem) or type(problem).__name__) from problem
        return arguments

    def serve(self, argv: Sequence[str], user_environment: Mapping[str, str]) -> int:
        """Run ``vllm serve`` in this process; every process of its tree is forked from here."""
        import torch
        from vllm.entrypoints.cli.serve import ServeSubcommand

        torch.set_num_threads(positive_number(os.environ.get("OMP_NUM_THREADS")) or self._torch_threads)
        vllm_fork.prepare_server(user_environment)
        sys.argv = ["vllm", "serve", *argv]
        assert self._parser is not None, "preload comes first"
        arguments = self._parser.parse_args(list(argv))
        command = ServeSubcommand()
        command.validate(arguments)
        command.cmd(arguments)
        return 0


def installed_version_text() -> str:
    """The version of the vLLM that was imported, as it says it; empty where it does not."""
    import vllm

    return str(getattr(vllm, "__version__", ""))


def installed_version() -> tuple[int, ...]:
    """The same in numbers; ``(0,)`` where it does not say."""
    numbers = re.match(r"[0-9.]*", installed_version_text())
    return tuple(int(number) for number in (numbers[0] if numbers else "").split(".") if number) or (0,)


def module_list(version: tuple[int, ...]) -> list[str]:
    """The modules to import ahead for a version of vLLM."""
    lists = {tuple(map(int, file.stem.split("."))): file for file in MODULE_LISTS.glob("*.txt")}
    older = [known for known in lists if known <= version[:2]]
    return read_names(lists[max(older) if older else min(lists)].read_text().splitlines())


def build_parser() -> argparse.ArgumentParser:
    """``vllm serve``'s parser, whose refusals are `OptionsError` and not an end of the process."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser

    commands = FlexibleArgumentParser(prog="vllm").add_subparsers()
    parser: argparse.ArgumentParser = ServeSubcommand().subparser_init(commands)

    def refuse(message: str) -> None:
        raise OptionsError(message)

    parser.error = refuse  # type: ignore[method-assign,assignment]
    return parser


def no_sleep_here() -> str | None:
    """Why vLLM cannot sleep on this platform; None where it can. Asks for the platform's kind alone, which touches no
    accelerator."""
    from vllm.platforms import current_platform

    if current_platform.is_sleep_mode_available():
        return None
    kind = current_platform.device_type or "a machine where it finds no accelerator"
    return f"vLLM cannot sleep on {kind}; ask for an emulated sleep (`sleep: emulate`)"


def no_sleep_with(arguments: argparse.Namespace) -> str | None:
    """Why a server with these options could not sleep; None where it can."""
    servers = arguments.api_server_count
    if servers is None:
        servers = arguments.data_parallel_size  # what vLLM makes of it
    if servers > 1:
        return (
            f"it would have {servers} API servers, each of which admits requests by itself; "
            "give --api-server-count 1 so that it can sleep"
        )
    if arguments.load_format == "ipc_cache":
        return "its weights stay in vLLM's weight cache daemon (--load-format ipc_cache), which sleep cannot reach"
    return None


def devices(arguments: argparse.Namespace) -> int:
    """How many accelerators a server takes on this machine, counted as vLLM counts its workers."""
    workers: int = (
        arguments.tensor_parallel_size * arguments.pipeline_parallel_size * arguments.prefill_context_parallel_size
    )
    replicas: int = arguments.data_parallel_size
    nodes: int = arguments.nnodes
    if nodes > 1:
        return workers * replicas // nodes
    if arguments.data_parallel_rank is not None or arguments.data_parallel_external_lb:
        return workers
    if arguments.data_parallel_size_local is not None:
        replicas = arguments.data_parallel_size_local
    return workers * replicas


def positive_number(text: str | None) -> int | None:
    """The number that ``text`` says, where it says one above zero."""
    return int(text) if text and text.isdecimal() and int(text) > 0 else None


def facts() -> dict[str, Any]:
    """What a user may want to know of this vLLM."""
    import torch
    from vllm.platforms import current_platform

    return {
        "version": installed_version_text(),
        "platform": str(current_platform.device_type),
        "torch": torch.__version__,
    }


world = VllmWorld()
