"""The options of `hf-pss train` beside the training arguments: model, data, run.

From the words of the command line, and a YAML file, to checked options.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.trainer.arguments import PSSTrainingArguments

__all__ = [
    "FRESH_LEARNING_RATE",
    "LEARNING_RATE_HELP",
    "TUNED_LEARNING_RATE",
    "DataOptions",
    "ModelOptions",
    "RunOptions",
    "TrainPlan",
    "config_path",
    "into_dataclasses",
    "make_parser",
    "one_line",
    "option",
    "parse_plan",
    "suggest",
    "words_of_file",
]

# Our choice; transformers' 5e-5 is too low for fresh weights and high for tuned ones.
FRESH_LEARNING_RATE, TUNED_LEARNING_RATE = 1e-3, 2e-5
LEARNING_RATE_HELP = "Peak of the schedule. Default: 1e-3 with --model_config, 2e-5 with --model."


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is trained: weights that exist, or fresh ones from a configuration."""

    _argument_group_name: ClassVar[str] = "Model"  # where HfArgumentParser lists them

    model: str | None = option(
        None, "Weights to start from: a folder, or a name on the Hub. Fine-tunes."
    )
    model_config: str | None = option(
        None,
        "Fresh weights: a config as JSON or YAML file, or a type such as gpt2 or llama. Pretrains.",
    )
    model_overrides: str | None = option(
        None, "Changes to --model_config: n_layer=8,n_embd=64; in YAML also a mapping."
    )
    tokenizer: str | None = option(
        None, "A folder or a name on the Hub; else the model's, or one trained on the text."
    )
    vocab_size: int = option(2048, "Size of a tokenizer that is trained on the text.")
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32",
        "How weights of --model are held. For mixed precision keep float32 and set --bf16.",
    )


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What it is trained on."""

    _argument_group_name: ClassVar[str] = "Data"

    dataset: str = option(
        "python",
        "python (the library of your interpreter), a .txt, .jsonl or .parquet file, or a name on "
        "the Hub.",
    )
    dataset_subset: str | None = option(None, "A Hub dataset's configuration.")
    dataset_split: str = option("train", "A Hub dataset's split.")
    text_column: str = option("text", "Where rows keep their text.")
    context_length: int = option(256, "Tokens a block.")
    max_tokens: int | None = option(None, "Read no more than this many tokens.")
    validation_fraction: float = option(
        0.05,
        "Share held out, from the end of the text; python holds out one file in twenty.",
    )
    max_validation_blocks: int = option(512, "Evaluate on so many blocks at most.")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_validation_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1; you gave {value}.")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where options come from, and where training starts."""

    _argument_group_name: ClassVar[str] = "Run"

    config: str | None = option(
        None, "A YAML file with any of these options, one a line; arguments win over it."
    )
    resume: bool = option(
        False, "Go on from the last checkpoint in --output_dir; give the same options again."
    )
    overwrite: bool = option(False, "Remove an earlier run's checkpoints from --output_dir.")


# Where a one-off run on one machine wants something else than transformers' defaults. Below 1:
# a share of all steps.
_DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "logging_steps": 0.01,
    "dataloader_pin_memory": torch.accelerator.is_available(),  # else it warns
}


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Everything that `hf-pss train` was told."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    arguments: PSSTrainingArguments


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Their None means the preset's value, which the help itself names.
        names_own = action.dest.startswith("pss_") and action.dest != "pss_preset"
        names_own = names_own or action.dest == "learning_rate"
        return action.help if names_own else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See `{self.prog} --help-all`.")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Call an option by one name: argparse says --learning_rate/--learning-rate."""
        try:
            return super().parse_known_args(*args, **kwargs)
        except argparse.ArgumentError as error:
            name = str(error.argument_name).split("/")[0]
            self.error(f"{name}: {error.message}")

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        # An empty list means something: `pss_detectors: []` guards against non-finite steps only.
        # And transformers declares --report_to, which may name several trackers, as one word.
        if kwargs.get("nargs") == "+" or names[0] == "--report_to":
            kwargs["nargs"] = "*"
        # Options that are None unless set would need a word: --tf32 true.
        elif kwargs.get("type") is string_to_bool and "nargs" not in kwargs:
            kwargs |= {"nargs": "?", "const": True}
        if names[0] == "--learning_rate" and ModelOptions in self.dataclass_types:
            kwargs["help"] = LEARNING_RATE_HELP
        return super().add_argument(*names, **kwargs)

    @property
    def names(self) -> list[str]:
        return [f.name for dtype in self.dataclass_types for f in fields(dtype) if f.init]


