"""PSSController: watch, decide and smooth behind one `step`, for any training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim import Optimizer

from hf_pss.config import PSSConfig
from hf_pss.detection import GLOBAL, Judgement, Quantity, Verdict
from hf_pss.detection.policy import Action, Decision, InterventionHistory, Policy
from hf_pss.detection.state import (
    JSON,
    check_version,
    read_integer,
    read_mapping,
    read_number,
    read_object,
)
from hf_pss.errors import ConfigurationError, NonFiniteError
from hf_pss.health.monitor import HealthMonitor
from hf_pss.linalg import SMOOTHING_FUNCTIONS, Anchored, SmoothingFunction, StableRankCap
from hf_pss.linalg.smoothing import looks_trained
from hf_pss.models.adapters import frozen_collapses, smooth_adapters_
from hf_pss.models.anchors import Anchors
from hf_pss.models.batching import DecompositionError
from hf_pss.models.distributed import Backend
from hf_pss.models.measurements import Gauges
from hf_pss.models.optimizer_state import (
    FIRST_MOMENTS,
    edit_first_moments_,
    edit_iterates_,
    has_iterates,
)
from hf_pss.models.selection import Selection
from hf_pss.models.smoother import Edit, smooth_matrices_
from hf_pss.models.trial import EvaluateLoss, Trial
from hf_pss.models.triggers import Watch
from hf_pss.records.events import Event, EventKind, Intervention, MatrixChange, Record
from hf_pss.records.messages import describe_nonfinite, describe_stop, is_worth_a_line
from hf_pss.records.steps import Step, StepReport

__all__ = ["PSSController", "StepReport"]

logger = logging.getLogger(__name__)

_VERSION = 2

T = TypeVar("T")


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
        config: The options; the preset ``anchored`` when None.
        backend: How parameters are stored; found from the parameters when None.
        optimizer: Needed where ``moments`` is not ``keep``: its state is edited in place.
        evaluate_loss: Computes the loss of one micro-batch, always the same one within a step, with
            the weights as they are now. An intervention that raises it is taken back (option
            ``trial``). It may change nothing, the random state included. Without it interventions
            are not tried, and the controller says so once.
        speaks: Whether to warn where there is nothing to watch; `caution` has the sentence.

    Raises:
        SelectionError: A pattern matches nothing, or nothing that can be selected.
        ConfigurationError: The model is sharded in a way that is not supported, or the optimizer
            is missing.
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
        self._evaluate_loss = evaluate_loss
        self._gauges = Gauges(model, self.config, backend)
        if self.config.moments != "keep" and optimizer is None:
            raise ConfigurationError(
                f"moments={self.config.moments!r} edits the optimizer's state; give the controller "
                "its optimizer: PSSController(model, config, optimizer=optimizer)."
            )
        on_nonfinite = self._check_backend()
        self._watch = Watch(self._gauges, self.config)
        self._anchors = self._first_anchors()
        self._caution_about_trained_weights()
        self._policy = Policy(
            cooldown_steps=self.config.cooldown_steps,
            # Whoever only observes spends no budget and starts no cooldown.
            max_interventions=0 if self._only_observes else self.config.max_interventions,
            on_nonfinite=on_nonfinite,
            max_nonfinite_streak=self.config.max_nonfinite_streak,
        )
        is_first = self._gauges.backend.rank == 0
        if self.tries_interventions and evaluate_loss is None and is_first:
            logger.warning(
                "PSS cannot try interventions before it keeps them, because it was given no "
                "evaluate_loss. Pass one to PSSController, or set trial='off'."
            )
        self.health = self._make_monitor()
        """Measures at the side of all this, with its own clock; None where ``health`` is off."""
        self._current: Step | None = None
        self._has_told_of_moments = self._has_looked_at_base = self._has_loaded = False
        if self.selection.adapters and self.config.moments != "keep":
            logger.warning(
                "moments=%r: the first moments of LoRA factors are kept; only those of whole "
                "matrices are edited.",
                self.config.moments,
            )
        if speaks and self._gauges.backend.rank == 0 and (caution := self._gauges.caution()):
            logger.warning("%s", caution)
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
        discarded: bool = False,
    ) -> bool:
        """Judge the gradient of this step and tell whether its update may be applied.

        Args:
            grad_norm_preclip: Global norm before clipping; None where the loop has none to give.
            loss: This step's loss.
            loss_scaled: A GradScaler is active: it skips overflown gradients by itself, so the
                answer to these is True, and only a long streak of them stops the run.
            discarded: The update has been dropped already, as DeepSpeed does by itself where the
                gradient is not finite: there is nothing left to hold back.

        Raises:
            NonFiniteError: The policy says to stop. No weight was touched.
        """
        started = time.perf_counter()
        self.step_number += 1
        step = self._current = Step(
            self.step_number,
            loss,
            grad_norm_preclip,
            not discarded,
            discarded,
            last_intervention_step=self._history.last_intervention_step,
        )
        has_overflown = (
            loss_scaled and grad_norm_preclip is not None and not math.isfinite(grad_norm_preclip)
        )
        for judgement in self._watch.judge_gradient(grad_norm_preclip, loss):
            action = self._decide(step, judgement, has_overflown=has_overflown)
            skips_spike = action is Action.ACT and self.config.spike_update == "skip"
            if has_overflown or skips_spike or action is Action.SKIP_UPDATE:
                step.update_applied = False
        self._gauges.forget_gradients()
        if self.health is not None:
            started += self._look_before(self.health, grad_norm_preclip)
        if step.update_applied and self._watch.reads(Quantity.UPDATE_NORM):
            self._gauges.start_update()
        self.seconds += time.perf_counter() - started
        return step.update_applied or has_overflown or discarded

    @torch.no_grad()
    def after_update(self) -> StepReport:
        """Judge the weights, carry the interventions of this step out, and report.

        Raises:
            NonFiniteError: The weights themselves are not finite and the policy says to stop.
        """
        step = self._current if self._current is not None else Step(self.step_number)
        step.is_after_update = True
        is_due = step.is_due(self.config.check_every_steps)
        ranks_are_due = is_due and self._watch.reads(Quantity.STABLE_RANK)
        norms_are_due = is_due and self._watch.reads(Quantity.SPECTRAL_NORM)
        health_is_due = self.health is None and step.is_due(self.config.health_every_steps)
        # Before any smoothing: health shows what the optimizer left, not what we made of it. A
        # reading for the report alone is no cost of PSS.
        health = self._measured(step, self.stable_ranks) if health_is_due else None
        reading = None
        if self.health is not None:
            reading = self.health.after_update(
                step.number,
                self._gauges.parameters(),
                optimizer=self._optimizer,
                loss=step.loss,
                grad_norm_preclip=step.grad_norm_preclip,
            )
        started = time.perf_counter()
        ranks = health
        if ranks_are_due and ranks is None:
            ranks = self._measured(step, self.stable_ranks)
        if step.update_applied:
            for judgement in self._watch.judge_update():
                self._decide(step, judgement)
        if ranks_are_due and ranks is not None:
            for judgement in self._watch.judge_stable_ranks(ranks):
                self._decide(step, judgement)
        norms = self._measured(step, self._gauges.spectral_norms) if norms_are_due else None
        if norms is not None:
            for judgement in self._watch.judge_spectral_norms(norms):
                self._decide(step, judgement)
        answers = [
            self._smooth(*answer, is_floor=answer[1].detector == "stable_rank_floor")
            for answer in step.to_smooth
        ]
        step.records += answers
        self._give_back(step, answers)
        self._follow_health(step)
        self._current = None
        self.seconds += time.perf_counter() - started
        self._listen()
        return step.report(
            self._history,
            seconds=self.seconds,
            stable_ranks=health,
            health=reading,
            health_seconds=None if self.health is None else self.health.seconds,
        )

    @property
    def tries_interventions(self) -> bool:
        """Whether the options ask for trials, and something may have to be tried."""
        config = self.config
        is_reached = config.reacts_to_spikes or (config.trial == "all" and bool(config.detectors))
        return config.trial != "off" and is_reached and not self._only_observes

    @property
    def is_in_trouble(self) -> bool:
        """Whether the step under way has spiked or was not finite."""
        return self._current is not None and self._current.is_in_trouble

    @property
    def selection(self) -> Selection:
        """Which matrices are watched, and why everything else is left alone."""
        return self._gauges.selection

    def caution(self, spelling: str = "PSSConfig({})") -> str | None:
        """Say what of the options finds nothing to watch in this model; None where all do.

        Args:
            spelling: How the caller spells an option; the braces stand for ``name=value``.
        """
        return self._gauges.caution(spelling)

    def stable_ranks(self) -> dict[str, float]:
        """Return the stable rank of each selected 2-D matrix by name; NaN where one is broken.

        All ranks of a distributed run must call it together.
        """
        return self._gauges.stable_ranks()

    @property
    def pending_records(self) -> tuple[Record, ...]:
        """Records of a step that an error ended before it could be reported."""
        return tuple(self._current.records) if self._current is not None else ()

    @torch.no_grad()
    def smooth_now(self) -> Intervention:
        """Smooth all selected matrices without waiting for a detector: to repair a run that died.

        With the detector ``stable_rank_floor`` each matrix is brought up to its floor, otherwise
        the smoothing function is applied; ``moments`` says what becomes of the first moments. It
        counts against no budget and starts no cooldown. With an ``anchor`` nothing is lowered below
        the record of healthy values, which is that of a loaded state, or of the weights that the
        controller was built with.
        """
        judgement = Judgement(Verdict.SPIKE, "resume", (GLOBAL,))
        decision = Decision(Action.ACT, "asked for")
        event = Event.of(judgement, decision, step=self.step_number, loss=None)
        has_floor = "stable_rank_floor" in self.config.detectors
        if not self._has_loaded and self._refers_to_start and self._gauges.backend.rank == 0:
            logger.warning(
                "The repair has nothing to refer to: no record of healthy weights was loaded, so "
                "what the model was built with counts as healthy. If it is damaged, set "
                "floor_reference='noise' or anchor='off'."
            )
        return self._smooth(event, judgement, is_floor=has_floor)

    # ---- what survives a checkpoint ----

    def state_dict(self) -> dict[str, JSON]:
        """Return all that later steps depend on, as plain strict JSON."""
        return {
            "version": _VERSION,
            "step": self.step_number,
            "seconds": self.seconds,
            "history": self._history.state_dict(),
            "anchors": None if self._anchors is None else self._anchors.state_dict(),
            **self._watch.state_dict(),
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
        step_number = read_integer(found["step"], what=f"'step' of {what}")
        seconds = read_number(found["seconds"], minimum=0.0, what=f"'seconds' of {what}")
        history = InterventionHistory.from_state_dict(
            read_mapping(found["history"], what="the history")
        )
        anchors = self._anchors
        if anchors is not None and found["anchors"] is not None:
            anchors = Anchors.from_state_dict(found["anchors"], tuple(anchors.healthy))
        noticed = {key: found[key] for key in self._watch.state_dict()}
        self._watch.load_state_dict(noticed)  # the last that may refuse
        self._history, self.step_number, self.seconds = history, step_number, seconds
        self._anchors, self._has_loaded = anchors, True
        self._listen()

    def reset(self, *, step_number: int = 0) -> None:
        """Forget everything but floors and healthy values, and count on from the given step."""
        self._watch.reset()
        if self._anchors is not None:
            self._anchors = Anchors(self._anchors.healthy)
        self._history, self.step_number, self.seconds = InterventionHistory(), step_number, 0.0
        self._listen()

    # ---- inside ----

    def _make_monitor(self) -> HealthMonitor | None:
        if self.config.health == "off":
            return None
        return HealthMonitor(
            self.selection,
            self._gauges.backend,
            self.config.health,
            every_steps=self.config.health_every_steps,
            model=self._gauges.model,
        )

    def _listen(self) -> None:
        """Let health listen to the step that begins now, where it samples that one."""
        if self.health is not None:
            self.health.before_step(self.step_number + 1, self._gauges.parameters())

    def _look_before(self, health: HealthMonitor, grad_norm_preclip: float | None) -> float:
        """Return the seconds it took: they are health's, not this controller's."""
        before = health.seconds
        health.before_update(self.step_number, self._gauges.parameters(), grad_norm_preclip)
        return health.seconds - before

    def _check_backend(self) -> Literal["skip", "stop"]:
        """Refuse what the backend cannot do, announce what it does, and return what NaN leads to.

        Raises:
            ConfigurationError: An option needs gradients that are gone, or an update held back.
        """
        backend = self._gauges.backend
        for sentence in backend.cautions(self._gauges.parameters()):
            logger.warning("%s", sentence)
        if backend.can_hold_back:
            return self.config.on_nonfinite
        needs_gradients = {"matrix_grad_norm_ratio", "update_norm_ratio"} & {*self.config.detectors}
        if needs_gradients or self.config.spike_update == "skip":
            named = [*sorted(needs_gradients)]
            named += ["spike_update='skip'"] if self.config.spike_update == "skip" else []
            raise ConfigurationError(
                f"{' and '.join(named)} cannot be had under DeepSpeed, which has applied the "
                "update, and dropped the gradients, before anybody can look at them. Use "
                "grad_norm_ratio or stable_rank_floor, with spike_update='apply'."
            )
        return "stop"

    def _decide(self, step: Step, judgement: Judgement, *, has_overflown: bool = False) -> Action:
        """Put a judgement through the policy, on record, and into the step's plan."""
        # A loss scaler overflows now and then by design and skips those steps itself.
        policy = replace(self._policy, on_nonfinite="skip") if has_overflown else self._policy
        if step.is_discarded and not has_overflown:  # as asked for, whatever the backend can do
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
        if self.config.observe_only:
            decision = Decision(Action.OBSERVE, "observe only")
        elif self._only_observes and judgement.verdict is Verdict.SPIKE:
            decision = Decision(Action.OBSERVE, "there is nothing to smooth")
        event = Event.of(judgement, decision, step=step.number, loss=step.loss)
        is_nonfinite = judgement.verdict is Verdict.NON_FINITE
        if is_nonfinite and is_worth_a_line(self._history.nonfinite_streak):
            logger.log(
                logging.INFO if has_overflown else logging.WARNING,
                "%s",
                describe_nonfinite(
                    event,
                    self._history.num_nonfinite_steps,
                    has_overflown=has_overflown,
                    is_discarded=step.is_discarded,
                ),
            )
        if decision.action is Action.ACT:
            step.to_smooth.append((event, judgement))
        else:
            step.records.append(event)
        if decision.action is Action.STOP:
            can_hold_back = self._gauges.backend.can_hold_back or step.is_discarded
            has_happened = step.is_after_update or not can_hold_back
            raise NonFiniteError(describe_stop(event, is_after_update=has_happened))
        return decision.action

    def _measured(self, step: Step, measure: Callable[[], dict[str, T]]) -> dict[str, T] | None:
        """Return what is measured; None, on record, where a decomposition does not converge.

        Where ranks share the work they go on together, or stop: one alone cannot go on.
        """
        try:
            return measure()
        except LinAlgError as error:
            if self._gauges.backend.is_shared and not isinstance(error, DecompositionError):
                raise
            logger.warning(
                "PSS, step %d: the weights could not be judged, %s. Training goes on.",
                step.number,
                error,
            )
            step.records.append(
                Event(
                    step=step.number,
                    kind=EventKind.ERROR,
                    detector="decomposition",
                    value=None,
                    baseline=None,
                    threshold=None,
                    fired=(),
                    new_level=(),
                    loss=step.loss,
                    decision=Action.OBSERVE,
                    reason=str(error),
                )
            )
            return None

    def _first_anchors(self) -> Anchors | None:
        """Return the record of healthy values that begins with the weights as they are now."""
        config = self.config
        if config.anchor == "off" or config.observe_only or not config.reacts_to_spikes:
            return None
        return Anchors(self._gauges.leading_values())

    def _give_back(self, step: Step, answers: Sequence[Intervention]) -> None:
        """Let answers that changed no weight cost neither budget nor a cooldown."""
        if not answers:
            return
        history = self._history
        idle = sum(not answer.has_changed_weights for answer in answers)
        spiked = [a for a in answers if a.event.kind is not EventKind.FLOOR]
        last = history.last_intervention_step
        if spiked and not any(answer.has_changed_weights for answer in spiked):
            last = step.last_intervention_step
        self._history = replace(
            history,
            num_interventions=history.num_interventions - idle,
            last_intervention_step=last,
        )

    def _follow_health(self, step: Step) -> None:
        """Keep the record of healthy values up to date."""
        if self._anchors is None:
            return
        if step.is_in_trouble:
            self._anchors.note_trouble(step.number)
        if self._anchors.is_due(step.number):
            values = self._measured(step, self._gauges.leading_values)
            if values is not None:
                self._anchors.update(step.number, values)

    def _caution_about_trained_weights(self) -> None:
        config = self.config
        if config.anchor != "off" or config.trial != "off":
            return
        if config.observe_only or not config.reacts_to_spikes:
            return
        is_trained = looks_trained(self._gauges.shapes, self._gauges.stable_ranks())
        if is_trained and self._gauges.backend.rank == 0:
            logger.warning(
                "These weights look trained, and without an anchor one false alarm can destroy "
                "what they know: use the preset anchored for fine-tuning."
            )

    def _smooth(self, event: Event, judgement: Judgement, *, is_floor: bool) -> Intervention:
        started = time.perf_counter()
        trial = self._trial(event, is_floor=is_floor)
        edits: list[Edit] = []
        options: dict[str, Any] = {
            "names": self._names_to_smooth(judgement, is_floor=is_floor),
            "max_rank": self.config.max_rank,
            "keep_frobenius": self.config.keep_frobenius,
            "before_write": None if trial is None else trial.before_write,
        }
        parameters, backend = self._gauges.parameters(), self._gauges.backend
        phi_for = self._floor_cap if is_floor else self._smoothing_function
        changes = smooth_matrices_(
            self.selection.matrices,
            parameters,
            backend,
            phi_for,
            and_then=edits.extend if self._has_state_to_edit() else None,
            **options,
        )
        # The floor knows no adapters. Where a person asks for a repair, they are smoothed.
        if not is_floor or (event.kind is EventKind.RESUME and self.config.reacts_to_spikes):
            changes += self._smooth_adapters(parameters, self._smoothing_function, options)
        if trial is not None and not trial.is_kept():
            event = replace(event, decision=Action.UNDO, reason=trial.why_not)
        else:
            self._edit_optimizer(edits)
        return Intervention(
            event=event,
            smoothing="stable_rank_cap" if is_floor else self.config.smoothing,
            seconds=time.perf_counter() - started,
            loss_before=None if trial is None else trial.loss_before,
            loss_after=None if trial is None else trial.loss_after,
            matrices=changes,
        )

    def _trial(self, event: Event, *, is_floor: bool) -> Trial | None:
        """Return a trial for one intervention; None where none is wanted or possible."""
        wanted = self.config.trial == "all" or (self.config.trial == "spikes" and not is_floor)
        if not wanted or self._evaluate_loss is None:
            return None
        return Trial(
            self._evaluate_loss,
            self._gauges.model,
            self._gauges.backend,
            self.config.trial_margin_ratio,
            # With an anchor an edit is safe by construction, and a person knows what he asks for.
            keeps_untried=self._anchors is not None or event.kind is EventKind.RESUME,
        )

    def _names_to_smooth(self, judgement: Judgement, *, is_floor: bool) -> frozenset[str] | None:
        """Return the matrices that an intervention may change; None for all."""
        if GLOBAL in judgement.fired:
            return None
        return frozenset(judgement.fired) if is_floor or self.config.scope == "fired" else None

    def _smooth_adapters(
        self,
        parameters: Mapping[str, nn.Parameter],
        phi_for: Callable[[Sequence[str]], SmoothingFunction],
        options: Mapping[str, Any],
    ) -> tuple[MatrixChange, ...]:
        views, backend = self.selection.adapters, self._gauges.backend
        if not views:
            return ()
        if not self._has_looked_at_base:
            self._has_looked_at_base = True
            if collapsed := frozen_collapses(views, parameters, backend):
                worst = min(collapsed, key=collapsed.__getitem__)
                logger.warning(
                    "%d of the frozen base weights have a stable rank below 2 (%s: %.3g). An "
                    "adapter cannot remove a direction of its base: repair the base model itself.",
                    len(collapsed),
                    worst,
                    collapsed[worst],
                )
        return smooth_adapters_(views, parameters, backend, phi_for, **options)

    @property
    def _only_observes(self) -> bool:
        has_nothing = not self.selection.matrices and not self.selection.adapters
        return self.config.observe_only or (has_nothing and self.config.spike_update != "skip")

    @property
    def _refers_to_start(self) -> bool:
        has_floor = self._watch.has_floors
        return self.config.floor_reference == "start" if has_floor else self._anchors is not None

    def _has_state_to_edit(self) -> bool:
        optimizer = self._optimizer
        return self.config.moments != "keep" or (optimizer is not None and has_iterates(optimizer))

    def _edit_optimizer(self, edits: Sequence[Edit]) -> None:
        if self._optimizer is None or not edits:
            return
        parameters, backend = self._gauges.parameters(), self._gauges.backend
        edit_iterates_(self._optimizer, edits, parameters, backend)
        if self.config.moments == "keep":
            return
        num_edited = edit_first_moments_(
            self.config.moments,
            self._optimizer,
            edits,
            parameters,
            backend,
        )
        if not num_edited and not self._has_told_of_moments:
            self._has_told_of_moments = True
            logger.warning(
                "moments=%r: %s keeps no first moment of the smoothed matrices (%s); nothing was "
                "done to its state.",
                self.config.moments,
                type(self._optimizer).__name__,
                " or ".join(FIRST_MOMENTS),
            )

    def _smoothing_function(self, names: Sequence[str]) -> SmoothingFunction:
        phi = SMOOTHING_FUNCTIONS[self.config.smoothing]()
        return phi if self._anchors is None else Anchored(phi, self._anchors.levels(names))

    def _floor_cap(self, names: Sequence[str]) -> SmoothingFunction:
        return StableRankCap(torch.tensor([self._watch.floors[name] for name in names]))
