"""A model's files on this host: how large its weights are, where they lie.

Read without a network and without the Hub's library, for an estimate before a first start. What a start then really
took is measured, and counts from then on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
"""Leftovers of a training, which no server reads."""


def model_folder(model: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of a model: a local one, or of a Hub id the newest snapshot in the local cache; None if there is none.

    Args:
        model: what ``--model`` says.
        environ: the server's environment, which says where the cache is.
    """
    with suppress(OSError, ValueError):
        if (local := Path(model)).is_dir():
            return local
        repository = hub_cache(environ) / f"models--{model.replace('/', '--')}"
        commit = (repository / "refs" / "main").read_text().strip()
        snapshot = repository / "snapshots" / commit
        return snapshot if commit and snapshot.is_dir() else None
    return None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The Hub's local cache, found by the variables that ``huggingface_hub`` reads, in its order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    base = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environ.get("HF_HOME") or base).expanduser() / "hub"


def weight_files(model: str, environ: Mapping[str, str]) -> list[Path]:
    """The files that a server of this model reads its weights from, by name; nothing where there are none yet.

    Args:
        model: what ``--model`` says: a folder, one file, or an id of the Hub.
        environ: the server's environment.
    """
    with suppress(OSError, ValueError):
        if Path(model).is_file():
            return [Path(model)]
    folder = model_folder(model, environ)
    return [] if folder is None else files_in(folder)


def files_in(folder: Path) -> list[Path]:
    """A folder's weights: ``*.safetensors``, of those the ones that the index names if there is one, else ``*.bin``."""
    with suppress(OSError):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        tensors = [file for file in files if file.suffix == ".safetensors"]
        named = read_json(folder / INDEX).get("weight_map")
        if isinstance(named, dict):
            # Some repositories hold the same weights twice, in one file and in parts; one of the two has the index.
            tensors = [file for file in tensors if file.name in named.values()] or tensors
        return tensors or [file for file in files if file.suffix == ".bin" and file.name not in NO_WEIGHTS]
    return []


def weight_mib(model_folder: Path) -> int | None:
    """The weights of a model in MiB, as the index says or else as large as the files are; None where there are none."""
    metadata = read_json(model_folder / INDEX).get("metadata")
    total = positive(metadata.get("total_size")) if isinstance(metadata, dict) else None
    if total is None:
        with suppress(OSError):
            total = sum(file.stat().st_size for file in files_in(model_folder))
    return to_mib(total) if total else None


def positive(value: object) -> int | None:
    """A value that is a positive whole number; None for any other."""
    return value if isinstance(value, int) and value > 0 and value is not True else None


def to_mib(count: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-count >> 20)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none to read."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    return {}
