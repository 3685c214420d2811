r"""Fine-tune a causal language model on conversations with PSS: in full, with LoRA or QLoRA.

    python recipes/llm_tiny_cpu/make_model.py
    python recipes/finetune_llm.py --config recipes/llm_tiny_cpu/lora.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/finetune_llm.py \
        --config recipes/llama_8b/full.yaml

Every option works on the command line, as --learning_rate 2e-5, and as a line of the YAML file, as
learning_rate: 2e-5. Arguments win over the file.

What is trained:

    --model_name_or_path FOLDER_OR_HUB_ID                every weight
    … --use_peft                                         LoRA; --lora_r and its neighbours
    … --use_peft --load_in_4bit                          QLoRA; needs bitsandbytes

What it is trained on: rows of .jsonl or .parquet files, or of the Hub, in one of two forms. Both go
through the model's chat template, and only what the assistant says is learned: labels are -100
elsewhere.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}                   or lists of messages

    --dataset 'data/*.jsonl'
    --dataset HuggingFaceH4/ultrachat_200k --dataset_split train_sft

`messages` need a template that marks what the assistant says with {% generation %}. For many models
trl has such a version of the template and takes it by itself; otherwise this script says what to
do. --assistant_only_loss false learns every token instead.

To go on after an interruption, run the same command with --resume_from_checkpoint true.
--report_to wandb logs to Weights & Biases, and WANDB_MODE=offline keeps that here.

--help lists the options of this script, --help-all also those of SFTConfig and PSS.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from hf_pss import PSSTrainerMixin, PSSTrainingArguments
from hf_pss.cli.model import load_tokenizer
from hf_pss.cli.parsing import (
    config_path,
    into_dataclasses,
    make_parser,
    one_line,
    option,
    words_of_file,
)
from hf_pss.cli.terminal import run_script, without_noise
from hf_pss.cli.training import check_reporters, latest_checkpoint
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import open_rows
from hf_pss.trainer.throughput import num_parameters

try:
    from trl import (
        ModelConfig,
        SFTConfig,
        SFTTrainer,
        get_peft_config,
        get_quantization_config,
        is_conversational,
    )
    from trl.chat_template_utils import get_training_chat_template
except ImportError as missing:
    raise SystemExit(f"Fine-tuning needs trl and peft: pip install trl peft ({missing})") from None

# As published for LoRA: ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without
# Regret"); 2e-5 is trl's own.
FULL_LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4
# What trl reads from a row beside the conversation itself.
_EXTRA_COLUMNS = ("tools", "chat_template_kwargs")
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class ScriptArguments:
    """Where conversations come from."""

    _argument_group_name: ClassVar[str] = "Script"

    config: str | None = option(
        None, "A YAML file with any of these options, one a line; arguments win over it."
    )
    dataset: str | None = option(
        None, "A .jsonl or .parquet file, a pattern for several, or a name on the Hub."
    )
    dataset_subset: str | None = option(None, "A Hub dataset's configuration.")
    dataset_split: str = option("train", "A Hub dataset's split.")
    max_rows: int | None = option(None, "Read no more than this many rows.")
    validation_fraction: float = option(
        0.05, "Share of the rows held out, at random; 0 evaluates nothing."
    )

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigurationError(f"max_rows must be at least 1; you gave {self.max_rows}.")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigurationError(
                "validation_fraction must be at least 0 and below 1; you gave "
                f"{self.validation_fraction}."
            )


# SFTConfig is the first base: its defaults count where both name a field.
@dataclass
class FinetuneArguments(SFTConfig, PSSTrainingArguments):
    """SFTConfig with the options of PSS."""

    learning_rate: float = option(
        FULL_LEARNING_RATE,
        f"Peak of the schedule. Default: {LORA_LEARNING_RATE:g} with --use_peft, "
        f"{FULL_LEARNING_RATE:g} without.",
    )
    assistant_only_loss: bool = option(
        True, "Learn only what the assistant says; with prompt and completion, the completion."
    )


class FinetuneTrainer(PSSTrainerMixin, SFTTrainer):
    """trl's SFTTrainer with PSS."""


@dataclass(frozen=True, slots=True)
class Conversations:
    """Rows in trl's forms, split; validation is None where nothing is held out."""

    train: Dataset
    validation: Dataset | None


