"""PSSController: watch, decide and smooth behind one `step`, for any training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_pss.config import PSSConfig
from hf_pss.detection import (
    GLOBAL,
    AnyOf,
    DetectorSettings,
    Judgement,
    Quantity,
    Readings,
    Verdict,
    make_detector,
    worst,
)
from hf_pss.detection.state import (
    JSON,
    check_version,
    read_integer,
    read_mapping,
    read_number,
    read_object,
    read_text,
)
from hf_pss.distributed import Backend
from hf_pss.errors import NonFiniteError, StateError
from hf_pss.events import Event, Intervention, Record
from hf_pss.gauges import Gauges
from hf_pss.linalg import SMOOTHING_FUNCTIONS, SmoothingFunction, StableRankCap, noise_stable_rank
from hf_pss.policy import Action, Decision, History, Policy
from hf_pss.selection import Selection
from hf_pss.smoother import smooth_matrices_

__all__ = ["PSSController", "StepReport"]

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, slots=True)
class StepReport:
    """What PSS saw and did in one step."""

    step: int
    verdict: Verdict
    update_applied: bool
    records: tuple[Record, ...]
    """Events and interventions, in the order in which they happened."""
    scalars: Mapping[str, float]
    """Finite numbers for the log; a number that is not finite, or not defined yet, is left out."""
    stable_ranks: Mapping[str, float] | None
    """Every matrix's stable rank, at the rhythm of ``health_every_steps``."""


@dataclass(slots=True)
class _Step:
    """The step under way: what `before_update` leaves for `after_update`."""

    number: int
    loss: float | None = None
    grad_norm_preclip: float | None = None
    update_applied: bool = True
    is_after_update: bool = False
    judgements: list[Judgement] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    answers: list[tuple[Event, Judgement]] = field(default_factory=list)
    """Events that `after_update` must answer by smoothing."""


