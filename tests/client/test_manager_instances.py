"""The asynchronous client's instances, with a real daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from bullpen.client import BullpenClient
from bullpen.client.errors import Refused
from bullpen.client.launch_errors import NotFound
from bullpen.client.manager import VLLMManager
from tests.support.daemon import Daemon

PATIENCE = 30.0


@pytest.fixture
async def manager(shared: Daemon) -> AsyncIterator[VLLMManager]:
    async with VLLMManager(shared.url) as manager:
        yield manager


async def ready(client: BullpenClient, name: str) -> None:
    await asyncio.to_thread(client.create, "--model m", instance_id=name, sleep="engine")
    await asyncio.to_thread(client.wait_until_ready, name, PATIENCE)


async def test_sleep_wake_and_swap(manager: VLLMManager, client: BullpenClient) -> None:
    await ready(client, "a")
    await ready(client, "b")
    assert {one.instance_id for one in (await manager.instances()).instances} == {"a", "b"}
    assert (await manager.sleep("a", level=1)).state == "sleeping"
    assert (await manager.instance("a")).sleep_level == 1
    assert (await manager.wake("a")).state == "ready"
    await manager.sleep("a")
    swapped = await manager.swap("a", out="b")
    assert swapped.incoming.state == "ready"
    assert [one.state for one in swapped.outgoing] == ["sleeping"]


async def test_watch(manager: VLLMManager, client: BullpenClient) -> None:
    async with aclosing(manager.watch(fine=True)) as events:
        await asyncio.to_thread(client.create, "--model m", instance_id="a")
        async with asyncio.timeout(PATIENCE):
            async for event in events:
                if event.instance is not None and event.instance.state == "ready":
                    assert event.instance.instance_id == "a"
                    return
    raise AssertionError("the watch ended")


async def test_unknown_instance(manager: VLLMManager) -> None:
    with pytest.raises(NotFound, match="nobody"):
        await manager.instance("nobody")
    with pytest.raises(Refused):
        await manager.swap("nobody")
