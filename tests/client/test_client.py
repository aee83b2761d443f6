"""The synchronous client with a real daemon."""

import http.server
import itertools
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bullpen.client import (
    BullpenClient,
    ConnectionFailed,
    Instance,
    InstanceFailed,
    Refused,
    TimedOut,
    Unauthorized,
    UnexpectedAnswer,
)
from bullpen.errors import BullpenError
from tests.support.daemon import Daemon

SLOW = {"BULLPEN_SIM_START_SECONDS": "30"}


def test_daemon_answers_for_itself(client: BullpenClient) -> None:
    assert client.health() == {"status": "OK"}
    readiness = client.ready()
    assert readiness.ready and readiness.engine == "sim"
    assert [zygote.state for zygote in readiness.zygotes] == ["warm"]


def test_life_of_an_instance(client: BullpenClient) -> None:
    created = client.create("--model m", instance_id="a", annotations={"team": "x"}, env_vars={"A": "b"}, engine="sim")
    assert (created.status, created.instance_id, created.annotations) == ("started", "a", {"team": "x"})
    ready = client.wait_until_ready("a", timeout=30)
    assert ready == client.get("a")
    assert ready.state == "ready" and ready.url and ready.seconds_to_ready is not None
    listed = client.list()
    assert [instance.instance_id for instance in listed.instances] == ["a"]
    assert client.delete("a").status == "terminated"
    assert client.list().instances == []


def test_daemon_chooses_an_id(client: BullpenClient) -> None:
    created = client.create("--model m")
    assert client.get(created.instance_id).model == "m"
    assert [instance.instance_id for instance in client.delete_all()] == [created.instance_id]


@pytest.mark.parametrize("instance_id", ["", "watch", "a/b", ".", "..", "ü x", "%41", "a?b#c", "\udcff"])
def test_odd_ids_are_refused_and_reach_nothing_else(client: BullpenClient, instance_id: str) -> None:
    client.create("--model m", instance_id="A")
    with pytest.raises(BullpenError):
        client.create("--model m", instance_id=instance_id)
    for call in (client.get, client.delete, client.log):
        with pytest.raises(BullpenError):
            call(instance_id)
    assert [instance.instance_id for instance in client.list().instances] == ["A"]


def test_refusals_carry_status_and_sentence(client: BullpenClient) -> None:
    with pytest.raises(Refused, match="--bogus") as bad:
        client.create("--model m --bogus")
    client.create("--model m", instance_id="a")
    with pytest.raises(Refused, match="exists") as taken:
        client.create("--model m", instance_id="a")
    with pytest.raises(Refused, match="'b'") as missing:
        client.get("b")
    assert [caught.value.status for caught in (bad, taken, missing)] == [422, 409, 404]


