"""Record quantities of a run that may warn of an explosion before the loss moves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.guard_callbacks import TimedCallback
from hf_pss.health.jacobian_energy import measure_jacobian_energies
from hf_pss.health.sign_diversity import SignDiversityMeter
from hf_pss.health.spectral_norms import SpectralNorm, SpectralNormMeter
from hf_pss.models.distributed import backend_for
from hf_pss.models.measurements import UpdateMeter, measure_stable_ranks
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.records.strict_json import finite_or_none
from hf_pss.trainer.callback import PSSCallback

__all__ = ["PROBED", "Probes"]

PROBED: Mapping[str, str] = {
    "grad_norm_preclip": "global gradient norm before clipping",
    "update_norm": "‖W_t − W_{t−1}‖ over all selected matrices, before any smoothing",
    "min_stable_rank": "smallest stable rank of a matrix, after the step and its smoothing",
    "mean_stable_rank": "mean stable rank of the matrices",
    "max_jacobian_energy": "largest stable Jacobian energy of a matrix, before the update",
    "mean_jacobian_energy": "mean stable Jacobian energy of the matrices",
    "min_sign_diversity": "smallest sign diversity of a matrix's inputs",
    "mean_sign_diversity": "mean sign diversity of the matrices' inputs",
    "max_spectral_growth": "largest σ₁ / σ₁ before training, without matrices that start at zero",
    "max_spectral_residual": "largest residual of the σ₁: above 0.05 one of them is stale",
}
"""The meaning of each series."""


class Probes(TimedCallback):
    """Records the quantities of `PROBED` every ``every_steps`` steps, and changes nothing.

    Add this callback after PSS's callback, whose gradient norm it records. Without PSS's callback
    it computes the norm from the gradients, but only if the Trainer does not clip them.

    Args:
        trainer: The trainer whose run to record.
        every_steps: Interval N of the record, which holds steps N, 2N, …
        jacobian_energy: Also record the Jacobian energies. They cost the most, because they need a
            decomposition of every matrix.

    Raises:
        ConfigurationError: `every_steps` is below 1.
    """

    def __init__(
        self, trainer: Trainer, *, every_steps: int = 1, jacobian_energy: bool = True
    ) -> None:
        if every_steps < 1:
            raise ConfigurationError(f"You gave every_steps={every_steps}; give 1 or more.")
        super().__init__()
        self.every_steps = every_steps
        self._trainer = trainer
        self._has_energy = jacobian_energy
        self._steps: list[int] = []
        self._series: dict[str, list[float | None]] = {name: [] for name in PROBED}
        self._now: dict[str, float] = {}
        self._is_due = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: ``every_steps``, ``seconds``, ``step``, and a list for each series.

        All lists have the same length. A number that is missing or not finite is None.
        """
        return {
            "every_steps": self.every_steps,
            "seconds": self.seconds,
            "step": list(self._steps),
            **{name: list(values) for name, values in self._series.items()},
        }

    def prepare(self) -> None:
        """Find the matrices and record their first spectral norms."""
        parameters = named_parameters_canonical(self.model)
        self._backend = backend_for(parameters)
        self._views = select_matrices(self.model).matrices
        self._updates = UpdateMeter(
            sorted({view.parameter_name for view in self._views}), self._backend
        )
        self._norms = SpectralNormMeter(self._views, self._backend)
        self._signs = SignDiversityMeter(self.model, self._views, self._backend)
        first = self._norms.measure(parameters)
        self._first = {name: norm.sigma for name, norm in first.items() if norm.sigma > 0}
        self._pss = next(
            (c for c in self._trainer.callback_handler.callbacks if isinstance(c, PSSCallback)),
            None,
        )

    def before_step(self, step: int) -> None:
        """Capture the forward passes of this step if the step is due."""
        self._now = {}
        self._is_due = step % self.every_steps == 0
        if self._is_due:
            self._signs.arm(self._norms.directions())

    def before_update(self) -> bool:
        """Read the gradients and the captured forward passes."""
        if not self._is_due:
            return False
        parameters = named_parameters_canonical(self.model)
        if self._pss is None and not self._trainer.args.max_grad_norm:
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            self._now["grad_norm_preclip"] = self._backend.agree(norm.reshape(1))[0]
        if self._has_energy:
            energies = measure_jacobian_energies(self._views, parameters, self._backend)
            self._note("jacobian_energy", energies.values(), "max")
        self._note("sign_diversity", self._signs.read().values(), "min")
        self._updates.start(parameters)
        return False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update before a guard smooths the weights."""
        if self._is_due:
            started = time.perf_counter()
            change = self._updates.stop(named_parameters_canonical(self.model))
            self._now["update_norm"] = self._backend.agree(change)[0]
            self.seconds += time.perf_counter() - started

    def after_step(self, step: int) -> bool:
        """Read the weights and add the step to the record."""
        if not self._is_due:
            return False
        parameters = named_parameters_canonical(self.model)
        ranks = measure_stable_ranks(self._views, parameters, self._backend)
        self._note("stable_rank", ranks.values(), "min")
        self._note_norms(self._norms.measure(parameters))
        report = self._pss.report if self._pss is not None else None
        if report is not None and report.step == step:
            norm = report.scalars.get("grad_norm_preclip", math.nan)
            self._now["grad_norm_preclip"] = norm
        self._steps.append(step)
        for name, series in self._series.items():
            series.append(finite_or_none(self._now.get(name)))
        return False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        self._signs.disarm()

    def _note(self, name: str, values: Iterable[float], worst: Literal["min", "max"]) -> None:
        """Keep the worst and the mean, or neither if a value is NaN: min and max may ignore it."""
        numbers = list(values)
        if not numbers or any(math.isnan(v) for v in numbers):
            return
        self._now[f"{worst}_{name}"] = min(numbers) if worst == "min" else max(numbers)
        self._now[f"mean_{name}"] = math.fsum(numbers) / len(numbers)

    def _note_norms(self, norms: Mapping[str, SpectralNorm]) -> None:
        growths = [norms[name].sigma / first for name, first in self._first.items()]
        self._now["max_spectral_growth"] = _largest(growths)
        self._now["max_spectral_residual"] = _largest([n.residual for n in norms.values()])


def _largest(numbers: list[float]) -> float:
    broken = not numbers or any(math.isnan(v) for v in numbers)
    return math.nan if broken else max(numbers)
