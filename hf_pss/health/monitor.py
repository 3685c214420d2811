"""The metrics of a preset, each measured at the right moment of a training step."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from hf_pss.detection.state import JSON, check_version, read_integer, read_number, read_object
from hf_pss.errors import StateError
from hf_pss.health.meter import RepresentationMeter, WatchAttention
from hf_pss.health.metrics import Cost
from hf_pss.health.spectrum_metrics import (
    effective_rank_of,
    measure_alignments,
    measure_low_rank_distances,
    measure_spectra,
)
from hf_pss.health.step_series import ChangeRates, ConditionAlarm, SpikeScore
from hf_pss.health.update_metrics import RelativeUpdateMeter, SpectralEdgeMeter
from hf_pss.health.update_operator import measure_denominators, whole_model
from hf_pss.models.adapters import AdapterSpectrum, measure_adapter_spectra
from hf_pss.models.distributed import Backend
from hf_pss.models.measurements import measure_matrix_grad_norms
from hf_pss.models.selection import Selection
from hf_pss.models.tracked import SpectrumTracker, TrackedSpectrum
from hf_pss.records.events import HealthReading

logger = logging.getLogger(__name__)

DEFAULT_EVERY_STEPS: Mapping[Cost, int] = {"light": 10, "standard": 10, "full": 100}
"""The default number of steps between readings [ours]."""

_VERSION = 1
_WHAT = "the state of the health monitor"
_LOW_RANK = 8
# For these metrics the smallest value is the worst. For all other metrics it is the largest.
_SMALLEST_IS_WORST = {
    "stable_rank",
    "effective_rank",
    "low_rank_distance",
    "sign_diversity",
    "gram_log_det",
    "gram_log_det_lower",
    "gram_log_det_upper",
    "token_effective_rank",
}


class HealthMonitor:
    """Measures one model while it trains, and changes nothing.

    Every step refreshes the tracker of σ₁ and updates the spike scores. Every ``every_steps``-th
    step measures the whole preset: the metrics of `hf_pss.health.metrics.METRICS` up to its cost.
    docs/health.md has the share of a step that this takes. If a metric raises an error, the monitor
    logs one warning that names the metric. If the backend cannot hold an update back, the monitor
    warns once and leaves out the metrics of gradients and of single updates.

    Args:
        selection: The matrices. For LoRA products only σ₁, ‖W‖_F and the stable rank are measured.
        backend: How parameters are stored. All ranks must make every call.
        preset: ``light``, ``standard`` or ``full``.
        every_steps: Steps between readings. 0 means `DEFAULT_EVERY_STEPS`.
        model: The model whose hidden states `full` measures. None leaves them out.
        tracker: A tracker of the same matrices that somebody else refreshes before each
            `after_update`. None makes one, which this object refreshes.
    """

    def __init__(
        self,
        selection: Selection,
        backend: Backend,
        preset: Cost,
        *,
        every_steps: int = 0,
        model: nn.Module | None = None,
        tracker: SpectrumTracker | None = None,
    ) -> None:
        self.every_steps = every_steps or DEFAULT_EVERY_STEPS[preset]
        self.seconds = 0.0
        """The time spent in this object since the start of the run, or since it was resumed."""
        self._views, self._adapters = selection.matrices, selection.adapters
        self._backend = backend
        self._is_standard, self._is_full = preset != "light", preset == "full"
        self._refreshes = tracker is None
        self._tracker = SpectrumTracker(self._views, backend) if tracker is None else tracker
        self._updates = RelativeUpdateMeter(self._views, backend)
        self._edge = SpectralEdgeMeter(self._views, backend)
        followed = ["spectral_norm", "frobenius_norm", *(["effective_rank"] * self._is_full)]
        self._rates = {name: ChangeRates() for name in followed}
        self._spikes = {name: SpikeScore() for name in ("loss", "grad_norm")}
        self._condition_alarm = ConditionAlarm()
        self._has_warned: set[str] = set()
        self._step_is_due = False
        self._grad_norms: dict[str, float] = {}
        self._representations: RepresentationMeter | None = None
        if not backend.can_hold_back and backend.rank == 0:
            logger.warning(
                "The health metrics grad_norm and relative_update are left out: DeepSpeed applies "
                "an update and drops its gradients before PSS can read them."
            )
        is_empty = not selection.matrices and not selection.adapters  # then it has no block
        if self._is_full and model is not None and not is_empty:
            with self._guard("representations"):
                self._representations = RepresentationMeter(model, selection, backend)

    def watch_attention(self, watch: WatchAttention) -> None:
        """Also measure the largest attention logits with this function, at the steps of `full`."""
        if self._representations is not None:
            with self._guard("attention_logit_max"):
                self._representations.watch_attention(watch)

    def before_step(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Register the hooks of `full` for the forward passes, if the step is due.

        Args:
            step: The number of the step that begins.
            parameters: The model's parameters by canonical name.
        """
        if self._representations is None:
            return
        with self._clock(), self._guard("representations"):
            if self.is_due(step):
                self._representations.arm(self._tracker.directions(parameters))
            else:
                self._representations.disarm()

    def stop(self) -> None:
        """Remove the hooks that are left at the end of a run."""
        if self._representations is not None:
            with self._guard("representations"):
                self._representations.disarm()

    def is_due(self, step: int) -> bool:
        """Return whether this step gets a reading."""
        return step % self.every_steps == 0

    def before_update(
        self, step: int, parameters: Mapping[str, nn.Parameter], grad_norm_preclip: float | None
    ) -> None:
        """Measure the gradients, clipped or not, and copy the weights, if a reading is due.

        If the backend cannot hold an update back, the update is already done,
        and this does nothing.

        Args:
            step: The number of the step that ends with this update.
            parameters: The model's parameters by canonical name, with gradients.
            grad_norm_preclip: The global norm before clipping. If it is missing or not finite, the
                gradient norms of matrices are left out.
        """
        self._grad_norms = {}
        self._step_is_due = self.is_due(step) and self._backend.can_hold_back
        if not self._step_is_due:
            return
        with self._clock():
            if grad_norm_preclip is not None and math.isfinite(grad_norm_preclip):
                with self._guard("grad_norm"):
                    self._grad_norms = measure_matrix_grad_norms(
                        self._views,
                        parameters,
                        self._backend,
                        grad_norm_preclip,
                        groups={v.name: (v.left_name, v.right_name) for v in self._adapters},
                    )
            if self._is_standard:
                with self._guard("relative_update"):
                    self._updates.start(parameters)

    @torch.no_grad()
    def after_update(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        *,
        optimizer: Optimizer | None = None,
        loss: float | None = None,
        grad_norm_preclip: float | None = None,
    ) -> HealthReading | None:
        """Update the tracker of the weights, and return a reading if one is due.

        Args:
            step: As in `before_update`.
            parameters: As in `before_update`.
            optimizer: Holds the second moments. None leaves the preconditioner out.
            loss: The loss of this step. Ranks may have different losses.
            grad_norm_preclip: As in `before_update`.
        """
        with self._clock():
            for name, value in (("loss", loss), ("grad_norm", grad_norm_preclip)):
                if value is not None:
                    with self._guard("spike_score"):
                        self._spikes[name].update(value)
            with self._guard("spectral_norm"):
                if self._refreshes:
                    self._tracker.refresh(parameters)
            if not self.is_due(step):
                return None
            reading = self._read(step, parameters, optimizer)
        logger.info("%s", describe(reading))
        return reading

    def state(self) -> dict[str, JSON]:
        """Return the spike scores and the reference of the preconditioner, as strict JSON.

        The last values of the change rates and the updates of the spectral edge are not saved.
        After a resume, both report nothing until they have enough readings. The controller saves
        the vectors of the tracker if detectors read the weights. Otherwise the tracker makes a cold
        start.
        """
        return {
            "version": _VERSION,
            "spikes": {name: score.state() for name, score in self._spikes.items()},
            "reference": self._condition_alarm.reference,
            "num_references": self._condition_alarm.num_readings,
        }

    def restore(self, state: object) -> None:
        """Restore a saved state.

        Raises:
            StateError: The state is damaged or of a different kind. The windows are then empty.
        """
        check_version(state, _VERSION, _WHAT)
        found = read_object(state, ("version", "spikes", "reference", "num_references"), _WHAT)
        spikes = read_object(found["spikes"], tuple(self._spikes), _WHAT)
        reference = read_number(found["reference"], f"the reference of {_WHAT}", minimum=0.0)
        num_references = read_integer(found["num_references"], f"the readings of {_WHAT}")
        try:
            for name, score in self._spikes.items():
                score.restore(spikes[name])
        except StateError:
            self._spikes = {name: SpikeScore() for name in self._spikes}
            raise
        self._condition_alarm.reference = reference
        self._condition_alarm.num_readings = num_references

    # ---- inside ----

    def _read(
        self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
    ) -> HealthReading:
        scalars: dict[str, float] = {}
        matrices: dict[str, Mapping[str, float]] = {}
        spectra: dict[str, tuple[float, ...]] = {}
        with self._guard("spectral_norm"):
            matrices |= self._tracked(parameters, scalars)
        matrices["grad_norm"] = self._grad_norms
        for name, score in self._spikes.items():
            if not math.isnan(score.score):
                scalars[f"spike_score_{name}"] = score.score
        if self._is_standard:
            self._read_standard(parameters, optimizer, scalars, matrices)
        if self._is_full:
            self._read_full(parameters, matrices, spectra)
        with self._guard("change_rate"):
            for name, rates in self._rates.items():
                matrices[f"{name}_change_rate"] = rates.of(step, matrices.get(name, {}))
        matrices = {name: values for name, values in matrices.items() if values}
        for name, values in matrices.items():
            scalars |= {f"{name}/{end}": x for end, x in _summary(values.values()).items()}
        return HealthReading(step, scalars, matrices, spectra)

    def _tracked(
        self, parameters: Mapping[str, nn.Parameter], scalars: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        found = self._tracker.read(parameters)
        if found:  # a residual of NaN means "measured apart" or "not finite"
            stale = [one for one in found.values() if one.is_stale and not math.isnan(one.residual)]
            scalars["spectral_norm/num_stale"] = float(len(stale))
        products = measure_adapter_spectra(self._adapters, parameters, self._backend)
        both: dict[str, TrackedSpectrum | AdapterSpectrum] = {**found, **products}
        return {
            "spectral_norm": {name: one.sigma for name, one in both.items()},
            "stable_rank": {name: one.stable_rank for name, one in both.items()},
            "frobenius_norm": {name: one.frobenius for name, one in both.items()},
            "spectral_norm_residual": {name: one.residual for name, one in found.items()},
        }

    def _read_standard(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer | None,
        scalars: dict[str, float],
        matrices: dict[str, Mapping[str, float]],
    ) -> None:
        if self._step_is_due:
            with self._guard("relative_update"):
                matrices["relative_update"] = self._updates.stop(parameters)
        with self._guard("spectral_edge"):
            if edge := self._edge.measure(parameters):
                scalars["spectral_edge"] = edge.ratio
                scalars["spectral_edge_position"] = float(edge.position)
        if optimizer is None:
            return
        with self._guard("sqrt_condition"):
            ranges = measure_denominators(self._views, parameters, optimizer, self._backend)
            if not ranges:
                return
            both = whole_model(ranges)
            for metric in ("sqrt_condition", "trimmed_sqrt_condition"):
                matrices[metric] = {name: getattr(one, metric) for name, one in ranges.items()}
                scalars[metric] = getattr(both, metric)
            self._compare(both.trimmed_sqrt_condition)

    def _compare(self, condition: float) -> None:
        """Warn on rank 0 if the preconditioner has changed by an order of magnitude."""
        is_finite = math.isfinite(condition)
        before = self._condition_alarm.update(condition) if is_finite else None
        if self._backend.rank != 0:
            return
        if not is_finite and "non-finite condition" not in self._has_warned:
            self._has_warned.add("non-finite condition")
            logger.warning(
                "Adam's preconditioner has no condition number: √κ(M), trimmed, is %s. A second "
                "moment is NaN, inf or, with eps=0, zero. PSS ignores these readings.",
                condition,
            )
        if before is not None:
            logger.warning(
                "The trimmed condition number √κ(M) of Adam's preconditioner changed by an order "
                "of magnitude, from %.3g to %.3g. See sqrt_condition in docs/health.md.",
                before,
                condition,
            )

    def _read_full(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: dict[str, Mapping[str, float]],
        spectra: dict[str, tuple[float, ...]],
    ) -> None:
        of_model = self._views, parameters, self._backend
        with self._guard("effective_rank"):
            spectra |= measure_spectra(*of_model)
            matrices["effective_rank"] = {n: effective_rank_of(s) for n, s in spectra.items()}
        with self._guard("low_rank_distance"):
            matrices["low_rank_distance"] = measure_low_rank_distances(*of_model, _LOW_RANK)
        with self._guard("neighbour_alignment"):
            pairs = measure_alignments(*of_model)
            matrices["neighbour_alignment"] = {p.reader: x for p, x in pairs.items()}
        meter = self._representations
        if meter is None or not meter.is_armed:
            return
        # The hooks run inside the model, so they are not tried again after an error.
        self._representations = None
        with self._guard("representations", "PSS does not measure it again in this run."):
            matrices |= meter.read(parameters)
            self._representations = meter
        self.seconds += meter.seconds

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    @contextmanager
    def _guard(
        self,
        metric: str,
        then: str = "PSS tries it again at the next reading, without another warning.",
    ) -> Iterator[None]:
        """Turn the errors of a metric into one warning per metric and run."""
        try:
            yield
        except Exception as error:
            if metric not in self._has_warned:
                self._has_warned.add(metric)
                logger.warning(
                    "The health metric %s failed: %s: %s. "
                    "Training continues without this number. %s",
                    metric,
                    type(error).__name__,
                    str(error).rstrip("."),
                    then,
                )


def describe(reading: HealthReading) -> str:
    """Return a line of text with the worst value of each metric and the matrix that has it.

    >>> describe(HealthReading(3, matrices={"stable_rank": {"a": 2.0, "b": 1.5}}))
    'Health, step 3: stable_rank 1.5 (b).'
    """
    parts = []
    for metric, values in reading.matrices.items():
        if values:
            name = _worst(metric, values)
            parts.append(f"{metric} {values[name]:.3g} ({name})")
    return f"Health, step {reading.step}: {', '.join(parts) or 'nothing measured'}."


def _worst(metric: str, values: Mapping[str, float]) -> str:
    """Return the name with the worst value. NaN comes first, then the smallest or the largest."""
    sign = -1.0 if metric in _SMALLEST_IS_WORST else 1.0
    return max(values, key=lambda name: (math.isnan(values[name]), sign * values[name]))


def _summary(values: Collection[float]) -> dict[str, float]:
    """Return extremes and median of the finite values, and the number of other values, if any."""
    every = list(values)
    finite = [x for x in every if math.isfinite(x)]
    found = {}
    if finite:
        found = {"min": min(finite), "median": statistics.median(finite), "max": max(finite)}
    if len(finite) < len(every):
        found["num_nonfinite"] = float(len(every) - len(finite))
    return found
