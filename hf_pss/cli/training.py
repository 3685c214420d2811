"""The checkpoints that lie in a run's folder, and which of them are good to go on from.

The run behind `hf-pss train`: load, train, save, sum up.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from transformers import (
    PreTrainedModel,
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

from hf_pss.cli.model import check_fit, load_model, load_tokenizer, make_config, make_model
from hf_pss.cli.parsing import ModelOptions, TrainPlan
from hf_pss.cli.progress import (
    ProgressDisplay,
    SessionClock,
    render_summary,
    set_rhythms_,
    summarise,
)
from hf_pss.cli.saved_options import KeepOptions, options_to_keep
from hf_pss.cli.terminal import without_noise
from hf_pss.cli.text import Text, load_training_text
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.evidence.data import unigram_entropy_nats
from hf_pss.models.measurements import select_watched
from hf_pss.models.selection import Selection
from hf_pss.runs.checkpoint import examine, recorded_step
from hf_pss.runs.folder import STATE_FILE, checkpoints_by_step
from hf_pss.runs.log import read_log
from hf_pss.trainer.arguments import PSSTrainingArguments
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.pss_trainer import PSSTrainer
from hf_pss.trainer.resuming import newest_whole

__all__ = [
    "check_reporters",
    "is_complete",
    "latest_checkpoint",
    "run_training",
    "step_of",
    "where_to_go_on",
]


def latest_checkpoint(output_dir: Path, *, accepts_fresh: bool = False) -> Path | None:
    """Return the newest one to go on from, and log which newer ones are passed over.

    Args:
        output_dir: The run's folder; None is returned where it holds no checkpoint at all.
        accepts_fresh: Also take one that lacks the optimizer's or the schedule's state.

    Raises:
        StateError: There are some, and none to go on from.
    """
    if not checkpoints_by_step(output_dir):
        return None
    return newest_whole(output_dir, accepts_fresh=accepts_fresh).path


def is_complete(checkpoint: Path) -> bool:
    """Tell whether its trainer_state.json, the last file that the Trainer writes, can be read."""
    try:
        step_of(checkpoint)
    except (OSError, StateError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """Return how many steps had been taken."""
    return recorded_step(checkpoint)


def where_to_go_on(output_dir: Path, resumed: Path | None) -> str:
    """Return the advice for a run that went wrong.

    Args:
        output_dir: The run's folder.
        resumed: What it had resumed from, which may lie elsewhere.
    """
    candidates = [*([resumed] if resumed else []), *checkpoints_by_step(output_dir)]
    complete = [path for path in candidates if examine(path).is_whole]
    healthy = [path for path in complete if _was_finite(path)]
    if not healthy and complete and not any(map(_evaluations, complete)):
        return f"No checkpoint was evaluated; the latest, of unknown health, is {complete[-1]}."
    if not healthy:
        return "No checkpoint has a finite evaluation to go on from: begin anew."
    return (
        f"The last checkpoint whose evaluation was finite is {healthy[-1]}: "
        "--resume_from_checkpoint goes on there at the old learning rate, --model starts from its "
        "weights at another."
    )


def _was_finite(checkpoint: Path) -> bool:
    return any(map(math.isfinite, _evaluations(checkpoint)))


def _evaluations(checkpoint: Path) -> list[float]:
    """Return the validation losses at the checkpoint's own step."""
    log = read_log(checkpoint / STATE_FILE)
    rows = (row for row in log.rows if row.step == log.global_step)
    return [row.eval_loss for row in rows if row.eval_loss is not None]


class _MakeRoom(TrainerCallback):
    """Removes an earlier run's checkpoints where training begins: all has been checked by then."""

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
    """Train as planned; ends with a table on stdout.

    ``output_dir`` then holds the model and its tokenizer, its checkpoints, and PSS's events.

    Raises:
        ConfigurationError: A model, text or checkpoint is not there, or they do not fit together.
        NonFiniteError: The run stopped at a step that was not finite, or ended with weights that
            are not.
    """
    _hide_progress_bars()
    _check_model_options(plan.model)
    check_reporters(plan.arguments.report_to)
    output_dir = Path(plan.arguments.output_dir)
    _check_folder(output_dir)
    console = Console(stderr=True)
    checkpoint, replaced = _find_checkpoints(plan)
    _refuse_fewer_steps(plan.arguments, checkpoint)
    kept = options_to_keep(
        plan, checkpoint, warn=lambda text: console.print(text, style="yellow", markup=False)
    )
    with console.status("Loading the model and the text …"):
        model, text = _load(plan, checkpoint)
    if checkpoint is None and kept is not None:
        kept["unigram_entropy"] = unigram_entropy_nats(text.train.blocks.numpy().ravel())
    check_fit(model, text.tokenizer, context_length=plan.data.context_length)
    pss_config = plan.arguments.pss_config()
    selection = select_watched(model, pss_config)
    _announce(console, model, text, checkpoint)
    _announce_pss(console, selection, plan.arguments)
    set_rhythms_(plan.arguments, num_blocks=len(text.train))
    _make_folder(output_dir)  # not before: a run that cannot begin leaves nothing behind
    trainer = PSSTrainer(
        model=model,
        args=plan.arguments,
        train_dataset=text.train,
        eval_dataset=text.validation,
        processing_class=text.tokenizer,
        data_collator=default_data_collator,
        pss_config=pss_config,
    )
    PSSCallback.of(trainer).announces = False  # `_announce_pss` has said it
    trainer.add_callback(_MakeRoom(replaced))  # after PSS, which may refuse the model
    trainer.add_callback(KeepOptions(kept))
    _train(trainer, console, checkpoint)