def make_parser(
    output_dir: str = "runs/train",
    *,
    groups: Sequence[type] = (ModelOptions, DataOptions, RunOptions, PSSTrainingArguments),
    prog: str = "hf-pss train",
) -> _Parser:
    """Return the parser of all options, grouped, with the defaults of `hf-pss train`."""
    parser = _Parser(
        groups,
        prog=prog,
        formatter_class=_Formatter,
        exit_on_error=False,
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(output_dir=output_dir, **_DEFAULTS)
    return parser


def parse_plan(words: Sequence[str]) -> TrainPlan:
    """Read options from the YAML file that ``--config`` names, then from the words, which win.

    A YAML entry is read as if its option stood on the command line before the others: one set of
    types, and one set of messages. ``output_dir`` is ``runs/<name of the YAML file>`` by default.

    Raises:
        ConfigurationError: No such file, bad YAML, an unknown option, or a value out of range.
    """
    path = config_path(words)
    parser = make_parser(f"runs/{path.stem if path else 'train'}")
    words = [*(words_of_file(path, parser) if path else []), *words]
    tunes = parser.parse_known_args(words)[0].model
    parser.set_defaults(learning_rate=TUNED_LEARNING_RATE if tunes else FRESH_LEARNING_RATE)
    return TrainPlan(*into_dataclasses(words, parser))


def into_dataclasses(words: Sequence[str], parser: _Parser) -> tuple[Any, ...]:
    """Return one object of each of the parser's groups.

    Raises:
        ConfigurationError: An unknown option, or a value out of range.
    """
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            list(words), look_for_args_file=False, return_remaining_strings=True
        )
    except PSSError:
        raise
    except (ValueError, ImportError) as error:  # TrainingArguments' own checks
        raise ConfigurationError(str(error)) from error
    if unknown:
        _refuse_unknown(unknown[0], parser)
    return tuple(parsed)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a question that names the known words nearest to a mistaken one, or nothing."""
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def one_line(error: Exception) -> str:
    """Return the first line of an error: what follows in Hugging Face's is advice for others."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _refuse_unknown(word: str, parser: _Parser) -> NoReturn:
    if not word.startswith("--"):
        raise ConfigurationError(
            f"{word!r} stands alone; every value follows an option: --dataset {word}."
        )
    name = word.removeprefix("--").split("=")[0].replace("-", "_")
    raise ConfigurationError(
        f"There is no option {word.split('=')[0]}.{suggest(name, parser.names)} "
        f"`{parser.prog} --help-all` lists all."
    )


def config_path(words: Sequence[str]) -> Path | None:
    """Return the YAML file that ``--config`` names, if it does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    found = parser.parse_known_args(words)[0].config
    return Path(found).expanduser() if found else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no valid YAML: {error}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigurationError(
            f"{path} must hold options, one a line, such as `learning_rate: 3e-3`."
        )
    return {str(name): value for name, value in options.items()}


def words_of_file(path: Path, parser: _Parser) -> list[str]:
    """Return a YAML file's options as command-line words, each tried alone to name it if bad.

    Raises:
        ConfigurationError: No such file, bad YAML, or an option that is unknown or out of range.
    """
    words: list[str] = []
    for key, value in _read_yaml(path).items():
        name = key.replace("-", "_")
        if name not in parser.names or name == "config":
            raise ConfigurationError(
                f"{path} sets {key!r}, which is no option.{suggest(name, parser.names)}"
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


def _as_words(name: str, value: Any) -> Iterator[str]:
    """Write a YAML entry as command-line words; null leaves an option at its default."""
    if isinstance(value, list):
        yield from (f"--{name}", *map(str, value))
    elif value is not None:
        yield f"--{name}={_as_word(value)}"


def _as_word(value: Any) -> str:
    # JSON: what argparse reads back as true, 0.001 or a mapping.
    return value if isinstance(value, str) else json.dumps(value, default=str)
