"""vllm-bootstrap: its variables, its ports, and what its servers do not inherit."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bullpen import __version__
from bullpen.cli import bootstrap
from bullpen.cli.bootstrap import VARIABLES, main
from bullpen.client import SyncVLLMManager
from bullpen.daemon import serve as daemon
from bullpen.node.characters import LEAST_PIECE
from bullpen.node.logs import MAX_CHUNK
from bullpen.node.settings import Settings
from tests.support.daemon import Daemon

SCRIPT = [sys.executable, "-c", "import sys; from bullpen.cli.bootstrap import main; sys.exit(main())"]


@pytest.fixture
def bare(nobody: None) -> Iterator[None]:
    """None of the variables is set; what a test or the command changes comes back."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper() in VARIABLES or name.startswith("BULLPEN_")]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def served(bare: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Run the command with variables, and get the settings that the daemon would have had."""

    def start(*arguments: str, **variables: str) -> Settings:
        found: list[Settings] = []

        def serve(settings: Settings) -> int:
            found.append(settings)
            return 7

        monkeypatch.setattr(daemon, "serve", serve)
        os.environ.update(variables)
        assert main(arguments) == 7
        return found[0]

    return start


def test_help_names_every_variable_and_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in VARIABLES)
    assert all(f" --{name} " in shown for name in ("host", "port", "grpc-port", "config", "version", "state-dir"))


def test_the_documentation_has_every_variable() -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    assert [name for name in VARIABLES if f"| `{name}` |" not in page] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vllm-bootstrap (bullpen {__version__})\n"


def test_the_ports_are_that_systems(served: Callable[..., Settings]) -> None:
    settings = served()
    assert (settings.host, settings.port, settings.grpc_port) == ("0.0.0.0", 8000, None)
    assert settings.access_key is None and not settings.grpc_limit_message_size


def test_the_variables_are_settings(served: Callable[..., Settings], tmp_path: Path) -> None:
    settings = served(
        VLLM_BOOTSTRAP_HOST="127.0.0.1",
        VLLM_BOOTSTRAP_PORT="9000",
        VLLM_GRPC_PORT="9100",
        VLLM_GRPC_LIMIT_MESSAGE_SIZE="True",
        VLLM_BOOTSTRAP_LOG_DIR=str(tmp_path / "a" / "logs"),
        VLLM_ACCESS_KEY=" secret\n",
        VLLM_STOP_TIMEOUT_SECONDS="2.5",
        VLLM_LOG_READ_CHUNK_BYTES="4096",
    )
    assert (settings.host, settings.port, settings.grpc_port) == ("127.0.0.1", 9000, 9100)
    assert settings.grpc_limit_message_size and settings.access_key == "secret" and settings.stop_timeout == 2.5
    assert (settings.log_dir, settings.log_chunk) == (tmp_path / "a" / "logs", 4096)


def test_a_piece_of_log_may_be_asked_for_as_large_as_one_likes(served: Callable[..., Settings]) -> None:
    """It gets smaller ones, which every caller must expect; what no character fits in is a mistake."""
    assert served(VLLM_LOG_READ_CHUNK_BYTES=str(MAX_CHUNK + 1)).log_chunk == MAX_CHUNK
    assert served(VLLM_LOG_READ_CHUNK_BYTES=str(LEAST_PIECE)).log_chunk == LEAST_PIECE


def test_names_are_read_in_any_case(served: Callable[..., Settings]) -> None:
    settings = served(vllm_bootstrap_port="9001", Vllm_Access_Key="secret", vllm_grpc_port="1", VLLM_GRPC_PORT="9002")
    assert (settings.port, settings.access_key, settings.grpc_port) == (9001, "secret", 9002)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_blank_value_is_none(served: Callable[..., Settings], name: str) -> None:
    assert served(**{name: " "}) == served()


def test_what_goes_before_what(served: Callable[..., Settings], tmp_path: Path) -> None:
    file = tmp_path / "bullpen.yaml"
    file.write_text("stop-timeout: 1\nspares: 3\ngrpc-port: 1\nhost: 127.0.0.9\n")
    settings = served(
        "--config",
        str(file),
        "--grpc-port",
        "4",
        VLLM_GRPC_PORT="3",
        BULLPEN_GRPC_PORT="2",
        VLLM_BOOTSTRAP_HOST="127.0.0.3",
        BULLPEN_HOST="127.0.0.2",
        BULLPEN_STOP_TIMEOUT="2",
    )
    assert (settings.grpc_port, settings.host, settings.stop_timeout, settings.spares) == (4, "127.0.0.3", 2, 3)
    assert served(BULLPEN_PORT="9005").port == 9005
    assert served(BULLPEN_ACCESS_KEY="other", VLLM_ACCESS_KEY="secret").access_key == "secret"


