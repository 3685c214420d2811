"""Record quantities of a run that may warn of an explosion before the loss moves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer

from hf_pss.evidence.guard_callbacks import TimedCallback
from hf_pss.health.probe_meters import SignDiversityMeter, measure_jacobian_energies
from hf_pss.linalg import quick_stable_rank
from hf_pss.models.batching import measure_each
from hf_pss.models.distributed import backend_for
from hf_pss.models.measurements import UpdateMeter
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.tracked import SpectrumTracker
from hf_pss.records.strict_json import finite_or_none
from hf_pss.trainer.callback import PSSCallback

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
    "max_spectral_residual": "largest residual of a tracked σ₁²; near 0 if one direction leads",
}
"""The meaning of each series."""


class Probes(TimedCallback):
    """Records the quantities of `PROBED` every ``every_steps`` steps, and changes nothing.

    Add this callback after PSS's callback, whose gradient norm it records. The Jacobian energies
    cost the most, because they need a decomposition of every matrix.

    Args:
        trainer: The trainer whose run to record. It has a PSSCallback.
        every_steps: Interval N of the record, which holds steps N, 2N, …
    """

    def __init__(self, trainer: Trainer, *, every_steps: int = 1) -> None:
        super().__init__()
        self.every_steps = every_steps
        self._trainer = trainer
        self._series: dict[str, list[Any]] = {"step": [], **{name: [] for name in PROBED}}
        self._now: dict[str, float] = {}
        self._is_due = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: ``every_steps``, ``seconds``, ``step``, and a list for each series.

        All lists have the same length. A number that is missing or not finite is None.
        """
        return {"every_steps": self.every_steps, "seconds": self.seconds, **self._series}

    def prepare(self) -> None:
        """Find the matrices and record their first spectral norms."""
        parameters = named_parameters_canonical(self.model)
        self._backend = backend_for(parameters)
        self._views = select_matrices(self.model).matrices
        names = sorted({view.parameter_name for view in self._views})
        self._updates = UpdateMeter(names, self._backend)
        self._norms = SpectrumTracker(self._views, self._backend)
        self._signs = SignDiversityMeter(self.model, self._views, self._backend)
        first = self._norms.measure(parameters)
        self._first = {name: norm.sigma for name, norm in first.items() if norm.sigma > 0}

    def before_step(self, step: int) -> None:
        """Capture the forward passes of this step if the step is due."""
        self._now = {}
        self._is_due = step % self.every_steps == 0
        if self._is_due:
            self._signs.arm(self._norms.directions(named_parameters_canonical(self.model)))

    def before_update(self) -> bool:
        """Read the gradients and the captured forward passes."""
        if not self._is_due:
            return False
        parameters = named_parameters_canonical(self.model)
        energies = measure_jacobian_energies(self._views, parameters, self._backend)
        self._note("jacobian_energy", energies.values(), max)
        self._note("sign_diversity", self._signs.read().values(), min)
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
        ranks = measure_each(self._views, parameters, self._backend, quick_stable_rank)
        self._note("stable_rank", ranks.values(), min)
        norms = self._norms.measure(parameters)
        growths = (norms[name].sigma / first for name, first in self._first.items())
        self._note("spectral_growth", growths, max)
        self._note("spectral_residual", (norm.residual for norm in norms.values()), max)
        report = PSSCallback.of(self._trainer).report
        if report is not None and report.step == step:
            self._now["grad_norm_preclip"] = report.scalars.get("grad_norm_preclip", math.nan)
        self._series["step"].append(step)
        for name in PROBED:
            self._series[name].append(finite_or_none(self._now.get(name)))
        return False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        self._signs.disarm()

    def _note(
        self, name: str, values: Iterable[float], worst: Callable[[Iterable[float]], float]
    ) -> None:
        """Keep the worst and the mean, or neither if a value is NaN: min and max may ignore it."""
        numbers = list(values)
        if numbers and not any(map(math.isnan, numbers)):
            self._now[f"{worst.__name__}_{name}"] = worst(numbers)
            self._now[f"mean_{name}"] = math.fsum(numbers) / len(numbers)
