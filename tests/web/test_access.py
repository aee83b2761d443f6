"""Who may call: keys, this host's own programs, and nobody else."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.types import Message, Scope

from bullpen.access import PROXY_HEADERS
from bullpen.web.access import Access
from tests.support.daemon import Daemon
from tests.web.calls import INSTANCES, raw

KEY = "the:k\u00e9y with blanks"
GUARDED = ["/", "/docs", "/openapi.json", INSTANCES, f"{INSTANCES}/watch", f"{INSTANCES}/x/log", "/v1/vllm", "/nowhere"]
OTHER_HOSTS = [
    "evil.example",
    "evil.example:8001",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8001",
    "evil.example#@localhost",
    "192.168.1.1",
    "[2001:db8::1]:8001",
    "0.0.0.0:8001",
    "2130706433",
    "",
]
OWN_HOSTS = [
    "localhost",
    "localhost:8001",
    "LocalHost:1",
    "127.0.0.1",
    "127.0.0.1:8001",
    "127.8.8.8",
    "[::1]:8001",
    "[::1]",
]
OTHER_ORIGINS = [
    "null",
    "http://evil.example",
    "https://localhost.evil.example",
    "http://192.168.1.1:8001",
    "file://localhost",
    "chrome-extension://localhost",
    "localhost",
    "",
]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# -- the rules, request by request ---------------------------------------------------------------------------------


async def status_of(
    access: Access,
    path: str = INSTANCES,
    client: tuple[str, int] | None = ("127.0.0.1", 5),
    **headers: str,
) -> tuple[int, dict[str, str], Scope]:
    """What a caller gets: 200 where the application is reached."""
    given = {"host": "localhost:8001", **headers}
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "client": client,
        "headers": [(name.replace("_", "-").encode(), value.encode("utf-8")) for name, value in given.items()],
    }
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    await access(scope, receive, send)
    names = {name.decode(): value.decode() for name, value in sent[0].get("headers", [])}
    return sent[0]["status"], names, scope


async def application(scope: Scope, receive: Any, send: Callable[[Message], Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def keyless() -> Access:
    return Access(application, None, allow_unauthenticated=False)


@pytest.fixture
def keyed() -> Access:
    return Access(application, KEY, allow_unauthenticated=False)


@pytest.mark.parametrize("client", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
async def test_own_programs_need_no_key(keyless: Access, client: str) -> None:
    assert (await status_of(keyless, client=(client, 5)))[0] == 200


async def test_unix_socket_counts_as_this_host(keyless: Access) -> None:
    assert (await status_of(keyless, client=None))[0] == 200


@pytest.mark.parametrize("client", ["10.0.0.9", "192.0.2.1", "2001:db8::1", "::ffff:10.0.0.9", "0.0.0.0", "nonsense"])
async def test_remote_callers_need_one(keyless: Access, client: str) -> None:
    status, headers, _ = await status_of(keyless, client=(client, 5))
    assert status == 403
    assert "www-authenticate" not in headers, "there is no key to ask for"


@pytest.mark.parametrize("name", sorted(PROXY_HEADERS))
async def test_what_a_proxy_passes_on_is_remote(keyless: Access, keyed: Access, name: str) -> None:
    said: dict[str, Any] = {name: "127.0.0.1"}
    assert (await status_of(keyless, **said))[0] == 403
    assert (await status_of(keyless, client=None, **said))[0] == 403
    opened = Access(application, None, allow_unauthenticated=True)
    assert (await status_of(opened, **said))[0] == 200
    assert (await status_of(keyed, authorization=f"Bearer {KEY}", **said))[0] == 200


@pytest.mark.parametrize("client", ["127.0.0.1", "10.0.0.9", "2001:db8::1"])
async def test_remote_callers_where_the_operator_allows_it(client: str) -> None:
    opened = Access(application, None, allow_unauthenticated=True)
    assert (await status_of(opened, client=(client, 5), host="bullpen.default.svc"))[0] == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
async def test_forged_host(keyless: Access, host: str) -> None:
    assert (await status_of(keyless, host=host))[0] == 403


@pytest.mark.parametrize("host", OWN_HOSTS)
async def test_own_host(keyless: Access, host: str) -> None:
    assert (await status_of(keyless, host=host))[0] == 200


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
async def test_forged_origin(keyless: Access, origin: str) -> None:
    assert (await status_of(keyless, origin=origin))[0] == 403


@pytest.mark.parametrize("origin", ["http://localhost:8001", "https://127.0.0.1", "http://[::1]:8001"])
async def test_own_origin(keyless: Access, origin: str) -> None:
    assert (await status_of(keyless, origin=origin))[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        f"BEARER  {KEY} ",
        basic("", KEY),
        basic("anyone", KEY),
        basic("x", KEY).replace("Basic", "basic"),
    ],
)
@pytest.mark.parametrize("client", ["127.0.0.1", "10.0.0.9"])
async def test_right_key(keyed: Access, authorization: str, client: str) -> None:
    status, _, _ = await status_of(keyed, client=(client, 5), host="bullpen.example", authorization=authorization)
    assert status == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY.upper()}",
        KEY,
        f"Token {KEY}",
        f"Basic {KEY}",
        "Basic",
        "Basic !!!",
        "Basic YQ",
        basic(KEY, ""),
        basic(KEY, "wrong"),
        basic("anyone", KEY + "x"),
        "Digest username=x",
        "Bearer \u0130\U0001f600",
    ],
)
@pytest.mark.parametrize("client", ["127.0.0.1", "10.0.0.9"])
async def test_wrong_key(keyed: Access, authorization: str, client: str) -> None:
    status, headers, _ = await status_of(keyed, client=(client, 5), authorization=authorization)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic ")


async def test_no_key_at_all(keyed: Access) -> None:
    assert (await status_of(keyed))[0] == 401


async def test_key_holds_even_where_remote_callers_are_allowed() -> None:
    both = Access(application, KEY, allow_unauthenticated=True)
    assert (await status_of(both))[0] == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_open_to_anyone(keyed: Access, keyless: Access, path: str) -> None:
    for access in (keyed, keyless):
        status, _, scope = await status_of(access, path, client=("10.0.0.9", 5), host="evil.example")
        assert status == 200
        assert scope["bullpen_admin"] is False


@pytest.mark.parametrize("path", [*GUARDED, "/healthy", "/health/", "//health", "/ready/x", "/health%2f.."])
async def test_guarded(keyed: Access, path: str) -> None:
    assert (await status_of(keyed, path))[0] == 401


# -- over the wire -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a key, on all addresses of this host."""
    state_dir = tmp_path_factory.mktemp("locked") / "state"
    with Daemon(state_dir, access_key=KEY, host="0.0.0.0") as daemon:
        daemon.wait_ready()
        daemon.http.headers["Authorization"] = basic("anyone", KEY)
        yield daemon.wait_warm()


