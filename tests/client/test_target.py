"""Where URL and key come from, and where a key never goes."""

from pathlib import Path

import pytest

from bullpen.client import ClientError
from bullpen.client.target import base_url, find, same_place


def left_by_daemon(folder: Path, url: str = "http://127.0.0.1:7001", key: str | None = "from-file") -> dict[str, str]:
    (folder / "url").write_text(url)
    if key is not None:
        (folder / "access_key").write_text(key)
    return {"BULLPEN_STATE_DIR": str(folder)}


def test_nothing_known_means_the_default_port(tmp_path: Path) -> None:
    target = find(environ={"BULLPEN_STATE_DIR": str(tmp_path)})
    assert (target.url, target.access_key, target.was_named) == ("http://127.0.0.1:8001", None, False)


def test_argument_goes_before_environment_before_state_directory(tmp_path: Path) -> None:
    environ = left_by_daemon(tmp_path)
    found = find(environ=environ)
    assert (found.url, found.was_named) == ("http://127.0.0.1:7001", False)
    environ["BULLPEN_URL"] = "http://127.0.0.1:7002/"
    found = find(environ=environ)
    assert (found.url, found.was_named) == ("http://127.0.0.1:7002", True)
    found = find("127.0.0.1:7003", environ=environ)
    assert (found.url, found.was_named) == ("http://127.0.0.1:7003", True)


def test_key_goes_by_the_same_order(tmp_path: Path) -> None:
    environ = left_by_daemon(tmp_path)
    assert find(environ=environ).access_key == "from-file"
    environ["VLLM_ACCESS_KEY"] = "vllm"
    assert find(environ=environ).access_key == "vllm"
    environ["BULLPEN_ACCESS_KEY"] = "bullpen"
    assert find(environ=environ).access_key == "bullpen"
    assert find(access_key="given", environ=environ).access_key == "given"


@pytest.mark.parametrize("url", ["http://10.0.0.5:7001", "http://127.0.0.1:7002", "https://127.0.0.1:7001"])
def test_key_of_the_state_directory_is_for_its_daemon_alone(tmp_path: Path, url: str) -> None:
    assert find(url, environ=left_by_daemon(tmp_path)).access_key is None


@pytest.mark.parametrize("url", ["http://localhost:7001", "http://[::1]:7001", "127.0.0.1:7001/"])
def test_loopback_has_several_names(tmp_path: Path, url: str) -> None:
    assert find(url, environ=left_by_daemon(tmp_path)).access_key == "from-file"


def test_same_place_compares_hosts() -> None:
    assert same_place("http://gpu-1:8001", "http://gpu-1:8001")
    assert not same_place("http://gpu-1:8001", "http://gpu-2:8001")


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://host:1", "http://host:99999", "http://ho st:8001", "http://[::1"]
)
def test_what_is_no_url_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ClientError, match=r"http://127\.0\.0\.1:8001"):
        base_url(text)


def test_key_is_not_shown() -> None:
    assert "secret" not in repr(find("http://x", "secret", environ={}))