def main(
    script: ScriptArguments, model: ModelConfig, training: FinetuneArguments
) -> FinetuneTrainer:
    """Load, train and save; return the trainer.

    Raises:
        PSSError: Something is not there or does not fit together; or the run was not finite.
    """
    check_reporters(training.report_to)
    check_model(model, training)
    checkpoint = find_checkpoint(training)
    tokenizer = load_tokenizer(
        str(model.model_name_or_path),
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    with training.main_process_first(desc="reading the rows"):
        conversations = load_conversations(script, seed=training.seed)
    complete_(training, model, conversations)
    check_template(tokenizer, training)
    trainer = FinetuneTrainer(
        model=weights_to_load(model, checkpoint),
        args=training,
        train_dataset=conversations.train,
        eval_dataset=conversations.validation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if trainer.is_world_process_zero():
        announce(trainer)
    with without_noise(trainer.model):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # with the tokenizer; an adapter alone where there is one
    trainer.save_state()
    return trainer


# ---- the model ----


def check_model(model: ModelConfig, training: FinetuneArguments) -> None:
    """Refuse what cannot be loaded before anything is read.

    Raises:
        ConfigurationError: No model was named; it is not there; it reads fewer tokens; or it is
            to be quantised without an adapter or without bitsandbytes.
    """
    if model.model_name_or_path is None:
        raise ConfigurationError(
            "You gave no model: name a folder or a model of the Hub with --model_name_or_path."
        )
    is_quantised = model.load_in_4bit or model.load_in_8bit
    if is_quantised and not model.use_peft:
        raise ConfigurationError(
            "Quantised weights cannot be trained themselves: add --use_peft, or leave "
            "--load_in_4bit and --load_in_8bit out."
        )
    if model.use_peft and find_spec("peft") is None:
        raise ConfigurationError("--use_peft needs peft: pip install peft.")
    if is_quantised and find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            "Quantised weights need bitsandbytes: pip install bitsandbytes. Without it leave "
            "--load_in_4bit and --load_in_8bit out: LoRA on unquantised weights."
        )
    try:
        config = AutoConfig.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"No model can be loaded from {model.model_name_or_path!r}: {one_line(error)}"
        ) from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and (training.max_length or 0) > longest:
        raise ConfigurationError(
            f"You asked for a max_length of {training.max_length}, but the model reads at most "
            f"{longest} tokens. Give a shorter --max_length."
        )


def find_checkpoint(training: FinetuneArguments) -> str | None:
    """Return the checkpoint to go on from; ``true`` means the output folder's newest whole one.

    Raises:
        ConfigurationError: There is none.
        StateError: There are some, and none is whole.
    """
    given = training.resume_from_checkpoint
    if given is None or str(given).lower() == "false":
        return None
    folder = Path(str(training.output_dir))
    if str(given).lower() == "true":
        found = latest_checkpoint(folder, accepts_fresh=training.pss_missing_state == "fresh")
        if found is None:
            raise ConfigurationError(
                f"{folder} holds no checkpoint to go on from. Leave --resume_from_checkpoint out, "
                "or give the --output_dir of the run that you want to continue."
            )
        return str(found)
    if not Path(given, "trainer_state.json").is_file():
        raise ConfigurationError(f"{given} is no complete checkpoint: no trainer_state.json.")
    return str(given)


def weights_to_load(model: ModelConfig, checkpoint: str | None) -> str:
    """Return where the model object comes from; the Trainer loads the checkpoint into it later.

    From the checkpoint itself where it holds whole weights: on a resume the Trainer leaves the
    experts of MoE models as they were made (transformers 5.23).
    """
    if checkpoint and not model.use_peft and any(Path(checkpoint).glob("model*.safetensors")):
        return checkpoint
    return str(model.model_name_or_path)


# ---- the conversations ----


def load_conversations(script: ScriptArguments, *, seed: int) -> Conversations:
    """Read rows in either form and hold some out.

    Raises:
        ConfigurationError: No such file or dataset, or its rows are no conversations.
    """
    if script.dataset is None:
        raise ConfigurationError(
            "You gave no conversations: name a .jsonl file, a pattern or a dataset of the Hub "
            "with --dataset."
        )
    rows = open_rows(
        script.dataset, column=None, subset=script.dataset_subset, split=script.dataset_split
    )
    if script.max_rows is not None:
        rows = rows.select(range(min(script.max_rows, len(rows))))
    rows = as_conversations(rows, source=script.dataset)
    if script.validation_fraction == 0.0:
        return Conversations(rows, None)
    num_held_out = max(1, round(len(rows) * script.validation_fraction))
    if num_held_out >= len(rows):
        raise ConfigurationError(
            f"{script.dataset} has {len(rows)} conversations: too few to hold one out. Give more, "
            "or --validation_fraction 0."
        )
    split = rows.train_test_split(test_size=num_held_out, seed=seed)
    return Conversations(split["train"], split["test"])