@pytest.fixture(scope="module")
def own_address() -> str:
    """An address of this host that is no loopback; a caller that uses it comes from there too."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if (
                address.family.name == "AF_INET"
                and not address.address.startswith("127.")
                and psutil.net_if_stats()[name].isup
            ):
                return str(address.address)
    pytest.skip("this host has no address but loopback")


@pytest.mark.parametrize("path", GUARDED)
def test_daemon_with_a_key(locked: Daemon, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        reply = httpx.get(locked.url + path, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"].startswith("Basic ")
        assert "Bearer" in reply.json()["detail"], "the sentence says what to do"
    assert httpx.post(locked.url + path, content=b"x" * 10_000).status_code == 401


def test_daemon_with_the_right_key(locked: Daemon, own_address: str) -> None:
    created = locked.create(instance_id="guarded")
    assert created["status"] == "started"
    remote = locked.url.replace("127.0.0.1", own_address)
    headers = {b"Authorization": f"Bearer {KEY}".encode()}
    assert httpx.get(f"{remote}{INSTANCES}/guarded", headers=headers).status_code == 200
    assert httpx.delete(f"{remote}{INSTANCES}/guarded").status_code == 401
    locked.delete("guarded")


def test_health_and_readiness_say_nothing_more(locked: Daemon, own_address: str) -> None:
    for url in (locked.url, locked.url.replace("127.0.0.1", own_address)):
        assert httpx.get(f"{url}/health").json() == {"status": "OK"}
        assert httpx.get(f"{url}/ready").json() == {"ready": True}
    assert "zygotes" in locked.http.get("/ready").json(), "those who may know hear more"


def test_daemon_without_a_key_from_afar(start_daemon: Callable[..., Daemon], own_address: str) -> None:
    daemon = start_daemon(host="0.0.0.0").wait_warm()
    remote = daemon.url.replace("127.0.0.1", own_address)
    body = {"options": "--model m"}
    for headers in ({}, {"Host": "localhost:8001"}, {"X-Forwarded-For": "127.0.0.1"}, {"Authorization": "Bearer x"}):
        reply = httpx.post(remote + INSTANCES, json=body, headers=headers)
        assert reply.status_code == 403
        assert "BULLPEN_ACCESS_KEY" in reply.json()["detail"]
        assert "--allow-unauthenticated" in reply.json()["detail"]
    assert httpx.get(f"{remote}/health").status_code == 200
    assert httpx.get(f"{remote}/ready").json() == {"ready": True}
    assert daemon.http.get(INSTANCES).json()["total_instances"] == 0


def test_daemon_that_is_open(start_daemon: Callable[..., Daemon], own_address: str) -> None:
    daemon = start_daemon(host="0.0.0.0", allow_unauthenticated=True).wait_warm()
    remote = daemon.url.replace("127.0.0.1", own_address)
    assert httpx.post(remote + INSTANCES, json={"options": "--model m"}).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"X-Forwarded-For": "203.0.113.9"},
    ],
)
def test_daemon_without_a_key_and_a_web_page_or_a_proxy(shared: Daemon, headers: dict[str, str]) -> None:
    for method, path in (("POST", INSTANCES), ("GET", INSTANCES), ("DELETE", INSTANCES), ("GET", "/")):
        status, body = raw(shared, method, path, b'{"options": "--model m"}', headers)
        assert status == 403, body
    assert raw(shared, "GET", "/health", headers=headers)[0] == 200
    assert shared.http.get(INSTANCES).json()["total_instances"] == 0


def test_key_under_its_other_name(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(environment={"VLLM_ACCESS_KEY": "k"})
    assert daemon.http.get(INSTANCES).status_code == 401
    assert daemon.http.get(INSTANCES, headers={"Authorization": "Bearer k"}).status_code == 200


def test_key_is_never_inherited_by_an_engine(locked: Daemon) -> None:
    zygote = locked.http.get("/ready").json()["zygotes"][0]["pid"]
    server = locked.create(instance_id="one")["pid"]
    for pid in (zygote, server):
        assert KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    locked.delete("one")