class PSSController:
    """Parametric Singularity Smoothing (arXiv 2602.01308) for one model in one training loop.

    In a hand-written loop it replaces the call of ``optimizer.step()``:

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> pss = PSSController(model)
    >>> model(torch.ones(3, 1, 8)).sum().backward()
    >>> grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    >>> pss.step(grad_norm, update=optimizer.step).verdict.value
    'calibrating'

    A loop that cannot hand its update over calls `before_update` and `after_update` around it.

    Args:
        model: The model being trained, wrapped or not. Parameters are looked up by name at every
            use, so wrappers may swap them.
        config: The options; the preset ``paper`` when None.
        backend: How parameters are stored; found from the parameters when None.

    Raises:
        SelectionError: The model holds no matrix to watch, or a pattern matches none.
        ConfigurationError: The model is sharded in a way that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PSSConfig | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.config = config if config is not None else PSSConfig()
        self._gauges = Gauges(model, self.config, backend)
        self._policy = Policy(
            cooldown_steps=self.config.cooldown_steps,
            # An observer spends no budget and starts no cooldown.
            max_interventions=0 if self.config.observe_only else self.config.max_interventions,
            on_nonfinite=self.config.on_nonfinite,
            max_nonfinite_streak=self.config.max_nonfinite_streak,
        )
        self._current: _Step | None = None
        self._starting_ranks = self._measure_starting_ranks()
        self.reset()

    # ---- one step ----

    def step(
        self,
        grad_norm_preclip: float | Tensor | None,
        *,
        update: Callable[[], object],
        loss: float | Tensor | None = None,
    ) -> StepReport:
        """Judge the gradient, apply the update unless it would do harm, smooth if need be.

        Args:
            grad_norm_preclip: Global ℓ₂ norm of the gradient before clipping, as
                ``clip_grad_norm_`` returns it; after loss-scale unscaling, over all ranks.
            update: Applies the optimizer's step; not called when the step is to be skipped.
            loss: This step's loss, for the record of events.

        Raises:
            NonFiniteError: The step is not finite and the policy says to stop; nothing was updated.
        """
        if self.before_update(*self.to_host(grad_norm_preclip, loss)):
            update()
        return self.after_update()

    def to_host(self, *values: float | Tensor | None) -> list[float | None]:
        """Return numbers as host floats: all tensors among them in one device-to-host read."""
        return self._gauges.to_host(*values)

    def inspect_gradients(self) -> None:
        """Before clipping: note which gradients are finite, so that an error can name the first.

        Optional. One pass over the gradients, nothing read back; only in runs that stop at a
        non-finite step or have had one, so that a healthy run pays nothing.
        """
        if self.config.on_nonfinite == "stop" or self._history.num_nonfinite_steps > 0:
            started = time.perf_counter()
            self._gauges.inspect_gradients()
            self.seconds += time.perf_counter() - started

    def before_update(
        self,
        grad_norm_preclip: float | None,
        loss: float | None = None,
        *,
        loss_scaled: bool = False,
    ) -> bool:
        """Judge the gradient of this step and tell whether its update may be applied.

        Args:
            grad_norm_preclip: Global norm before clipping; None where the loop has none to give.
            loss: This step's loss.
            loss_scaled: A GradScaler is active: it skips overflown gradients by itself, so the
                answer to these is True, and only a long streak of them stops the run.

        Raises:
            NonFiniteError: The policy says to stop. No weight was touched.
        """
        started = time.perf_counter()
        self.step_number += 1
        step = self._current = _Step(self.step_number, loss, grad_norm_preclip)
        has_overflown = (
            loss_scaled and grad_norm_preclip is not None and not math.isfinite(grad_norm_preclip)
        )
        for judgement in self._judge_gradient(grad_norm_preclip, loss):
            action = self._decide(step, judgement, has_overflown=has_overflown)
            skips_spike = action is Action.ACT and self.config.spike_update == "skip"
            if has_overflown or skips_spike or action is Action.SKIP_UPDATE:
                step.update_applied = False
        self._gauges.forget_gradients()
        if step.update_applied and self._reads(Quantity.UPDATE_NORM):
            self._gauges.start_update()
        self.seconds += time.perf_counter() - started
        return step.update_applied or has_overflown

    @torch.no_grad()
    def after_update(self) -> StepReport:
        """Judge the weights, carry the interventions of this step out, and report.

        Raises:
            NonFiniteError: The weights themselves are not finite and the policy says to stop.
        """
        step = self._current if self._current is not None else _Step(self.step_number)
        step.is_after_update = True
        check_is_due = self._reads(Quantity.STABLE_RANK) and _is_due(
            step, self.config.check_every_steps
        )
        health_is_due = _is_due(step, self.config.health_every_steps)
        started = time.perf_counter()
        # Before any smoothing: health shows what the optimizer left, not what we made of it.
        ranks = self.stable_ranks() if check_is_due or health_is_due else None
        if not check_is_due:
            started = time.perf_counter()  # a reading for the report alone is no cost of PSS
        for judgement in self._judge_weights(step, ranks if check_is_due else None):
            self._decide(step, judgement)
        step.records += [self._smooth(event, judgement) for event, judgement in step.answers]
        self._current = None
        self.seconds += time.perf_counter() - started
        return StepReport(
            step=step.number,
            verdict=worst(step.judgements).verdict if step.judgements else Verdict.NORMAL,
            update_applied=step.update_applied,
            records=tuple(step.records),
            scalars=self._scalars(step),
            stable_ranks=ranks if health_is_due else None,
        )

    @property
    def selection(self) -> Selection:
        """Which matrices are watched, and why everything else is left alone."""
        return self._gauges.selection

    def stable_ranks(self) -> dict[str, float]:
        """Return the stable rank of each selected 2-D matrix by name; NaN where one is broken.

        All ranks of a distributed run must call it together.
        """
        return self._gauges.stable_ranks()

    @property
    def pending_records(self) -> tuple[Record, ...]:
        """Records of a step that an error ended before it could be reported."""
        return tuple(self._current.records) if self._current is not None else ()

    # ---- what survives a checkpoint ----

    def state_dict(self) -> dict[str, JSON]:
        """Return all that later steps depend on, as plain strict JSON."""
        return {
            "version": _VERSION,
            "matrices": self._gauges.fingerprint(),
            "step": self.step_number,
            "seconds": self.seconds,
            "history": self._history.state_dict(),
            "starting_ranks": dict(self._starting_ranks),
            "detectors": self._detectors.state_dict() if self._detectors else None,
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state, exactly.

        Args:
            state: Parsed JSON, not trusted.

        Raises:
            StateError: Truncated, damaged, of another version, of another model or of other
                detectors; the controller is as it was.
        """
        what = "the PSS state"
        check_version(state, _VERSION, what=what)
        found = read_object(state, tuple(self.state_dict()), what=what)
        if read_text(found["matrices"], what=f"'matrices' of {what}") != self._gauges.fingerprint():
            raise StateError(
                "The PSS state belongs to a model with other weight matrices (or to another "
                "selection of them); load it into the model that it was saved with."
            )
        ranks = read_object(
            found["starting_ranks"], tuple(self._starting_ranks), what=f"'starting_ranks' of {what}"
        )
        starting_ranks = {
            name: read_number(rank, minimum=0.0, what=f"starting rank of {name!r}")
            for name, rank in ranks.items()
        }
        step_number = read_integer(found["step"], what=f"'step' of {what}")
        seconds = read_number(found["seconds"], minimum=0.0, what=f"'seconds' of {what}")
        history = History.from_state_dict(read_mapping(found["history"], what="the history"))
        floors = self._floors_for(starting_ranks)
        detectors = self._new_detectors(floors)
        if detectors is not None:
            detectors.load_state_dict(found["detectors"])
        self._starting_ranks, self._floors = starting_ranks, floors
        self._detectors, self._history = detectors, history
        self.step_number, self.seconds = step_number, seconds

    def reset(self, *, step_number: int = 0) -> None:
        """Forget everything but the floors, and count on from the given step."""
        self._floors = self._floors_for(self._starting_ranks)
        self._detectors, self._history = self._new_detectors(self._floors), History()
        self.step_number, self.seconds = step_number, 0.0

    # ---- inside ----

    def _measure_starting_ranks(self) -> dict[str, float]:
        """Return what the floors refer to where that is the matrices' own stable rank now."""
        if "stable_rank_floor" not in self.config.detectors or (
            self.config.floor_reference == "noise"
        ):
            return {}
        ranks = {name: noise_stable_rank(m, n) for name, (m, n) in self._gauges.shapes.items()}
        for name, rank in self.stable_ranks().items():
            # Zero (a zero-initialised projection) and NaN say nothing about a healthy level.
            if 0 < rank < ranks[name]:
                ranks[name] = rank
        return ranks

    def _floors_for(self, starting_ranks: Mapping[str, float]) -> dict[str, float]:
        """ρ times the starting stable rank; times that of noise where there is none."""
        if "stable_rank_floor" not in self.config.detectors:
            return {}
        return {
            name: self.config.floor_ratio * starting_ranks.get(name, noise_stable_rank(m, n))
            for name, (m, n) in self._gauges.shapes.items()
        }

    def _new_detectors(self, floors: Mapping[str, float]) -> AnyOf | None:
        settings = DetectorSettings(
            threshold_ratio=self.config.threshold_ratio,
            baseline_alpha=self.config.baseline_alpha,
            calibration_steps=self.config.calibration_steps,
            patience_steps=self.config.patience_steps,
            stable_rank_drop=self.config.stable_rank_drop,
            floors=floors,
        )
        names = self.config.detectors
        return AnyOf([make_detector(name, settings) for name in names]) if names else None

    def _reads(self, quantity: Quantity) -> bool:
        return self._detectors is not None and quantity in self._detectors.quantities

    def _judge_gradient(self, norm: float | None, loss: float | None) -> Iterator[Judgement]:
        if norm is not None and not math.isfinite(norm):
            where = self._gauges.first_nonfinite_gradients()
            yield Judgement(Verdict.NON_FINITE, "grad_norm", where, value=norm)
        elif loss is not None and not math.isfinite(loss):
            yield Judgement(Verdict.NON_FINITE, "loss", (GLOBAL,), value=loss)
        elif norm is not None:
            yield from self._judge(Quantity.GRAD_NORM, lambda: {GLOBAL: norm})
            yield from self._judge(
                Quantity.MATRIX_GRAD_NORM, lambda: self._gauges.matrix_grad_norms(norm)
            )

    def _judge_weights(self, step: _Step, ranks: Mapping[str, float] | None) -> Iterator[Judgement]:
        if step.update_applied:
            yield from self._judge(Quantity.UPDATE_NORM, self._gauges.update_norm)
        if ranks is not None:
            # A zero matrix has no direction to be concentrated in: there is nothing to judge.
            judged = {name: rank for name, rank in ranks.items() if rank != 0}
            yield from self._judge(Quantity.STABLE_RANK, lambda: judged)

    def _judge(self, quantity: Quantity, measure: Callable[[], Readings]) -> Iterator[Judgement]:
        """Measure a quantity that some detector reads, and yield what the gravest one says."""
        if self._detectors and self._reads(quantity) and (readings := measure()):
            yield self._detectors.judge(quantity, readings)

    def _decide(self, step: _Step, judgement: Judgement, *, has_overflown: bool = False) -> Action:
        """Put a judgement through the policy, on record, and into the step's plan."""
        # A loss scaler overflows now and then by design and skips those steps itself.
        policy = replace(self._policy, on_nonfinite="skip") if has_overflown else self._policy
        decision, self._history = policy.decide(judgement, step=step.number, history=self._history)
        step.judgements.append(judgement)
        if decision.action is Action.CONTINUE:
            return decision.action
        if self.config.observe_only:
            decision = Decision(Action.OBSERVE, "observe only")
        event = Event.of(judgement, decision, step=step.number, loss=step.loss)
        if judgement.verdict is Verdict.NON_FINITE:
            _warn_of_nonfinite(event, self._history, has_overflown)
        if decision.action is Action.ACT:
            step.answers.append((event, judgement))
        else:
            step.records.append(event)
        if decision.action is Action.STOP:
            raise NonFiniteError(_describe_stop(event, step.is_after_update))
        return decision.action

    def _smooth(self, event: Event, judgement: Judgement) -> Intervention:
        started = time.perf_counter()
        is_floor = judgement.detector == "stable_rank_floor"
        own = is_floor or (self.config.scope == "fired" and GLOBAL not in judgement.fired)
        changes = smooth_matrices_(
            self.selection.matrices,
            self._gauges.parameters(),
            self._gauges.backend,
            self._cap_at_floors if is_floor else self._smoothing_function,
            names=frozenset(judgement.fired) if own else None,
            max_rank=self.config.max_rank,
            keep_frobenius=self.config.keep_frobenius,
        )
        return Intervention(
            event=event,
            smoothing="stable_rank_cap" if is_floor else self.config.smoothing,
            seconds=time.perf_counter() - started,
            matrices=changes,
        )

    def _smoothing_function(self, names: Sequence[str]) -> SmoothingFunction:
        return SMOOTHING_FUNCTIONS[self.config.smoothing]()

    def _cap_at_floors(self, names: Sequence[str]) -> SmoothingFunction:
        return StableRankCap(torch.tensor([self._floors[name] for name in names]))

    def _scalars(self, step: _Step) -> dict[str, float]:
        numbers: dict[str, float | None] = {
            "grad_norm_preclip": step.grad_norm_preclip,
            "interventions": self._history.num_interventions,
            "nonfinite_steps": self._history.num_nonfinite_steps,
            "seconds": self.seconds,
        }
        for judgement in step.judgements:
            if judgement.detector == "grad_norm_ratio":
                numbers["baseline"] = judgement.baseline
                numbers["threshold"] = judgement.threshold
        return {k: float(v) for k, v in numbers.items() if v is not None and math.isfinite(v)}


def _is_due(step: _Step, every: int) -> bool:
    return every > 0 and step.number % every == 0


def _warn_of_nonfinite(event: Event, history: History, has_overflown: bool) -> None:
    logger.log(
        logging.INFO if has_overflown else logging.WARNING,
        "Step %d is not finite (%s = %s, loss %s)%s: %s. Non-finite steps so far: %d.",
        event.step,
        event.detector,
        event.value,
        event.loss,
        _where(event),
        "left to the loss scaler" if has_overflown else event.decision.value.replace("_", " "),
        history.num_nonfinite_steps,
    )


def _where(event: Event) -> str:
    return f", first in {', '.join(event.fired)}" if event.fired not in ((), (GLOBAL,)) else ""


def _describe_stop(event: Event, is_after_update: bool) -> str:
    moment = "after" if is_after_update else "before"
    remedy = (
        "The weights are damaged: resume from an earlier checkpoint"
        if is_after_update
        else "No weight was touched: look at this step's batch"
    )
    return (
        f"Stopped {moment} the update of step {event.step}: {event.detector} = {event.value}, "
        f"loss = {event.loss}{_where(event)} ({event.reason}). {remedy}, lower the learning rate, "
        "or set on_nonfinite='skip' to pass over such steps."
    )
