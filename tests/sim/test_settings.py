"""The environment: defaults, values, and what cannot be used."""

from pathlib import Path

import pytest

from bullpen.sim.settings import SettingsError, read_settings


def test_defaults() -> None:
    settings = read_settings({})
    assert (settings.start_seconds, settings.sleep_seconds, settings.wake_seconds) == (0.05, 0.02, 0.02)
    assert (settings.awake_mib, settings.asleep_mib, settings.tokens_per_second) == (1024, 64, 1000)
    assert (settings.fail, settings.exit_after, settings.exit_code) == (frozenset(), None, 1)
    assert (settings.stubborn, settings.log_bytes, settings.development_mode) == (0, 0, False)
    assert (settings.fail_file, settings.gpu_folders) == (None, ())


def test_values() -> None:
    settings = read_settings(
        {
            "BULLPEN_SIM_START_SECONDS": "1.5",
            "BULLPEN_SIM_FAIL": "wake,sleep_hang",
            "BULLPEN_SIM_EXIT_AFTER": "0",
            "BULLPEN_SIM_EXIT_CODE": "3",
            "BULLPEN_SIM_STUBBORN": "2",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_API_KEY": "k",
        }
    )
    assert (settings.start_seconds, settings.fail) == (1.5, frozenset({"wake", "sleep_hang"}))
    assert settings.fails("wake") and settings.fails("sleep_hang") and not settings.fails("sleep")
    assert (settings.exit_after, settings.exit_code, settings.stubborn) == (0, 3, 2)
    assert (settings.development_mode, settings.api_key) == (True, "k")


def test_an_empty_value_is_the_default() -> None:
    names = ["START_SECONDS", "FAIL", "FAIL_FILE", "EXIT_AFTER", "EXIT_CODE", "STUBBORN", "LOG_BYTES"]
    assert read_settings({f"BULLPEN_SIM_{name}": "" for name in names}) == read_settings({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BULLPEN_SIM_START_SECONDS", "soon"),
        ("BULLPEN_SIM_START_SECONDS", "-1"),
        ("BULLPEN_SIM_START_SECONDS", "nan"),
        ("BULLPEN_SIM_WAKE_SECONDS", "inf"),
        ("BULLPEN_SIM_TOKENS_PER_SECOND", "0"),
        ("BULLPEN_SIM_EXIT_CODE", "256"),
        ("BULLPEN_SIM_STUBBORN", "3"),
        ("BULLPEN_SIM_LOG_BYTES", "1.5"),
        ("BULLPEN_SIM_FAIL", "often"),
        ("BULLPEN_SIM_FAIL", "wake,often"),
        ("VLLM_SERVER_DEV_MODE", "yes"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_settings({name: value})


def test_failures_of_a_file_come_and_go(tmp_path: Path) -> None:
    file = tmp_path / "fail"
    settings = read_settings({"BULLPEN_SIM_FAIL": "health", "BULLPEN_SIM_FAIL_FILE": str(file)})
    assert settings.fails("health")
    assert not settings.fails("wake")
    file.write_text("wake, sleep_exit\n")
    assert settings.fails("health") and settings.fails("wake") and settings.fails("sleep_exit")
    file.unlink()
    assert settings.fails("health")
    assert not settings.fails("wake")


@pytest.mark.parametrize(
    ("visible", "expected"), [("", []), ("-1", []), ("0", ["/gpus/0"]), ("3,0", ["/gpus/3", "/gpus/0"])]
)
def test_folders_of_mock_gpus(visible: str, expected: list[str]) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    assert read_settings(environment).gpu_folders == ()
    assert read_settings({**environment, "BULLPEN_MOCK_GPU_DIR": "/gpus"}).gpu_folders == tuple(map(Path, expected))


@pytest.mark.parametrize("visible", ["GPU-0", "0,", "0,0", "1.5"])
def test_devices_that_are_no_indices(visible: str) -> None:
    with pytest.raises(SettingsError, match="CUDA_VISIBLE_DEVICES"):
        read_settings({"BULLPEN_MOCK_GPU_DIR": "/gpus", "CUDA_VISIBLE_DEVICES": visible})
