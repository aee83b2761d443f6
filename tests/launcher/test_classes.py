"""The launcher's classes: their shape, and their use in a script without a daemon."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import BaseModel, ValidationError

from bullpen.errors import BullpenError, ConflictError, InvalidRequestError, NotFoundError, StateError
from bullpen.launcher import VllmConfig, VllmInstance, VllmMultiProcessManager
from tests.support.daemon import Daemon, wait_until
from tests.support.processes import is_alive

MODEL = VllmConfig(options="--model m")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[VllmMultiProcessManager]:
    with VllmMultiProcessManager(engine="sim", state_dir=tmp_path / "state") as manager:
        yield manager


def wait_state(manager: VllmMultiProcessManager, instance_id: str, state: str) -> dict[str, Any]:
    wait_until(lambda: bool(manager.get_instance_status(instance_id)["state"] == state))
    return manager.get_instance_status(instance_id)


# -- shape ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "method", "parameters"),
    [
        (VllmInstance, "start", {}),
        (VllmInstance, "stop", {"timeout": 10}),
        (VllmInstance, "get_status", {}),
        (VllmInstance, "get_log_bytes", {"start": 0, "end": None}),
        (VllmMultiProcessManager, "create_instance", {"vllm_config": ..., "instance_id": None}),
        (VllmMultiProcessManager, "stop_instance", {"instance_id": ..., "timeout": 10}),
        (VllmMultiProcessManager, "stop_all_instances", {"timeout": 10}),
        (VllmMultiProcessManager, "get_instance_status", {"instance_id": ...}),
        (VllmMultiProcessManager, "get_all_instances_status", {}),
        (VllmMultiProcessManager, "get_instance_log_bytes", {"instance_id": ..., "start": 0, "end": None}),
        (VllmMultiProcessManager, "__init__", {"engine": "vllm", "state_dir": None}),
    ],
)
def test_methods_and_defaults(owner: type, method: str, parameters: dict[str, Any]) -> None:
    function = getattr(owner, method)
    assert not inspect.iscoroutinefunction(function), "a plain synchronous call"
    found = list(inspect.signature(function).parameters.values())[1:]
    assert {
        parameter.name: ... if parameter.default is parameter.empty else parameter.default for parameter in found
    } == parameters
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in found)


def test_configuration_is_a_pydantic_model() -> None:
    assert issubclass(VllmConfig, BaseModel)
    document = {
        "options": "--model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --port 8005",
        "env_vars": {"VLLM_USE_V1": "1", "VLLM_LOGGING_LEVEL": "DEBUG"},
    }
    config = VllmConfig.model_validate(document)
    assert (config.options, config.env_vars) == (document["options"], document["env_vars"])
    assert VllmConfig(options="--model m").env_vars is None
    with pytest.raises(ValidationError) as caught:
        VllmConfig.model_validate({"env_vars": {"A": ["s3cr3t"]}})
    assert "s3cr3t" not in str(caught.value)


# -- use -----------------------------------------------------------------------------------------------------------


def test_life_of_an_instance(manager: VllmMultiProcessManager) -> None:
    created = manager.create_instance(MODEL, "one")
    assert (created["status"], created["instance_id"]) == ("started", "one")
    assert wait_state(manager, "one", "ready")["status"] == "running"
    stopped = manager.stop_instance("one")
    assert (stopped["status"], stopped["instance_id"]) == ("terminated", "one")
    assert not is_alive(created["pid"])
    with pytest.raises(NotFoundError, match="'one'"):
        manager.get_instance_status("one")


def test_several_instances(manager: VllmMultiProcessManager) -> None:
    ids = [manager.create_instance(MODEL)["instance_id"] for _ in range(2)]
    manager.create_instance(VllmConfig(options="m", env_vars={"BULLPEN_SIM_EXIT_AFTER": 0.05}), "dead")
    wait_state(manager, "dead", "failed")
    everything = manager.get_all_instances_status()
    assert (everything["total_instances"], everything["running_instances"]) == (3, 2)
    assert [one["instance_id"] for one in everything["instances"]] == [*ids, "dead"]
    stopped = manager.stop_all_instances()
    assert (stopped["status"], stopped["total_stopped"]) == ("all_stopped", 3)
    assert {one["instance_id"]: one["status"] for one in stopped["stopped_instances"]} == {
        ids[0]: "terminated",
        ids[1]: "terminated",
        "dead": "not_running",
    }
    assert manager.get_all_instances_status()["total_instances"] == 0


def test_stop_by_force_after_its_timeout(manager: VllmMultiProcessManager) -> None:
    created = manager.create_instance(VllmConfig(options="m", env_vars={"BULLPEN_SIM_STUBBORN": 2}), "stubborn")
    wait_state(manager, "stubborn", "ready")
    assert manager.stop_instance("stubborn", timeout=0.2)["status"] == "terminated"
    assert not is_alive(created["pid"])


def test_log(manager: VllmMultiProcessManager) -> None:
    manager.create_instance(VllmConfig(options="m", env_vars={"BULLPEN_SIM_EXIT_AFTER": 0.3}), "one")
    wait_state(manager, "one", "failed")
    data, total = manager.get_instance_log_bytes("one")
    assert len(data) == total
    assert b"this is a simulator" in data
    assert manager.get_instance_log_bytes("one", 5, 10) == (data[5:10], total)
    assert manager.get_instance_log_bytes("one", start=total - 4) == (data[-4:], total)
    assert manager.get_instance_log_bytes("one", total + 5) == (b"", total)
    with pytest.raises(NotFoundError):
        manager.get_instance_log_bytes("none")


@pytest.mark.parametrize(
    ("instance_id", "options", "error"),
    [
        ("taken", "--model m", ConflictError),
        (None, "--model m --port eight", InvalidRequestError),
        (None, "--port 1", InvalidRequestError),
        (None, "--model 'm", InvalidRequestError),
        ("../etc", "--model m", InvalidRequestError),
        ("watch", "--model m", InvalidRequestError),
    ],
)
def test_refusals(
    manager: VllmMultiProcessManager, instance_id: str | None, options: str, error: type[BullpenError]
) -> None:
    manager.create_instance(MODEL, "taken")
    with pytest.raises(error):
        manager.create_instance(VllmConfig(options=options), instance_id)
    assert manager.get_all_instances_status()["total_instances"] == 1


def test_instance_by_itself(manager: VllmMultiProcessManager) -> None:
    instance = VllmInstance("one", MODEL, manager)
    assert (instance.instance_id, instance.config) == ("one", MODEL)
    assert instance.start()["status"] == "started"
    wait_state(manager, "one", "ready")
    assert instance.get_status() == manager.get_instance_status("one")
    data, total = instance.get_log_bytes(0, 10)
    assert (data, total > 10) == (b"bullpen si", True)
    assert instance.stop(timeout=5)["status"] == "terminated"
    assert manager.get_all_instances_status()["total_instances"] == 0


def test_context_stops_what_it_started(tmp_path: Path) -> None:
    with VllmMultiProcessManager("sim", tmp_path) as manager:
        pids = [manager.create_instance(MODEL)["pid"] for _ in range(3)]
    assert not [pid for pid in pids if is_alive(pid)]
    manager.close()  # once more does nothing


def test_context_stops_what_it_started_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the caller"), VllmMultiProcessManager("sim", tmp_path) as manager:
        pid = manager.create_instance(MODEL)["pid"]
        raise RuntimeError("of the caller")
    assert not is_alive(pid)


def test_manager_that_is_closed_says_so(tmp_path: Path) -> None:
    with VllmMultiProcessManager("sim", tmp_path) as manager:
        pass
    with pytest.raises(StateError, match="closed"):
        manager.create_instance(MODEL)


def test_state_directory_of_a_running_daemon(daemon: Daemon) -> None:
    with pytest.raises(StateError, match=f"pid {daemon.pid}"):
        VllmMultiProcessManager("sim", daemon.state_dir)


def test_in_a_script(tmp_path: Path) -> None:
    """Without a state directory, and without any setting: what is left is nothing."""
    script = """
        from bullpen.launcher import VllmConfig, VllmMultiProcessManager

        with VllmMultiProcessManager(engine="sim") as manager:
            created = manager.create_instance(VllmConfig(options="--model facebook/opt-125m"), "mine")
            print(created["status"], manager.get_instance_status("mine")["status"], created["pid"])
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BULLPEN_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    started, running, pid = done.stdout.split()
    assert (started, running) == ("started", "running")
    assert not is_alive(int(pid))
    assert not list(tmp_path.iterdir()), "its temporary state directory is gone"


def test_ctrl_c_in_a_script_stops_what_it_started(tmp_path: Path) -> None:
    script = """
        import time
        from bullpen.launcher import VllmConfig, VllmMultiProcessManager

        with VllmMultiProcessManager(engine="sim") as manager:
            print(manager.create_instance(VllmConfig(options="m"))["pid"], flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        server = psutil.Process(pid)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert not (server.is_running() and is_alive(pid))
