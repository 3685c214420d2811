"""What might warn before the loss moves: quantities recorded during a run, for later judgement."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer

from hf_pss.errors import ConfigurationError
from hf_pss.health.jacobian_energy import measure_jacobian_energies
from hf_pss.health.sign_diversity import SignDiversityMeter
from hf_pss.health.spectral_norms import SpectralNorm, SpectralNormMeter
from hf_pss.models.distributed import backend_for
from hf_pss.models.measurements import UpdateMeter, measure_stable_ranks
from hf_pss.models.selection import named_parameters_canonical, select_matrices
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
    "max_spectral_growth": "largest σ₁ / σ₁ before training; matrices that start at zero left out",
    "max_spectral_residual": "largest residual of the σ₁: above 0.05 one of them is stale",
}
"""Each series, and what it holds."""


class Probes(TrainerCallback):
    """Records the quantities of `PROBED` at every ``every_steps``-th step, and changes nothing.

    Add it behind PSS's callback, whose gradient norm it takes. Without one the norm is read from
    the gradients, and only where the Trainer does not clip them.

    Args:
        trainer: Whose run is recorded.
        every_steps: Rhythm of the record: steps N, 2N, …
        jacobian_energy: Whether to decompose every matrix for it; the dearest of all.

    Raises:
        ConfigurationError: `every_steps` below 1.
    """

    def __init__(
        self, trainer: Trainer, *, every_steps: int = 1, jacobian_energy: bool = True
    ) -> None:
        if every_steps < 1:
            raise ConfigurationError(f"You gave every_steps={every_steps}; give 1 or more.")
        self.every_steps = every_steps
        self.seconds = 0.0
        """Time spent here, in all."""
        self._trainer = trainer
        self._has_energy = jacobian_energy
        self._steps: list[int] = []
        self._series: dict[str, list[float | None]] = {name: [] for name in PROBED}
        self._now: dict[str, float] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON: ``every_steps``, ``seconds``, ``step``, and a list for each series.

        The lists are of one length; None stands where a number is not finite or was not there.
        """
        return {
            "every_steps": self.every_steps,
            "seconds": self.seconds,
            "step": list(self._steps),
            **{name: list(values) for name, values in self._series.items()},
        }

    # ---- the Trainer's events ----

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the matrices and note their first spectral norms."""
        if model is None:
            raise ConfigurationError("Probes needs the model in on_train_begin; got none.")
        started = time.perf_counter()
        self._model = model
        parameters = named_parameters_canonical(model)
        self._backend = backend_for(parameters)
        self._views = select_matrices(model).matrices
        self._updates = UpdateMeter(
            sorted({view.parameter_name for view in self._views}), self._backend
        )
        self._norms = SpectralNormMeter(self._views, self._backend)
        self._signs = SignDiversityMeter(model, self._views, self._backend)
        first = self._norms.measure(parameters)
        self._first = {name: norm.sigma for name, norm in first.items() if norm.sigma > 0}
        self._listener = next(
            (c for c in self._trainer.callback_handler.callbacks if isinstance(c, PSSCallback)),
            None,
        )
        self.seconds += time.perf_counter() - started

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the forward passes of this step, if it is a recorded one."""
        self._now = {}
        if self._is_due(state.global_step + 1):
            self._signs.arm(self._norms.directions())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read what there is before the update: gradients, and what the forward passes showed."""
        if not self._is_due(state.global_step + 1):
            return
        started = time.perf_counter()
        parameters = named_parameters_canonical(self._model)
        if self._listener is None and not args.max_grad_norm:
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            self._now["grad_norm_preclip"] = self._backend.agree(norm.reshape(1))[0]
        if self._has_energy:
            energies = measure_jacobian_energies(self._views, parameters, self._backend)
            self._note("jacobian_energy", energies.values(), "max")
        self._note("sign_diversity", self._signs.read().values(), "min")
        self._updates.start(parameters)
        self.seconds += time.perf_counter() - started

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update, before anybody smooths the weights."""
        if self._is_due(state.global_step + 1):
            started = time.perf_counter()
            change = self._updates.stop(named_parameters_canonical(self._model))
            self._now["update_norm"] = self._backend.agree(change)[0]
            self.seconds += time.perf_counter() - started

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the weights and put the step on record."""
        if not self._is_due(state.global_step):
            return
        started = time.perf_counter()
        parameters = named_parameters_canonical(self._model)
        ranks = measure_stable_ranks(self._views, parameters, self._backend)
        self._note("stable_rank", ranks.values(), "min")
        self._note_norms(self._norms.measure(parameters))
        report = self._listener.report if self._listener is not None else None
        if report is not None and report.step == state.global_step:
            norm = report.scalars.get("grad_norm_preclip", math.nan)
            self._now["grad_norm_preclip"] = norm
        self._steps.append(state.global_step)
        for name, series in self._series.items():
            value = self._now.get(name, math.nan)
            series.append(value if math.isfinite(value) else None)
        self.seconds += time.perf_counter() - started

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook behind."""
        self._signs.disarm()

    def _is_due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def _note(self, name: str, values: Iterable[float], worst: Literal["min", "max"]) -> None:
        """Note the worst and the mean; nothing if one is NaN, which min and max may pass over."""
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
