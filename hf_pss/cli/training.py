"""Run `hf-pss train`: load the model and the text, train, save, and print a summary."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from hf_pss.cli.model import (
    SIZES,
    check_fit,
    load_model,
    load_tokenizer,
    make_config,
    make_model,
    read_overrides,
)
from hf_pss.cli.progress import (
    ProgressDisplay,
    render_summary,
    set_step_counts_,
    summarise,
)
from hf_pss.cli.resume_choice import advice_after_failure, choose_checkpoints, latest_checkpoint
from hf_pss.cli.saved_options import KeepOptions, options_to_keep
from hf_pss.cli.terminal import without_noise
from hf_pss.cli.text import BUILT_IN, Text, load_training_text, open_stream
from hf_pss.cli.train_options import ModelOptions, TrainPlan
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.evidence.data import BlockDataset, unigram_entropy_nats
from hf_pss.models.measurements import select_watched
from hf_pss.trainer.pss_trainer import PSSTrainer
from hf_pss.trainer.throughput import ThroughputTrainerMixin, num_parameters
from hf_pss.view.numbers import plural

__all__ = ["run_training"]

# nanoGPT's choice for GPT-2: 50,257 tokens become 50,304 rows, because GPUs multiply multiples of
# 64 faster.
_VOCAB_MULTIPLE = 64


class _TextTrainer(ThroughputTrainerMixin, PSSTrainer):
    """PSSTrainer with tokens per second and perplexity in its logs."""


class _RemoveCheckpoints(TrainerCallback):
    """Removes an earlier run's checkpoints when training begins and every check has passed."""

    def __init__(self, checkpoints: list[Path]) -> None:
        self._checkpoints = checkpoints

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove them, on the first process only."""
        if state.is_world_process_zero:
            for folder in self._checkpoints:
                shutil.rmtree(folder)


def run_training(plan: TrainPlan) -> None:
    """Train according to the plan, in one process or in several, and print a summary to stdout.

    ``output_dir`` then holds the model, the tokenizer, the checkpoints, and PSS's events.

    Raises:
        ConfigurationError: A model, text or checkpoint is missing, or they do not fit together.
        NonFiniteError: The run stopped at a step that was not finite, or its final
            weights are not finite.
    """
    transformers.utils.logging.disable_progress_bar()  # our own bar is on the terminal
    datasets.disable_progress_bars()
    plan = replace(plan, model=_named_model(plan))
    _check_reporters(plan.arguments.report_to)
    _check_folder(Path(plan.arguments.output_dir))
    console = Console(stderr=True, quiet=plan.arguments.process_index > 0)
    checkpoint, replaced = choose_checkpoints(plan)
    kept = None  # for a stream, whose options `hf-pss rescue` does not know
    if not plan.scale.streaming:
        kept = options_to_keep(
            plan, checkpoint, warn=lambda text: console.print(text, style="yellow", markup=False)
        )
    with console.status("Loading the model and the text …"):
        model, text = _load(plan, checkpoint)
    num_blocks = 0  # for a stream, which needs --max_steps
    if isinstance(text.train, BlockDataset):
        num_blocks = len(text.train)
        if checkpoint is None and kept is not None:
            kept["unigram_entropy"] = unigram_entropy_nats(text.train.blocks.numpy().ravel())
    check_fit(model, text.tokenizer, context_length=plan.data.context_length)
    pss_config = plan.arguments.pss_config()
    select_watched(model, pss_config)  # refuses a bad pattern before the Trainer makes a folder
    _announce(console, plan, model, text, checkpoint)
    set_step_counts_(plan.arguments, num_blocks=num_blocks)
    trainer = _TextTrainer(
        model=model,
        args=plan.arguments,
        train_dataset=text.train,
        eval_dataset=text.validation,
        processing_class=text.tokenizer,
        data_collator=default_data_collator,
        pss_config=pss_config,
    )
    trainer.add_callback(_RemoveCheckpoints(replaced))  # after PSS, which may refuse the model
    trainer.add_callback(KeepOptions(kept))
    _train(trainer, console, checkpoint)
    # This is not in a finally block: after an error, other ranks may wait in a collective, and this
    # call would wait for them.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(trainer: PSSTrainer, console: Console, checkpoint: Path | None) -> None:
    output_dir = Path(trainer.args.output_dir)
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    display = ProgressDisplay(trainer, console)
    trainer.add_callback(display)
    try:
        with display, without_noise(trainer.model):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        with suppress(StateError):  # no checkpoint can be resumed
            if latest := latest_checkpoint(output_dir):
                console.print(f"{latest} is saved. To continue, add --resume to the same command.")
        raise
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} {advice_after_failure(output_dir, checkpoint)}") from error
    summary = summarise(
        trainer, train_seconds=outcome.metrics["train_runtime"], pss_seconds=display.pss_seconds
    )
    if not summary.has_broken_weights:
        trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        Console().print(render_summary(summary, output_dir))
    if summary.problem:
        raise NonFiniteError(f"{summary.problem} {advice_after_failure(output_dir, checkpoint)}")


def _named_model(plan: TrainPlan) -> ModelOptions:
    """Return the options of the one model that is given, with ``--model_size`` spelled out."""
    model, size = plan.model, plan.scale.model_size
    options = {
        "--model": model.model,
        "--model_config": model.model_config,
        "--model_size": size,
    }
    given = [name for name, value in options.items() if value]
    if len(given) != 1:
        raise ConfigurationError(
            f"You gave {' and '.join(given) or 'no model'}. Give --model gpt2 (or a folder) to "
            "fine-tune weights that exist, or one of --model_config gpt2 and --model_size 124m to "
            "train fresh ones."
        )
    if model.model_overrides and model.model:
        raise ConfigurationError("--model_overrides shapes fresh weights: it needs --model_config.")
    if size is None:
        return model
    shape: dict[str, Any] = {**SIZES[size], "n_positions": plan.data.context_length}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= read_overrides(model.model_overrides or "")
    return replace(model, model_config="gpt2", model_overrides=json.dumps(shape))


def _check_reporters(names: list[str]) -> None:
    available = get_available_reporting_integrations()
    if missing := [name for name in names if name not in available]:
        raise ConfigurationError(
            f"You asked to report to {', '.join(missing)}, which is not installed or not known. "
            f"Available: {', '.join(available) or 'none'}. Install it, or leave --report_to out."
        )


def _check_folder(path: Path) -> None:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "it cannot be written to" if there.is_dir() else "it is a file"
        where = "" if there == path else f" {there} is in the way:"
        raise ConfigurationError(
            f"The folder {path} cannot be made:{where} {problem}. Choose another --output_dir."
        )


def _load(plan: TrainPlan, checkpoint: Path | None) -> tuple[PreTrainedModel, Text]:
    """Load the model and the text, and begin with the one that fails faster."""
    options = plan.model
    given = plan.scale.attn_implementation
    attention = {"attn_implementation": given} if given else {}
    source = options.model
    # A checkpoint in shards is not used here, because the Trainer loads its shards into the model.
    if checkpoint and any(checkpoint.glob("model*.safetensors")):
        source = str(checkpoint)  # which has the right vocabulary
    model = load_model(source, dtype=options.dtype, **attention) if source else None
    # A resumed run must cut its text into the same tokens.
    tokenizer = load_tokenizer(str(checkpoint)) if checkpoint else _find_tokenizer(plan)
    if model is not None:
        return model, _load_text(plan, tokenizer)
    config = make_config(str(options.model_config), options.model_overrides)
    text = _load_text(plan, tokenizer)
    multiple = _VOCAB_MULTIPLE if plan.scale.model_size else 1
    set_seed(plan.arguments.seed)
    return make_model(config, text.tokenizer, vocab_multiple=multiple, **attention), text


def _find_tokenizer(plan: TrainPlan) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer. None means that one will be trained on the text."""
    if source := plan.model.tokenizer or plan.model.model:
        return load_tokenizer(source)
    if plan.scale.streaming or (plan.scale.model_size and plan.data.dataset != BUILT_IN):
        return load_tokenizer("gpt2")
    return None


