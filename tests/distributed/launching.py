"""Start the worker on one or several ranks, and read what they wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import events_of
from preloaded import start, start_ranks
from torch import Tensor

HERE = Path(__file__).parent
WORKER = HERE / "worker.py"
TIMEOUT_SECONDS = 150


@dataclass(frozen=True)
class Run:
    """What the ranks of a run have left."""

    folder: Path
    returncode: int
    errors: str
    ranks: tuple[dict[str, Any], ...]

    @property
    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.load(self.folder / "weights-0.pt")
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        return events_of(self.folder)

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoint-4")


def environment(backend: str) -> dict[str, str]:
    wanted = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    return {
        **os.environ,
        **(wanted if backend.startswith("zero") else {}),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    }


def launch(
    backend: str, folder: Path, *, num_ranks: int = 2, torchrun: bool = False, **options: Any
) -> Run:
    """Run the worker; `options` are its flags, mappings as JSON; see `launch_ranks`."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    num_ranks = num_ranks if backend != "one" else 0
    return launch_ranks(
        WORKER.name, folder, backend, *flags, num_ranks=num_ranks, torchrun=torchrun
    )


def launch_ranks(
    worker: str, folder: Path, first: str, *flags: str, num_ranks: int, torchrun: bool = False
) -> Run:
    """Run a script of this folder, ``worker first folder flags…``; 0 ranks: one process, alone.

    Args:
        torchrun: Whether torchrun starts the ranks, which costs many seconds more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(HERE / worker), first, str(folder), *flags]
    if torchrun:
        returncode, errors = _under_torchrun(words, first, num_ranks)
    else:
        started = (
            start_ranks(num_ranks, *words, env=environment(first))
            if num_ranks
            else start(*words, env=environment(first))
        )
        with started as process:
            _, errors = process.communicate(TIMEOUT_SECONDS)
            returncode = process.returncode
    files = sorted(folder.glob("rank*.json"))
    # A rank that the launcher ends between opening its file and writing leaves an empty file.
    ranks = tuple(json.loads(text) for file in files if (text := file.read_text()))
    return Run(folder, returncode, errors, ranks)


def _under_torchrun(words: list[str], backend: str, num_ranks: int) -> tuple[int, str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *words],
        env=environment(backend),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.terminate()  # and with it its ranks; a kill would leave them behind
    return process.returncode, errors
