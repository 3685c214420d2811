"""PSSController, which measures, judges, decides and smooths in one `step`, for any loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim import Optimizer

from hf_pss.config import PSSConfig, spelt
from hf_pss.detection.detectors import GLOBAL, Judgement, Quantity, Verdict
from hf_pss.detection.policy import Action, Decision, InterventionHistory, Policy
from hf_pss.detection.state import JSON, check_version, read_integer, read_object
from hf_pss.errors import ConfigurationError, NonFiniteError
from hf_pss.models.anchors import Anchors
from hf_pss.models.batching import DecompositionError
from hf_pss.models.distributed import Backend
from hf_pss.models.intervention import EvaluateLoss, ModelSmoother
from hf_pss.models.measurements import Measurements
from hf_pss.models.option_checks import (
    nothing_to_watch,
    only_observes,
    option_warnings,
    response_to_nonfinite,
    tries_interventions,
)
from hf_pss.models.selection import Selection
from hf_pss.models.triggers import Triggers
from hf_pss.records.events import (
    Event,
    EventKind,
    HealthReading,
    Intervention,
    Record,
    Step,
    StepReport,
)
from hf_pss.records.messages import (
    InterventionLevels,
    describe_nonfinite,
    describe_stop,
    intervention_line,
    is_worth_a_line,
)

logger = logging.getLogger(__name__)

_VERSION = 4
_FLOOR = "stable_rank_floor"
_HEALTH_MODULE = "hf_pss.health.monitor"
"""The metrics are an extension: this module is loaded only if ``health`` asks for them."""

T = TypeVar("T")
Parameters: TypeAlias = Mapping[str, nn.Parameter]


class HealthMetrics(Protocol):
    """The part of `hf_pss.health.monitor.HealthMonitor` that a training loop uses."""

    seconds: float
    """The time that the metrics have taken."""

    def watch_attention(self, watch: Callable[[], Any]) -> None:
        """Measure attention logits with this function as well."""

    def before_step(self, step: int, parameters: Parameters) -> None:
        """Prepare to measure the forward passes of a step."""

    def before_update(
        self, step: int, parameters: Parameters, grad_norm_preclip: float | None
    ) -> None:
        """Measure the gradients."""

    def after_update(
        self, step: int, parameters: Parameters, **numbers: Any
    ) -> HealthReading | None:
        """Measure the weights, and return a reading if one is due."""

    def state(self) -> dict[str, JSON]:
        """Return everything that a checkpoint must hold."""

    def restore(self, state: object) -> None:
        """Restore a state, or raise `StateError`."""

    def stop(self) -> None:
        """End the run."""


class PSSController:
    """Applies Parametric Singularity Smoothing (arXiv 2602.01308) to one model and training loop.

    In a training loop that you write yourself, it replaces the call of ``optimizer.step()``:

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> pss = PSSController(model)
    >>> model(torch.ones(3, 1, 8)).sum().backward()
    >>> grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    >>> pss.step(grad_norm, update=optimizer.step).verdict.value
    'calibrating'

    Every call counts as one step. If you accumulate gradients, call it once for each update: with
    Accelerate, if ``accelerator.sync_gradients``. If your loop cannot pass its update as a
    function, call `before_update` before it and `after_update` after it. If you use
    ``smooth_on_resume``, call `smooth_now` after `load_state_dict`.

    Args:
        model: The model being trained, wrapped or not. Its parameters are looked up by name at
            every use, so wrappers may swap them.
        config: The options. None means the preset ``anchored``.
        backend: How parameters are stored. If None, it is determined from the parameters.
        optimizer: The optimizer, whose state is edited in place. It is needed unless
            ``moments`` is ``keep``.
        evaluate_loss: Computes the loss of one micro-batch with the current weights. Within a step
            it must always use the same micro-batch. It must not change anything, not even the
            random state. If an intervention raises this loss, it is undone (option ``trial``).
            Without this function interventions are not tried, and the controller warns once.
        speaks: Whether to log interventions, and to warn of options that have no effect in this
            loop; see `caution`.

    Raises:
        SelectionError: A pattern matches nothing, or nothing that can be selected.
        ConfigurationError: The model is sharded in a way that is not supported, or
            the optimizer is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PSSConfig | None = None,
        *,
        backend: Backend | None = None,
        optimizer: Optimizer | None = None,
        evaluate_loss: EvaluateLoss | None = None,
        speaks: bool = True,
    ) -> None:
        self.config = config if config is not None else PSSConfig()
        self._optimizer = optimizer
        self._measurements = Measurements(model, self.config, backend)
        if self.config.moments != "keep" and optimizer is None:
            raise ConfigurationError(
                f"moments={self.config.moments!r} edits the optimizer's state, so the controller "
                "needs the optimizer: PSSController(model, config, optimizer=optimizer)."
            )
        on_nonfinite = response_to_nonfinite(self.config, self._measurements)
        self._only_observes = only_observes(self.config, self.selection)
        self._triggers = Triggers(self._measurements, self.config)
        self._policy = Policy(
            cooldown_steps=self.config.cooldown_steps,
            # A controller that only observes uses no budget and starts no cooldown.
            max_interventions=0 if self._only_observes else self.config.max_interventions,
            on_nonfinite=on_nonfinite,
            max_nonfinite_streak=self.config.max_nonfinite_streak,
        )
        self._smoother = ModelSmoother(self._measurements, self.config, optimizer, evaluate_loss)
        self._anchors = self._first_anchors()
        self.health: HealthMetrics | None = None
        """The health metrics, which measure their own time. None if ``health`` is off."""
        has_health = self.config.health != "off"
        # The metrics need an update at every step. Otherwise a tracker of their own keeps the
        # numbers of PSS the same with and without them.
        reads_every_step = self._triggers.reads_weights and self.config.check_every_steps == 1
        self._shares_tracker = has_health and reads_every_step
        if has_health:
            self.health = import_module(_HEALTH_MODULE).HealthMonitor(
                self.selection,
                self._measurements.backend,
                self.config.health,
                every_steps=self.config.health_every_steps,
                model=model,
                tracker=self._measurements.tracker if self._shares_tracker else None,
            )
        self.seconds = 0.0
        """The time that PSS has taken, without health. It is no part of the state: equal runs save
        equal states."""
        self._current: Step | None = None
        self._has_loaded = False
        self._speaks, self._levels = speaks, InterventionLevels()
        self._has_norm: set[bool] = set()  # whether the steps so far had a gradient norm
        options = {"has_loss": evaluate_loss is not None, "has_trainer": not speaks}
        self._warn(option_warnings(self.config, self._measurements, **options))
        self.reset()

    # ---- one step ----

    def step(
        self,
        grad_norm_preclip: float | Tensor | None,
        *,
        update: Callable[[], object],
        loss: float | Tensor | None = None,
    ) -> StepReport:
        """Judge the gradient, apply the update unless it would do harm, and smooth if needed.

        Args:
            grad_norm_preclip: The global ℓ₂ norm of the gradient before clipping, as
                ``clip_grad_norm_`` returns it. It must be unscaled, and computed over all ranks.
            update: Applies the optimizer's step. It is not called if the step must be skipped.
            loss: The loss of this step, which events record.

        Raises:
            NonFiniteError: The step is not finite, and the policy stops the run before its update.
            ConfigurationError: ``update`` cannot be called.
        """
        if not callable(update):
            raise ConfigurationError(
                f"update is called when the step may be applied; you gave {update!r}. Write "
                "update=optimizer.step, without parentheses."
            )
        if self.before_update(*self.to_host(grad_norm_preclip, loss)):
            update()
        return self.after_update()

    def to_host(self, *values: float | Tensor | None) -> list[float | None]:
        """Return numbers as host floats. All tensors among them need one device-to-host read."""
        return self._measurements.to_host(*values)

    def inspect_gradients(self) -> None:
        """Record which gradients are finite, so that an error can name the first bad one.

        This is optional. Call it before clipping. It needs one pass over the gradients without a
        device-to-host read. It does nothing in a healthy run: with ``on_nonfinite="skip"`` it names
        parameters from the second non-finite step on, with ``"stop"`` at the first.
        """
        if self.config.on_nonfinite == "stop" or self._history.num_nonfinite_steps > 0:
            started = time.perf_counter()
            self._measurements.inspect_gradients()
            self.seconds += time.perf_counter() - started

    def before_update(
        self,
        grad_norm_preclip: float | None,
        loss: float | None = None,
        *,
        loss_scaled: bool = False,
        discarded: bool = False,
    ) -> bool:
        """Judge the gradient of this step, and return whether its update may be applied.

        Args:
            grad_norm_preclip: The global norm before clipping, or None if the loop has none.
            loss: The loss of this step.
            loss_scaled: Whether a GradScaler is active. A GradScaler skips overflown gradients
                itself, so the result is True for these. Only a long streak of them stops the run.
            discarded: Whether a different library has already dropped the update. DeepSpeed does
                this if the gradient is not finite.

        Raises:
            NonFiniteError: The policy stops the run. No weight was changed.
        """
        started = time.perf_counter()
        self.step_number += 1
        self._note_norm(grad_norm_preclip is not None)
        step = self._current = Step(
            self.step_number,
            loss,
            grad_norm_preclip,
            update_applied=not discarded,
            is_discarded=discarded,
            last_intervention_step=self._history.last_intervention_step,
        )
        has_overflown = (
            loss_scaled and grad_norm_preclip is not None and not math.isfinite(grad_norm_preclip)
        )
        for judgement in self._triggers.judge_gradient(grad_norm_preclip, loss):
            action = self._decide(step, judgement, has_overflown=has_overflown)
            skips_spike = action is Action.ACT and self.config.spike_update == "skip"
            if has_overflown or skips_spike or action is Action.SKIP_UPDATE:
                step.update_applied = False
        self._measurements.forget_gradients()
        if self.health is not None:
            before = self.health.seconds
            parameters = self._measurements.parameters()
            self.health.before_update(self.step_number, parameters, grad_norm_preclip)
            started += self.health.seconds - before  # health counts this time, not the controller
        if step.update_applied and self._triggers.reads(Quantity.UPDATE_NORM):
            self._measurements.start_update()
        self.seconds += time.perf_counter() - started
        return step.update_applied or has_overflown or discarded

    @torch.no_grad()
    def after_update(self) -> StepReport:
        """Judge the weights, carry out the interventions of this step, and return its report.

        Raises:
            NonFiniteError: The weights are not finite, and the policy stops the run.
        """
        step = self._current if self._current is not None else Step(self.step_number)
        step.is_after_update = True
        started = time.perf_counter()
        if self._follows_weights(step):
            self._measured(step, self._measurements.follow)
        self.seconds += time.perf_counter() - started
        # Health is measured before any smoothing, so that it shows the result of the optimizer. A
        # reading that is only for the report does not count as a cost of PSS.
        stable_ranks = reading = None
        if self.health is not None:
            reading = self.health.after_update(
                step.number,
                self._measurements.parameters(),
                optimizer=self._optimizer,
                loss=step.loss,
                grad_norm_preclip=step.grad_norm_preclip,
            )
        elif step.is_due(self.config.health_every_steps):
            stable_ranks = self._measured(step, self._current_stable_ranks)
        started = time.perf_counter()
        for judgement in self._judge_weights(step, stable_ranks):
            self._decide(step, judgement)
        interventions = [
            self._smooth(step.settled(event), judgement, is_floor=judgement.detector == _FLOOR)
            for event, judgement in step.to_smooth
        ]
        step.records += interventions
        self._refund(step, interventions)
        self._follow_health(step)
        self._current = None
        self.seconds += time.perf_counter() - started
        self._prepare_health()
        return step.report(
            self._history,
            seconds=self.seconds,
            stable_ranks=stable_ranks,
            health=reading,
            health_seconds=None if self.health is None else self.health.seconds,
        )

    @property
    def tries_interventions(self) -> bool:
        """Whether the options ask for trials, and an intervention can occur."""
        return tries_interventions(self.config, self.selection)

    @property
    def is_in_trouble(self) -> bool:
        """Whether the current step spiked or was not finite."""
        return self._current is not None and self._current.is_in_trouble

    @property
    def selection(self) -> Selection:
        """The selected matrices, and the reason why each other parameter is left alone."""
        return self._measurements.selection

    def caution(self, spelling: str = "PSSConfig({})") -> str | None:
        """Return a warning about options that find no matrix in this model, or None.

        Args:
            spelling: How the caller writes an option. The braces stand for ``name=value``.
        """
        return nothing_to_watch(self.config, self._measurements, spelling)

    def stable_ranks(self) -> dict[str, float]:
        """Return the stable rank of each selected 2-D matrix by name, read from scratch.

        A broken matrix has NaN. The checks of a step follow the matrices from step to step instead.
        In a distributed run all ranks must make this call together.
        """
        return self._measurements.stable_ranks()

    def matrix_metrics(self) -> dict[str, dict[str, float]]:
        """Return the gradient norm, σ₁ and the stable rank of each matrix, by metric and by name.

        Call it between `before_update` and the update. The result is empty if the gradient norm is
        unknown or not finite. In a distributed run all ranks must make this call together.
        """
        step, measurements = self._current, self._measurements
        if step is None or step.grad_norm_preclip is None:
            return {}
        norm, started = step.grad_norm_preclip, time.perf_counter()
        if not math.isfinite(norm):
            return {}

        def measure() -> dict[str, dict[str, float]]:
            return {
                "grad_norm": dict(measurements.matrix_grad_norms(norm)),
                "spectral_norm": measurements.spectral_norms(),
                "stable_rank": measurements.stable_ranks(),
            }

        with torch.no_grad():
            found = self._measured(step, measure)
        self.seconds += time.perf_counter() - started
        return found or {}

    @property
    def pending_records(self) -> tuple[Record, ...]:
        """The records of a step that an error ended before its report."""
        return self._current.settled_records if self._current is not None else ()

    @torch.no_grad()
    def smooth_now(self) -> Intervention:
        """Smooth all selected matrices now, to repair a run that failed.

        With the detector ``stable_rank_floor`` each matrix is raised to its floor. Otherwise the
        smoothing function is applied. ``moments`` determines how the first moments change. The
        repair does not count against the budget and does not start a cooldown. With an ``anchor``
        no value is lowered below the record of healthy values. That record comes from a loaded
        state. Without one, it comes from the weights at the time when the controller was built.
        """
        judgement = Judgement(Verdict.SPIKE, "resume", (GLOBAL,))
        decision = Decision(Action.ACT, "requested")
        event = Event.of(judgement, decision, step=self.step_number, loss=None)
        refers_to_start = (
            self.config.floor_reference == "start"
            if self._triggers.has_floors
            else self._anchors is not None
        )
        if not self._has_loaded and refers_to_start:
            self._warn(
                [
                    "The repair has no record of healthy weights, so the weights that the "
                    "controller was built with count as healthy. If they are damaged, set "
                    "floor_reference='noise' or anchor='off'."
                ]
            )
        return self._smooth(event, judgement, is_floor=_FLOOR in self.config.detectors)

    def scale_floors(self, factor: float) -> None:
        """Set every stable-rank floor to a multiple of the one that the options give.

        The factor is no part of the state. After you load a state or build a controller, it is 1.

        Args:
            factor: A finite number of at least 0. With 0 the floors are off, and stable ranks are
                measured only if a different detector reads them.

        Raises:
            ConfigurationError: The factor is negative or not finite.
        """
        if not 0 <= factor < math.inf:
            raise ConfigurationError(
                f"You gave the factor {factor} for the floors; choose a finite number >= 0 (0 "
                "switches them off)."
            )
        self._triggers.scale_floors(factor)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, JSON]:
        """Return everything that later steps depend on, as plain strict JSON."""
        return {
            "version": _VERSION,
            "step": self.step_number,
            "history": self._history.state_dict(),
            "anchors": None if self._anchors is None else self._anchors.state_dict(),
            "tracked": self._measurements.tracker.state(),
            **self._triggers.state_dict(),
        }

    def load_state_dict(self, state: object) -> None:
        """Continue exactly from a saved state.

        Args:
            state: Parsed JSON, which is not trusted.

        Raises:
            StateError: The state is truncated, damaged, of a different version, of a different
                model or of different detectors. The controller is then unchanged.
        """
        what = "the PSS state"
        check_version(state, _VERSION, what=what)
        found = read_object(state, tuple(self.state_dict()), what=what)
        step_number = read_integer(found["step"], what=f"'step' of {what}")
        history = InterventionHistory.from_state_dict(found["history"])
        anchors = self._anchors
        if anchors is not None and found["anchors"] is not None:
            anchors = Anchors.from_state_dict(found["anchors"], tuple(anchors.healthy))
        tracker = self._measurements.tracker
        tracked = tracker.parsed(found["tracked"], self._measurements.parameters())
        # This is the last statement that may raise.
        self._triggers.load_state_dict({key: found[key] for key in self._triggers.state_dict()})
        self._history, self.step_number = history, step_number
        self._anchors, self._has_loaded = anchors, True
        tracker.restore(tracked)
        self._prepare_health()

    def reset(self, *, step_number: int = 0) -> None:
        """Reset everything except floors and healthy values, and count from the given step."""
        self._triggers.reset()
        if self._anchors is not None:
            self._anchors = Anchors(self._anchors.healthy)
        self._history, self.step_number = InterventionHistory(), step_number
        self._prepare_health()

    # ---- one step, in detail ----

    def _warn(self, sentences: Iterable[str]) -> None:
        """Log warnings on the first rank. All ranks iterate, as a warning may be collective."""
        for sentence in sentences:
            if self._measurements.backend.rank == 0:
                logger.warning("%s", spelt(sentence))

    def _note_norm(self, has_norm: bool) -> None:
        """Warn once if only some steps have a norm, as if each micro-batch were a step."""
        is_mixed = self._has_norm == {not has_norm}
        self._has_norm.add(has_norm)
        if is_mixed and self._speaks:
            self._warn(
                [
                    f"PSS, step {self.step_number}: only some of the steps have a gradient norm, "
                    "and PSS counts every call as a step. If you accumulate gradients, call it "
                    "once for each update: with Accelerate, if accelerator.sync_gradients."
                ]
            )

    def _judge_weights(
        self, step: Step, stable_ranks: Mapping[str, float] | None
    ) -> Iterator[Judgement]:
        """Yield the judgements of an update and, at their interval, of the weights."""
        is_due = step.is_due(self.config.check_every_steps)
        reads_ranks = is_due and self._triggers.reads(Quantity.STABLE_RANK)
        if reads_ranks and stable_ranks is None:
            stable_ranks = self._measured(step, self._current_stable_ranks)
        if step.update_applied:
            yield from self._triggers.judge_update()
        if reads_ranks and stable_ranks is not None:
            yield from self._triggers.judge_weights(Quantity.STABLE_RANK, stable_ranks)
        if is_due and self._triggers.reads(Quantity.SPECTRAL_NORM):
            norms = self._measured(step, self._measurements.followed_spectral_norms)
            if norms is not None:
                yield from self._triggers.judge_weights(Quantity.SPECTRAL_NORM, norms)

    def _follows_weights(self, step: Step) -> bool:
        """Return whether this step reads the tracked spectra, so that they must be updated."""
        config = self.config
        is_read = step.is_due(config.check_every_steps) or step.is_due(config.health_every_steps)
        return self._shares_tracker or (is_read and self._triggers.reads_weights)

    def _current_stable_ranks(self) -> dict[str, float]:
        """Return the stable ranks after a step, tracked if the detectors read the weights."""
        if self._triggers.reads_weights:
            return self._measurements.followed_stable_ranks(self._triggers.floors)
        return self.stable_ranks()

    def _decide(self, step: Step, judgement: Judgement, *, has_overflown: bool = False) -> Action:
        """Ask the policy about a judgement, and record the decision in the step.

        Raises:
            NonFiniteError: The policy stops the run.
        """
        policy = self._policy
        if has_overflown:  # A loss scaler overflows by design, and skips those steps itself.
            policy = replace(policy, on_nonfinite="skip")
        elif step.is_discarded:  # No update is left to hold back, so the option applies as given.
            policy = replace(policy, on_nonfinite=self.config.on_nonfinite)
        decision, self._history = policy.decide(
            judgement,
            step=step.number,
            history=self._history,
            is_after_update=step.is_after_update,
        )
        step.judgements.append(judgement)
        if decision.action is Action.CONTINUE:
            return decision.action
        broken = self._broken_weight(decision)
        if broken is not None:
            reason = f"{broken} is not finite, which skipping steps cannot repair"
            decision = Decision(Action.STOP, reason)
        elif self.config.observe_only:
            decision = Decision(Action.OBSERVE, "observe only")
        elif self._only_observes and judgement.verdict is Verdict.SPIKE:
            decision = Decision(Action.OBSERVE, "there is nothing to smooth")
        event = Event.of(judgement, decision, step=step.number, loss=step.loss)
        if judgement.verdict is Verdict.NON_FINITE:
            self._log_nonfinite(step, event, has_overflown=has_overflown)
        if decision.action is Action.ACT:
            step.to_smooth.append((event, judgement))
        else:
            step.records.append(event)
        if decision.action is Action.STOP:
            can_hold_back = self._measurements.backend.can_hold_back or step.is_discarded
            is_after_update = step.is_after_update or not can_hold_back
            step.update_applied &= is_after_update
            text = describe_stop(
                event, is_after_update=is_after_update, is_damaged=broken is not None
            )
            raise NonFiniteError(text)
        return decision.action

    def _broken_weight(self, decision: Decision) -> str | None:
        """Return the weight that broke a step for good, with its rank, or None. Collective.

        One rank's broken weight breaks every later step of all ranks, and the ranks then differ.
        """
        is_shared = self._measurements.backend.is_shared and not self.config.observe_only
        if not is_shared or decision.action not in (Action.SKIP_UPDATE, Action.STOP):
            return None
        return self._measurements.nonfinite_weight()

    def _log_nonfinite(self, step: Step, event: Event, *, has_overflown: bool) -> None:
        if is_worth_a_line(self._history.nonfinite_streak):
            line = describe_nonfinite(
                event,
                self._history.num_nonfinite_steps,
                has_overflown=has_overflown,
                is_discarded=step.is_discarded,
            )
            logger.log(logging.INFO if has_overflown else logging.WARNING, "%s", line)

    def _measured(self, step: Step, measure: Callable[[], T]) -> T | None:
        """Return a measurement. If a decomposition does not converge, add an event and return None.

        Ranks that share work either all continue or all stop.
        """
        try:
            return measure()
        except LinAlgError as error:
            if self._measurements.backend.is_shared and not isinstance(error, DecompositionError):
                raise
            logger.warning(
                "PSS, step %d: the weights could not be judged, %s. Training continues.",
                step.number,
                error,
            )
            step.records.append(
                Event(
                    step=step.number,
                    kind=EventKind.ERROR,
                    detector="decomposition",
                    loss=step.loss,
                    decision=Action.OBSERVE,
                    reason=str(error),
                )
            )
            return None

    def _smooth(self, event: Event, judgement: Judgement, *, is_floor: bool) -> Intervention:
        intervention = self._smoother.smooth_(
            event,
            judgement,
            is_floor=is_floor,
            floors=self._triggers.floors,
            anchors=self._anchors,
        )
        if self._speaks and self._measurements.backend.rank == 0:
            logger.log(self._levels.of(intervention), "%s", intervention_line(intervention))
        return intervention

    def _refund(self, step: Step, interventions: Sequence[Intervention]) -> None:
        """Give back budget and cooldown of interventions that changed no weight."""
        idle = sum(not each.has_changed_weights for each in interventions)
        on_spikes = [each for each in interventions if each.event.kind is not EventKind.FLOOR]
        last = self._history.last_intervention_step
        if on_spikes and not any(each.has_changed_weights for each in on_spikes):
            last = step.last_intervention_step
        self._history = replace(
            self._history,
            num_interventions=self._history.num_interventions - idle,
            last_intervention_step=last,
        )

    # ---- health ----

    def _first_anchors(self) -> Anchors | None:
        """Return the record of healthy values, which starts with the current weights."""
        config = self.config
        if config.anchor == "off" or config.observe_only or not config.reacts_to_spikes:
            return None
        return Anchors(self._measurements.leading_values())

    def _follow_health(self, step: Step) -> None:
        """Update the record of healthy values."""
        if self._anchors is None:
            return
        if step.is_in_trouble:
            self._anchors.note_trouble(step.number)
        if self._anchors.is_due(step.number):
            values = self._measured(step, self._measurements.leading_values)
            if values is not None:
                self._anchors.update(step.number, values)

    def _prepare_health(self) -> None:
        """Install the hooks of the health metrics if they sample the next step."""
        if self.health is not None:
            self.health.before_step(self.step_number + 1, self._measurements.parameters())
