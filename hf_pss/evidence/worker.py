"""Train one cell of a sweep or of the demo, and measure it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_pss.detection.explosion import find_explosion
from hf_pss.errors import NonFiniteError
from hf_pss.evidence.baselines import TRAINERS_OWN, make_optimizer
from hf_pss.evidence.corpus import Corpus, build_corpus
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.guards.base import OptimizerSettings
from hf_pss.evidence.probes import Probes
from hf_pss.evidence.recipes import Fault, Recipe
from hf_pss.evidence.rows import Row
from hf_pss.records.events import Intervention
from hf_pss.records.strict_json import finite_or_none
from hf_pss.runs.folder import HEALTH_FILE, METRICS_FILE
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.pss_trainer import PSSTrainer

__all__ = ["CellTrainer", "read_health_series", "run_cell", "train_cell"]

# The PSS numbers of a step that a line of the record holds.
_PSS_NUMBERS = ("grad_norm_preclip", "baseline", "threshold", "interventions", "nonfinite_steps")


class CellTrainer(PSSTrainer):
    """Trains with the fault of the recipe, and keeps the loss of every step."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.losses: list[float | None] = []
        self._noise = torch.Generator().manual_seed(self.args.seed)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch. In a fault, use random tokens or put a NaN into every gradient."""
        fault = self.recipe.fault
        kind = fault.kind if fault and fault.covers(self.state.global_step + 1) else None
        if kind == "random_batch":
            ids = inputs["input_ids"]
            noise = torch.randint(self.recipe.vocab_size, ids.shape, generator=self._noise)
            inputs = {**inputs, "input_ids": noise, "labels": noise}
        loss = super().training_step(model, inputs, *args, **kwargs)
        if kind == "nan_gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
        self.losses.append(finite_or_none(loss.item()))
        return loss


class _HighLearningRate(TrainerCallback):
    """Multiplies the learning rate over the steps of a fault."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise the rate of this step. The scheduler overwrites it for the next step."""
        if optimizer is not None and self._fault.covers(state.global_step + 1):
            for group in optimizer.param_groups:
                group["lr"] *= self._fault.factor


