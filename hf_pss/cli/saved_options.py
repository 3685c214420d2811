"""The options that a run's checkpoints depend on, kept beside them: `--resume` holds to these."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pss.cli.model import read_overrides
from hf_pss.cli.parsing import TrainPlan, make_parser
from hf_pss.detection.state import check_version, read_object
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.rescue.command import TRAINING_OPTIONS

__all__ = ["OPTIONS_FILE", "KeepOptions", "options_to_keep"]

OPTIONS_FILE = "hf_pss_options.json"
_VERSION = 1
# The weights were made for these; other data or another rate is a choice.
_BINDING = (
    *("model", "model_config", "model_overrides", "tokenizer", "vocab_size", "dtype"),
    "context_length",
)
# For `hf-pss rescue`, and no option that a resumed run could give otherwise.
_NOT_COMPARED = ("training", "unigram_entropy")

Options: TypeAlias = dict[str, Any]


class KeepOptions(TrainerCallback):
    """Writes options where training begins; None where those of a resumed run are not known."""

    def __init__(self, options: Options | None) -> None:
        self._options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write them, on the first process only."""
        if state.is_world_process_zero and self._options is not None:
            text = json.dumps({"version": _VERSION, **self._options}, indent=2, allow_nan=False)
            Path(args.output_dir, OPTIONS_FILE).write_text(f"{text}\n", encoding="utf-8")


def options_to_keep(
    plan: TrainPlan, checkpoint: Path | None, *, warn: Callable[[str], None]
) -> Options | None:
    """Return what `KeepOptions` is to write: these options, or those a resumed run began with.

    Raises:
        ConfigurationError: A resumed run has another model or context length, or the file of its
            options is damaged.
    """
    given = _options_of(plan)
    if checkpoint is None:
        return given
    path = checkpoint.parent / OPTIONS_FILE
    if not path.is_file():  # a checkpoint of another program
        return None
    kept = _read(path, given)
    compared = (name for name in given if name not in _NOT_COMPARED)
    for name in (name for name in compared if given[name] != kept[name]):
        here, there = _show(name, given[name]), _show(name, kept[name])
        if name in _BINDING:
            raise ConfigurationError(
                f"The run that you resume has {there}; this one has {here}. Give what it has, or "
                "begin a run in another --output_dir."
            )
        if name == "learning_rate":
            warn(f"The schedule is the checkpoint's, with {there}; {here} has no effect.")
        else:
            warn(f"The run goes on with {here}; it began with {there}.")
    return kept


def _options_of(plan: TrainPlan) -> Options:
    options = {**asdict(plan.model), **asdict(plan.data)}
    options["model_overrides"] = read_overrides(plan.model.model_overrides or "")
    options["learning_rate"] = plan.arguments.learning_rate
    options["training"] = _unlike_the_defaults(plan.arguments)
    return {**options, "unigram_entropy": None}  # filled in once the text is there


def _unlike_the_defaults(arguments: TrainingArguments) -> Options:
    parser = make_parser()
    found: Options = {}
    for name in TRAINING_OPTIONS:
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            found[name] = value.value if isinstance(value, Enum) else value
    return found


def _read(path: Path, known: Options) -> Options:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        check_version(parsed, _VERSION, "the file")
        later: Options = {"training": {}, "unigram_entropy": None}  # files of before have neither
        kept = dict(read_object({**later, **parsed}, ("version", *known), "the file"))
    except (OSError, ValueError, StateError) as error:
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
