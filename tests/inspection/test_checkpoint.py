from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_pss.errors import ConfigurationError, StateError
from hf_pss.records.strict_json import read_object
from hf_pss.runs.options import recorded_entropy
from hf_pss.runs.safetensors_files import open_checkpoint

COMMIT = "a" * 40


def shard(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 3) for name in names}, path)
    return path


def index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in open_checkpoint(path).tensors)


def test_file_folder_and_index_mean_the_same(tmp_path: Path) -> None:
    first = shard(tmp_path / "model-1.safetensors", "a")
    shard(tmp_path / "model-2.safetensors", "b")
    assert names(tmp_path) == ["a", "b"]  # no index: every file
    listed = index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert names(tmp_path) == names(listed) == ["a", "b"]
    assert names(first) == ["a"]


def test_the_model_goes_before_other_files(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    shard(tmp_path / "copy.safetensors", "a")
    assert names(tmp_path) == ["a"]


def test_config_is_read_as_json(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    assert open_checkpoint(tmp_path).model_type is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert open_checkpoint(tmp_path).model_type == "gpt2"
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "limit": [0.0, Infinity]}')
    assert open_checkpoint(tmp_path).model_type == "mamba2"  # as transformers 4 wrote it
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "model_type": "x"}')
    with pytest.raises(StateError, match="appears twice"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(" " * (4 * 2**20 + 1))
    with pytest.raises(StateError, match="larger than"):
        open_checkpoint(tmp_path)


def hub(root: Path) -> Path:
    blob = shard(root / "blobs" / "0123.safetensors", "a")
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_hub_cache(tmp_path: Path) -> None:
    snapshot = hub(tmp_path / "models--x")
    assert names(snapshot) == names(tmp_path / "models--x") == ["a"]
    (tmp_path / "models--x" / "snapshots" / ("b" * 40)).mkdir()
    with pytest.raises(ConfigurationError, match="2 possible snapshots"):
        open_checkpoint(tmp_path / "models--x")
    (tmp_path / "models--x" / "refs").mkdir()
    main = tmp_path / "models--x" / "refs" / "main"
    main.write_text(COMMIT)
    assert names(tmp_path / "models--x") == ["a"]
    main.write_text("../../..")
    with pytest.raises(ConfigurationError, match="0 possible snapshots"):
        open_checkpoint(tmp_path / "models--x")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = shard(tmp_path / "elsewhere" / "model.safetensors", "a")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(StateError, match="leads out"):
        open_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    with pytest.raises(StateError, match="leads out"):
        open_checkpoint(index(folder, {"a": "part.safetensors"}))


@pytest.mark.parametrize("config", [True, False])
def test_a_config_that_links_out_of_the_folder_is_ignored(tmp_path: Path, config: bool) -> None:
    folder = tmp_path / "checkpoint"
    path = shard(folder / "model.safetensors", "a")
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(StateError, match="leads out"):
        open_checkpoint(folder if config else path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "inner/../../outside.safetensors",
        "/etc/outside.safetensors",
        "C:\\outside.safetensors",
        "..\\outside.safetensors",
        "a\0.safetensors",
        "weights.bin",
        "",
    ],
)
def test_a_shard_lies_in_its_folder(tmp_path: Path, name: str) -> None:
    shard(tmp_path / "outside.safetensors", "a")
    folder = tmp_path / "checkpoint"
    (folder / "inner").mkdir(parents=True)
    with pytest.raises(StateError, match="It is not opened"):
        open_checkpoint(index(folder, {"a": name}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "missing.safetensors"}, "missing"),
        ({"x": "one.safetensors"}, "which does not hold it"),
        (
            {"a": "two.safetensors", "b": "two.safetensors", "x": "one.safetensors"},
            "which does not",
        ),
        ({"a": 3}, "is not a name"),
        ({}, "weight_map"),
        ([1], "weight_map"),
    ],
)
def test_a_wrong_index_is_an_error(tmp_path: Path, weight_map: object, message: str) -> None:
    shard(tmp_path / "one.safetensors", "a")
    shard(tmp_path / "two.safetensors", "b")
    with pytest.raises(StateError, match=message):
        open_checkpoint(index(tmp_path, weight_map))


def test_one_name_in_two_files_is_an_error(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a")
    shard(tmp_path / "two.safetensors", "a")
    with pytest.raises(StateError, match="a lies in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04this would not even load")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigurationError, match="a pickle can run any program"):
            open_checkpoint(path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no"):
        open_checkpoint(tmp_path / "nowhere")
    for step in (45, 5, 50):
        shard(tmp_path / f"checkpoint-{step}" / "model.safetensors", "a")
    names = "checkpoint-5, checkpoint-45, checkpoint-50"
    with pytest.raises(ConfigurationError, match=f"Give one of its folders: {names}"):
        open_checkpoint(tmp_path)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer. The same holds for an index and a run's options."""
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(StateError, match="not a regular file"):
        open_checkpoint(tmp_path)
    with pytest.raises(StateError, match="not a regular file"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")
    os.mkfifo(tmp_path / "hf_pss_options.json")
    with pytest.raises(StateError, match="not a regular file"):
        read_object(tmp_path / "hf_pss_options.json", max_bytes=100)
    assert recorded_entropy(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "nowhere.json", max_bytes=100)
