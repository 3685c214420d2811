"""The run behind `hf-pss train`: load, train, save, sum up."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import transformers
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from hf_pss.cli.model import check_fit, load_model, load_tokenizer, make_config, make_model
from hf_pss.cli.options import ModelOptions
from hf_pss.cli.parsing import TrainPlan
from hf_pss.cli.progress import ProgressDisplay
from hf_pss.cli.summary import render_summary, summarise
from hf_pss.cli.text import Text, load_training_text
from hf_pss.errors import ConfigurationError
from hf_pss.integration.arguments import PSSTrainingArguments
from hf_pss.integration.trainer import PSSTrainer

__all__ = ["run_training"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def run_training(plan: TrainPlan) -> None:
    """Train as planned; ends with a table on stdout.

    ``output_dir`` then holds the model and its tokenizer, its checkpoints, and PSS's events.

    Raises:
        ConfigurationError: A model, text or checkpoint is not there, or they do not fit together.
        NonFiniteError: ``pss_on_nonfinite`` is ``stop``, and a step was not finite.
    """
    _hide_progress_bars()
    _check_model_options(plan.model)
    _check_reporters(plan.arguments.report_to)
    _make_folder(Path(plan.arguments.output_dir))
    console = Console(stderr=True)
    checkpoint = _find_checkpoint(plan)
    with console.status("Loading the model and the text …"):
        model, text = _load(plan, checkpoint)
    check_fit(model, text.tokenizer, context_length=plan.data.context_length)
    _announce(console, model, text, plan.arguments, checkpoint)
    trainer = PSSTrainer(
        model=model,
        args=plan.arguments,
        train_dataset=text.train,
        eval_dataset=text.validation,
        processing_class=text.tokenizer,
        data_collator=default_data_collator,
    )
    _train(trainer, console, checkpoint)


def _train(trainer: PSSTrainer, console: Console, checkpoint: Path | None) -> None:
    output_dir = Path(trainer.args.output_dir)
    display = ProgressDisplay(console)
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    trainer.add_callback(display)
    before = _seconds_before(checkpoint)
    try:
        with display, _silenced("transformers.modeling_utils"):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if latest := _latest_checkpoint(output_dir):
            console.print(f"{latest} is saved: the same command with --resume goes on from there.")
        raise
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        summary = summarise(
            trainer, train_seconds=outcome.metrics["train_runtime"], pss_seconds_before=before
        )
        Console().print(render_summary(summary, output_dir))


def _hide_progress_bars() -> None:
    """Leave the terminal to our own bar; the libraries' warnings still come through."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Hide what models warn about at their first forward: padding, which full blocks have not."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {path} cannot be made: {error.strerror}. Choose another --output_dir."
        ) from error


def _check_model_options(options: ModelOptions) -> None:
    if options.model and options.model_config:
        raise ConfigurationError(
            "You gave --model, which loads weights, and --model_config, which makes fresh ones. "
            "Give one of them."
        )
    if not options.model and not options.model_config:
        raise ConfigurationError(
            "Say what to train: --model gpt2 (or a folder) fine-tunes weights that exist, "
            "--model_config gpt2 --model_overrides n_layer=4,n_embd=96 trains fresh ones."
        )
    if options.model_overrides and not options.model_config:
        raise ConfigurationError("--model_overrides shapes fresh weights: it needs --model_config.")


def _check_reporters(names: list[str]) -> None:
    available = get_available_reporting_integrations()
    if missing := [name for name in names if name not in available]:
        raise ConfigurationError(
            f"You asked to report to {', '.join(missing)}, which is not installed or not known; "
            f"here are {', '.join(available) or 'none'}. Install it, or leave --report_to out."
        )


def _load(plan: TrainPlan, checkpoint: Path | None) -> tuple[PreTrainedModel, Text]:
    """Load model and text; what is quick to fail comes first."""
    options = plan.model
    if options.model_config and not checkpoint:
        config = make_config(options.model_config, options.model_overrides)
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        text = load_training_text(plan.data, tokenizer, vocab_size=options.vocab_size)
        set_seed(plan.arguments.seed)
        return make_model(config, text.tokenizer), text
    # From the checkpoint where there is one: the text must be cut into the same tokens, and the
    # Trainer's own resume leaves experts of MoE models as they were made (transformers 5.23).
    source = str(checkpoint or options.model)
    model = load_model(source, dtype=options.dtype)
    tokenizer = load_tokenizer(source if checkpoint else options.tokenizer or source)
    return model, load_training_text(plan.data, tokenizer, vocab_size=options.vocab_size)


def _find_checkpoint(plan: TrainPlan) -> Path | None:
    """Return the checkpoint to resume from; make room for a new run where that was asked for."""
    output_dir, given = Path(plan.arguments.output_dir), plan.arguments.resume_from_checkpoint
    latest = _latest_checkpoint(output_dir)
    if plan.run.resume or str(given).lower() == "true":
        if latest is None:
            raise ConfigurationError(
                f"{output_dir} holds no checkpoint to resume from. Leave --resume out, or give "
                "the --output_dir of the run that you want to continue."
            )
        return latest
    if given is not None:
        if not _is_complete(Path(given)):
            raise ConfigurationError(f"{given} is no complete checkpoint: no trainer_state.json.")
        return Path(given)
    if latest is not None:
        if not plan.run.overwrite:
            raise ConfigurationError(
                f"{output_dir} holds checkpoints of an earlier run. Add --resume to continue it, "
                "--overwrite to remove them, or choose another --output_dir."
            )
        for folder in _checkpoints(output_dir):
            shutil.rmtree(folder)
    return None


def _latest_checkpoint(output_dir: Path) -> Path | None:
    return next(filter(_is_complete, reversed(_checkpoints(output_dir))), None)


def _checkpoints(output_dir: Path) -> list[Path]:
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "trainer_state.json").is_file()  # the last file that the Trainer writes


def _seconds_before(checkpoint: Path | None) -> float:
    """Return what PSS had spent when the checkpoint's run last logged."""
    if checkpoint is None:
        return 0.0
    history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return next((row["pss/seconds"] for row in reversed(history) if "pss/seconds" in row), 0.0)


def _announce(
    console: Console,
    model: PreTrainedModel,
    text: Text,
    arguments: PSSTrainingArguments,
    checkpoint: Path | None,
) -> None:
    blocks, context_length = text.train.blocks.shape
    console.print(
        f"{model.config.model_type}, {model.num_parameters():,} parameters; "
        f"{blocks * context_length:,} training tokens in blocks of {context_length}, "
        f"{len(text.validation):,} validation blocks; PSS preset {arguments.pss_preset}"
        + (f"; resumed from {checkpoint}" if checkpoint else ""),
        highlight=False,
        markup=False,
    )