def test_wait_tells_every_change(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_START_SECONDS": "0.3"})
    seen: list[Instance] = []
    ready = client.wait_until_ready("a", timeout=30, on_change=seen.append)
    assert seen[-1] == ready
    assert {"weights", "kv_cache"} <= {instance.phase for instance in seen}
    assert all(first != second for first, second in itertools.pairwise(seen))


def test_wait_ends_with_the_servers_sentence_when_a_start_fails(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_FAIL": "start"})
    with pytest.raises(InstanceFailed) as caught:
        client.wait_until_ready("a", timeout=30)
    error = client.get("a").error
    assert error is not None and str(caught.value) == error.message
    assert caught.value.instance.state == "failed"


def test_wait_ends_when_the_instance_is_removed(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars=SLOW)
    threading.Timer(0.2, lambda: client.delete("a")).start()
    with pytest.raises(InstanceFailed, match="removed"):
        client.wait_until_ready("a", timeout=30)


def test_wait_ends_in_time_although_nothing_is_said(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars=SLOW)
    with pytest.raises(TimedOut, match="configuration"):
        client.wait_until_ready("a", timeout=0.3)


def test_wait_for_nobody_is_refused(client: BullpenClient) -> None:
    with pytest.raises(Refused, match="'a'"):
        client.wait_until_ready("a", timeout=30)


def test_log_by_range_and_as_a_whole(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_LOG_BYTES": "2500000"})
    client.wait_until_ready("a", timeout=30)
    first, total = client.log("a")
    assert len(first) == 1 << 20 and total > 2_500_000
    assert client.log("a", 5, 9) == (first[5:9], total)
    assert client.log("a", 5, 5) == (b"", total)
    assert client.log("a", total + 10)[0] == b""
    whole = b"".join(chunk.data for chunk in client.log_chunks("a"))
    assert whole[: len(first)] == first and len(whole) >= total


def test_log_is_followed_to_its_end(client: BullpenClient) -> None:
    client.create(
        "--model m", instance_id="a", env_vars={"BULLPEN_SIM_EXIT_AFTER": "0.4", "BULLPEN_SIM_EXIT_CODE": "0"}
    )
    followed = b"".join(client.follow_log("a", 10))
    whole = b"".join(chunk.data for chunk in client.log_chunks("a"))
    assert followed == whole[10:]
    assert b"Application startup complete" in followed


def test_watch_begins_with_what_is_there(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a")
    revision = client.list().revision
    client.create("--model m", instance_id="b")
    watch = client.watch()
    assert [next(watch).instance.instance_id for _ in "ab"] == ["a", "b"]  # type: ignore[union-attr]
    watch.close()  # type: ignore[attr-defined]
    later = next(client.watch(since=revision))
    assert (later.type, later.revision) == ("CREATED", revision + 1)
    with pytest.raises(Refused, match="not happened") as caught:
        next(client.watch(since=10**9))
    assert caught.value.status == 410


def test_instance_is_followed_to_its_removal(client: BullpenClient) -> None:
    client.create("--model m", instance_id="a", env_vars={"BULLPEN_SIM_START_SECONDS": "0.2"})
    events = []
    for event in client.follow("a", timeout=30):
        events.append(event)
        if event.instance is not None and event.instance.state == "ready":
            client.delete("a")
    states = [event.instance.state for event in events if event.instance is not None]
    assert sorted(set(states), key=states.index) == ["starting", "ready", "stopping", "stopped"]
    assert (events[0].type, events[-1].type) == ("CREATED", "DELETED")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_nobody_there_says_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with BullpenClient(url) as client, pytest.raises(ConnectionFailed) as caught:
        client.health()
    assert (
        str(caught.value)
        == f"no Bullpen answers at {url}; check that URL first, or start a daemon with `bullpen serve`"
    )


def test_another_server_is_recognised() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with BullpenClient(f"127.0.0.1:{server.server_port}") as client:
            for call in (client.health, client.list, client.delete_all):
                with pytest.raises(UnexpectedAnswer):
                    call()
        server.shutdown()


def test_key_is_found_and_sent(
    start_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BULLPEN_STATE_DIR", str(tmp_path / "state"))
    for name in ("BULLPEN_URL", "BULLPEN_ACCESS_KEY", "VLLM_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    daemon = start_daemon(tmp_path / "state", access_key="schlüssel")
    with BullpenClient() as client:
        assert client.url == daemon.url
        assert client.list().instances == []
    with BullpenClient(daemon.url, "wrong") as client, pytest.raises(Unauthorized, match="does not accept"):
        client.list()
    monkeypatch.setenv("BULLPEN_STATE_DIR", str(tmp_path))
    with BullpenClient(daemon.url) as client, pytest.raises(Unauthorized, match="wants its access key"):
        client.list()


def test_end_of_the_daemon_ends_a_wait(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(on_exit="stop").wait_warm()
    with BullpenClient(daemon.url) as client:
        client.create("--model m", instance_id="a", env_vars=SLOW)
        threading.Timer(0.3, daemon.process.terminate).start()
        with pytest.raises((ConnectionFailed, InstanceFailed)):
            client.wait_until_ready("a", timeout=30)
