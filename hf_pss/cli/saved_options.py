"""Keep the options that a run's checkpoints depend on, so that `--resume` can compare them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pss.cli.model import read_overrides
from hf_pss.cli.parsing import make_parser
from hf_pss.cli.text import BUILT_IN
from hf_pss.cli.train_options import TrainPlan
from hf_pss.detection.state import check_version, read_mapping, read_object
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.runs.options import (
    LR_SCALE,
    TRAINING_OPTIONS,
    options_file,
    read_options,
    write_options,
)

__all__ = ["KeepOptions", "options_to_keep"]

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


class KeepOptions(TrainerCallback):
    """Writes the options when training begins, unless a resumed run does not know them (None)."""

    def __init__(self, options: Options | None) -> None:
        self._options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file, on the first process only."""
        if state.is_world_process_zero and self._options is not None:
            write_options(Path(args.output_dir), {"version": _VERSION, **self._options})


def options_to_keep(
    plan: TrainPlan, checkpoint: Path | None, *, warn: Callable[[str], None]
) -> Options | None:
    """Return the options for `KeepOptions`: the given ones, or those of the run that is resumed.

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
    return {**options, "unigram_entropy": None}  # filled in once the text is loaded


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
        kept = dict(read_object({**later, **parsed}, ("version", *known), "the file"))
        for name in ("training", "paths"):
            kept[name] = dict(read_mapping(kept[name], name))
    except (OSError, StateError) as error:
        raise ConfigurationError(
            f"The options of the run that you resume cannot be read from {path}: {error} "
            "Remove the file to resume without comparing them."
        ) from error
    del kept["version"]
    return kept


def _show(name: str, value: Any) -> str:
    if value is None or value == {}:
        return f"no --{name}"
    if isinstance(value, dict):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    return f"--{name} {value}"
