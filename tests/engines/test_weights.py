"""What a model's files say: size of the weights, where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bullpen.engines.weights import INDEX, hub_cache, model_folder, weight_files, weight_mib

MIB = 1 << 20


def write(folder: Path, **sizes: int) -> Path:
    """Files of these sizes; an underscore stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        with (folder / name.replace("_", ".")).open("wb") as file:
            file.truncate(size)
    return folder


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


# -- weights ---------------------------------------------------------------------------------------------------------


def test_the_index_says_the_size(tmp_path: Path) -> None:
    write(tmp_path, a_safetensors=MIB)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 16 * MIB + 1}, "weight_map": {}}))
    assert weight_mib(tmp_path) == 17


@pytest.mark.parametrize(
    "index", ["", "{", "[]", "{}", '{"metadata": 1}', '{"metadata": {"total_size": "9"}}', "9" * 5000]
)
def test_else_the_files_do(tmp_path: Path, index: str) -> None:
    write(tmp_path, a_safetensors=MIB, b_safetensors=2 * MIB, c_bin=9 * MIB)
    (tmp_path / INDEX).write_text(index)
    assert weight_mib(tmp_path) == 3
    assert names(weight_files(str(tmp_path), {})) == ["a.safetensors", "b.safetensors"]


def test_older_models_have_other_files(tmp_path: Path) -> None:
    write(tmp_path, model_bin=MIB, optimizer_bin=5 * MIB)
    write(tmp_path / "x_safetensors")
    assert weight_mib(tmp_path) == 1
    assert names(weight_files(str(tmp_path), {})) == ["model.bin"]


def test_weights_that_are_there_twice(tmp_path: Path) -> None:
    write(tmp_path, consolidated_safetensors=2 * MIB, a_safetensors=MIB, b_safetensors=MIB)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert names(weight_files(str(tmp_path), {})) == ["a.safetensors", "b.safetensors"]
    assert weight_mib(tmp_path) == 2
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    assert weight_mib(tmp_path) == 4, "an index of other files says nothing"


def test_where_there_are_none(tmp_path: Path) -> None:
    assert weight_mib(tmp_path) is None
    assert weight_mib(tmp_path / "absent") is None
    for model in (str(tmp_path), str(tmp_path / "absent"), "org/name", "", "a\0b", "x" * 5000):
        assert weight_files(model, {"HF_HOME": str(tmp_path)}) == []


def test_one_file_is_a_model(tmp_path: Path) -> None:
    file = write(tmp_path, model_gguf=1) / "model.gguf"
    assert weight_files(str(file), {}) == [file]


# -- the Hub's cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HF_HUB_CACHE": "", "HF_HOME": ""}, "~/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "~/x"}, "~/x"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], folder: str) -> None:
    assert hub_cache(environ) == Path(folder).expanduser()


def test_the_snapshot_that_main_names(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    repository = tmp_path / "models--org--name"
    write(repository / "snapshots" / "older", old_safetensors=1)
    blob = write(repository / "blobs", abc=3 * MIB) / "abc"
    newer = write(repository / "snapshots" / "newer")
    (newer / "model.safetensors").symlink_to(blob)
    assert model_folder("org/name", environ) is None, "no reference yet"
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("newer\n")
    assert model_folder("org/name", environ) == newer
    assert weight_files("org/name", environ) == [newer / "model.safetensors"]
    assert weight_mib(newer) == 3
    (repository / "refs" / "main").write_text("absent")
    assert weight_files("org/name", environ) == []


def test_a_download_under_way_has_broken_links(tmp_path: Path) -> None:
    write(tmp_path, a_safetensors=MIB)
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "absent")
    assert names(weight_files(str(tmp_path), {})) == ["a.safetensors"]
    assert weight_mib(tmp_path) == 1