def as_conversations(rows: Dataset, *, source: str) -> Dataset:
    """Return the rows with the columns that trl reads, and no others; those without answer go.

    Other columns must go: trl takes a row with a ``prompt`` for one with a completion.

    Raises:
        ConfigurationError: Neither form is there, or no row holds an answer.
    """
    names = rows.column_names
    extra = [name for name in _EXTRA_COLUMNS if name in names]
    if "messages" in names:
        rows = rows.select_columns(["messages", *extra])
    elif {"prompt", "completion"} <= set(names):
        rows = rows.select_columns(["prompt", "completion", *extra]).map(_as_turns)
    else:
        raise ConfigurationError(
            f"{source} has the columns {', '.join(map(repr, names))}. Conversations are rows with "
            "'messages', or with 'prompt' and 'completion'."
        )
    if len(rows) == 0 or not is_conversational(rows[0]):
        raise ConfigurationError(
            f"The rows of {source} are no conversations. A message is written as "
            '{"role": "user", "content": "…"}.'
        )
    answered = rows.filter(_has_answer)
    if len(answered) == 0:
        raise ConfigurationError(f"No row of {source} has a turn of the role 'assistant'.")
    num_left_out = len(rows) - len(answered)
    if num_left_out and PartialState().is_main_process:
        print(f"{num_left_out} of {len(rows)} rows have no assistant's turn and are left out")
    return answered


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Make one turn each of a prompt and a completion that are plain text."""
    roles = (("prompt", "user"), ("completion", "assistant"))
    return {
        name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name, role in roles
    }


def _has_answer(row: dict[str, Any]) -> bool:
    turns = row["messages"] if "messages" in row else row["completion"]
    return any(turn["role"] == "assistant" for turn in turns or ())


def complete_(
    training: FinetuneArguments, model: ModelConfig, conversations: Conversations
) -> None:
    """Set what trl reads from its arguments but is known from the model and the rows."""
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    if conversations.validation is None:
        training.eval_strategy = "no"
    if "completion" in conversations.train.column_names:
        # The completion's own mask needs no marked template.
        training.completion_only_loss = training.assistant_only_loss
        training.assistant_only_loss = False


def check_template(tokenizer: PreTrainedTokenizerBase, training: FinetuneArguments) -> None:
    """Make sure that there is a chat template, and that it marks what the assistant says.

    Raises:
        ConfigurationError: It does not, or there is none.
    """
    source = training.chat_template_path
    if source is None:
        marked = tokenizer
    elif source.endswith((".jinja", ".j2")):
        marked = copy.copy(tokenizer)
        try:
            marked.chat_template = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{source} cannot be read: {error.strerror}.") from error
    else:
        marked = load_tokenizer(source)
    if not marked.chat_template:
        raise ConfigurationError(
            f"The tokenizer of {source or tokenizer.name_or_path} has no chat template, as those "
            "of base models. Give one with --chat_template_path: the name of the instruction-tuned "
            "sibling, or a .jinja file such as recipes/llm_tiny_cpu/chat.jinja, which needs no "
            "tokens of its own."
        )
    template = marked.chat_template
    template = template["default"] if isinstance(template, dict) else template
    if not training.assistant_only_loss or _GENERATION_MARKER.search(template):
        return
    try:
        get_training_chat_template(marked)
    except ValueError as error:
        raise ConfigurationError(
            "The chat template does not mark what the assistant says, and trl knows no version of "
            "it that does. Write {% generation %} before and {% endgeneration %} after each "
            "assistant's turn, its end-of-turn token included, into a copy of it and give that "
            "with --chat_template_path; or give rows with prompt and completion, which need no "
            "marks; or learn every token with --assistant_only_loss false."
        ) from error


def announce(trainer: FinetuneTrainer) -> None:
    """Print what is about to be trained."""
    model, arguments = trainer.model, trainer.args
    sequences = arguments.train_batch_size * arguments.world_size
    print(
        f"{model.config.model_type}, {num_parameters(model, trained=True):,} of "
        f"{num_parameters(model):,} parameters "
        f"trained; {len(trainer.train_dataset):,} conversations, "
        f"{sequences * arguments.gradient_accumulation_steps} a step"
    )


# ---- the words ----


def parse(words: Sequence[str]) -> tuple[ScriptArguments, ModelConfig, FinetuneArguments]:
    """Read options from the YAML file that ``--config`` names, then from the words, which win.

    Raises:
        ConfigurationError: No such file, an unknown option, or a value out of range.
    """
    path = config_path(words)
    parser = parser_of(f"runs/{path.stem if path else 'finetune'}")
    words = [*(words_of_file(path, parser) if path else []), *words]
    if parser.parse_known_args(words)[0].use_peft:
        parser.set_defaults(learning_rate=LORA_LEARNING_RATE)
    return into_dataclasses(words, parser)


def parser_of(output_dir: str) -> Any:
    """Return the parser of all options."""
    parser = make_parser(
        output_dir,
        groups=(ScriptArguments, ModelConfig, FinetuneArguments),
        prog="python recipes/finetune_llm.py",
    )
    has_accelerator = torch.accelerator.is_available()
    # Without it, several CPU processes under `accelerate launch` would each train alone.
    parser.set_defaults(use_cpu=not has_accelerator)
    if not has_accelerator:
        parser.set_defaults(bf16=False)
    # Every trained parameter is used at every step; DDP need not look for others.
    parser.set_defaults(ddp_find_unused_parameters=False)
    # Every linear layer but the head, whatever the model calls them.
    parser.set_defaults(lora_target_modules=["all-linear"])
    return parser


def run(words: Sequence[str]) -> int:
    """Run the script with these words and return its exit code."""
    return run_script(
        words,
        train=lambda: main(*parse(words)),
        parser_of=parser_of,
        page=str(__doc__),
        groups={"Conversations": ScriptArguments, "Model": ModelConfig},
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
