"""The options of `hf-pss train` in addition to the training arguments.

This module imports neither torch nor transformers, so that ``--help`` can list the options at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_pss.errors import ConfigurationError

if TYPE_CHECKING:
    from hf_pss.trainer.arguments import PSSTrainingArguments


# These are our choice. The default of transformers, 5e-5, is too low for fresh weights and high for
# pretrained ones.
FRESH_LEARNING_RATE, TUNED_LEARNING_RATE = 1e-3, 2e-5
LEARNING_RATE_HELP = "Peak of the schedule. Default: 1e-3 for fresh weights, 2e-5 with --model."


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model to train: existing weights, or fresh ones from a configuration."""

    _argument_group_name: ClassVar[str] = "Model"  # the heading under which --help-all lists them

    model: str | None = _option(None, "Fine-tune these weights: a folder, or a name on the Hub.")
    model_config: str | None = _option(
        None,
        "Pretrain fresh weights: a config in a JSON or YAML file, or a type such as gpt2 or llama.",
    )
    model_overrides: str | None = _option(
        None, "Changes to --model_config, as n_layer=8,n_embd=64. In YAML this may be a mapping."
    )
    tokenizer: str | None = _option(
        None,
        "A folder or a name on the Hub. Default: the tokenizer of the model, or for fresh weights "
        "one that is trained on the text.",
    )
    vocab_size: int = _option(2048, "Size of a tokenizer that is trained on the text.")
    dtype: Literal["float32", "bfloat16", "auto"] = _option(
        "float32",
        "Precision of the weights of --model. For mixed precision keep float32 and set --bf16.",
    )


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The text to train on."""

    _argument_group_name: ClassVar[str] = "Data"

    dataset: str = _option(
        "python",
        "python (the library of your interpreter), a .txt, .jsonl or .parquet file, a pattern such "
        "as 'data/*.jsonl', or a name on the Hub.",
    )
    dataset_subset: str | None = _option(None, "A Hub dataset's configuration.")
    dataset_split: str = _option("train", "A Hub dataset's split.")
    text_column: str = _option("text", "The column of the rows that holds the text.")
    context_length: int = _option(256, "Tokens per block.")
    max_tokens: int | None = _option(None, "Read at most this many tokens.")
    validation_fraction: float = _option(
        0.05,
        "Share of the text to hold out, from its end. python holds out one file in twenty.",
    )
    max_validation_blocks: int = _option(512, "Evaluate on at most this many blocks.")

    def __post_init__(self) -> None:
        _require_positive(self, "max_tokens", "max_validation_blocks")


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """Options for large runs: a model by its size, tokens per update, text as a stream."""

    _argument_group_name: ClassVar[str] = "Large runs"

    model_size: Literal["124m", "350m", "774m", "1.5b"] | None = _option(
        None,
        "Pretrain a GPT-2 of this size with fresh weights, without dropout, for --context_length.",
    )
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] | None = _option(
        None,
        "How attention is computed. flash_attention_2 needs flash-attn and --bf16. Default: sdpa "
        "if the model has it.",
    )
    tokens_per_step: int | None = _option(
        None, "Tokens per update over all devices. Sets gradient_accumulation_steps."
    )
    streaming: bool = _option(
        False, "Read the rows of files or of the Hub during training. This needs --max_steps."
    )
    shuffle_buffer: int = _option(
        10_000, "Shuffle a stream within this many documents. With 1 they keep their order."
    )

    def __post_init__(self) -> None:
        _require_positive(self, "tokens_per_step", "shuffle_buffer")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The source of the options, and the start of training."""

    _argument_group_name: ClassVar[str] = "Run"

    config: str | None = _option(
        None, "A YAML file with any of these options, one per line. The command line wins over it."
    )
    resume: bool = _option(
        False, "Continue from the last checkpoint in --output_dir; give the same options again."
    )
    overwrite: bool = _option(False, "Remove an earlier run's checkpoints from --output_dir.")


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """All options of `hf-pss train`."""

    model: ModelOptions
    data: DataOptions
    scale: ScaleOptions
    run: RunOptions
    arguments: PSSTrainingArguments


def _require_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1; you gave {value}.")
