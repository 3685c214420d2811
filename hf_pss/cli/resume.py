"""Resume a run of `hf-pss train`: the checkpoint to resume from, and the options that it needs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainingArguments

from hf_pss.cli.loading import BUILT_IN, read_overrides
from hf_pss.cli.parsing import make_parser
from hf_pss.cli.train_options import TrainPlan
from hf_pss.detection.state import check_version, read_mapping, read_object
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.runs.checkpoint import examine, recorded_step
from hf_pss.runs.folder import STATE_FILE, checkpoints_by_step, step_by_name
from hf_pss.runs.options import LR_SCALE, TRAINING_OPTIONS, options_file, read_options
from hf_pss.runs.records_files import read_log
from hf_pss.trainer.resuming import newest_whole

_VERSION = 1
# These must stay the same, because the weights depend on them. The data and the rate may change.
_BINDING = (
    *("model", "model_config", "model_overrides", "tokenizer", "vocab_size", "dtype"),
    "context_length",
)
# These are for `hf-pss rescue`. A resumed run does not have them as options.
_NOT_COMPARED = ("training", "paths", "unigram_entropy")
# The value may also be a name on the Hub or a model type.
_MAY_BE_PATHS = ("model", "model_config", "tokenizer", "dataset")

Options: TypeAlias = dict[str, Any]


def choose_checkpoints(plan: TrainPlan) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint to resume from, and the earlier run's checkpoints to remove.

    Raises:
        ConfigurationError: There is nothing to resume, nothing left to train, or the folder holds
            an earlier run.
        StateError: There are checkpoints, but none is complete.
    """
    output_dir = Path(plan.arguments.output_dir)
    given = str(plan.arguments.resume_from_checkpoint or "false")
    if plan.run.resume or given.lower() == "true":
        accepts_fresh = plan.arguments.pss_missing_state == "fresh"
        latest = latest_checkpoint(output_dir, accepts_fresh=accepts_fresh)
        if latest is None:
            raise ConfigurationError(
                f"{output_dir} holds no checkpoint to resume from. Leave --resume out, or give "
                "the --output_dir of the run that you want to continue."
            )
    elif given.lower() != "false":
        latest = Path(given)
    else:
        earlier = checkpoints_by_step(output_dir)
        if not plan.run.overwrite and any(_step_of(path) is not None for path in earlier):
            raise ConfigurationError(
                f"{output_dir} holds checkpoints of an earlier run. Add --resume to continue it, "
                "--overwrite to remove them, or choose another --output_dir."
            )
        return None, earlier if plan.run.overwrite else []
    step, max_steps = _step_of(latest), plan.arguments.max_steps
    if step is None:
        raise ConfigurationError(f"{latest} is not a complete checkpoint: no {STATE_FILE}.")
    if 0 < max_steps <= step:  # the Trainer would still take one more step (5.23)
        where = "at" if step == max_steps else "past"
        raise ConfigurationError(
            f"{latest.name} is already {where} --max_steps {max_steps}. Give more steps, or start "
            "a run in another --output_dir."
        )
    return latest, []


def latest_checkpoint(output_dir: Path, *, accepts_fresh: bool = False) -> Path | None:
    """Return the newest checkpoint that can be resumed, and log the newer ones that cannot.

    Args:
        output_dir: The run's folder. The result is None if it holds no checkpoint at all.
        accepts_fresh: Also accept a checkpoint without the optimizer's or the schedule's state.

    Raises:
        StateError: There are checkpoints, but none can be resumed.
    """
    if not checkpoints_by_step(output_dir):
        return None
    return newest_whole(output_dir, accepts_fresh=accepts_fresh).path


def advice_after_failure(output_dir: Path, resumed: Path | None) -> str:
    """Return the advice for a run that failed: which checkpoint to continue from, and how.

    Args:
        output_dir: The run's folder.
        resumed: The checkpoint from which the run had resumed. It may be in a different folder.
    """
    candidates = [*([resumed] if resumed else []), *checkpoints_by_step(output_dir)]
    usable = [found for found in map(examine, candidates) if found.problem is None]
    losses = {}  # the validation losses at the step of each checkpoint
    for found in usable:
        log = read_log(found.path / STATE_FILE)
        rows = (row for row in log.rows if row.step == log.global_step)
        losses[found.path] = [row.eval_loss for row in rows if row.eval_loss is not None]
    healthy = [found for found in usable if any(map(math.isfinite, losses[found.path]))]
    if not healthy and usable and not any(losses.values()):
        return f"No checkpoint was evaluated; the latest, of unknown health, is {usable[-1].path}."
    if not healthy:
        return "No checkpoint has a finite evaluation to continue from: start the run again."
    best = healthy[-1]
    resume = "--resume_from_checkpoint continues from it at the old learning rate, "
    return (
        f"The last checkpoint whose evaluation was finite is {best.path}: "
        f"{resume if best.is_whole else ''}--model starts from its weights at another."
    )