class _StepRecorder(TrainerCallback):
    """Keeps the numbers of every step that a row needs, and writes each step to a file at once."""

    def __init__(self, trainer: CellTrainer, file: TextIO) -> None:
        self._losses = trainer.losses
        self._pss = PSSCallback.of(trainer)
        self._file = file
        self._started = 0.0
        self.train_seconds = 0.0
        self.grad_norms: list[float | None] = []
        self.interventions: list[int] = []
        self.evaluations: list[tuple[int, float | None]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a training step. Evaluation does not count."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, and record the loss and the numbers that PSS measured."""
        self.train_seconds += time.perf_counter() - self._started
        report = self._pss.report
        scalars = report.scalars if report is not None else {}
        if report is not None:
            self.grad_norms.append(scalars.get("grad_norm_preclip"))
            if any(isinstance(r, Intervention) and r.has_changed_weights for r in report.records):
                self.interventions.append(report.step)
        self._write(
            step=state.global_step,
            loss=self._losses[-1],
            **{name: finite_or_none(scalars.get(name)) for name in _PSS_NUMBERS},
            pss_seconds=scalars.get("seconds"),
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the validation loss."""
        loss = finite_or_none((metrics or {}).get("eval_loss"))
        self.evaluations.append((state.global_step, loss))
        self._write(step=state.global_step, eval_loss=loss)

    def _write(self, **row: float | None) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def run_cell(cell: Cell) -> Row:
    """Train one cell, keep none of its files, and return its row.

    Raises:
        ConfigurationError: The cell cannot be run, see `Cell.check`.
    """
    with tempfile.TemporaryDirectory(prefix="hf_pss-sweep-") as folder:
        return train_cell(cell, Path(folder))


def train_cell(cell: Cell, folder: Path) -> Row:
    """Train one cell and return its row.

    Args:
        cell: What to train.
        folder: Where the metrics of every step and the files of PSS are written.

    Raises:
        ConfigurationError: The cell cannot be run, see `Cell.check`.
    """
    cell.check()
    recipe, guard = cell.recipe, cell.guard
    corpus = _corpus(recipe.vocab_size, recipe.context_length)
    row = cell.new_row(unigram_entropy=corpus.unigram_entropy_nats)
    trainer = _trainer(cell, corpus, folder)
    own: Any = guard.callback(trainer) if guard.callback is not None else None
    probes = Probes(trainer, every_steps=cell.probes_every_steps or 1)
    # The file is line-buffered, so a killed run leaves every step that it has finished.
    with (folder / METRICS_FILE).open("w", encoding="utf-8", buffering=1) as file:
        recorder = _StepRecorder(trainer, file)
        if recipe.fault is not None and recipe.fault.kind == "high_learning_rate":
            trainer.add_callback(_HighLearningRate(recipe.fault))
        if own is not None:
            trainer.add_callback(own)
        if cell.probes_every_steps:
            trainer.add_callback(probes)
        trainer.add_callback(recorder)  # last, so that its clock includes the guard's work
        try:
            trainer.train()
        except NonFiniteError as error:
            row = replace(row, status="stopped", error=str(error))
    extra: dict[str, Any] = {}
    if health := read_health_series(folder / HEALTH_FILE):
        extra["health"] = health
    if recipe.fault is not None:
        extra |= {"fault_start": recipe.fault.start, "fault_end": recipe.fault.last_step}
    if cell.probes_every_steps:
        extra["probes"] = probes.to_dict()
    return _measured(replace(row, extra=extra), trainer, recorder, own)


def _measured(row: Row, trainer: CellTrainer, recorder: _StepRecorder, own: Any) -> Row:
    eval_steps = tuple(step for step, _ in recorder.evaluations)
    eval_losses = tuple(loss for _, loss in recorder.evaluations)
    is_whole = eval_steps[-1:] == (row.num_steps,)
    explosion = find_explosion(
        trainer.losses, trainer.recipe.explosion, unigram_entropy=row.unigram_entropy
    )
    controller = PSSCallback.of(trainer).controller
    return replace(
        row,
        final_eval_loss=eval_losses[-1] if is_whole else None,
        losses=_rounded(trainer.losses),
        grad_norms=_rounded(recorder.grad_norms),
        eval_steps=eval_steps,
        eval_losses=eval_losses,
        interventions=tuple(own.intervention_steps if own else recorder.interventions),
        train_seconds=recorder.train_seconds,
        guard_seconds=(controller.seconds if controller else 0.0) + (own.seconds if own else 0.0),
        explosion_step=explosion.step if explosion else None,
        explosion_kind=explosion.kind if explosion else None,
    )


def _trainer(cell: Cell, corpus: Corpus, folder: Path) -> CellTrainer:
    recipe, guard = cell.recipe, cell.guard
    set_seed(cell.seed)
    model = recipe.model()
    if guard.prepare is not None:
        guard.prepare(model)
    arguments = recipe.arguments(folder, cell.seed)
    if guard.max_grad_norm is not None:
        arguments.max_grad_norm = guard.max_grad_norm
    settings = OptimizerSettings(
        learning_rate=cell.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    optimizer = None
    if guard.optimizer is not None:
        optimizer = guard.optimizer(model, settings)
    elif cell.optimizer != TRAINERS_OWN:
        optimizer = make_optimizer(
            cell.optimizer, model, settings, matrix_lr_ratio=recipe.matrix_lr_ratio
        )
    set_seed(cell.seed)  # the order of the data must not depend on numbers that the guard drew
    trainer = CellTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=Subset(corpus.validation, _evenly(len(corpus.validation), recipe)),
        optimizers=(optimizer, None),
        pss_config=guard.pss,
        recipe=recipe,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@cache
def _corpus(vocab_size: int, context_length: int) -> Corpus:
    return build_corpus(vocab_size=vocab_size, context_length=context_length, max_tokens=None)


def _evenly(length: int, recipe: Recipe) -> list[int]:
    """Return indices spread over all of the validation text; they are the same for every run."""
    count = min(recipe.num_eval_blocks, length)
    return [int(i) for i in torch.linspace(0, length - 1, count)]


def read_health_series(path: Path) -> dict[str, list[Any]]:
    """Return ``step`` and one list per scalar of a ``pss_health.jsonl``, all of the same length.

    The scalars describe the whole model, or the smallest, median and largest value of a metric over
    its matrices (``stable_rank/min``). A number that is missing or not finite is None. The result
    is empty if the file is missing or holds no scalars.

    Args:
        path: The file; see `hf_pss.runs.records_files.reading_line`.
    """
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    readings = [line for line in lines if "scalars" in line]
    names = sorted({name for reading in readings for name in reading["scalars"]})
    if not names:
        return {}
    return {
        "step": [reading["step"] for reading in readings],
        **{name: list(_rounded(r["scalars"].get(name) for r in readings)) for name in names},
    }


def _rounded(values: Iterable[float | None]) -> tuple[float | None, ...]:
    # Five digits resolve a tenth of a millinat in any loss here, and halve the size of the file.
    return tuple(None if v is None else float(f"{v:.5g}") for v in values)
