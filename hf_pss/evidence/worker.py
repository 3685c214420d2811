"""Train one cell of a sweep or of the demo, and measure it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed

from hf_pss.detection.explosion import find_explosion
from hf_pss.errors import NonFiniteError
from hf_pss.evidence.baselines import TRAINERS_OWN, make_optimizer
from hf_pss.evidence.corpus import cache_folder
from hf_pss.evidence.examples import Examples, examples_of
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.probes import Probes
from hf_pss.evidence.recipes import TOKEN_FAULTS, Fault, Recipe
from hf_pss.evidence.rows import Row
from hf_pss.records.events import Intervention
from hf_pss.records.strict_json import finite_or_none
from hf_pss.runs.folder import HEALTH_FILE, METRICS_FILE, replacing
from hf_pss.runs.records_files import parse_reading, read_lines
from hf_pss.trainer.callback import PSSCallback
from hf_pss.trainer.pss_trainer import PSSTrainer

# The PSS numbers of a step that a line of the record holds.
_PSS_NUMBERS = ("grad_norm_preclip", "baseline", "threshold", "interventions", "nonfinite_steps")
# Added to the seed of a cell for the run before it.
_PRETRAINING_SEED = 1_000


class CellTrainer(PSSTrainer):
    """Trains with the fault of the recipe, and keeps the loss of every step."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.losses: list[float | None] = []
        self._noise = torch.Generator().manual_seed(self.args.seed)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Train on a batch, with the harm of a fault: to its tokens, gradients or learning rate."""
        fault = self.recipe.fault
        kind = fault.kind if fault and fault.covers(self.state.global_step + 1) else None
        if fault and fault.kind in TOKEN_FAULTS:
            inputs = self._with_harmed_tokens(inputs, fault)
            if num_items_in_batch is not None:  # the Trainer counted the labels of whole rows
                num_items_in_batch = (inputs["labels"] != -100).sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if kind == "nan_gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
        elif fault and kind == "high_learning_rate":
            for group in self.optimizer.param_groups:
                group["lr"] *= fault.factor  # the scheduler overwrites it for the next step
        self.losses.append(finite_or_none(loss.item()))
        return loss

    def _with_harmed_tokens(self, inputs: Mapping[str, Tensor], fault: Fault) -> dict[str, Tensor]:
        ids, labels = inputs["input_ids"], inputs["labels"]
        num_rows, length = ids.shape
        step = self.state.global_step + 1
        if fault.kind == "sequence_jump":
            num_kept = length if step >= fault.start else length // 2
            return {name: values[:, :num_kept] for name, values in inputs.items()}
        if not fault.covers(step):
            return dict(inputs)
        num_drawn = 1 if fault.kind == "repeated_token" else length
        size = num_rows, num_drawn
        noise = torch.randint(self.recipe.vocab_size, size, generator=self._noise).expand_as(ids)
        return {**inputs, "input_ids": noise, "labels": torch.where(labels == -100, -100, noise)}


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
        self.eval_steps: list[int] = []
        self.eval_losses: list[float | None] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock of a training step. Evaluation does not count."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
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

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Record the validation loss."""
        loss = finite_or_none(kwargs["metrics"]["eval_loss"])
        self.eval_steps.append(state.global_step)
        self.eval_losses.append(loss)
        self._write(step=state.global_step, eval_loss=loss)

    def _write(self, **row: float | None) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def run_cell(cell: Cell) -> Row:
    """Train one cell, keep none of its files, and return its row."""
    with tempfile.TemporaryDirectory(prefix="hf_pss-sweep-") as folder:
        return train_cell(cell, Path(folder))


