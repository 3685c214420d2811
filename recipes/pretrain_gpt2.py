r"""Pretrain GPT-2 from random weights with PSSTrainer, on one device or on many.

    python recipes/pretrain_gpt2.py --config recipes/gpt2_tiny_cpu/pss.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/pretrain_gpt2.py \
        --config recipes/gpt2_124m/pss.yaml

Every option works on the command line, as --learning_rate 6e-4, and as a line of the YAML file, as
learning_rate: 6e-4. Arguments win over the file.

Text comes from one of three places, and is packed to full context: documents end to end, with the
end-of-text token after each, without padding.

    --dataset python                                     the library of your interpreter
    --dataset 'data/*.jsonl'                             files: .txt, .jsonl, .parquet
    --dataset HuggingFaceFW/fineweb-edu --dataset_subset sample-10BT --streaming
                                                         the Hub, read while training

To go on after an interruption, run the same command with --resume_from_checkpoint true. A stream
is read again up to where it was; --ignore_data_skip begins it anew instead.

Training logs carry throughput/tokens_per_second, throughput/mfu and throughput/eta_seconds beside
the numbers of PSS; evaluations carry eval_perplexity. --report_to wandb sends all of them there,
and WANDB_MODE=offline keeps them here.

--help lists the options of this script, --help-all also those of TrainingArguments and PSS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_pss import PSSTrainer, PSSTrainingArguments
from hf_pss.cli.model import (
    check_fit,
    load_model,
    load_tokenizer,
    make_config,
    make_model,
    read_overrides,
)
from hf_pss.cli.parsing import (
    DataOptions,
    ModelOptions,
    config_path,
    into_dataclasses,
    make_parser,
    option,
    words_of_file,
)
from hf_pss.cli.terminal import run_script, without_noise
from hf_pss.cli.text import BUILT_IN, load_training_text
from hf_pss.cli.training import check_reporters
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import BlockDataset, open_rows
from hf_pss.evidence.packing import PackedStream, first_blocks, split_stream
from hf_pss.trainer.throughput import ThroughputTrainerMixin, num_parameters

# Layers, width and heads of GPT-2 (Radford et al. 2019, table 2), with the head width of 64 that
# the released weights have.
SIZES = {
    "124m": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "350m": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "774m": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "1.5b": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
# 50,257 tokens become 50,304 rows, as in nanoGPT: GPUs multiply multiples of 64 faster.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class ScriptArguments:
    """What this script adds to the options of `hf-pss train`."""

    _argument_group_name: ClassVar[str] = "Script"

    config: str | None = option(
        None, "A YAML file with any of these options, one a line; arguments win over it."
    )
    model_size: Literal["124m", "350m", "774m", "1.5b"] | None = option(
        None, "A GPT-2 of this size with fresh weights, without dropout, for --context_length."
    )
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = option(
        "sdpa", "How attention is computed; flash_attention_2 needs flash-attn, and --bf16."
    )
    tokens_per_step: int | None = option(
        None, "Tokens an update over all devices; sets gradient_accumulation_steps."
    )
    streaming: bool = option(
        False, "Read rows of files or of the Hub while training; needs --max_steps."
    )
    shuffle_buffer: int = option(
        10_000, "Documents that a stream is shuffled within; 1 keeps their order."
    )

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1; you gave {value}.")


@dataclass(frozen=True, slots=True)
class Text:
    """Packed text, split, and what tokenised it."""

    train: Dataset[dict[str, torch.Tensor]]
    validation: BlockDataset
    tokenizer: PreTrainedTokenizerBase


class PretrainTrainer(ThroughputTrainerMixin, PSSTrainer):
    """PSSTrainer with throughput and perplexity in its logs."""


def main(
    script: ScriptArguments, model: ModelOptions, data: DataOptions, training: PSSTrainingArguments
) -> PretrainTrainer:
    """Load, train and save; return the trainer.

    Raises:
        PSSError: Something is not there or does not fit together; or the run was not finite.
    """
    check_reporters(training.report_to)
    tokenizer = find_tokenizer(script, model, data)
    text = load_text(script, model, data, tokenizer, seed=training.seed)
    if isinstance(text.train, PackedStream) and training.max_steps <= 0:
        raise ConfigurationError("A stream has no length: say with --max_steps when to stop.")
    set_seed(training.seed)
    network = build_model(script, model, data, text.tokenizer)
    check_fit(network, text.tokenizer, context_length=data.context_length)
    trainer = PretrainTrainer(
        model=network,
        args=training,
        train_dataset=text.train,
        eval_dataset=text.validation,
        processing_class=text.tokenizer,
        data_collator=default_data_collator,
    )
    if trainer.is_world_process_zero():
        announce(network, data, training)
    with without_noise(network):
        checkpoint = training.resume_from_checkpoint
        # Words here, truths for the Trainer.
        truths: dict[str, bool] = {"true": True, "false": False}
        trainer.train(resume_from_checkpoint=truths.get(str(checkpoint).lower(), checkpoint))
    trainer.save_model()  # with the tokenizer: plain transformers loads the folder
    trainer.save_state()
    return trainer


def find_tokenizer(
    script: ScriptArguments, model: ModelOptions, data: DataOptions
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer; None where one is to be trained on the text."""
    if model.tokenizer or model.model:
        return load_tokenizer(str(model.tokenizer or model.model))
    if script.streaming or (script.model_size and data.dataset != BUILT_IN):
        return load_tokenizer("gpt2")
    return None


