"""The gate around an application: what is counted, held, refused, hidden."""

import asyncio

import pytest

from bullpen.gate.state import Gate
from tests.gate.client import House, until

LOCAL = "127.0.0.1"


async def test_a_request_counts_until_its_answer_is_whole() -> None:
    house = House()
    house.application.go_on.clear()
    call = house.call()
    await until(lambda: call.body == b"hi")
    assert house.counts == (1, 0)
    house.application.go_on.set()
    await call.ended()
    assert call.body == b"hi!"
    assert house.counts == (0, 0)


async def test_a_request_that_fails_or_is_cancelled_counts_no_longer() -> None:
    house = House()
    with pytest.raises(RuntimeError):
        await house.ask("POST", "/error")
    house.application.go_on.clear()
    call = house.call()
    await until(lambda: house.counts == (1, 0))
    call.task.cancel()
    await asyncio.wait([call.task])
    assert house.counts == (0, 0)


async def test_the_gates_own_endpoint() -> None:
    house = House()
    for peer in (LOCAL, "::1", None):
        answer = await house.ask("GET", "/bullpen/gate", peer=peer)
        assert (answer.status, answer.headers[b"content-type"]) == (200, b"application/json")
        assert set(answer.content) == {"mode", "in_flight", "held", "idle_seconds"}
    for mode in ("hold", "refuse", "open"):
        answer = await house.ask("POST", "/bullpen/gate", query=f"mode={mode}", peer=LOCAL)
        assert (answer.status, answer.content["mode"], house.gate.mode) == (200, mode, mode)
    for query in ("", "mode=", "mode=shut", "mood=open"):
        answer = await house.ask("POST", "/bullpen/gate", query=query, peer=LOCAL)
        assert (answer.status, house.gate.mode) == (400, "open")
        assert "mode=open|hold|refuse" in answer.content["detail"]
    assert (await house.ask("DELETE", "/bullpen/gate", peer=LOCAL)).status == 405
    assert (await house.ask("GET", "/bullpen/else", peer=LOCAL)).status == 404
    assert house.application.served == []


async def test_for_others_it_does_not_exist() -> None:
    house = House()
    for method, query in (("GET", ""), ("POST", "mode=refuse")):
        answer = await house.ask(method, "/bullpen/gate", query=query, peer="10.0.0.1", headers={"x-bullpen-pass": "1"})
        assert (answer.status, answer.content) == (404, {"detail": "Not Found"})
    assert house.gate.mode == "open"
    assert house.application.served == []


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
async def test_what_a_proxy_passes_on_is_not_local(header: str) -> None:
    house = House()
    asked = await house.ask("GET", "/bullpen/gate", peer=LOCAL, headers={header: "127.0.0.1"})
    assert asked.status == 404


async def test_a_servers_own_address_is_local() -> None:
    house = House()
    assert (await house.ask("GET", "/bullpen/gate", peer="192.0.2.2")).status == 200
    assert (await house.ask("GET", "/bullpen/gate", peer="192.0.2.3")).status == 404


async def test_held_requests_enter_when_the_gate_opens_with_all_that_they_sent() -> None:
    house = House()
    house.gate.set_mode("hold")
    calls = [house.call(body=(b"a", b"b")), house.call(path="/v1/embeddings"), house.call(body=())]
    await until(lambda: house.counts == (0, 3))
    assert (await house.ask("GET", "/health")).status == 200
    assert house.application.served == ["/health"]
    house.gate.set_mode("open")
    await calls[0].ended()
    await calls[1].ended()
    assert [call.body for call in calls[:2]] == [b"ab!", b"hi!"]
    # The third has entered too, and what it sends only now arrives as well.
    assert house.counts == (1, 0)
    calls[2].inbox.put_nowait({"type": "http.request", "body": b"late"})
    assert (await calls[2].ended()).body == b"late!"


async def test_refused_at_once_and_from_holding() -> None:
    house = House()
    house.gate.set_mode("hold")
    call = house.call()
    await until(lambda: house.counts == (0, 1))
    house.gate.set_mode("refuse")
    for refused in (await call.ended(), await house.ask("POST", "/v1/chat/completions", peer=LOCAL)):
        assert (refused.status, refused.headers[b"retry-after"]) == (503, b"5")
        error = refused.content["error"]
        assert (error["type"], error["param"], error["code"]) == ("service_unavailable", None, 503)
        assert "try again" in error["message"]
    assert house.application.served == []
    assert house.counts == (0, 0)


