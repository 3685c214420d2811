"""Read the options of `hf-pss train`.

Options come from a YAML file and from the command line. The parser treats a YAML entry as an option
on the command line, so both have the same types and the same error messages.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_pss.cli.train_options import (
    FRESH_LEARNING_RATE,
    LEARNING_RATE_HELP,
    TUNED_LEARNING_RATE,
    DataOptions,
    ModelOptions,
    RunOptions,
    ScaleOptions,
    TrainPlan,
)
from hf_pss.errors import ConfigurationError, PSSError, did_you_mean
from hf_pss.trainer.arguments import PSSTrainingArguments

# Defaults that differ from those of transformers, because they suit one run on one machine. Numbers
# of steps below 1 are shares of all steps.
_DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "logging_steps": 0.01,
    "dataloader_pin_memory": torch.accelerator.is_available(),  # without one, True warns
    # Otherwise each CPU process of `accelerate launch` would train a separate model.
    "use_cpu": not torch.accelerator.is_available(),
    # A causal language model uses every parameter at every step, so DDP need not look
    # for unused ones.
    "ddp_find_unused_parameters": False,
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None stands for the value of the preset, which the help text names.
        names_own = action.dest.startswith("pss_") and action.dest != "pss_preset"
        names_own = names_own or action.dest == "learning_rate"
        return action.help if names_own else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See `{self.prog} --help-all`.")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, and name an option once in errors: argparse writes --max_steps/--max-steps."""
        try:
            return super().parse_known_args(*args, **kwargs)
        except argparse.ArgumentError as error:
            name = str(error.argument_name).split("/")[0]
            self.error(f"{name}: {error.message}")

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        # An empty list has a meaning: `pss_detectors: []` guards against non-finite steps only.
        # transformers declares --report_to, which may name several trackers, as a single word.
        if kwargs.get("nargs") == "+" or names[0] == "--report_to":
            kwargs["nargs"] = "*"
        # Make `--tf32` mean `--tf32 true`: transformers requires the word if None is allowed.
        elif kwargs.get("type") is string_to_bool and "nargs" not in kwargs:
            kwargs |= {"nargs": "?", "const": True}
        if names[0] == "--learning_rate":
            kwargs["help"] = LEARNING_RATE_HELP
        return super().add_argument(*names, **kwargs)

    @property
    def names(self) -> list[str]:
        return [f.name for dtype in self.dataclass_types for f in fields(dtype) if f.init]


def make_parser(output_dir: str = "runs/train") -> _Parser:
    """Return the parser of all options, in groups, with the defaults of `hf-pss train`."""
    parser = _Parser(
        (ModelOptions, DataOptions, ScaleOptions, RunOptions, PSSTrainingArguments),
        prog="hf-pss train",
        formatter_class=_Formatter,
        exit_on_error=False,
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(output_dir=output_dir, **_DEFAULTS)
    return parser


def parse_plan(words: Sequence[str]) -> TrainPlan:
    """Read the options of the YAML file that ``--config`` names, then those of the command line.

    The command line wins over the file. ``output_dir`` defaults to ``runs/<name of
    the YAML file>``.

    Args:
        words: The command line after `hf-pss train`.

    Raises:
        ConfigurationError: The file is missing or is not valid YAML, an option is unknown, or a
            value is out of range.
    """
    path = _config_path(words)
    parser = make_parser(f"runs/{path.stem if path else 'train'}")
    words = [*(_words_of_file(path, parser) if path else []), *words]
    known = parser.parse_known_args(words)[0]
    parser.set_defaults(learning_rate=TUNED_LEARNING_RATE if known.model else FRESH_LEARNING_RATE)
    if known.tokens_per_step is not None:
        # This comes before the arguments are built, because DeepSpeed reads the number during that.
        parser.set_defaults(gradient_accumulation_steps=micro_batches(known))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            list(words), look_for_args_file=False, return_remaining_strings=True
        )
    except PSSError:
        raise
    except (ValueError, ImportError) as error:  # the checks of TrainingArguments
        raise ConfigurationError(str(error)) from error
    if unknown:
        _refuse_unknown(unknown[0], parser)
    return TrainPlan(*parsed)


def one_line(error: Exception) -> str:
    """Return the first line of an error, without advice of Hugging Face that does not apply."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def micro_batches(known: argparse.Namespace) -> int:
    """Return the number of micro-batches per device and update for ``--tokens_per_step``."""
    if known.gradient_accumulation_steps != 1:
        raise ConfigurationError(
            "--tokens_per_step sets gradient_accumulation_steps: give one of the two."
        )
    num_devices = 1 if known.use_cpu else max(1, torch.cuda.device_count())
    num_devices = int(os.environ.get("WORLD_SIZE", num_devices))
    at_once = num_devices * known.per_device_train_batch_size * known.context_length
    if known.tokens_per_step % at_once:
        raise ConfigurationError(
            f"--tokens_per_step {known.tokens_per_step} is not a multiple of {at_once}: "
            f"{num_devices} devices take {known.per_device_train_batch_size} sequences of "
            f"{known.context_length} tokens each at once. Change --per_device_train_batch_size."
        )
    return int(known.tokens_per_step // at_once)


def _refuse_unknown(word: str, parser: _Parser) -> NoReturn:
    if not word.startswith("--"):
        raise ConfigurationError(
            f"{word!r} belongs to no option; every value follows its option: --dataset {word}."
        )
    name = word.removeprefix("--").split("=")[0].replace("-", "_")
    raise ConfigurationError(
        f"There is no option {word.split('=')[0]}.{did_you_mean(name, parser.names)} "
        f"`{parser.prog} --help-all` lists all."
    )


def _config_path(words: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    found = parser.parse_known_args(words)[0].config
    return Path(found).expanduser() if found else None


def _words_of_file(path: Path, parser: _Parser) -> list[str]:
    """Return a YAML file's options as command-line words.

    This parses each option alone first, so that an error names the line of the file.
    """
    options = read_yaml(path)
    if options is None:
        return []
    if not isinstance(options, dict):
        raise ConfigurationError(
            f"{path} must hold options, one a line, such as `learning_rate: 3e-3`."
        )
    words: list[str] = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in parser.names or name == "config":
            raise ConfigurationError(
                f"{path} sets {str(key)!r}, which is not an option."
                f"{did_you_mean(name, parser.names)}"
            )
        own = list(_as_words(name, value))
        try:
            left = parser.parse_known_args(own)[1]
        except ConfigurationError as error:
            problem = str(error).removeprefix(f"--{name}: ")
            raise ConfigurationError(f"{path} sets {key}: {_as_word(value)}. {problem}") from error
        if left:
            raise ConfigurationError(
                f"{path} sets {key}: {_as_word(value)}, but {key} takes one value."
            )
        words += own
    return words


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigurationError: The file cannot be read, or it is not valid YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error


def _as_words(name: str, value: Any) -> Iterator[str]:
    """Write a YAML entry as command-line words. null leaves an option at its default."""
    if isinstance(value, list):
        yield from (f"--{name}", *map(str, value))
    elif value is not None:
        yield f"--{name}={_as_word(value)}"


def _as_word(value: Any) -> str:
    # This writes JSON, which argparse's types read back as true, 0.001 or a mapping.
    return value if isinstance(value, str) else json.dumps(value, default=str)
