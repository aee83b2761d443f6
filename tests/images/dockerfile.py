"""Reads a Dockerfile, and checks it and the scripts that it runs by the rules of hadolint that apply."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    value: str
    line: int


@dataclass
class Stage:
    """What follows one FROM.

    Attributes:
        base: the image or stage that it begins with, its build arguments filled in.
        parent: the stage that it begins with, if it is one.
    """

    name: str
    base: str
    parent: Stage | None
    instructions: list[Instruction] = field(default_factory=list)

    def lineage(self) -> list[Instruction]:
        """All instructions that lead to it, those of the stages below it first."""
        return [*(self.parent.lineage() if self.parent else []), *self.instructions]

    def last(self, name: str) -> str | None:
        """The value of the last instruction of that name."""
        return next((found.value for found in reversed(self.lineage()) if found.name == name), None)


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile."""
    joined, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not joined):
            continue
        start = start if joined else number
        joined += line.rstrip("\\") + " "
        if not line.endswith("\\"):
            name, _, value = joined.strip().partition(" ")
            yield Instruction(name.upper(), " ".join(value.split()), start)
            joined = ""


def stages(text: str, **arguments: str) -> list[Stage]:
    """The stages of a Dockerfile, in order.

    Args:
        text: the Dockerfile.
        **arguments: build arguments that replace the defaults.
    """
    found: list[Stage] = []
    values: dict[str, str] = {}
    for instruction in instructions(text):
        if instruction.name == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            base = fill_in(base, values)
            found.append(Stage(name, base, next((stage for stage in found if stage.name == base), None)))
        elif not found:
            assert instruction.name == "ARG", f"{instruction.name} before the first FROM"
            key, _, default = instruction.value.partition("=")
            values[key] = arguments.get(key, default)
        else:
            found[-1].instructions.append(instruction)
    return found


def fill_in(text: str, values: dict[str, str]) -> str:
    """A text with its `${NAME}` replaced."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def copies(stage: Stage) -> Iterator[tuple[list[str], str]]:
    """What a stage takes over from the build's context: sources and destination of each COPY."""
    for instruction in stage.lineage():
        if instruction.name == "COPY" and not instruction.value.startswith("--from="):
            *sources, destination = instruction.value.split()
            yield sources, destination


def scripts(stage: Stage) -> list[str]:
    """The files of the repository that a stage's RUNs call."""
    return [
        word for found in stage.lineage() if found.name == "RUN" for word in re.findall(r"[\w./-]+\.sh\b", found.value)
    ]


def faults(found: list[Stage]) -> list[str]:
    """What is wrong with a Dockerfile's stages, as `RULE line: sentence`."""
    wrong: list[str] = []
    for stage in found:
        if stage.parent is None and not is_pinned(stage.base):
            wrong.append(f"DL3006 {stage.name}: {stage.base} has no version")
        has_pipefail = False
        for instruction in stage.lineage():
            has_pipefail |= instruction.name == "SHELL" and "pipefail" in instruction.value
            wrong += [f"{rule} line {instruction.line}: {text}" for rule, text in instruction_faults(instruction)]
            if instruction.name == "RUN" and not has_pipefail:
                wrong.append(f"DL4006 line {instruction.line}: RUN before a SHELL with pipefail")
    final = found[-1]
    if (final.last("USER") or "root").split(":")[0] in ("root", "0"):
        wrong.append("DL3002: the last user is root")
    for name in ("ENTRYPOINT", "HEALTHCHECK"):
        if final.last(name) is None:
            wrong.append(f"none: no {name}")
    return wrong


def is_pinned(base: str) -> bool:
    """Whether an image is named with a version."""
    _, _, tag = base.rpartition("/")[2].partition(":")
    return "@sha256:" in base or (tag != "" and re.search(r"\d", tag) is not None and not tag.startswith("latest"))


def instruction_faults(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """What is wrong with one instruction by itself."""
    name, value = instruction.name, instruction.value
    if name == "ADD":
        yield "DL3020", "ADD; say COPY"
    if name == "MAINTAINER":
        yield "DL4000", "MAINTAINER; say LABEL"
    if name == "WORKDIR" and not value.startswith("/"):
        yield "DL3000", f"WORKDIR {value} is relative"
    if name in ("CMD", "ENTRYPOINT") and not is_json_list(value):
        yield "DL3025", f"{name} is no list in JSON"
    if name == "HEALTHCHECK" and value != "NONE" and not is_json_list(value.partition("CMD ")[2]):
        yield "DL3025", "the command of HEALTHCHECK is no list in JSON"
    if name == "COPY" and len(value.split()) > 2 and not value.startswith("--") and not value.endswith("/"):
        yield "DL3021", "COPY of several things to what is no folder"
    if name in ("ARG", "ENV") and re.search(r"(?i)(key|token|secret|password)\w*=", value):
        yield "none", f"{name} {value}: a secret has no place in an image"
    if name == "RUN":
        yield from shell_faults(value)


def shell_faults(text: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the commands of a RUN, or of a script that one calls."""
    if re.search(r"\bsudo\b", text):
        yield "DL3004", "sudo"
    if re.search(r"\bapt (install|update)", text):
        yield "DL3027", "apt; say apt-get"
    if re.search(r"apt-get (dist-)?upgrade", text):
        yield "DL3005", "apt-get upgrade"
    if "apt-get install" in text:
        for rule, part in (
            ("DL3014", "install -y"),
            ("DL3015", "--no-install-recommends"),
            ("DL3009", "rm -rf /var/lib/apt/lists"),
        ):
            if part not in text:
                yield rule, f"apt-get install without {part}"
    if re.search(r"pip install|-m pip\b.* install", text):
        if "--no-cache-dir" not in text and "PIP_NO_CACHE_DIR" not in text:
            yield "DL3042", "pip keeps a cache"
        if not re.search(r"--constraint|-r requirements|==", text):
            yield "DL3013", "pip without versions"
    if re.search(r"(curl|wget).*\| *(ba)?sh", text):
        yield "none", "what is downloaded is run unseen"


def is_json_list(text: str) -> bool:
    """Whether a text is a JSON list of texts."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Context:
    """What the builder is sent of a folder: all that .dockerignore leaves.

    The last pattern that fits decides; one that fits a folder fits all that is in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        lines = (root / ".dockerignore").read_text().splitlines()
        self._patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def has(self, path: str) -> bool:
        """Whether a file is sent."""
        sent = True
        for pattern in self._patterns:
            if any(_matcher(pattern.lstrip("!")).fullmatch(part) for part in _and_folders(path)):
                sent = pattern.startswith("!")
        return sent

    def files(self, source: str) -> list[Path]:
        """The files that a COPY of ``source`` takes, relative to the root."""
        start = self.root / source
        files = start.rglob("*") if start.is_dir() else [start]
        relative = [file.relative_to(self.root) for file in files if file.is_file()]
        return [file for file in relative if self.has(file.as_posix())]

    def copy(self, sources: list[str], destination: Path) -> None:
        """Do what COPY does; the content of a source that is a folder goes right into the destination."""
        for source in sources:
            for file in self.files(source):
                is_folder = (self.root / source).is_dir()
                target = destination / (file.relative_to(source) if is_folder else file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / file, target)


def _and_folders(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: index + 1]) for index in range(len(parts))]


def _matcher(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.compile(text)
