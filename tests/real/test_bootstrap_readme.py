"""The examples of vllm-bootstrap's README on a real engine: as they are printed, only the host is another."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
from typing import Any

import pytest

from tests.support.bootstrap_readme import BLOCKS, EMBEDDER, LOCAL, SERVER, WRITER
from tests.support.daemon import Daemon
from tests.support.published_client import needs_published_client, run_script

OURS = ("from vllm_bootstrap_client import", "from bullpen.client import")
FIRST = ("Embeddings", "Completions")
LAST = ("Manual lifecycle", "Other operations")
SEEN = """
seen = {
    "vectors": vectors,
    "written": globals().get("written", []),
    "launch": [launch.model, launch.state],
    "status": (await manager.status(launch_id)).state,
    "left": [launch.launch_id for launch in await manager.list_launches()],
    "log": "Application startup complete" in (await manager.logs(launch_id)).content,
}
"""
"""What is looked at beside the examples; `written` has what they print."""


def script(url: str, *blocks: str) -> str:
    """One program of the examples: `seen` is what came of them."""
    body = "\n".join([*map(BLOCKS.__getitem__, blocks), SEEN])
    # The last two are printed apart: who read the one knows the launch of the other.
    body = body.replace(BLOCKS["Other operations"], "launch_id = launch.launch_id\n" + BLOCKS["Other operations"])
    lines, client = BLOCKS["Client library"].replace(SERVER, url).split("\n\n")
    filled = client.replace("    ...\n", textwrap.indent(body, "    "))
    assert url in filled and "import" in lines
    return f"{lines}\nasync def main():\n    global seen\n{textwrap.indent(filled, '    ')}"


def check(seen: dict[str, Any]) -> None:
    """What the examples promise."""
    assert [len(vector) for vector in seen["vectors"]] == [384, 384]
    assert seen["launch"] == [WRITER, "bootstrapping"]
    assert (seen["status"], seen["left"], seen["log"]) == ("stopped", [], True)


async def test_python_with_bullpens_own_client(box: Daemon) -> None:
    """Every block; only the package's name is another."""
    written: list[str] = []
    namespace: dict[str, Any] = {"written": written, "print": written.append}
    exec(compile(script(box.url, *FIRST, *LAST).replace(*OURS), "README.md", "exec"), namespace)
    await namespace["main"]()
    check(namespace["seen"])
    assert len(written) == 1 and isinstance(written[0], str) and written[0]


@needs_published_client
async def test_python_with_the_published_client(box: Daemon) -> None:
    """Every block but the one that the published client itself does not allow: it knows no `prompt=`."""
    program = script(box.url, "Embeddings", *LAST)
    check(await run_script(f"import asyncio, json\n{program}\nasyncio.run(main())\nprint(json.dumps(seen))"))


def shell(command: str) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run(["bash", "-euc", command], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(box: Daemon) -> None:
    """Both models are launched side by side and become ready; the log is the launch's."""
    launched = [shell(BLOCKS[name].replace(LOCAL, box.url)) for name in ("Launch", "Launch an embedding model")]
    assert [(one["model"], one["task"], one["state"], one["gpu_ids"]) for one in launched] == [
        (WRITER, "generate", "bootstrapping", []),
        (EMBEDDER, "embed", "bootstrapping", []),
    ]
    for launch in launched:
        document = box.wait_state(launch["launch_id"], "ready", "failed", "stopped")
        assert document["state"] == "ready", box.log(launch["launch_id"])[-4000:]
        tail = BLOCKS["Tail logs"].replace(LOCAL, box.url).replace("<launch_id>", launch["launch_id"])
        piece = shell(tail)
        assert (piece["launch_id"], piece["offset"]) == (launch["launch_id"], 0)
        assert piece["next_offset"] == len(piece["content"].encode())
        assert launch["model"] in piece["content"]
        assert box.http.post(f"/stop/{launch['launch_id']}").json()["state"] == "stopped"
