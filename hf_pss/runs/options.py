"""Read how `hf-pss train` was started from the options file beside the checkpoints.

The file may come from anyone. The module therefore takes values only for the options that are
listed here, and only if they are printable and do not begin with a dash.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_pss.config import PSSConfig
from hf_pss.detection.state import number_of
from hf_pss.errors import PSSError
from hf_pss.records.strict_json import read_object
from hf_pss.runs.folder import MAX_CONFIG_BYTES, OPTIONS_FILE, leads_out, write_whole
from hf_pss.runs.records_files import RunLog

_MOST_ENTROPY = 20.0  # ln of five hundred million tokens

_OWN_OPTIONS = (
    *("model", "model_config", "model_overrides", "tokenizer", "vocab_size", "dtype", "dataset"),
    *("dataset_subset", "dataset_split", "text_column", "context_length", "max_tokens"),
    *("validation_fraction", "max_validation_blocks", "learning_rate"),
)
_BATCH_SIZE = "per_device_train_batch_size"
LR_SCALE = "pss_lr_scale"
TRAINING_OPTIONS = (
    *("seed", "data_seed", "full_determinism", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha"),
    *(_BATCH_SIZE, "auto_find_batch_size", "gradient_accumulation_steps"),
    *("activation_checkpointing", "gradient_checkpointing"),
    *("average_tokens_across_devices", "train_sampling_strategy"),
    *("dataloader_drop_last", "ignore_data_skip", "bf16", "fp16", "tf32", "use_cpu"),
    *("per_device_eval_batch_size", "eval_strategy", "eval_steps", "eval_delay"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better"),
    *("pss_optim", "pss_optim_args", "pss_preset", LR_SCALE),
    *(f"pss_{option.name}" for option in fields(PSSConfig)),
)
"""The training arguments that the file keeps under ``training`` if they differ from the defaults.

The seed, the schedule and the warm-up are needed because scheduler.pt holds only the base rate and
the step, not the shape of the schedule. Without these arguments, a continued run would get
different batches and different learning rates. The batch size per device is always kept, because
trainer_state.json holds only the batch size of a process, which may use several devices.
"""

_LISTS = {f"pss_{option.name}" for option in fields(PSSConfig) if isinstance(option.default, tuple)}
_RANDOM_STATE = re.compile(r"rng_state_(\d{1,5})\.pth")


@dataclass(frozen=True, slots=True)
class Launch:
    """How a run was started, as far as its files show."""

    words: tuple[str, ...]
    """Options and their values in the form that `hf-pss train` accepts."""
    is_whole: bool
    """Whether a version of hf-pss that keeps all of `TRAINING_OPTIONS` wrote the file."""
    lr_scale: float | None = None
    """The factor on the learning rate with which the run was started."""


def write_options(run_dir: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a run.

    Raises:
        OSError: The file cannot be written.
    """
    write_whole(run_dir / OPTIONS_FILE, json.dumps(options, indent=2, allow_nan=False) + "\n")


def read_options(path: Path) -> dict[str, Any]:
    """Read an options file. The values are not checked.

    Raises:
        StateError: The file is damaged.
        OSError: The file cannot be read.
    """
    return read_object(path, max_bytes=MAX_CONFIG_BYTES)


def options_file(checkpoint: Path) -> Path | None:
    """Return the options file of the run, which is inside a repaired copy or beside a checkpoint.

    A link that leads out of its folder is ignored.
    """
    folders = (checkpoint, checkpoint.parent)
    paths = (folder / OPTIONS_FILE for folder in folders)
    return next((p for p in paths if p.is_file() and not leads_out(p, p.parent)), None)


def read_launch(checkpoint: Path, log: RunLog | None, *, without: Collection[str]) -> Launch | None:
    """Return how the run that wrote a checkpoint was started, or None if that is unknown.

    Args:
        checkpoint: The folder of the checkpoint.
        log: The log of the run. It holds the number of steps and how often they were logged.
        without: The names of options that the caller sets itself.
    """
    path = options_file(checkpoint)
    kept = None if path is None else _kept_in(path)
    if kept is None or log is None:
        return None
    training, paths = kept.get("training", {}), kept.get("paths", {})
    if not isinstance(training, dict) or not isinstance(paths, dict):
        return None
    given = {name: paths.get(name, kept.get(name)) for name in _OWN_OPTIONS}
    given |= {name: training.get(name) for name in TRAINING_OPTIONS if name not in without}
    given |= {"max_steps": log.max_steps or None, "logging_steps": log.log_interval}
    lr_scale = training.get(LR_SCALE)
    if lr_scale is not None and not 0 < (number_of(lr_scale) or 0) < math.inf:
        return None
    is_whole = _BATCH_SIZE in training
    if not is_whole:
        given[_BATCH_SIZE] = log.batch_size or None
    words: list[str] = []
    for name, value in given.items():
        if value is None or value == {}:
            continue
        own = _words(name, value)
        if own is None:
            return None
        words += [f"--{name}", *own]
    return Launch(tuple(words), is_whole, lr_scale)


def num_processes(checkpoint: Path) -> int | None:
    """Count the processes that saved their random state, or return None if one is missing.

    If several nodes share no disk, each node holds only the states of the processes on that node.
    """
    names = (_RANDOM_STATE.fullmatch(entry.name) for entry in os.scandir(checkpoint))
    found = {int(name[1]) for name in names if name}
    if not found:
        return 1
    return len(found) if found == set(range(len(found))) else None


def recorded_entropy(folder: Path) -> float | None:
    """Return the unigram entropy of the training text in nats, if `hf-pss train` has saved it."""
    path = folder / OPTIONS_FILE
    kept = None if leads_out(path, folder) else _kept_in(path)
    value = None if kept is None else kept.get("unigram_entropy")
    return value if isinstance(value, float) and 0 < value < _MOST_ENTROPY else None


def began_from_noise(folder: Path) -> bool | None:
    """Return whether `hf-pss train` began with random weights, or None if another script trained.

    Args:
        folder: The folder of the run, or of a repaired copy.
    """
    path = folder / OPTIONS_FILE
    kept = None if leads_out(path, folder) else _kept_in(path)
    if kept is None or not (kept.get("model") or kept.get("model_config")):
        return None
    return not kept.get("model")


def _kept_in(path: Path) -> dict[str, Any] | None:
    try:
        return read_options(path)
    except (PSSError, OSError):
        return None


def _words(name: str, value: object) -> list[str] | None:
    """Return the words after an option, or None for a value that `hf-pss train` does not write."""
    if isinstance(value, Mapping | bool):
        try:
            found = [json.dumps(value)]  # a mapping may hold null, lists and mappings
        except RecursionError:
            return None
    elif isinstance(value, str | int | float):
        found = [str(value)]
    elif isinstance(value, list) and name in _LISTS and all(isinstance(v, str) for v in value):
        found = value
    else:
        return None
    return found if all(w.isprintable() and not w.startswith("-") for w in found) else None
