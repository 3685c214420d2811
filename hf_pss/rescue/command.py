"""How to go on: the command that resumes a run from the chosen checkpoint, with smoothing.

The launch of a run is known where `hf-pss train` wrote it: its options beside the checkpoints, the
steps and the batch size in trainer_state.json. Other scripts leave theirs in training_args.bin
alone, a pickle that is never opened here, so that for them the options to add are given.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pss.errors import PSSError
from hf_pss.inspection.strict_json import read_object
from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.history import History

__all__ = ["OPTIONS_FILE", "TRAINING_OPTIONS", "ResumePlan", "plan_resume", "recorded_entropy"]

OPTIONS_FILE = "hf_pss_options.json"
_MAX_OPTIONS_BYTES = 2**20
_MOST_ENTROPY = 20.0  # ln of five hundred million tokens
_FLOOR = "floor"
# Of `hf-pss train`, as it writes them; nothing else is taken from the file.
_KNOWN = (
    *("model", "model_config", "model_overrides", "tokenizer", "vocab_size", "dtype", "dataset"),
    *("dataset_subset", "dataset_split", "text_column", "context_length", "max_tokens"),
    *("validation_fraction", "max_validation_blocks", "learning_rate"),
)
TRAINING_OPTIONS = (
    *("seed", "data_seed", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "gradient_accumulation_steps", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "use_cpu"),
    *("per_device_eval_batch_size", "eval_steps", "save_steps", "save_total_limit"),
)
"""Of TrainingArguments, kept under ``training`` where they were not the defaults.

Without seed, schedule and warm-up a run that goes on gets other batches, at another rate:
scheduler.pt holds the base rate and the step, not the shape.
"""
_JSON_WORDS = frozenset({"lr_scheduler_kwargs"})


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
        (
            *_at_the_end(history, chosen),
            *_rising_rate(history, chosen, repaired),
            *_remarks(chosen, smoothing, is_last_resort, known is not None, repaired),
        ),
    )


def recorded_entropy(folder: Path) -> float | None:
    """Return the unigram entropy of a run's training text in nats, where `hf-pss train` kept it."""
    try:
        value = read_object(folder / OPTIONS_FILE, max_bytes=_MAX_OPTIONS_BYTES)["unigram_entropy"]
    except (PSSError, OSError, KeyError):
        return None
    is_sound = isinstance(value, float) and 0 < value < _MOST_ENTROPY
    return value if is_sound else None


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
    training = kept.get("training", {})
    if not isinstance(training, dict):
        return None
    given = [(name, kept.get(name)) for name in _KNOWN]
    given += [(name, training.get(name)) for name in TRAINING_OPTIONS]
    words: list[str] = []
    for name, value in given:
        if value is None or value == {}:
            continue
        word = _word(name, value)
        if word is None:
            return None
        words += [f"--{name}", word]
    counts = {
        "max_steps": history.max_steps,
        "per_device_train_batch_size": history.batch_size,
        "logging_steps": history.log_interval,
    }
    for name, count in counts.items():
        words += [f"--{name}", str(count)] if count else []
    return words


def _word(name: str, value: object) -> str | None:
    """One word of a command line; None for what this program would not have written."""
    if isinstance(value, Mapping) and name not in _JSON_WORDS:
        text = ",".join(f"{key}={_word(str(key), item)}" for key, item in value.items())
    elif isinstance(value, Mapping | bool):
        text = json.dumps(value)
    elif isinstance(value, str | int | float):
        text = str(value)
    else:
        return None
    return text if text.isprintable() and not text.startswith("-") else None


def _at_the_end(history: History | None, chosen: CheckpointReport) -> list[str]:
    if history is None or history.max_steps is None or chosen.step < history.max_steps:
        return []
    return [
        "The run has taken all its steps: there is nothing to go on with, but with more "
        "--max_steps. Where you know when it went wrong, say so: --failed-at STEP."
    ]


def _rising_rate(
    history: History | None, chosen: CheckpointReport, repaired: Path | None
) -> list[str]:
    """Warn where the schedule leads to higher rates again; the margin of a tenth is ours."""
    rows = () if history is None or repaired is not None else history.rows
    rates = [(row.step, row.learning_rate) for row in rows if row.learning_rate is not None]
    before = [rate for step, rate in rates if step <= chosen.step]
    later = [(rate, step) for step, rate in rates if step > chosen.step]
    if not before or not later or not max(later)[0] > 1.1 * before[-1]:
        return []
    rate, step = max(later)
    return [
        f"The learning rate rises after this checkpoint, from {before[-1]:.2g} to {rate:.2g} at "
        f"step {step}: what failed then will fail again. Lower it: --write OUT --lr-scale 0.1 "
        "--allow-pickle."
    ]


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
            "Model, data, steps, batch size, seed, schedule and optimizer are those of the run; "
            "add what else you had given, such as --report_to."
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
            "--learning_rate has no effect here: a resumed run takes its base rate from "
            "scheduler.pt. For a lower rate, or to pass over batches, write a copy: --write OUT "
            "--lr-scale 0.5 --skip-batches N."
        )
    return said


def _literal(value: Any) -> str:
    return {"true": "True", "false": "False"}.get(value, repr(value))
