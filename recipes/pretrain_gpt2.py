r"""Pretrain GPT-2 from random weights with PSSTrainer: an example to copy and change.

    python recipes/pretrain_gpt2.py --config recipes/gpt2_124m/pss.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/pretrain_gpt2.py \
        --config recipes/gpt2_124m/pss.yaml --max_steps 20000

You do not need this script to pretrain a model: `hf-pss train` reads the same YAML files and does
more. Copy the script if you want to write your own loop, model or text. It uses public names only.
Any script has options, a text and a model. Three things come from hf_pss: PSSTrainingArguments,
PSSTrainer and the `pss_preset` in the YAML file.

Every option works on the command line, as --learning_rate 6e-4, and as a line of the YAML file, as
learning_rate: 6e-4. The command line wins over the file. --help lists all options.

To continue after an interruption, run the same command with --resume_from_checkpoint true. The
script then reads a stream again up to the place where it stopped. With --ignore_data_skip it starts
from the beginning of the stream. --include_num_input_tokens_seen all adds tokens per second to the
logs, and --report_to wandb sends the logs to Weights & Biases.

The script needs trl for the command-line parser: pip install trl
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from trl import TrlParser

from hf_pss import PSSTrainer, PSSTrainingArguments

# Layers, width and heads of GPT-2 (Radford et al. 2019, table 2). As in the released weights, the
# width of a head is 64.
SIZES = {"124m": (12, 768, 12), "350m": (24, 1024, 16), "774m": (36, 1280, 20)}
SIZES["1.5b"] = (48, 1600, 25)
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """The model and the text."""

    model_size: Literal["124m", "350m", "774m", "1.5b"] = "124m"
    attn_implementation: str = "sdpa"
    tokenizer: str = field(default="gpt2", metadata={"help": "A folder or a name on the Hub."})
    dataset: str = field(
        default="HuggingFaceFW/fineweb-edu",
        metadata={"help": "A .txt, .jsonl or .parquet file, a pattern, or a name on the Hub."},
    )
    dataset_subset: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    streaming: bool = field(default=False, metadata={"help": "Read rows while training."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Of a stream, in documents."})
    max_validation_blocks: int = 512


@dataclass
class PretrainArguments(PSSTrainingArguments):
    """The training arguments, with the number of tokens instead of the number of sequences."""

    context_length: int = 1024
    tokens_per_step: int | None = field(
        default=None,
        metadata={"help": "Tokens per update over all devices. Sets gradient_accumulation_steps."},
    )

    def __post_init__(self) -> None:
        """Count the micro-batches before DeepSpeed reads them."""
        if self.tokens_per_step is not None:
            num_devices = int(os.environ.get("WORLD_SIZE", 1))
            at_once = num_devices * self.per_device_train_batch_size * self.context_length
            self.gradient_accumulation_steps, rest = divmod(self.tokens_per_step, at_once)
            if rest or not self.gradient_accumulation_steps:
                raise ValueError(f"--tokens_per_step is not a multiple of {at_once}.")
        super().__post_init__()


def main(script: ScriptArguments, args: PretrainArguments) -> PSSTrainer:
    """Load, train and save; return the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer)
    train, validation = load_text(script, args, tokenizer)
    set_seed(args.seed)
    trainer = PSSTrainer(
        model=build_model(script, args, tokenizer),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    checkpoint = args.resume_from_checkpoint  # a path, or a word that the Trainer cannot read
    words = {"true": True, "false": False}
    trainer.train(resume_from_checkpoint=words.get(str(checkpoint).lower(), checkpoint))
    trainer.save_model()  # with the tokenizer: plain transformers loads the folder
    trainer.save_state()
    return trainer


def build_model(
    script: ScriptArguments, args: PretrainArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a GPT-2 with fresh weights and without dropout."""
    num_layers, width, num_heads = SIZES[script.model_size]
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=num_heads,
        n_positions=args.context_length,
        # As in nanoGPT, 50,257 tokens become 50,304 rows: GPUs multiply multiples of 64 faster.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    attention = script.attn_implementation
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def load_text(
    script: ScriptArguments, args: PretrainArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Return packed training text, and the first blocks of the held-out documents."""
    loader = LOADERS.get(Path(script.dataset).suffix)
    source: dict[str, Any] = {"path": script.dataset, "name": script.dataset_subset}
    if loader is not None:
        source = {"path": loader, "data_files": script.dataset}
    rows = load_dataset(**source, split=script.dataset_split, streaming=script.streaming)
    rows = rows.select_columns(script.text_column)
    columns = [script.text_column]
    train, held_out = (
        rows.filter(lambda text, side=side: is_held_out(text) == side, input_columns=columns)
        for side in (False, True)
    )
    if script.streaming:
        train = train.shuffle(seed=args.seed, buffer_size=script.shuffle_buffer)
    pack_rows = partial(pack, tokenizer=tokenizer, context_length=args.context_length)
    train, held_out = (
        part.map(pack_rows, batched=True, input_columns=columns, remove_columns=columns)
        for part in (train, held_out)
    )
    return train, Dataset.from_list(list(islice(held_out, script.max_validation_blocks)))


def is_held_out(text: str) -> bool:
    """Choose one document in twenty by its content, so that all workers agree."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def pack(
    texts: list[str], *, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> dict[str, list[list[int]]]:
    """Join documents end to end, each with the end-of-text token, and cut them into full blocks."""
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in documents))
    starts = range(0, len(tokens) - context_length + 1, context_length)
    blocks = [tokens[start : start + context_length] for start in starts]
    return {"input_ids": blocks, "labels": blocks}


def parse(words: list[str] | None = None) -> Any:
    """Read the YAML file that ``--config`` names, then the command line, which takes priority."""
    parser = TrlParser((ScriptArguments, PretrainArguments), allow_abbrev=False)
    # Without use_cpu, each CPU process of `accelerate launch` would train a separate model.
    parser.set_defaults(eval_strategy="steps", use_cpu=not torch.accelerator.is_available())
    return parser.parse_args_and_config(words, fail_with_unknown_args=True)


if __name__ == "__main__":
    main(*parse())
