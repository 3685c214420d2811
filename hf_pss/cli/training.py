"""Run `hf-pss train`: load the model and the text, train, save, and print a summary."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    default_data_collator,
)
from transformers.integrations import get_available_reporting_integrations

from hf_pss.cli import loading, progress, resume
from hf_pss.cli.terminal import without_noise
from hf_pss.cli.train_options import TrainPlan
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.evidence.data import BlockDataset, unigram_entropy_nats
from hf_pss.models.measurements import select_watched
from hf_pss.runs.folder import remove_checkpoint
from hf_pss.runs.options import write_options
from hf_pss.trainer.pss_trainer import PSSTrainer
from hf_pss.trainer.throughput import ThroughputTrainerMixin, num_parameters
from hf_pss.view.numbers import plural


class _TextTrainer(ThroughputTrainerMixin, PSSTrainer):
    """PSSTrainer with tokens per second and perplexity in its logs."""


class _Begin(TrainerCallback):
    """Removes an earlier run's checkpoints and keeps the options when training begins.

    Every check has passed by then. Without options, as in a resumed run that does not know them,
    no file is written.
    """

    def __init__(self, earlier: list[Path], options: dict[str, Any] | None) -> None:
        self._earlier = earlier
        self._options = options

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Do so, on the first process only."""
        if state.is_world_process_zero:
            for folder in self._earlier:
                remove_checkpoint(folder)
            if self._options is not None:
                write_options(Path(args.output_dir), self._options)


def run_training(plan: TrainPlan) -> None:
    """Train according to the plan, in one process or in several, and print a summary to stdout.

    ``output_dir`` then holds the model, the tokenizer, the checkpoints, and PSS's events.

    Raises:
        ConfigurationError: A model, text or checkpoint is missing, or they do not fit together.
        NonFiniteError: The run stopped at a step that was not finite, or its final
            weights are not finite.
        StateError: The final model cannot be written, or the checkpoint cannot be resumed.
    """
    transformers.utils.logging.disable_progress_bar()  # our own bar is on the terminal
    datasets.disable_progress_bars()
    plan = replace(plan, model=loading.named_model(plan))
    _check_reporters(plan.arguments.report_to)
    _check_folder(Path(plan.arguments.output_dir))
    console = Console(stderr=True, quiet=plan.arguments.process_index > 0)
    checkpoint, replaced = resume.choose_checkpoints(plan)
    kept = None  # for a stream, whose options `hf-pss rescue` does not know
    if not plan.scale.streaming:
        kept = resume.options_to_keep(
            plan, checkpoint, warn=lambda text: console.print(text, style="yellow", markup=False)
        )
    with console.status("Loading the model and the text …"):
        model, text = loading.load(plan, checkpoint)
    num_blocks = 0  # for a stream, which needs --max_steps
    if isinstance(text.train, BlockDataset):
        num_blocks = len(text.train)
        if checkpoint is None and kept is not None:
            kept["unigram_entropy"] = unigram_entropy_nats(text.train.blocks.numpy().ravel())
    loading.check_fit(model, text.tokenizer, context_length=plan.data.context_length)
    pss_config = plan.arguments.pss_config()
    select_watched(model, pss_config)  # refuses a bad pattern before the Trainer makes a folder
    _announce(console, plan, model, text, checkpoint)
    progress.set_step_counts_(plan.arguments, num_blocks=num_blocks)
    trainer = _TextTrainer(
        model=model,
        args=plan.arguments,
        train_dataset=text.train,
        eval_dataset=text.validation,
        processing_class=text.tokenizer,
        data_collator=default_data_collator,
        pss_config=pss_config,
    )
    trainer.add_callback(_Begin(replaced, kept))  # after PSS, which may refuse the model
    _train(trainer, console, checkpoint)
    # This is not in a finally block: after an error, other ranks may wait in a collective, and this
    # call would wait for them.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(trainer: PSSTrainer, console: Console, checkpoint: Path | None) -> None:
    output_dir = Path(trainer.args.output_dir)
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    display = progress.ProgressDisplay(console)
    trainer.add_callback(display)
    try:
        with display, without_noise(trainer.model):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (KeyboardInterrupt, SystemExit):  # a signal
        with suppress(StateError, OSError):  # no checkpoint can be resumed, or the terminal is gone
            if latest := resume.latest_checkpoint(output_dir):
                console.print(f"{latest} is saved. To continue, add --resume to the same command.")
        raise
    except NonFiniteError as error:
        advice = resume.advice_after_failure(output_dir, checkpoint)
        raise NonFiniteError(f"{error} {advice}") from error
    eval_loss = progress.last_evaluation(trainer)
    try:
        if not progress.is_broken(eval_loss):
            trainer.save_model()
        trainer.save_state()
    except (OSError, SafetensorError) as error:
        advice = resume.advice_after_failed_save(output_dir, trainer.state.global_step)
        raise StateError(
            f"The final model could not be written to {output_dir}: {error}. {advice}"
        ) from error
    summary = progress.render_summary(trainer, train_seconds=outcome.metrics["train_runtime"])
    if trainer.is_world_process_zero():
        Console().print(summary)
    if problem := progress.problem_of(eval_loss, progress.closing_streak(trainer)):
        raise NonFiniteError(f"{problem} {resume.advice_after_failure(output_dir, checkpoint)}")


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


def _announce(
    console: Console,
    plan: TrainPlan,
    model: PreTrainedModel,
    text: loading.Text,
    checkpoint: Path | None,
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