async def test_holding_has_a_deadline() -> None:
    house = House(Gate.from_environment({"BULLPEN_GATE_HOLD_SECONDS": "0.05"}))
    house.gate.set_mode("hold")
    assert (await house.ask("POST", "/v1/completions")).status == 503
    assert house.application.served == []
    assert house.counts == (0, 0)


async def test_a_client_that_leaves_while_held_is_not_passed_on() -> None:
    house = House()
    house.gate.set_mode("hold")
    call = house.call()
    await until(lambda: house.counts == (0, 1))
    call.inbox.put_nowait({"type": "http.disconnect"})
    await call.ended()
    assert house.counts == (0, 0)
    house.gate.set_mode("open")
    assert (call.sent, house.application.served) == ([], [])


async def test_a_held_request_that_is_cancelled_leaves_nothing() -> None:
    house = House()
    house.gate.set_mode("hold")
    call = house.call()
    await until(lambda: house.counts == (0, 1))
    call.task.cancel()
    await asyncio.wait([call.task])
    assert house.counts == (0, 0)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@pytest.mark.parametrize("mode", ["hold", "refuse"])
async def test_the_pass_of_this_machine(mode: str) -> None:
    house = House()
    house.gate.set_mode("refuse" if mode == "refuse" else "hold")
    house.application.go_on.clear()
    passed = house.call(peer=LOCAL, headers={"x-bullpen-pass": "1"})
    await until(lambda: passed.status == 200)
    assert house.counts == (0, 0)
    house.application.go_on.set()
    await passed.ended()
    if mode == "refuse":
        for peer, value in (("10.0.0.1", "1"), (LOCAL, "0")):
            refused = await house.ask("POST", "/v1/completions", peer=peer, headers={"x-bullpen-pass": value})
            assert refused.status == 503


async def test_websockets() -> None:
    house = House()
    house.application.go_on.clear()
    open_one = house.websocket()
    await until(lambda: house.counts == (1, 0))
    house.application.go_on.set()
    await open_one.ended()
    house.gate.set_mode("hold")
    entering, refused, leaving = house.websocket(), house.websocket(), house.websocket()
    await until(lambda: house.counts == (0, 3))
    leaving.inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})
    await leaving.ended()
    house.gate.set_mode("open")
    await entering.ended()
    await refused.ended()
    accepted = [{"type": "websocket.accept"}, {"type": "websocket.close", "code": 1000}]
    assert entering.sent == refused.sent == accepted
    assert leaving.sent == []
    house.gate.set_mode("refuse")
    types = [(message["type"], message.get("code")) for message in (await house.websocket().ended()).sent]
    assert types == [("websocket.accept", None), ("websocket.close", 1013)]
    assert (await house.websocket(path="/bullpen/gate").ended()).sent == [{"type": "websocket.close"}]
    assert house.counts == (0, 0)


async def test_development_endpoints() -> None:
    open_house = House()
    assert (await open_house.ask("POST", "/sleep")).status == 200
    house = House(Gate.from_environment({"BULLPEN_DEV_ENDPOINTS": "loopback"}))
    house.gate.set_mode("refuse")
    for method, path, root_path in (
        ("POST", "/sleep", ""),
        ("GET", "/server_info", ""),
        ("POST", "/prefix/collective_rpc", "/prefix"),
    ):
        remote = await house.ask(method, path, root_path=root_path, headers={"x-bullpen-pass": "1"})
        assert (remote.status, remote.content) == (404, {"detail": "Not Found"})
        local = await house.ask(method, path, root_path=root_path, peer=LOCAL)
        assert local.status == 200
    assert (await house.ask("GET", "/health")).status == 200


async def test_the_lifespan_passes() -> None:
    house = House()
    house.gate.set_mode("refuse")

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    await house.middleware({"type": "lifespan"}, nothing, nothing)  # type: ignore[arg-type]
    assert house.application.served == ["lifespan"]
