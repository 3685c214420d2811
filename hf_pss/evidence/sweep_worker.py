"""The live health metrics of one run, as series: from the file that PSS writes to a row.

One cell of a sweep, trained and measured.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

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
from hf_pss.evidence.baselines import make_optimizer
from hf_pss.evidence.corpus import Corpus, build_corpus
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.guards.base import Guard, OptimizerSettings
from hf_pss.evidence.probes import Probes
from hf_pss.evidence.recipes import Recipe
from hf_pss.evidence.rows import Row
from hf_pss.records.events import Intervention
from hf_pss.runs.folder import HEALTH_FILE
from hf_pss.runs.records_files import parse_reading, read_lines
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.pss_trainer import PSSTrainer

__all__ = ["SweepTrainer", "read_health_series", "run_cell"]


def read_health_series(path: Path) -> dict[str, list[Any]]:
    """Return ``step`` and a list a scalar, all of one length, of a ``pss_health.jsonl``.

    The scalars are a reading's own: those of the whole model, and of each metric the smallest,
    median and largest over matrices (``stable_rank/min``). None stands where a number is not finite
    or was not there. Empty where there is no file, or none with scalars.

    Args:
        path: The file; see `hf_pss.runs.records_files.reading_line`.
    """
    readings = [reading for reading in read_lines(path, parse_reading).rows if reading.scalars]
    names = sorted({name for reading in readings for name in reading.scalars})
    if not names:
        return {}
    return {
        "step": [reading.step for reading in readings],
        **{name: [_short(_finite(r.scalars.get(name))) for r in readings] for name in names},
    }


def _short(value: float | None) -> float | None:
    # Five digits, as a row's losses: far below the scatter between seeds.
    return None if value is None else float(f"{value:.5g}")


class SweepTrainer(PSSTrainer):
    """Does the recipe's harm at its steps, and keeps every step's loss."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.losses: list[float | None] = []
        self._noise = torch.Generator().manual_seed(self.args.seed)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a batch; a random one, or with NaN for a gradient, where the recipe says so."""
        kind = self._fault_of_this_step()
        if kind == "random_batch":
            ids = inputs["input_ids"]
            noise = torch.randint(self.recipe.training.vocab_size, ids.shape, generator=self._noise)
            inputs = {**inputs, "input_ids": noise, "labels": noise}
        loss = super().training_step(model, inputs, *args, **kwargs)
        if kind == "nan_gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
        self.losses.append(_finite(loss.item()))
        return loss

    def _fault_of_this_step(self) -> str | None:
        fault = self.recipe.fault
        harmed = fault is not None and fault.covers(self.state.global_step + 1)
        return fault.kind if fault is not None and harmed else None


class _Recorder(TrainerCallback):
    """Keeps the clock, the gradient norms and the steps at which PSS acted."""

    def __init__(self, pss: PSSCallback) -> None:
        self._pss = pss
        self._started = 0.0
        self.train_seconds = 0.0
        self.grad_norms: list[float | None] = []
        self.interventions: list[int] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a training step; evaluation does not count."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock and note what PSS saw."""
        self.train_seconds += time.perf_counter() - self._started
        report = self._pss.report
        if report is not None:
            self.grad_norms.append(report.scalars.get("grad_norm_preclip"))
            if any(isinstance(r, Intervention) and r.has_changed_weights for r in report.records):
                self.interventions.append(report.step)


class _HighLearningRate(TrainerCallback):
    """Multiplies the learning rate over the steps of a fault."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise this step's rate; the scheduler sets the next one anew."""
        fault = self._recipe.fault
        if fault and fault.kind == "high_learning_rate" and fault.covers(state.global_step + 1):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] *= fault.factor


def run_cell(cell: Cell) -> Row:
    """Train one cell and return its row.

    Raises:
        ConfigurationError: The cell cannot be run, see `Cell.check`.
    """
    cell.check()
    recipe = replace(
        cell.recipe, training=replace(cell.recipe.training, learning_rate=cell.learning_rate)
    )
    corpus = _corpus(recipe.training.vocab_size, recipe.training.context_length)
    row = cell.new_row(unigram_entropy=corpus.unigram_entropy_nats)
    with tempfile.TemporaryDirectory(prefix="hf_pss-sweep-") as folder:
        trainer = _trainer(cell, recipe, corpus, Path(folder))
        recorder = _Recorder(PSSCallback.of(trainer))
        probes = Probes(trainer, every_steps=cell.probes_every_steps or 1)
        own = cell.guard.callback(trainer) if cell.guard.callback is not None else None
        callbacks: list[TrainerCallback] = [_HighLearningRate(recipe)]
        callbacks += [own] if own is not None else []
        callbacks += [probes] if cell.probes_every_steps else []
        # Last, so that its clock holds what the guard does.
        for callback in (*callbacks, recorder):
            trainer.add_callback(callback)
        try:
            trainer.train()
        except NonFiniteError as error:
            row = replace(row, status="stopped", error=str(error))
        if health := read_health_series(Path(folder) / HEALTH_FILE):
            row = replace(row, extra={"health": health})
    return _measured(row, cell, trainer, recorder, own, probes)


def _measured(
    row: Row,
    cell: Cell,
    trainer: SweepTrainer,
    recorder: _Recorder,
    own: Any,
    probes: Probes,
) -> Row:
    recipe = trainer.recipe
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    eval_losses = tuple(_finite(entry["eval_loss"]) for entry in evaluations)
    eval_steps = tuple(int(entry["step"]) for entry in evaluations)
    is_whole = bool(eval_steps) and eval_steps[-1] == row.num_steps
    explosion = find_explosion(
        trainer.losses, recipe.explosion, unigram_entropy=row.unigram_entropy
    )
    controller = PSSCallback.of(trainer).controller
    fault = recipe.fault
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
        extra={
            **row.extra,
            **({"fault_start": fault.start, "fault_end": fault.last_step} if fault else {}),
            **({"probes": probes.to_dict()} if cell.probes_every_steps else {}),
        },
    )


def _trainer(cell: Cell, recipe: Recipe, corpus: Corpus, folder: Path) -> SweepTrainer:
    guard: Guard = cell.guard
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
    optimizer = (
        make_optimizer(cell.optimizer, model, settings, matrix_lr_ratio=recipe.matrix_lr_ratio)
        if guard.optimizer is None
        else guard.optimizer(model, settings)
    )
    set_seed(cell.seed)  # whatever the guard has drawn, the order of the data is the same
    trainer = SweepTrainer(
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
    """Indices spread over all of the validation text, the same for every run."""
    count = min(recipe.training.num_eval_blocks, length)
    return [int(i) for i in torch.linspace(0, length - 1, count)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(values: Sequence[float | None]) -> tuple[float | None, ...]:
    # Five digits: a tenth of a millinat of any loss here, at half the size of the file.
    return tuple(None if v is None else float(f"{v:.5g}") for v in values)
