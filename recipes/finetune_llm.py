r"""Fine-tune a causal language model on conversations with PSS: in full, with LoRA or QLoRA.

    python recipes/llm_tiny_cpu/make_model.py
    python recipes/finetune_llm.py --config recipes/llm_tiny_cpu/lora.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/finetune_llm.py \
        --config recipes/llama_8b/full.yaml

This is trl's SFT with PSS in front: `FinetuneTrainer` and `FinetuneArguments` below. Every option
works on the command line, as --learning_rate 2e-5, and as a line of the YAML file, as
learning_rate: 2e-5. The command line wins over the file. --help lists all options.

What is trained:

    --model_name_or_path FOLDER_OR_HUB_ID                every weight
    … --use_peft                                         LoRA; --lora_r and its neighbours
    … --use_peft --load_in_4bit                          QLoRA; needs bitsandbytes

The text comes as rows of .jsonl or .parquet files, or from the Hub, in one of two forms. Both pass
through the model's chat template. The model learns only the assistant's turns: the labels of all
other tokens are -100.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}                   or lists of messages

`messages` need a template that marks the assistant's turns with {% generation %}. trl has such a
template for many models and uses it automatically. For other models, give a marked copy of the
template with --chat_template_path, or give rows with prompt and completion. You can also train on
every token with --assistant_only_loss false.

To continue after an interruption, run the same command with --resume_from_checkpoint true.
--report_to wandb logs to Weights & Biases, and WANDB_MODE=offline keeps the logs on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
    is_conversational,
)

from hf_pss import PSSTrainerMixin, PSSTrainingArguments

ON_CPU = not torch.accelerator.is_available()
DEFAULTS = {
    "use_cpu": ON_CPU,  # else each CPU process of `accelerate launch` trains a model alone
    "bf16": not ON_CPU,
    "ddp_find_unused_parameters": False,  # every trained parameter is used at every step
    "lora_target_modules": ["all-linear"],  # every linear layer but the head
    "eval_strategy": "steps",
    "eval_steps": 0.1,  # a tenth of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,
    "logging_steps": 0.01,
}
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """The conversations."""

    dataset: str = field(
        metadata={"help": "A .jsonl or .parquet file, a pattern for several, or a name on the Hub."}
    )
    dataset_subset: str | None = None
    dataset_split: str = "train"
    max_rows: int | None = field(default=None, metadata={"help": "Read at most this many rows."})
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of rows to hold out, at random; 0 evaluates nothing."},
    )


@dataclass
class FinetuneArguments(SFTConfig, PSSTrainingArguments):
    """SFTConfig with the options of PSS. Its defaults are those of SFTConfig, the first base."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 2e-4 with --use_peft, 2e-5 without."}
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Learn the assistant's turns only, or the completion."}
    )


class FinetuneTrainer(PSSTrainerMixin, SFTTrainer):
    """trl's SFTTrainer with PSS."""


def main(
    script: ScriptArguments, model: ModelConfig, training: FinetuneArguments
) -> FinetuneTrainer:
    """Load, train and save; return the trainer."""
    with training.main_process_first(desc="reading the rows"):
        rows = load_conversations(script)
    split = {"train": rows, "test": None}
    if script.validation_fraction > 0:
        num_held_out = max(1, round(len(rows) * script.validation_fraction))
        split = rows.train_test_split(test_size=num_held_out, seed=training.seed)
    else:
        training.eval_strategy = "no"
    if "completion" in rows.column_names:  # completions have a mask and need no marked template
        training.completion_only_loss = training.assistant_only_loss
        training.assistant_only_loss = False
    training.learning_rate = learning_rate(model, training)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    if not (tokenizer.chat_template or training.chat_template_path):
        raise ValueError(
            "The tokenizer has no chat template, as those of base models. Give one with "
            "--chat_template_path: the name of the instruction-tuned sibling, or a .jinja file, as "
            "recipes/llm_tiny_cpu/chat.jinja, which needs no tokens of its own."
        )
    trainer = FinetuneTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    checkpoint = training.resume_from_checkpoint  # a path, or a word that the Trainer cannot read
    words = {"true": True, "false": False}
    trainer.train(resume_from_checkpoint=words.get(str(checkpoint).lower(), checkpoint))
    trainer.save_model()  # with the tokenizer; with LoRA, only the adapter
    trainer.save_state()
    return trainer


def learning_rate(model: ModelConfig, training: FinetuneArguments) -> float:
    """Return the given rate, or one that suits the weights that are trained."""
    # Ten times the rate of full fine-tuning suits LoRA (Schulman et al. 2025, "LoRA Without
    # Regret").
    default = 2e-4 if model.use_peft else 2e-5
    return default if training.learning_rate is None else training.learning_rate


def load_conversations(script: ScriptArguments) -> Dataset:
    """Return the rows that hold an answer, with only the columns that trl reads.

    The other columns must go, because trl expects a completion wherever it finds a ``prompt``.
    """
    loader = LOADERS.get(Path(script.dataset).suffix)
    source: dict[str, Any] = {"path": script.dataset, "name": script.dataset_subset}
    if loader is not None:
        source = {"path": loader, "data_files": script.dataset}
    rows = load_dataset(**source, split=script.dataset_split)
    if script.max_rows is not None:
        rows = rows.select(range(min(script.max_rows, len(rows))))
    form = ["messages"] if "messages" in rows.column_names else ["prompt", "completion"]
    extra = {"tools", "chat_template_kwargs"} & set(rows.column_names)
    rows = rows.select_columns([*form, *sorted(extra)])
    if "completion" in form:
        rows = rows.map(as_turns)
    if not is_conversational(rows[0]):
        raise ValueError('Write a message as {"role": "user", "content": "…"}.')
    return rows.filter(has_answer, input_columns=form[-1:])


def as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a prompt and a completion that are plain text into one turn each."""
    return {
        name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    }


def has_answer(turns: list[dict[str, Any]] | None) -> bool:
    """Return whether one of these turns is the assistant's."""
    return any(turn["role"] == "assistant" for turn in turns or ())


def parse(words: list[str] | None = None) -> Any:
    """Read the YAML file that ``--config`` names, then the command line, which takes priority."""
    parser = TrlParser((ScriptArguments, ModelConfig, FinetuneArguments), allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_and_config(words, fail_with_unknown_args=True)


if __name__ == "__main__":
    main(*parse())