def advice_after_failed_save(output_dir: Path, step: int) -> str:
    """Return the advice for a run that could not write its final model.

    Args:
        output_dir: The run's folder.
        step: The step at which the run ended.
    """
    usable = [
        found.path
        for found in map(examine, checkpoints_by_step(output_dir))
        if found.problem is None
    ]
    if not usable:
        return "There is no checkpoint either. Free some disk space and start the run again."
    if step_by_name(usable[-1]) == step:
        return f"{usable[-1]} holds the final weights; use that folder as the model."
    return (
        f"The latest checkpoint is {usable[-1]}. Free some disk space, then add --resume to the "
        "same command: it trains only the steps after that checkpoint."
    )


def _step_of(checkpoint: Path) -> int | None:
    try:
        return recorded_step(checkpoint)
    except (StateError, OSError):
        return None


def options_to_keep(
    plan: TrainPlan, checkpoint: Path | None, *, warn: Callable[[str], None]
) -> Options | None:
    """Return the options to write beside the checkpoints: the given ones, or the resumed run's.

    Raises:
        ConfigurationError: A resumed run has a different model or context length, or the file with
            its options is damaged.
    """
    given = _options_of(plan)
    if checkpoint is None:
        return given
    path = options_file(checkpoint)
    if path is None:  # a checkpoint of a different program
        return None
    kept = _read(path, given)
    for name in (name for name in given if not _is_the_same(name, given, kept)):
        here, there = _show(name, given[name]), _show(name, kept[name])
        if name in _BINDING:
            raise ConfigurationError(
                f"The run that you resume has {there}; this one has {here}. Give the same, or "
                "begin a run in another --output_dir."
            )
        if name == "learning_rate" and plan.arguments.pss_lr_scale is None:
            warn(
                f"The schedule is the checkpoint's, with {there}; {here} has no effect without "
                "--pss_lr_scale."
            )
        else:
            warn(f"The run continues with {here}; it began with {there}.")
    inherited = kept["training"].get(LR_SCALE)
    if plan.arguments.pss_lr_scale is not None:  # from here on the given rates count
        kept["learning_rate"] = given["learning_rate"]
        kept["training"][LR_SCALE] = given["training"][LR_SCALE]
    elif isinstance(inherited, float):
        warn(
            f"The run continues with {inherited} times --learning_rate {kept['learning_rate']}, "
            f"its earlier factor; --{LR_SCALE} changes it."
        )
    return kept


def _options_of(plan: TrainPlan) -> Options:
    options = {**asdict(plan.model), **asdict(plan.data)}
    options["model_overrides"] = read_overrides(plan.model.model_overrides or "")
    options["learning_rate"] = plan.arguments.learning_rate
    options["training"] = _unlike_the_defaults(plan.arguments)
    options["paths"] = _local_paths(options)
    # The entropy is filled in once the text is loaded.
    return {"version": _VERSION, **options, "unigram_entropy": None}


def _unlike_the_defaults(arguments: TrainingArguments) -> Options:
    parser = make_parser()
    known = set(parser.names)  # of this version of transformers
    found: Options = {}
    if "activation_checkpointing" in known:
        known.discard("gradient_checkpointing")  # the older name, which causes a warning
    for name in (name for name in TRAINING_OPTIONS if name in known):
        value = getattr(arguments, name)
        # TrainingArguments turns None into False.
        is_unset = name == "activation_checkpointing" and value is False
        is_default = is_unset or value == parser.get_default(name)
        if not is_default or name == "per_device_train_batch_size":
            found[name] = value.value if isinstance(value, Enum) else value
    return found


def _local_paths(options: Options) -> dict[str, str]:
    """Return the absolute paths of options that name files, because a rescue may run elsewhere."""
    given = {name: options[name] for name in _MAY_BE_PATHS if options[name]}
    if given["dataset"] == BUILT_IN:
        del given["dataset"]
    paths = {name: Path(value).expanduser() for name, value in given.items()}
    if "model_config" in paths and not paths["model_config"].suffix:  # a model type, such as gpt2
        del paths["model_config"]
    return {name: str(path.resolve()) for name, path in paths.items() if os.path.exists(path)}


def _is_the_same(name: str, given: Options, kept: Options) -> bool:
    if name in _NOT_COMPARED or given[name] == kept[name]:
        return True
    path = given["paths"].get(name)
    return path is not None and path == kept["paths"].get(name)


def _read(path: Path, known: Options) -> Options:
    try:
        parsed = read_options(path)
        check_version(parsed, _VERSION, "the file")
        # Files of earlier versions lack these.
        later: Options = {"training": {}, "paths": {}, "unigram_entropy": None}
        kept = dict(read_object({**later, **parsed}, tuple(known), "the file"))
        for name in ("training", "paths"):
            kept[name] = dict(read_mapping(kept[name], name))
    except (OSError, StateError) as error:
        raise ConfigurationError(
            f"The options of the run that you resume cannot be read from {path}: {error} "
            "Remove the file to resume without comparing them."
        ) from error
    return kept


def _show(name: str, value: Any) -> str:
    if value is None or value == {}:
        return f"no --{name}"
    if isinstance(value, dict):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    return f"--{name} {value}"
