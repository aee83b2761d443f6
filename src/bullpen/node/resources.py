"""Everything outside its own memory that a supervisor works with."""

from __future__ import annotations

from dataclasses import dataclass

from bullpen.node.bus import Bus
from bullpen.node.cgroups import Cgroups
from bullpen.node.gpus import Gpus
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
