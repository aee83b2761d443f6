"""The launcher's Python face: its classes, and the same service as an ASGI application.

``python -m bullpen.launcher`` and ``uvicorn --port 8001 bullpen.launcher:app`` start the daemon that ``bullpen serve``
starts; under uvicorn it has no gRPC port. In a script, without a daemon::

    from bullpen.launcher import VllmConfig, VllmMultiProcessManager

    with VllmMultiProcessManager() as manager:
        status = manager.create_instance(VllmConfig(options="--model facebook/opt-125m --port 8000"))

The classes are synchronous views of the supervisor that the REST API uses.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from bullpen.core.public import public
from bullpen.errors import StateError
from bullpen.node.settings import Settings, load
from bullpen.node.supervisor import Supervisor
from bullpen.web.models import VllmConfig

__all__ = ["VllmConfig", "VllmInstance", "VllmMultiProcessManager"]

T = TypeVar("T")


class VllmMultiProcessManager:
    """Manages several instances, without a daemon.

    Args:
        engine: ``vllm`` or ``sim``.
        state_dir: where journal and logs go; a temporary one where None.

    Raises:
        StateError: the state directory cannot be used.
    """

    def __init__(self, engine: Literal["vllm", "sim"] = "vllm", state_dir: str | Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="bullpen-") if state_dir is None else None
        folder = Path(self._temporary.name if self._temporary is not None else str(state_dir))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bullpen", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._supervisor = Supervisor(Settings(engine=engine, state_dir=folder))
            self._call(self._supervisor.start())
        except BaseException:
            self._end_loop()
            raise

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise StateError("this manager is closed; make a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _on_loop(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def create_instance(self, vllm_config: VllmConfig, instance_id: str | None = None) -> dict[str, Any]:
        """Create and start an instance; return its description, ``status`` being ``started``.

        Raises:
            InvalidRequestError: options or id can never work.
            ConflictError: the id, a port or a GPU is another's.
            LaunchError: no process could be made.
        """
        config = self._supervisor.read_config(**vllm_config.model_dump())
        return public(self._call(self._supervisor.create(config, instance_id)), "started")

    def stop_instance(self, instance_id: str, timeout: float = 10) -> dict[str, Any]:
        """Stop and remove an instance; ``timeout``: seconds from SIGTERM to SIGKILL.

        Raises:
            NotFoundError: there is none of that id.
        """
        return public(*self._call(self._supervisor.stop(instance_id, timeout)))

    def stop_all_instances(self, timeout: float = 10) -> dict[str, Any]:
        """Stop and remove all instances, side by side."""
        stopped = [public(instance, word) for instance, word in self._call(self._supervisor.stop_all(timeout))]
        return {"status": "all_stopped", "stopped_instances": stopped, "total_stopped": len(stopped)}

    def get_instance_status(self, instance_id: str) -> dict[str, Any]:
        """Describe an instance.

        Raises:
            NotFoundError: there is none of that id.
        """
        return public(self._call(self._on_loop(self._supervisor.fleet.get, instance_id)))

    def get_all_instances_status(self) -> dict[str, Any]:
        """Describe all instances."""
        documents = [public(instance) for instance in self._call(self._on_loop(self._supervisor.fleet.listed))]
        running = sum(document["status"] == "running" for document in documents)
        return {"total_instances": len(documents), "running_instances": running, "instances": documents}

    def get_instance_log_bytes(self, instance_id: str, start: int = 0, end: int | None = None) -> tuple[bytes, int]:
        """Bytes of an instance's log from ``start`` up to and not including ``end`` (1 MiB at most), and its size.

        Raises:
            NotFoundError: there is none of that id.
        """
        chunk = self._call(self._on_loop(self._supervisor.read_log, instance_id, start, end))
        return chunk.data, chunk.total

    def close(self) -> None:
        """Stop what was started, and end."""
        if self._closed:
            return
        self._closed = True
        try:
            self._call(self._supervisor.close())
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> VllmMultiProcessManager:
        """Be one's own context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what was started."""
        self.close()


class VllmInstance:
    """One instance with its configuration.

    Args:
        instance_id: its id.
        config: what to run.
        manager: who runs it; a manager of its own where None, which ends with `stop`.
    """

    def __init__(self, instance_id: str, config: VllmConfig, manager: VllmMultiProcessManager | None = None) -> None:
        self.instance_id = instance_id
        self.config = config
        self._manager = manager
        self._owns_manager = manager is None

    def _managed(self) -> VllmMultiProcessManager:
        if self._manager is None:
            self._manager = VllmMultiProcessManager()
        return self._manager

    def start(self) -> dict[str, Any]:
        """Start the server. Raises what `VllmMultiProcessManager.create_instance` does."""
        return self._managed().create_instance(self.config, self.instance_id)

    def stop(self, timeout: float = 10) -> dict[str, Any]:
        """Stop the server, by force after ``timeout`` seconds."""
        document = self._managed().stop_instance(self.instance_id, timeout)
        if self._owns_manager and self._manager is not None:
            self._manager.close()
            self._manager = None
        return document

    def get_status(self) -> dict[str, Any]:
        """Describe the instance."""
        return self._managed().get_instance_status(self.instance_id)

    def get_log_bytes(self, start: int = 0, end: int | None = None) -> tuple[bytes, int]:
        """Bytes of the log, and its size."""
        return self._managed().get_instance_log_bytes(self.instance_id, start, end)


def __getattr__(name: str) -> Any:
    """Make ``app`` when it is asked for: settings come from the environment, and a script needs none of it."""
    if name == "app":
        from bullpen.web.app import create_app

        return create_app(load({}))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    import sys

    if sys.argv[1:]:
        wanted = sys.argv[1:] in (["-h"], ["--help"])
        print(
            "python -m bullpen.launcher takes no arguments: its settings come from BULLPEN_* variables;"
            " `bullpen serve --help` has them as flags",
            file=sys.stdout if wanted else sys.stderr,
        )
        raise SystemExit(0 if wanted else 2)

    from bullpen.daemon.serve import serve

    try:
        raise SystemExit(serve(load({})))
    except StateError as problem:
        print(f"bullpen: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