def load_text(
    script: ScriptArguments,
    model: ModelOptions,
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
) -> Text:
    """Load text into memory, or open it as a stream."""
    if not script.streaming:
        text = load_training_text(data, tokenizer, vocab_size=model.vocab_size)
        return Text(text.train, text.validation, text.tokenizer)
    if tokenizer is None or data.dataset == BUILT_IN:
        raise ConfigurationError(
            f"--streaming reads files or a dataset of the Hub; leave it out with {BUILT_IN!r}."
        )
    if data.max_tokens is not None:
        raise ConfigurationError("--max_tokens has no effect on a stream; use --max_steps.")
    rows = open_rows(
        data.dataset,
        column=data.text_column,
        subset=data.dataset_subset,
        split=data.dataset_split,
        streaming=True,
    )
    kept, held_out = split_stream(rows, column=data.text_column, fraction=data.validation_fraction)
    train, validation = (
        PackedStream(part, tokenizer, context_length=data.context_length, column=data.text_column)
        for part in (kept.shuffle(seed=seed, buffer_size=script.shuffle_buffer), held_out)
    )
    return Text(train, first_blocks(validation, data.max_validation_blocks), tokenizer)


def build_model(
    script: ScriptArguments,
    model: ModelOptions,
    data: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Return fresh weights of a named size or of a configuration, or weights to go on from."""
    given = [
        name
        for name, value in (
            ("--model_size", script.model_size),
            ("--model_config", model.model_config),
            ("--model", model.model),
        )
        if value
    ]
    if len(given) != 1:
        raise ConfigurationError(
            f"You gave {' and '.join(given) or 'no model'}: give one of --model_size, "
            "--model_config (fresh weights) and --model (weights to go on from)."
        )
    if model.model:
        return load_model(model.model, dtype=model.dtype)
    shape: dict[str, object] = {}
    if script.model_size:
        shape = {**SIZES[script.model_size], "n_positions": data.context_length}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= read_overrides(model.model_overrides or "")
    config = make_config(model.model_config or "gpt2", json.dumps(shape))
    return make_model(
        config,
        tokenizer,
        vocab_multiple=VOCAB_MULTIPLE,
        attn_implementation=script.attn_implementation,
    )


def announce(model: PreTrainedModel, data: DataOptions, training: PSSTrainingArguments) -> None:
    """Print what is about to be trained."""
    sequences = training.train_batch_size * training.world_size
    tokens = sequences * training.gradient_accumulation_steps * data.context_length
    print(
        f"{model.config.model_type}, {num_parameters(model):,} parameters; {tokens:,} tokens a "
        f"step: {training.gradient_accumulation_steps} × {training.train_batch_size} sequences of "
        f"{data.context_length}, on {training.world_size} "
        f"{'process' if training.world_size == 1 else 'processes'}"
    )


def parse(
    words: Sequence[str],
) -> tuple[ScriptArguments, ModelOptions, DataOptions, PSSTrainingArguments]:
    """Read options from the YAML file that ``--config`` names, then from the words, which win.

    Raises:
        ConfigurationError: No such file, an unknown option, or a value out of range.
    """
    path = config_path(words)
    parser = parser_of(f"runs/{path.stem if path else 'pretrain'}")
    words = [*(words_of_file(path, parser) if path else []), *words]
    known = parser.parse_known_args(words)[0]
    if known.tokens_per_step is not None:
        parser.set_defaults(gradient_accumulation_steps=micro_batches(known))
    return into_dataclasses(words, parser)


def parser_of(output_dir: str) -> Any:
    """Return the parser of all options, with the defaults of `hf-pss train`."""
    parser = make_parser(
        output_dir,
        groups=(ScriptArguments, ModelOptions, DataOptions, PSSTrainingArguments),
        prog="python recipes/pretrain_gpt2.py",
    )
    # Without it, several CPU processes under `accelerate launch` would each train alone.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    # Every parameter is used at every step; DDP need not look for others.
    parser.set_defaults(ddp_find_unused_parameters=False)
    return parser


def micro_batches(known: argparse.Namespace) -> int:
    """Return how many micro-batches each device takes for ``--tokens_per_step``.

    Known before the arguments are built: DeepSpeed reads it there.

    Raises:
        ConfigurationError: The tokens do not divide evenly, or both numbers were given.
    """
    if known.gradient_accumulation_steps != 1:
        raise ConfigurationError(
            "--tokens_per_step sets gradient_accumulation_steps: give one of the two."
        )
    num_devices = 1 if known.use_cpu else max(1, torch.cuda.device_count())
    num_devices = int(os.environ.get("WORLD_SIZE", num_devices))
    at_once = num_devices * known.per_device_train_batch_size * known.context_length
    if known.tokens_per_step % at_once:
        raise ConfigurationError(
            f"{known.tokens_per_step} tokens a step are no multiple of the {at_once} that "
            f"{num_devices} devices take at once, {known.per_device_train_batch_size} sequences "
            f"of {known.context_length} each. Change --per_device_train_batch_size."
        )
    return int(known.tokens_per_step // at_once)


def run(words: Sequence[str]) -> int:
    """Run the script with these words and return its exit code."""
    return run_script(
        words,
        train=lambda: main(*parse(words)),
        parser_of=parser_of,
        page=str(__doc__),
        groups={g._argument_group_name: g for g in (ScriptArguments, ModelOptions, DataOptions)},
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