def test_a_key_file_goes_before_the_variable(served: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    settings = served("--access-key-file", str(tmp_path / "key"), VLLM_ACCESS_KEY="secret")
    assert settings.access_key == "from-file"


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("VLLM_BOOTSTRAP_PORT", "eight", "give a port, a number from 0 to 65535"),
        ("VLLM_BOOTSTRAP_PORT", "65536", "give a port"),
        ("VLLM_GRPC_PORT", "-1", "give a port"),
        ("VLLM_GRPC_PORT", "٣", "give a port"),
        ("VLLM_GRPC_LIMIT_MESSAGE_SIZE", "maybe", "give true or false"),
        ("VLLM_STOP_TIMEOUT_SECONDS", "soon", "give a number of seconds, such as 10"),
        ("VLLM_STOP_TIMEOUT_SECONDS", "nan", "give a number of seconds"),
        ("VLLM_STOP_TIMEOUT_SECONDS", "-1", "give a number of seconds"),
        ("VLLM_LOG_READ_CHUNK_BYTES", str(LEAST_PIECE - 1), "give a number of bytes, 8 or more, such as 1048576"),
        ("VLLM_LOG_READ_CHUNK_BYTES", "1MiB", "give a number of bytes"),
        ("VLLM_BOOTSTRAP_HOST", "h\udcff", "it holds bytes that are no UTF-8"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    bare: None, capsys: pytest.CaptureFixture[str], name: str, text: str, advice: str
) -> None:
    os.environ[name] = text
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"bullpen: {name} is {text!r}: ") and advice in shown.err


@pytest.mark.parametrize("name", ["VLLM_ACCESS_KEY", "BULLPEN_ACCESS_KEY"])
def test_a_key_that_is_no_text_is_not_quoted(bare: None, capsys: pytest.CaptureFixture[str], name: str) -> None:
    os.environ[name] = "s3cr3t\udcff"
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"bullpen: {name}") and "it holds bytes that are no UTF-8" in shown.err
    assert "s3cr3t" not in shown.err


@pytest.mark.parametrize("host", ["256.1.1.1", "a b", "x..y", "a" * 70 + ".b", "1::2::3"])
def test_a_host_that_cannot_be(
    bare: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(logging, "disable", lambda: None)  # that would be for all tests to come
    os.environ.update(VLLM_BOOTSTRAP_HOST=host, VLLM_GRPC_PORT="0", BULLPEN_STATE_DIR=str(tmp_path))
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("bullpen: ") and host in shown.err and "choose another --host" in shown.err


def test_a_folder_for_logs_that_cannot_be(bare: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.environ.update(VLLM_BOOTSTRAP_LOG_DIR="/dev/null/logs", BULLPEN_ENGINE="sim", BULLPEN_STATE_DIR=str(tmp_path))
    os.environ.update(VLLM_BOOTSTRAP_PORT="0", VLLM_GRPC_PORT="0")
    assert main([]) == 2
    told = "bullpen: the folder for logs /dev/null/logs cannot be used: Not a directory; make it writable, or give"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--port", "99999"], ["--bogus"], ["model"]])
def test_wrong_usage(bare: None, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("bullpen: ")


def test_variables_are_taken_away() -> None:
    environ = {"VLLM_ACCESS_KEY": "secret", "vllm_grpc_port": " ", "VLLM_LOGGING_LEVEL": "DEBUG", "HOME": "/root"}
    assert bootstrap.take_variables(environ) == {"access_key": "secret"}
    assert environ == {"VLLM_LOGGING_LEVEL": "DEBUG", "HOME": "/root"}


def free_ports() -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return [one.getsockname()[1], other.getsockname()[1]]


def recording_python(folder: Path) -> Path:
    """An interpreter that writes down its environment, which is what servers inherit."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nenv -0 >"{folder}/environment"\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def test_it_serves_and_its_servers_inherit_none_of_it(tmp_path: Path) -> None:
    rest, rpc = free_ports()
    variables: dict[str, Any] = {
        "VLLM_BOOTSTRAP_HOST": "127.0.0.1",
        "VLLM_BOOTSTRAP_PORT": str(rest),
        "vllm_grpc_port": str(rpc),
        "VLLM_ACCESS_KEY": " secret ",
        "vllm_access_key": "another",
        "VLLM_STOP_TIMEOUT_SECONDS": "2",
        "VLLM_LOG_READ_CHUNK_BYTES": "1024",
        "VLLM_GRPC_LIMIT_MESSAGE_SIZE": "false",
        "VLLM_BOOTSTRAP_LOG_DIR": str(tmp_path / "logs"),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    unset = dict.fromkeys(("host", "port", "grpc_port", "stop_timeout"))
    settings: dict[str, Any] = {**unset, "engine_python": recording_python(tmp_path)}
    box = Daemon(tmp_path / "s", command=SCRIPT, environment=variables, **settings)
    with (
        box,
        SyncVLLMManager(f"http://127.0.0.1:{rest}", access_key="secret", grpc_address=f"127.0.0.1:{rpc}") as manager,
    ):
        assert box.wait_ready().url == f"http://127.0.0.1:{rest}"
        assert box.http.get("/launch").status_code == 401
        launch = manager.launch("tiny")
        manager.wait_until_ready(launch.launch_id, timeout=60)
        assert 0 < len(manager.logs(launch.launch_id).content.encode()) <= 1024
        (log,) = (tmp_path / "logs").iterdir()
        assert log.read_text().startswith(manager.logs(launch.launch_id).content)
        assert manager.complete(launch.launch_id, prompt="Once", max_tokens=3).text
        with grpc.insecure_channel(f"127.0.0.1:{rpc}") as channel:
            method: Any = channel.unary_unary("/vllm_bootstrap.InferenceService/Complete")
            with pytest.raises(grpc.RpcError) as refused:
                method(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        manager.stop(launch.launch_id)
        assert box.end(signal.SIGTERM) == 0
    lines = (tmp_path / "environment").read_text().rstrip("\0").split("\0")
    inherited = dict(line.split("=", 1) for line in lines)
    assert inherited["VLLM_LOGGING_LEVEL"] == "INFO"
    assert [name for name in inherited if name.upper() in VARIABLES] == []
    assert not {" secret ", "secret", "another"} & set(inherited.values())
