"""How to go on: the command that resumes a run from the chosen checkpoint, with smoothing.

The launch of a run is known where `hf-pss train` wrote it: its own options beside the checkpoints,
the steps and the batch size in trainer_state.json. Other scripts leave theirs in training_args.bin
alone, a pickle that is never opened here, so that for them the options to add are given.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pss.errors import PSSError
from hf_pss.inspection.strict_json import read_object
from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.history import History

__all__ = ["OPTIONS_FILE", "ResumePlan", "plan_resume"]

OPTIONS_FILE = "hf_pss_options.json"
_MAX_OPTIONS_BYTES = 2**20
_FLOOR = "floor"
# Of `hf-pss train`, as it writes them; nothing else is taken from the file.
_KNOWN = (
    *("model", "model_config", "model_overrides", "tokenizer", "vocab_size", "dtype", "dataset"),
    *("dataset_subset", "dataset_split", "text_column", "context_length", "max_tokens"),
    *("validation_fraction", "max_validation_blocks", "learning_rate"),
)


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """What to run."""

    options: tuple[str, ...]
    """Words to add to the launch command of any script that reads PSSTrainingArguments."""
    command: tuple[str, ...] | None
    """The whole of it, for a run of `hf-pss train`; None where the launch is not known."""
    remarks: tuple[str, ...]

    @property
    def shell(self) -> str:
        """The command for a shell; ``<your launch command>`` stands for what is not known."""
        if self.command is not None:
            return shlex.join(self.command)
        return f"<your launch command> {shlex.join(self.options)}"

    @property
    def python(self) -> str:
        """The same for a script without a command line."""
        pairs = dict(zip(self.options[::2], self.options[1::2], strict=True))
        resumed = pairs.pop("--resume_from_checkpoint")
        words = [f"{name.removeprefix('--')}={_literal(value)}" for name, value in pairs.items()]
        return (
            f"args = PSSTrainingArguments(..., {', '.join(words)})\n"
            "PSSTrainer(model=model, args=args, train_dataset=dataset).train(\n"
            f"    resume_from_checkpoint={resumed!r}\n"
            ")"
        )


def plan_resume(
    run_dir: Path,
    history: History | None,
    chosen: CheckpointReport,
    *,
    smoothing: str,
    is_last_resort: bool,
    repaired: Path | None = None,
) -> ResumePlan:
    """Say how to go on.

    Args:
        run_dir: The run's folder.
        history: Its log.
        chosen: Where to go on from.
        smoothing: ``floor``, the name of a smoothing function, or ``none``.
        is_last_resort: Whether the weights may be damaged: then the floor is that of noise.
        repaired: A copy that was smoothed already, to go on from instead.
    """
    source = (repaired or chosen.path).absolute()
    target = run_dir.absolute().with_name(f"{run_dir.absolute().name}-rescued")
    options = ["--resume_from_checkpoint", str(source), "--output_dir", str(target)]
    options += _smoothing_options(smoothing, is_last_resort, smoothed=repaired is not None)
    known = _launch(chosen.path.parent, history)
    command = None if known is None else ("hf-pss", "train", *options, *known)
    return ResumePlan(
        tuple(options),
        command,
        tuple(_remarks(chosen, smoothing, is_last_resort, known is not None, repaired)),
    )


def _smoothing_options(smoothing: str, is_last_resort: bool, *, smoothed: bool) -> Sequence[str]:
    if smoothing == "none":
        return []
    if smoothing == _FLOOR:
        # Healthy weights are their own measure; damaged ones would be taken for healthy.
        own = ["--pss_floor_reference", "noise" if is_last_resort else "start"]
        options = ["--pss_preset", "floor", *own]
    else:
        options = ["--pss_preset", "paper", "--pss_smoothing", smoothing]
    if not smoothed:
        options += ["--pss_smooth_on_resume", "true"]
    return [*options, *(["--pss_moments", "reset"] if is_last_resort and not smoothed else [])]


def _launch(folder: Path, history: History | None) -> list[str] | None:
    path = folder / OPTIONS_FILE
    if not path.is_file() or history is None:
        return None
    try:
        kept = read_object(path, max_bytes=_MAX_OPTIONS_BYTES)
    except (PSSError, OSError):
        return None
    words: list[str] = []
    for name in (name for name in _KNOWN if kept.get(name) not in (None, {})):
        value = _word(kept[name])
        if value is None:
            return None
        words += [f"--{name}", value]
    counts = {
        "max_steps": history.max_steps,
        "per_device_train_batch_size": history.batch_size,
        "logging_steps": history.log_interval,
    }
    for name, count in counts.items():
        words += [f"--{name}", str(count)] if count else []
    return words


def _word(value: object) -> str | None:
    """One word of a command line; None for what this program would not have written."""
    if isinstance(value, Mapping):
        pairs = [(key, _word(item)) for key, item in value.items()]
        return ",".join(f"{key}={item}" for key, item in pairs)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)
    return text if text.isprintable() and not text.startswith("-") else None


def _remarks(
    chosen: CheckpointReport,
    smoothing: str,
    is_last_resort: bool,
    is_known: bool,
    repaired: Path | None,
) -> list[str]:
    said = []
    if is_known:
        said.append(
            "Model, data, steps and batch size are those of the run; add what else you had given "
            "(schedule, warm-up, weight decay, seed, accumulation): no file that is safe to open "
            "holds it."
        )
    else:
        said.append(
            "Give all else as you gave it then: the same data, steps, batch size and number of "
            "processes. The script must read PSSTrainingArguments and train with PSSTrainer."
        )
    if chosen.layout != "whole":
        said.append("Start it as it was trained, under the same backend and launcher.")
    if smoothing == _FLOOR and repaired is None:
        said.append(
            "The weights may be damaged, so noise of their shapes is the measure of the floor; "
            "pretrained weights lie below it, and for those --smoothing none is safer."
            if is_last_resort
            else "The floor is the checkpoint's own: smoothing changes nothing at the start, and "
            "lets no matrix fall below from there on."
        )
    if smoothing != "none" and repaired is None:
        said.append(
            "After another interruption go on with --pss_smooth_on_resume false: it would smooth "
            "again."
        )
    if repaired is None:
        said.append(
            "--learning_rate has no effect here: a resumed run takes its schedule from "
            "scheduler.pt. For a lower rate, or to pass over batches, write a copy: --write OUT "
            "--lr-scale 0.5 --skip-batches N."
        )
    return said


def _literal(value: Any) -> str:
    return {"true": "True", "false": "False"}.get(value, repr(value))