def _train(trainer: PSSTrainer, console: Console, checkpoint: Path | None) -> None:
    output_dir = Path(trainer.args.output_dir)
    display = ProgressDisplay(console)
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    trainer.add_callback(display)
    clock = SessionClock(trainer)
    trainer.add_callback(clock)
    quiet = without_noise(trainer.model)
    try:
        with display, quiet, _silenced("transformers.modeling_utils"):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        with suppress(StateError):  # nothing whole to point at
            if latest := latest_checkpoint(output_dir):
                console.print(
                    f"{latest} is saved: the same command with --resume goes on from there."
                )
        raise
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} {where_to_go_on(output_dir, checkpoint)}") from error
    summary = summarise(
        trainer, train_seconds=outcome.metrics["train_runtime"], pss_seconds=clock.pss_seconds
    )
    if not summary.has_broken_weights:
        trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        Console().print(render_summary(summary, output_dir))
    if summary.problem:
        raise NonFiniteError(f"{summary.problem} {where_to_go_on(output_dir, checkpoint)}")


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


def _check_folder(path: Path) -> None:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "it cannot be written to" if there.is_dir() else "it is a file"
        where = "" if there == path else f" {there} is in the way:"
        raise ConfigurationError(
            f"The folder {path} cannot be made:{where} {problem}. Choose another --output_dir."
        )


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


def check_reporters(names: list[str]) -> None:
    """Make sure that what a run reports to is there.

    Raises:
        ConfigurationError: One is not installed, or not known.
    """
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


def _find_checkpoints(plan: TrainPlan) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint to resume from, and those that a new run is to replace."""
    output_dir, given = Path(plan.arguments.output_dir), plan.arguments.resume_from_checkpoint
    if plan.run.resume or str(given).lower() == "true":
        accepts_fresh = plan.arguments.pss_missing_state == "fresh"
        latest = latest_checkpoint(output_dir, accepts_fresh=accepts_fresh)
        if latest is None:
            raise ConfigurationError(
                f"{output_dir} holds no checkpoint to resume from. Leave --resume out, or give "
                "the --output_dir of the run that you want to continue."
            )
        return latest, []
    if given is not None:
        if not is_complete(Path(given)):
            raise ConfigurationError(f"{given} is no complete checkpoint: no trainer_state.json.")
        return Path(given), []
    earlier = checkpoints_by_step(output_dir)
    if not plan.run.overwrite and any(map(is_complete, earlier)):
        raise ConfigurationError(
            f"{output_dir} holds checkpoints of an earlier run. Add --resume to continue it, "
            "--overwrite to remove them, or choose another --output_dir."
        )
    return None, earlier if plan.run.overwrite else []


def _refuse_fewer_steps(arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Also where none is left: the Trainer would take one more all the same (5.23)."""
    if checkpoint is not None and 0 < arguments.max_steps <= (step := step_of(checkpoint)):
        where = "at" if step == arguments.max_steps else "past"
        raise ConfigurationError(
            f"{checkpoint.name} is already {where} --max_steps {arguments.max_steps}. Give more "
            "steps, or begin a run in another --output_dir."
        )


def _announce(
    console: Console,
    model: PreTrainedModel,
    text: Text,
    checkpoint: Path | None,
) -> None:
    blocks, context_length = text.train.blocks.shape
    console.print(
        f"{model.config.model_type}, {model.num_parameters():,} parameters; "
        f"{blocks * context_length:,} training tokens in blocks of {context_length}, "
        f"{len(text.validation):,} validation blocks"
        + (f"; resumed from {checkpoint}" if checkpoint else ""),
        highlight=False,
        markup=False,
    )


def _announce_pss(console: Console, selection: Selection, arguments: PSSTrainingArguments) -> None:
    roles = Counter(matrix.role for matrix in selection.matrices)
    parts = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
    matrices = "1 matrix" if roles.total() == 1 else f"{roles.total()} matrices"
    watched = f"{matrices} ({parts})" if roles else "for non-finite steps only"
    if selection.adapters:
        watched = f"{len(selection.adapters)} LoRA products" + (f", {watched}" if roles else "")
    console.print(
        f"watching {watched}, preset {arguments.pss_preset}",
        highlight=False,
        markup=False,
    )
    if arguments.pss_optim is not None:
        console.print(
            f"{arguments.pss_optim} trains the weight matrices, AdamW all else",
            highlight=False,
            markup=False,
        )
