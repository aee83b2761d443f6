"""Real vLLM for the tests: models made on the spot, and one warm daemon for as many tests as can share it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bullpen.demo import models as demo_models
from tests.real import minilm
from tests.real.serving import Models, wait_ready
from tests.support.bootstrap_readme import EMBEDDER, WRITER
from tests.support.daemon import Daemon

LONG_CONTEXT = 32768
SHARED = ("tiny-a", "tiny-b")
OPINIONS = {"max_new_tokens": 3, "repetition_penalty": 9.0}
"""Of the generation configuration of ``tiny-opinions``."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is real."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``tiny-a`` and ``tiny-b``; ``tiny-long`` with room for long answers; ``unknown`` of no known architecture;
    ``tiny-opinions`` with wishes of its own about how it is sampled."""
    folder = tmp_path_factory.mktemp("models")
    engine = demo_models.find_engine(sys.executable)
    paths = demo_models.make_models(engine, folder)
    derive(paths[0], folder / "tiny-long", max_position_embeddings=LONG_CONTEXT)
    derive(paths[0], folder / "unknown", architectures=["NobodyKnowsForCausalLM"])
    derive(paths[0], folder / "tiny-opinions")
    (folder / "tiny-opinions" / "generation_config.json").write_text(json.dumps(OPINIONS))
    _, _, _, *tiny = engine.options(paths[0])
    return Models(folder, tuple(tiny))


def keep_in_hub(home: Path, name: str, model: Path) -> None:
    """Keep a model where the Hugging Face hub's client keeps what it has downloaded under a name."""
    folder, revision = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(model, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


def derive(model: Path, target: Path, **changes: Any) -> None:
    """Copy a model with changes to its configuration."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="session")
def start_real_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Daemon]]:
    """Start daemons on real vLLM that end, with their instances, when the tests do."""
    started: list[Daemon] = []

    def start(state_dir: Path | None = None, environment: Mapping[str, str] | None = None, **settings: Any) -> Daemon:
        folder = state_dir or tmp_path_factory.mktemp("state")
        variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **(environment or {})}
        # vLLM's server, told to end while it starts or while a stream is open, has to be killed: do not wait long.
        daemon = Daemon(folder, engine="vllm", environment=variables, **{"stop_timeout": 2, **settings})
        started.append(daemon)
        return daemon.wait_ready()

    yield start
    for daemon in reversed(started):
        if daemon.process.poll() is None:
            assert daemon.end() == 0


@pytest.fixture(scope="session")
def daemon(start_real_daemon: Callable[..., Daemon]) -> Daemon:
    """The warm daemon that most tests share."""
    return start_real_daemon().wait_warm()


@pytest.fixture(scope="session")
def pair(daemon: Daemon, models: Models) -> dict[str, dict[str, Any]]:
    """``tiny-a`` and ``tiny-b``, started at once and ready. Nobody stops them."""
    for name in SHARED:
        daemon.create(models.options(name), instance_id=name)
    return {name: wait_ready(daemon, name) for name in SHARED}


@pytest.fixture(scope="session")
def box(start_real_daemon: Callable[..., Daemon], models: Models, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """A warm daemon with gRPC, whose host can load the models that vllm-bootstrap's README names, under their names."""
    home = tmp_path_factory.mktemp("hub")
    keep_in_hub(home, WRITER, models.folder / "tiny-a")
    keep_in_hub(home, EMBEDDER, Path(minilm.FOLDER))
    # 1 GiB where vLLM would take most of the host's memory, and no compiler, for those who ask for neither.
    modest = {"HF_HOME": str(home), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
    daemon = start_real_daemon(grpc_port=None, environment=modest)
    daemon.wait_grpc()
    return daemon.wait_warm()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves an instance of its own on the shared daemon."""
    yield
    if "box" in request.fixturenames:
        box: Daemon = request.getfixturevalue("box")
        current = [launch["launch_id"] for launch in box.http.get("/launch").json()]
        for launch_id in current:
            box.http.post(f"/stop/{launch_id}")
        assert not current
    if "daemon" in request.fixturenames:
        shared: Daemon = request.getfixturevalue("daemon")
        left = set(shared.http.get("/v2/vllm/instances?detail=False").json()["instance_ids"]) - set(SHARED)
        for instance_id in left:
            shared.delete(instance_id)
        assert not left
