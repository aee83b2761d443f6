"""Settings: the command line over the environment over the file over defaults; errors say where to look."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bullpen.errors import StateError
from bullpen.node.settings import Settings, load


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "bullpen.yaml"
    path.write_text("port: 3000\nlog-level: debug\nstop_timeout: 3\n")
    return path


def test_defaults_need_nothing() -> None:
    settings = load({}, environ={})
    assert (settings.host, settings.port, settings.on_exit, settings.access_key) == ("0.0.0.0", 8001, "stop", None)
    assert settings.state_dir.name == "bullpen"


def test_the_upper_layer_counts(config: Path) -> None:
    environ = {"BULLPEN_PORT": "2000", "BULLPEN_LOG_LEVEL": "info", "BULLPEN_SPARES": "2"}
    settings = load({"port": 1000, "spares": None}, config, environ)
    assert settings.port == 1000, "command line"
    assert settings.log_level == "info", "environment"
    assert settings.spares == 2, "a flag that was not given is no flag"
    assert settings.stop_timeout == 3, "file"
    assert settings.instance_host == "127.0.0.1", "default"


LAYERS = st.lists(st.integers(1, 65535) | st.none(), min_size=3, max_size=3)


@given(ports=LAYERS)
def test_precedence(tmp_path_factory: pytest.TempPathFactory, ports: list[int | None]) -> None:
    flag, variable, key = ports
    path = tmp_path_factory.getbasetemp() / "precedence.yaml"
    path.write_text("" if key is None else f"port: {key}")
    environ = {} if variable is None else {"BULLPEN_PORT": str(variable)}
    expected = next((port for port in ports if port is not None), 8001)
    assert load({"port": flag}, path, environ).port == expected


def test_the_file_can_be_named_in_the_environment(config: Path) -> None:
    assert load({}, environ={"BULLPEN_CONFIG": str(config)}).port == 3000


def test_variables_that_are_empty_are_not_set() -> None:
    assert load({}, environ={"BULLPEN_PORT": "", "BULLPEN_CONFIG": ""}).port == 8001


def test_kinds_of_values_in_the_environment(tmp_path: Path) -> None:
    environ = {
        "BULLPEN_MOCK_GPUS": "true",
        "BULLPEN_ALLOW_ENV": "LD_PRELOAD, PYTHONPATH",
        "BULLPEN_STATE_DIR": str(tmp_path),
        "BULLPEN_STOP_TIMEOUT": "2.5",
        "BULLPEN_ENGINE": "sim",
    }
    settings = load({}, environ=environ)
    assert settings.mock_gpus is True
    assert settings.allow_env == ("LD_PRELOAD", "PYTHONPATH")
    assert settings.state_dir == tmp_path
    assert settings.stop_timeout == 2.5
    assert settings.engine == "sim"


def test_the_home_folder_may_be_named_by_its_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load({}, environ={"BULLPEN_STATE_DIR": "~/pen"}).state_dir == Path("/home/me/pen")
    (tmp_path / "file.yaml").write_text("state-dir: ~/pen")
    assert load({}, tmp_path / "file.yaml", {}).state_dir == Path("/home/me/pen")


@pytest.mark.parametrize(
    ("given", "environ", "text", "says"),
    [
        ({"port": 70_000}, {}, "", "--port on the command line: Input should be less than or equal to 65535"),
        ({}, {"BULLPEN_PORT": "x"}, "", "BULLPEN_PORT in the environment: Input should be a valid integer"),
        ({}, {}, "stop-timeout: -1", "stop-timeout in {config}: Input should be greater than or equal to 0"),
        ({}, {}, "stop_timeout: -1", "stop-timeout in {config}: Input should be"),
        ({}, {"BULLPEN_ON_EXIT": "bang"}, "", "BULLPEN_ON_EXIT in the environment: Input should be 'stop' or 'keep'"),
        ({"port": 1}, {"BULLPEN_SPARES": "65"}, "port: 2", "BULLPEN_SPARES in the environment: Input should be less"),
        ({}, {}, "ports: 1\nhosts: x", "the configuration {config} has unknown keys: hosts, ports"),
        ({}, {}, "- port", "the configuration {config} must hold `name: value` lines"),
        ({}, {}, "port: [1", "the configuration {config} cannot be read: "),
        ({}, {"BULLPEN_ACCESS_KEY_FILE": "/nowhere/key"}, "", "the access key file /nowhere/key cannot be read: "),
    ],
)
def test_errors_name_source_and_key(
    tmp_path: Path, given: dict[str, object], environ: dict[str, str], text: str, says: str
) -> None:
    config = tmp_path / "file.yaml"
    config.write_text(text)
    with pytest.raises(StateError) as caught:
        load(given, config, environ)
    assert str(caught.value).startswith(says.format(config=config))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"the configuration .*none\.yaml cannot be read: .*No such file"):
        load({}, tmp_path / "none.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(StateError, match=r"bytes\.yaml cannot be read"):
        load({}, tmp_path / "bytes.yaml", {})


def test_an_error_never_shows_the_value() -> None:
    with pytest.raises(StateError) as caught:
        load({}, environ={"BULLPEN_PORT": "s3cret"})
    assert "s3cret" not in str(caught.value)


# -- the key -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    (tmp_path / "key").write_text("  from file\n")
    return str(tmp_path / "key")


def test_the_key_is_read_from_its_file_and_not_shown(key_file: str) -> None:
    settings = load({"access_key_file": key_file}, environ={})
    assert settings.access_key == "from file"
    assert "from file" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({"access_key": "flag"}, {"BULLPEN_ACCESS_KEY_FILE": "FILE"}, "flag"),
        ({"access_key_file": "FILE"}, {"BULLPEN_ACCESS_KEY": "variable"}, "from file"),
        ({}, {"BULLPEN_ACCESS_KEY": "variable", "VLLM_ACCESS_KEY": "other"}, "variable"),
        ({}, {"VLLM_ACCESS_KEY": "other"}, "other"),
    ],
)
def test_flag_and_file_are_one_setting(
    key_file: str, given: dict[str, str], environ: dict[str, str], expected: str
) -> None:
    def place(layer: dict[str, str]) -> dict[str, str]:
        return {name: key_file if value == "FILE" else value for name, value in layer.items()}

    assert load(place(given), environ=place(environ)).access_key == expected


def test_an_empty_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    with pytest.raises(StateError, match=r"the access key file .* is empty"):
        load({"access_key_file": tmp_path / "key"}, environ={})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
    assert os.fspath(Settings().state_dir)


@pytest.mark.parametrize(
    ("text", "mib"), [("512", 512), ("512MiB", 512), ("64GiB", 65536), ("64 g", 65536), ("1.5T", 1572864), ("0", 0)]
)
def test_sizes_have_units(text: str, mib: int) -> None:
    assert load({}, environ={"BULLPEN_HOST_MEMORY_BUDGET": text}).limits().host_mib == mib


@pytest.mark.parametrize("text", ["much", "12XiB", "-1", "1 GiB of it"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(StateError, match="BULLPEN_HOST_MEMORY_BUDGET"):
        load({}, environ={"BULLPEN_HOST_MEMORY_BUDGET": text})
