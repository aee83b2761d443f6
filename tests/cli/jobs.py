"""What the tests of batch jobs share: the files and the command line of a job, and simulators that do it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bullpen.client import BullpenClient
from tests.cli.terminal import COMMAND
from tests.support.daemon import wait_until


class Work:
    """The files of one job in a folder, and the command line that does it."""

    def __init__(self, folder: Path, size: int = 0, **body: Any) -> None:
        self.jobs, self.out, self.partial = folder / "jobs.jsonl", folder / "out.jsonl", folder / "out.jsonl.partial"
        default = {"model": "whoever", "max_tokens": 4}
        self.write(*({**default, "prompt": f"prompt {number}", **body} for number in range(size)))

    def write(self, *bodies: dict[str, Any]) -> None:
        """Have one job for each body."""
        fields = {"method": "POST", "url": "/v1/completions"}
        lines = ({"custom_id": f"id-{number}", **fields, "body": body} for number, body in enumerate(bodies))
        self.jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def words(self, *more: str, model: str = "m") -> list[str]:
        """What the command is given."""
        return ["batch", "run", str(self.jobs), "-o", str(self.out), "--model", model, *more]

    @contextmanager
    def running(self, *more: str, model: str = "m") -> Iterator[subprocess.Popen[str]]:
        """The command as a process, from its first results on."""
        process = subprocess.Popen(
            [*COMMAND, *self.words(*more, model=model)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: self.kept >= 5)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)

    @property
    def kept(self) -> int:
        """How many results are in the partial file."""
        return self.partial.read_bytes().count(b"\n") if self.partial.exists() else 0

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results."""
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def check(self, size: int) -> None:
        """All results are there, once each, in order, and successes."""
        assert [one["custom_id"] for one in self.results] == [f"id-{number}" for number in range(size)]
        assert {one["response"]["status_code"] for one in self.results} <= {200}
        assert len({one["response"]["body"]["id"] for one in self.results}) == size
        assert not self.partial.exists()


def start(client: BullpenClient, name: str = "m", **variables: object) -> str:
    """Have a simulator ready; return its URL."""
    given = {f"BULLPEN_SIM_{key.upper()}": str(value) for key, value in variables.items()}
    client.create("--model org/tiny", instance_id=name, env_vars=given)
    return str(client.wait_until_ready(name, 30).url)


def answered(url: str) -> int:
    """How many requests a simulator has brought to their end."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [line for line in lines if line.startswith("vllm:request_success_total{") and '"length"' in line]
    return int(float(found[0].rpartition(" ")[2]))


def running(url: str) -> int:
    """How many requests a simulator has."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return int(float(next(line for line in lines if line.startswith("vllm:num_requests_running{")).rpartition(" ")[2]))


def ids(client: BullpenClient) -> list[str]:
    return [instance.instance_id for instance in client.list().instances]
