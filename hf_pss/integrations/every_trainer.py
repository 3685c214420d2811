"""Attach PSS to every Trainer of a command that `hf-pss exec` runs.

The command's environment carries the options to all its Python processes: startup/sitecustomize.py
wraps ``Trainer.train``, and `join` is what the wrapper calls. ``train`` is public, every launcher
and framework around transformers calls it, and callbacks of the user's own are attached by then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from hf_pss.config import PSSConfig

if TYPE_CHECKING:
    from transformers import Trainer

_VARIABLE = "HF_PSS_EXEC"
_FOLDER = Path(__file__).parent / "startup"

_seen: WeakSet[Trainer] = WeakSet()


def environment(config: PSSConfig | None, joined_file: Path) -> dict[str, str]:
    """Return this process's environment with what makes every Trainer of a command join.

    Args:
        config: The options. None leaves them to the trainer's arguments, as in `PSSCallback`.
        joined_file: The file to which each Trainer adds a line; see `joined_trainers`.
    """
    settings = {"config": None if config is None else config.to_dict(), "file": str(joined_file)}
    paths = [str(_FOLDER), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        _VARIABLE: json.dumps(settings),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def join(trainer: Trainer) -> None:
    """Attach a PSSCallback to a Trainer that has none, and write that down on the first rank.

    Raises:
        ConfigurationError: PSS cannot work with this trainer; see `PSSCallback`.
    """
    from hf_pss.trainer.callback import PSSCallback

    if trainer in _seen:
        return
    settings = json.loads(os.environ[_VARIABLE])
    has_own = any(isinstance(one, PSSCallback) for one in trainer.callback_handler.callbacks)
    if not has_own:
        given = settings["config"]
        PSSCallback(None if given is None else PSSConfig(**given)).attach(trainer)
    _seen.add(trainer)
    if trainer.args.process_index == 0:
        line = json.dumps([type(trainer).__name__, has_own])
        # Another machine does not have the folder of this file, and trains all the same.
        with suppress(OSError), open(settings["file"], "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def joined_trainers(joined_file: Path, *, had_own: bool) -> Sequence[str]:
    """Return the class names of the Trainers that trained.

    Args:
        joined_file: The file that was given to `environment`.
        had_own: Whether to return those that had a PSSCallback of their own, or the others.
    """
    lines = joined_file.read_text(encoding="utf-8").splitlines() if joined_file.exists() else []
    return [name for name, has_own in map(json.loads, lines) if has_own is had_own]
