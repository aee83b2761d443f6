"""Everything outside its own memory that a supervisor works with."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from bullpen.node.bus import Bus
from bullpen.node.cgroups import Cgroups
from bullpen.node.gpus import Gpus, find_gpus
from bullpen.node.journal import Journal
from bullpen.node.logs import Logs
from bullpen.node.ports import Ports
from bullpen.node.settings import Settings
from bullpen.node.statedir import StateDir
from bullpen.node.trees import Trees
from bullpen.node.zygotes import Zygotes


@dataclass
class Resources:
    """What a supervisor holds, as one value."""

    settings: Settings
    state: StateDir
    journal: Journal
    bus: Bus
    logs: Logs
    ports: Ports
    cgroups: Cgroups
    trees: Trees
    zygotes: Zygotes
    gpus: Gpus

    def remove_files(self, key: str) -> None:
        """Remove an instance's log, folder, cgroup and held port."""
        self.ports.release(key)
        self.logs.remove(key)
        self.cgroups.remove(key)
        self.state.remove_instance_folder(key)

    def close(self) -> None:
        """Let go of journal, cgroups and state directory; zygotes have ended by then."""
        self.journal.close()
        self.cgroups.close()
        self.state.close()


async def open_resources(
    settings: Settings, state: StateDir, journal: Journal, bus: Bus, zygotes: Zygotes, log_dir: Path | None
) -> Resources:
    """Find the accelerators and set up all else.

    Raises:
        StateError: the accelerators cannot be used.
    """
    cgroups = Cgroups(state.sockets.name if state.sockets.name != "run" else fingerprint(state.path))
    return Resources(
        settings=settings,
        state=state,
        journal=journal,
        bus=bus,
        logs=Logs(state.logs, settings.log_cap, log_dir),
        ports=Ports(),
        cgroups=cgroups,
        trees=Trees(cgroups),
        zygotes=zygotes,
        gpus=await find_gpus(settings, state.mock_gpus, os.environ),
    )


def fingerprint(path: Path) -> str:
    """A short name for a state directory."""
    return uuid.uuid5(uuid.NAMESPACE_URL, str(path)).hex[:12]