def train_cell(cell: Cell, folder: Path) -> Row:
    """Train one cell and return its row.

    Args:
        cell: What to train.
        folder: Where the metrics of every step and the files of PSS are written.
    """
    recipe, guard = cell.recipe, cell.guard
    examples = examples_of(recipe, seed=cell.seed)
    trainer = _trainer(cell, examples, folder)
    own: Any = guard.callback(trainer) if guard.callback is not None else None
    every_steps = cell.probes_every_steps
    probes = Probes(trainer, every_steps=every_steps) if every_steps else None
    stopped: dict[str, str] = {}
    # The file is line-buffered, so a killed run leaves every step that it has finished.
    with (folder / METRICS_FILE).open("w", encoding="utf-8", buffering=1) as file:
        recorder = _StepRecorder(trainer, file)
        for callback in (own, probes, recorder):  # in this order, to time the guard's work
            if callback is not None:
                trainer.add_callback(callback)
        try:
            trainer.train()
        except NonFiniteError as error:
            stopped = {"status": "stopped", "error": str(error)}
    extra: dict[str, Any] = {}
    if health := read_health_series(folder / HEALTH_FILE):
        extra["health"] = health
    if recipe.fault is not None:
        extra |= {"fault_start": recipe.fault.start, "fault_end": recipe.fault.last_step}
    if probes is not None:
        extra["probes"] = probes.to_dict()
    entropy = examples.unigram_entropy_nats
    explosion = find_explosion(trainer.losses, recipe.explosion, unigram_entropy=entropy)
    controller = PSSCallback.of(trainer).controller
    is_whole = recorder.eval_steps[-1:] == [recipe.num_steps]
    return cell.new_row(
        **stopped,
        final_eval_loss=recorder.eval_losses[-1] if is_whole else None,
        unigram_entropy=entropy,
        losses=_rounded(trainer.losses),
        grad_norms=_rounded(recorder.grad_norms),
        eval_steps=tuple(recorder.eval_steps),
        eval_losses=tuple(recorder.eval_losses),
        interventions=tuple(own.intervention_steps if own else recorder.interventions),
        train_seconds=recorder.train_seconds,
        guard_seconds=(controller.seconds if controller else 0.0) + (own.seconds if own else 0.0),
        explosion_step=explosion.step if explosion else None,
        explosion_kind=explosion.kind if explosion else None,
        extra=extra,
    )


def _trainer(cell: Cell, examples: Examples, folder: Path) -> CellTrainer:
    recipe, guard = cell.recipe, cell.guard
    # This may train, so it comes before the seed, which the guard's preparation depends on.
    weights = _pretrained(cell) if recipe.pretrain_steps else None
    set_seed(cell.seed)
    model = recipe.model()
    if weights is not None:
        model.load_state_dict(weights)
    model = recipe.with_adapters(model)
    if guard.prepare is not None:
        guard.prepare(model)
    arguments = recipe.arguments(folder, cell.seed)
    if guard.max_grad_norm is not None:
        arguments.max_grad_norm = guard.max_grad_norm
    optimizer = None
    if guard.optimizer is not None:
        optimizer = guard.optimizer(model, arguments)
    elif cell.optimizer != TRAINERS_OWN:
        optimizer = make_optimizer(
            cell.optimizer, model, arguments, matrix_lr_ratio=recipe.matrix_lr_ratio
        )
    set_seed(cell.seed)  # the order of the data must not depend on numbers that the guard drew
    trainer = CellTrainer(
        model=model,
        args=arguments,
        train_dataset=examples.train,
        eval_dataset=examples.validation,
        data_collator=examples.collator,
        optimizers=(optimizer, None),
        pss_config=guard.pss,
        recipe=recipe,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pretrained(cell: Cell) -> dict[str, Tensor]:
    """Return the weights from which a cell starts, and train them the first time.

    The cells of a seed share them. Their data has another order than that of the cells.
    """
    recipe = cell.recipe.pretraining
    seed = cell.seed + _PRETRAINING_SEED
    plain = Cell(recipe_name="", recipe=recipe, optimizer="adamw", guard_name="clip", seed=seed)
    examples = examples_of(recipe, seed=seed)
    path = cache_folder() / f"weights-{plain.id}-{examples.fingerprint[:8]}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(prefix="hf_pss-sweep-") as folder:
                trainer = _trainer(plain, examples, Path(folder))
                trainer.train()
            with replacing(path) as stream:
                torch.save(trainer.model.state_dict(), stream)
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def read_health_series(path: Path) -> dict[str, list[Any]]:
    """Return ``step`` and one list per scalar of a ``pss_health.jsonl``, all of the same length.

    The scalars describe the whole model, or the smallest, median and largest value of a metric over
    its matrices (``stable_rank/min``). A number that is missing or not finite is None. The result
    is empty if the file is missing or holds no scalars.

    Args:
        path: The file; see `hf_pss.runs.records_files.reading_line`.
    """
    readings = [r for r in read_lines(path, parse_reading).rows if r.scalars]
    series = {
        name: list(_rounded(finite_or_none(r.scalars.get(name)) for r in readings))
        for name in sorted({name for r in readings for name in r.scalars})
    }
    return {"step": [r.step for r in readings], **series} if series else {}


def _rounded(values: Iterable[float | None]) -> tuple[float | None, ...]:
    # Five digits resolve a tenth of a millinat in any loss here, and halve the size of the file.
    return tuple(None if v is None else float(f"{v:.5g}") for v in values)
