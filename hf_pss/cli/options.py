"""The options of `hf-pss train` beside the training arguments: model, data, run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_pss.errors import ConfigurationError

__all__ = [
    "FRESH_LEARNING_RATE",
    "LEARNING_RATE_HELP",
    "TUNED_LEARNING_RATE",
    "DataOptions",
    "ModelOptions",
    "RunOptions",
    "option",
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
