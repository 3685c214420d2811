"""Find the weights that a path means: a file, a checkpoint's folder, the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_pss.errors import ConfigurationError, StateError
from hf_pss.inspection.header import TensorEntry, read_header
from hf_pss.inspection.names import visible
from hf_pss.inspection.strict_json import read_object

__all__ = ["Checkpoint", "open_checkpoint"]

_INDEX, _WEIGHTS, _CONFIG = ".safetensors.index.json", ".safetensors", "config.json"
_PREFERRED = ("model", "adapter_model", "diffusion_pytorch_model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# The index of a model of 90,000 tensors has 9 MB, a config a few thousand bytes.
_MAX_INDEX_BYTES = 32 * 2**20
_MAX_CONFIG_BYTES = 4 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_MAX_REF_BYTES = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint, none of them read, and its config as plain JSON."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    """In the order of files and bytes."""
    config: Mapping[str, Any]
    """Empty where there is none. Only numbers and ``model_type`` are ever looked at."""

    @property
    def model_type(self) -> str | None:
        """What config.json says, as text to compare with."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """Judge all headers and the index; cost: no tensor is read.

    Args:
        path: A .safetensors file; an index, *.safetensors.index.json; a folder that holds either;
            or of the hub's cache ``models--…`` (the commit that ``refs/main`` names, or the only
            one) and ``models--…/snapshots/<commit>``.

    Raises:
        ConfigurationError: There are no safetensors: only pickles, only checkpoints of several
            steps, or nothing.
        StateError: A file is damaged, or the index leads out of its folder.
        OSError: A file cannot be read.
    """
    if path.is_dir():
        return _open_folder(_commit_of(path))
    if not path.exists():
        raise ConfigurationError(
            f"There is no {visible(path)}. Give a checkpoint's folder or file."
        )
    if path.name.endswith(_INDEX):
        return _open_index(path)
    if path.suffix != _WEIGHTS:
        raise ConfigurationError(_refusal(visible(path)))
    return _checkpoint(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    indices = _ordered(folder.glob(f"*{_INDEX}"))
    weights = _ordered(folder.glob(f"*{_WEIGHTS}"))
    whole = [path for path in weights if path.name.removesuffix(_WEIGHTS) in _PREFERRED]
    if whole:
        return _checkpoint(folder, [_confined(whole[0], folder)])
    if indices:
        return _open_index(indices[0], shown=folder)
    if weights:
        return _checkpoint(folder, [_confined(path, folder) for path in weights])
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        raise ConfigurationError(_refusal(f"{visible(folder)} holds pickles only and"))
    inside = sorted(visible(found.parent.name) for found in folder.glob(f"*/*{_WEIGHTS}"))
    hint = f" Give one of its folders: {', '.join(dict.fromkeys(inside))}." if inside else ""
    raise ConfigurationError(f"{visible(folder)} holds no .safetensors file.{hint}")


def _open_index(index: Path, *, shown: Path | None = None) -> Checkpoint:
    folder = index.parent
    listed = read_object(index, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise StateError(f"{visible(index)} is damaged: weight_map maps tensors to files.")
    shards = {name: _shard(index, name) for name in _distinct(index, listed.values())}
    checkpoint = _checkpoint(shown or index, [shards[name] for name in sorted(shards)], folder)
    held = {entry.name: entry.path for entry in checkpoint.tensors}
    for tensor, shard in listed.items():
        if held.get(tensor) != shards[shard]:
            raise StateError(
                f"{visible(index)} says that {visible(shard)} holds {visible(tensor)}, which it "
                "does not: files of two checkpoints were mixed, or one is damaged."
            )
    return checkpoint


def _distinct(index: Path, names: Iterable[object]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str):
            raise StateError(f"{visible(index)} is damaged: {visible(name)} is no file's name.")
        found[name] = None
    return list(found)


def _shard(index: Path, name: str) -> Path:
    inner = PurePosixPath(name)
    foreign = inner.is_absolute() or PureWindowsPath(name).anchor or "\\" in name or "\0" in name
    if foreign or ".." in inner.parts or inner.suffix != _WEIGHTS:
        raise StateError(
            f"{visible(index)} names {visible(name)}; a shard is a .safetensors file inside the "
            "checkpoint's own folder, by a relative path. It is not opened."
        )
    path = index.parent / inner
    if not path.is_file():
        raise StateError(f"{visible(index)} names {visible(name)}, which is missing.")
    return _confined(path, index.parent)


def _confined(path: Path, folder: Path) -> Path:
    # In the hub's cache a snapshot's files are links to ../../blobs; no other link may lead out.
    own = Path(os.path.realpath(folder))
    allowed = [own]
    if own.parent.name == "snapshots":
        allowed.append(own.parent.parent / "blobs")
    end = Path(os.path.realpath(path))  # `resolve` raises where links go in a circle
    if not any(end.is_relative_to(root) for root in allowed):
        raise StateError(
            f"{visible(path)} is a link that leads out of its folder. It is not opened: copy the "
            "file to where the link is."
        )
    return path


def _checkpoint(path: Path, files: list[Path], folder: Path | None = None) -> Checkpoint:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in entries:
                raise StateError(
                    f"{visible(entry.name)} lies in {visible(entries[entry.name].path)} and in "
                    f"{visible(file)}: files of two checkpoints were mixed. Give one of the files."
                )
            entries[entry.name] = entry
    return Checkpoint(path, tuple(entries.values()), _config(folder or files[0].parent))


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    # transformers 4 writes Infinity: the time_step_limit of Mamba-2, Bamba and Falcon-H1.
    own = _confined(path, folder)
    return read_object(own, max_bytes=_MAX_CONFIG_BYTES, allow_nonfinite=True)


def _commit_of(folder: Path) -> Path:
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    commits = [path for path in sorted(snapshots.iterdir()) if path.is_dir()]
    main = folder / "refs" / "main"
    if main.is_file():
        with main.open("rb") as stream:
            name = stream.read(_MAX_REF_BYTES).decode("ascii", "replace").strip()
        commits = [path for path in commits if path.name == name and _COMMIT.fullmatch(name)]
    if len(commits) != 1:
        raise ConfigurationError(
            f"{visible(folder)} holds {len(commits)} snapshots that could be meant. Give one: "
            f"{visible(snapshots)}/<commit>."
        )
    return commits[0]


def _ordered(paths: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> tuple[int, str]:
        stem = path.name.split(".")[0]
        return (_PREFERRED.index(stem) if stem in _PREFERRED else len(_PREFERRED), path.name)

    return sorted(paths, key=rank)


def _refusal(what: str) -> str:
    return (
        f"{what} is not read: only .safetensors files are opened, for a pickle can run any "
        "program. Convert it where you trust it: from_pretrained, then save_pretrained."
    )
