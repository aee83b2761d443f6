"""The gRPC face where it cannot be: the daemon goes on, and says that there is none."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from bullpen.daemon import inference
from bullpen.daemon.inference import GrpcFace
from bullpen.daemon.ports import bind
from bullpen.rpc.settings import RpcSettings


async def test_its_port_is_told_until_it_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> Any:
        raise ImportError("no library")

    monkeypatch.setattr(inference, "import_module", fail)
    address = bind("127.0.0.1", 0)
    face = GrpcFace(cast(Any, None), RpcSettings(), address)
    assert face.port() == address.getsockname()[1]
    with caplog.at_level(logging.ERROR):
        face.begin()
        await face.stop()
    assert face.port() is None
    assert "gRPC is not served, all else is (ImportError: no library)" in caplog.text
