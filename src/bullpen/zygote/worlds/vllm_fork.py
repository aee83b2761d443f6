"""What is changed inside vLLM so that its whole process tree is forked warm, and why.

vLLM starts its engine core and its workers with ``multiprocessing``; by default each of them is a fresh interpreter
that imports everything again. The changes are few, made in our own processes only, and each one stands down where
the user has chosen otherwise or where a fork would be unsafe.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bullpen.zygote import guards

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
SINGLE_PROCESS_EXECUTOR = "VLLM_ENABLE_V1_MULTIPROCESSING"


def prepare_parent() -> None:
    """Do once in the parent what every worker would do for itself, and settle the heap for forking."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _allow_amx()
        _scan_for_kernel_overrides_once()
    _configure_logging_once()
    _remember_entry_points()
    _compile_a_chat_template()
    gc.collect()
    # vLLM runs full collections while it starts: slow on an inherited heap, and they would unshare its pages.
    gc.freeze()


def prepare_server(user_environment: Mapping[str, str]) -> None:
    """Make this process start its engine core and workers by forking."""
    from vllm.platforms import current_platform

    unsafe = guards.reason_not_to_fork()
    if METHOD not in user_environment:
        os.environ[METHOD] = "spawn" if unsafe else "fork"
        if current_platform.is_cpu() and not unsafe:
            _keep_fork_on_cpu()
    if current_platform.is_cpu() and SINGLE_PROCESS_EXECUTOR not in user_environment:
        # One worker: the engine core runs it itself, a process less. It falls back to a process for each worker
        # where there are several, whatever this says.
        os.environ[SINGLE_PROCESS_EXECUTOR] = "0"
    if not unsafe:
        _inspect_models_by_forking()


def _allow_amx() -> None:
    """Ask the kernel for the AMX registers, which a process and its forks inherit.

    Without it bf16 attention dies of SIGILL on processors that have AMX.
    """
    import torch

    try:
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
    except (AttributeError, RuntimeError):
        pass  # a torch that has no such call


def _scan_for_kernel_overrides_once() -> None:
    """Replace Triton kernels by C++ ones here; each worker's own scan of every module takes 0.4 s."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if register is None:
        return
    register()
    platform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def _configure_logging_once() -> None:
    """Set up vLLM's default logging here; a server whose options say nothing about it then has nothing to do."""
    try:
        from vllm.config.logging import LoggingConfig
        from vllm.logger import configure_logging, configure_logging_if_needed
        from vllm.v1.engine import core
    except ImportError:  # before 0.32, which has its logging set up when it is imported
        return
    configure_logging(LoggingConfig())
    # The engine core would set logging up whether that is needed or not.
    core.configure_logging = configure_logging_if_needed


def _remember_entry_points() -> None:
    """Read the metadata of all installed packages once; vLLM does it anew for each group of plugins in each process."""
    everything = metadata.entry_points()

    def entry_points(**wanted: Any) -> Any:
        return everything.select(**wanted) if wanted else everything

    metadata.entry_points = entry_points


def _compile_a_chat_template() -> None:
    """Use jinja once: the first template of a process fills caches that all others share."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.from_string("{% for message in messages %}{{ message['content'] }}{% endfor %}").render(messages=[])


def _keep_fork_on_cpu() -> None:
    """On the CPU vLLM sets ``spawn`` while it checks the configuration: set ``fork`` again after."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        os.environ[METHOD] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)


def _inspect_models_by_forking() -> None:
    """vLLM looks at a model's class in a fresh interpreter (7 s) where its cache has no entry: fork instead.

    It does so only to keep CUDA out of the server; a fork keeps it out just as well while CUDA is not initialised.
    """
    from vllm.model_executor.models import registry

    original = getattr(registry, "_run_in_subprocess", None)
    if original is None:
        return

    def run_in_fork(function: Callable[[], Any]) -> Any:
        import torch

        return original(function) if torch.cuda.is_initialized() else call_in_fork(function)

    registry._run_in_subprocess = run_in_fork


def call_in_fork(function: Callable[[], Any]) -> Any:
    """Call a function in a forked process and return what it returned.

    Raises:
        RuntimeError: it raised; the text holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        pid = os.fork()
        if pid == 0:
            _answer_and_exit(function, result)
        _, status = os.waitpid(pid, 0)
        answer = pickle.loads(result.read_bytes()) if result.exists() else None
    if answer is None or os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the inspection of a model's class ended with status {status}")
    value, error = answer
    if error:
        raise RuntimeError(f"Error raised in subprocess:\n{error}")
    return value


def _answer_and_exit(function: Callable[[], Any], result: Path) -> None:
    try:
        answer: tuple[Any, str | None] = (function(), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    try:
        result.write_bytes(pickle.dumps(answer))
        os._exit(0)
    finally:
        os._exit(1)
