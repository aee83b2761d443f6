"""A stand-in for a container engine: runs a Dockerfile's instructions on a copy of this system that is thrown away.

The copy is an overlay: files come from this system, changes go to memory. Steps have a mount and a process namespace of
their own, so that whatever they start or mount ends with the container, which ends with this process. The network is
the host's.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.images.dockerfile import Context, Instruction, Stage, fill_in

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("unshare", "nsenter", "mount", "chroot", "apt-get")
STEP_SECONDS = 60.0
END_SECONDS = 20.0
# Of the folder $1, the environment $2 to be lent to the folder $3 of the container. It lives until its input ends.
MAKE = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir upper work venv venv-work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
rm -rf "root/${3%/*}"
mkdir -p "root/$3"
mount -t overlay overlay -o "lowerdir=$2,upperdir=venv,workdir=venv-work" "root/$3"
mount --rbind /dev root/dev
mount -t tmpfs -o size=64m,mode=1777 tmpfs root/dev/shm
mount -t tmpfs -o mode=1777 tmpfs root/tmp
mount -t tmpfs -o mode=755 tmpfs root/run
mount -t sysfs -o ro sysfs root/sys
echo ready
read -r _ || true
"""
# A step in the folder $1: what follows is the command line of chroot.
STEP = 'mount -t proc proc "$1/proc" && shift && exec chroot "$@"'


class NoContainerError(Exception):
    """This machine lets nobody make one; the text says why."""


class Container:
    """A system to change and throw away.

    Args:
        folder: an empty folder to mount it on.
        venv: an environment of Python.
        place: where the container has that environment, and may change it.

    Raises:
        NoContainerError: see there.
    """

    def __init__(self, folder: Path, venv: Path, place: str) -> None:
        if os.geteuid() != 0:
            raise NoContainerError("only root may mount")
        if missing := [name for name in TOOLS if not shutil.which(name, path=PATH)]:
            raise NoContainerError(f"this system has no {' and no '.join(missing)}")
        self._inside = folder / "root"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", MAKE, "bash", folder, venv, place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        if (said := self._holder.stdout.readline()) != "ready\n":
            self.close()
            raise NoContainerError(f"mounts are refused: {said.strip()}")
        # Its name server, which may be behind a link to where the container has nothing.
        (self.root / "etc/resolv.conf").unlink(missing_ok=True)
        (self.root / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())

    @property
    def root(self) -> Path:
        """Its root folder as this process reaches it."""
        return Path(f"/proc/{self._holder.pid}/root{self._inside}")

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        user: str = "0:0",
        workdir: str = "/",
        output: int | IO[str] = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start a program as process 1 of a process namespace; stderr goes to stdout."""
        spaces = f"/proc/{self._holder.pid}/ns"
        enter = ["nsenter", f"--mount={spaces}/mnt", f"--pid={spaces}/pid_for_children"]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", STEP, "bash", str(self._inside)]
        change = [f"--userspec={user}", "--groups=", str(self._inside), "env", "--ignore-environment", "-C", workdir]
        variables = [f"{name}={value}" for name, value in environment.items()]
        return subprocess.Popen(
            [*enter, *own, *change, *variables, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        user: str = "0:0",
        workdir: str = "/",
        seconds: float = STEP_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end.

        Raises:
            subprocess.TimeoutExpired: it takes longer; it ends with the container.
        """
        process = self.start(command, environment or {"PATH": PATH}, user, workdir)
        output, _ = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def close(self) -> None:
        """End all that runs in it, and with that its mounts."""
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait(END_SECONDS)
        self._holder.stdout.close()


def first_process(started: subprocess.Popen[str]) -> int | None:
    """The number that process 1 of what a container started has out here; None before it is there."""
    number = started.pid
    for _ in ("nsenter's child", "unshare's child"):
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        if not children:
            return None
        number = int(children[0])
    return number


class Image:
    """What a Dockerfile's instructions make of a container.

    Args:
        container: where they are done; it counts as what the first stage is based on.
        context: the files to copy.
        **arguments: build arguments.

    Attributes:
        environment: the image's variables.
        user: who its program runs as.
        outputs: what each RUN said, by its command.
    """

    def __init__(self, container: Container, context: Context, **arguments: str) -> None:
        self.container = container
        self.environment = {"PATH": PATH}
        self.user = "0:0"
        self.outputs: dict[str, str] = {}
        self._context = context
        self._arguments = arguments
        self._values: dict[str, str] = {}
        self._workdir = "/"
        self._shell = ["/bin/sh", "-c"]

    def target(self, stage: Stage) -> Image:
        """The image of a stage that begins with this one and changes no files."""
        made = copy.copy(self)
        made.environment = dict(self.environment)
        for instruction in stage.instructions:
            assert instruction.name not in ("RUN", "COPY")
            made.do(instruction)
        return made

    def do(self, instruction: Instruction) -> None:
        """Do what an instruction says, as the builder does; those that only describe the image do nothing.

        Raises:
            AssertionError: it is a RUN that fails.
        """
        value = instruction.value
        match instruction.name:
            case "ARG":
                key, _, default = value.partition("=")
                self._values[key] = self._arguments.get(key, default)
            case "ENV":
                pairs = [pair.partition("=") for pair in shlex.split(value)]
                self.environment |= {key: fill_in(text, self.environment) for key, _, text in pairs}
            case "SHELL":
                self._shell = json.loads(value)
            case "USER":
                self.user = value
            case "WORKDIR":
                self._workdir = value
                self.inside(value).mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, destination = value.split()
                self._context.copy(sources, self.inside(self._workdir) / destination)
            case "RUN":
                done = self.run([*self._shell, value], **self._values)
                assert done.returncode == 0, f"RUN {value}\n{done.stdout}"
                self.outputs[value] = done.stdout

    def inside(self, path: str) -> Path:
        """A path in the container, as this process reaches it."""
        return self.container.root / path.lstrip("/")

    def run(self, command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as the image's user."""
        return self.container.run(command, self._variables(variables), self.user, self._workdir)

    def start(self, command: Sequence[str], output: IO[str], **variables: str) -> subprocess.Popen[str]:
        """Start a program as the image's user."""
        return self.container.start(command, self._variables(variables), self.user, self._workdir, output)

    def output(self, script: str) -> str:
        """What the RUN with that script said."""
        [output] = [output for command, output in self.outputs.items() if script in command]
        return output

    def _variables(self, more: dict[str, str]) -> dict[str, str]:
        accounts = [line.split(":") for line in self.inside("etc/passwd").read_text().splitlines()]
        home = next(account[5] for account in accounts if account[2] == self.user.split(":")[0])
        return {"HOME": home, **self.environment, **more}


def open_to_others(container: Container, path: Path = Path(sys.base_prefix)) -> None:
    """Let the container's users reach a folder, such as a Python in root's home."""
    for folder in (path, *path.parents):
        inside = container.root / folder.as_posix().lstrip("/")
        inside.chmod(inside.stat().st_mode | 0o011)