def _load_text(plan: TrainPlan, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    if not plan.scale.streaming or tokenizer is None:
        return load_training_text(plan.data, tokenizer, vocab_size=plan.model.vocab_size)
    if plan.arguments.max_steps <= 0:
        raise ConfigurationError("A stream has no length: set with --max_steps when to stop.")
    return open_stream(
        plan.data,
        tokenizer,
        shuffle_buffer=plan.scale.shuffle_buffer,
        seed=plan.arguments.seed,
    )


def _announce(
    console: Console, plan: TrainPlan, model: PreTrainedModel, text: Text, checkpoint: Path | None
) -> None:
    arguments, length = plan.arguments, plan.data.context_length
    sequences = arguments.train_batch_size * arguments.world_size
    tokens = sequences * arguments.gradient_accumulation_steps * length
    of_text = f"a stream in blocks of {length}"
    if isinstance(text.train, BlockDataset):
        of_text = f"{text.train.blocks.numel():,} training tokens in blocks of {length}"
    lines = [
        f"{model.config.model_type}, {num_parameters(model):,} parameters; {of_text}, "
        f"{plural(len(text.validation), 'validation block')}"
        + (f"; resumed from {checkpoint}" if checkpoint else ""),
        f"{tokens:,} tokens a step: {arguments.gradient_accumulation_steps} × "
        f"{arguments.train_batch_size} sequences of {length}, on "
        f"{plural(arguments.world_size, 'process', 'processes')}",
    ]
    if arguments.pss_optim is not None:
        lines.append(f"{arguments.pss_optim} trains the weight matrices, AdamW all else")
    console.print("\n".join(lines), highlight=False, markup=False)
