"""PSSCallback: PSS at the right moments of a Trainer's step; it decides nothing itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_pss.config import PSSConfig
from hf_pss.controller import PSSController, StepReport
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.models.batching import matrix_names
from hf_pss.records.events import Event, EventKind, Intervention, Record
from hf_pss.records.messages import describe_answer
from hf_pss.records.steps import HealthReading
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE
from hf_pss.runs.records_files import JsonLines, health_line, log_scalars, reading_line
from hf_pss.trainer.arguments import PSSTrainingArguments
from hf_pss.trainer.attention_maxima import attention_watch
from hf_pss.trainer.hooks import StepListener, hook
from hf_pss.trainer.schedule_free import ScheduleFreeCallback
from hf_pss.trainer.trackers import Reporters, reporters_for, summary_table

__all__ = ["PSSCallback"]

logger = logging.getLogger(__name__)


class PSSCallback(ScheduleFreeCallback, ExportableState, StepListener):
    """Parametric Singularity Smoothing as a callback, for trainers that are not `PSSTrainer`.

    The gradient norm before clipping is no callback's argument, so the callback is attached
    instead of passed in ``callbacks=``:

    ```python
    trainer = SFTTrainer(...)
    PSSCallback().attach(trainer)
    trainer.train()
    ```

    Args:
        config: The options. None takes them from `PSSTrainingArguments` where the trainer has
            these, and the preset ``anchored`` otherwise.
    """

    goes_back = False
    """Whether the next training goes on with this one, from an older checkpoint."""
    repairs = True
    """Whether what it loads is what ``smooth_on_resume`` is meant for."""
    announces = True
    """Whether to say at the start what PSS watches; what it does not is said in any case."""

    def __init__(self, config: PSSConfig | None = None) -> None:
        self.config = config
        self.controller: PSSController | None = None
        self.report: StepReport | None = None
        self._grad_norm: float | None = None
        self._device_loss: Tensor | None = None
        self._loss: float | None = None
        self._norm_is_new = False
        self._scaler_is_active = self._update_is_discarded = False
        self._floor_has_acted = False
        self._smoothed_in: str | None = None
        """The run's folder, once it was smoothed on its resume: what is saved there is so."""
        self._speaks = True
        self._events: JsonLines | None = None
        self._health: JsonLines | None = None
        # Where there is something to tell, and on the first process only.
        self._tracker_args: TrainingArguments | None = None
        self._reporters: Reporters | None = None
        self._first_reading: HealthReading | None = None
        self._last_reading: HealthReading | None = None

    @property
    def health_summary(self) -> str | None:
        """The matrices that look ill at the end of the last run, the worst first, and why.

        None where ``health`` is off, or the run ended before a reading.
        """
        if self._first_reading is None or self._last_reading is None:
            return None
        return summary_table(self._first_reading, self._last_reading)

    @property
    def readings(self) -> tuple[float | None, float | None]:
        """This step's loss, and its gradient norm before clipping, once they are on the host."""
        return self._loss, self._grad_norm

    @classmethod
    def of(cls, trainer: Trainer) -> PSSCallback:
        """Return the trainer's PSSCallback.

        Raises:
            ConfigurationError: It has none.
        """
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PSSCallback):
                return callback
        raise ConfigurationError("This trainer has no PSSCallback: attach one to it.")

    def attach(self, trainer: Trainer) -> PSSCallback:
        """Add this callback to a trainer of any class, and let it hear norms and losses.

        Raises:
            ConfigurationError: The trainer has a PSSCallback already.
            IncompatibleVersionError: This release of transformers lacks a method that PSS needs.
        """
        hook(trainer, self)
        return self

    # ---- what StepHooks hands over ----

    def see_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's loss to this step's; it stays on the device."""
        loss = torch.as_tensor(loss).detach()
        if loss.dim():  # logged as its mean
            loss = loss.float().mean()
        self._device_loss = loss if self._device_loss is None else self._device_loss + loss

    def before_clipping(self) -> None:
        """Note which gradients are finite while they can still be told apart."""
        if self.controller is not None:
            self.controller.inspect_gradients()

    def see_grad_norm(
        self,
        norm: Tensor | float | None,
        *,
        scaler_is_active: bool,
        update_is_discarded: bool = False,
    ) -> float | None:
        """Bring this step's norm and loss to the host.

        The one device-to-host read of PSS in a step without an event. The Trainer gets the float
        and needs no read of its own when it logs the norm.
        """
        if self.controller is not None:
            self._grad_norm, self._loss = self.controller.to_host(norm, self._device_loss)
        self._device_loss = None
        self._norm_is_new, self._scaler_is_active = True, scaler_is_active
        self._update_is_discarded = update_is_discarded
        return self._grad_norm

    def extend_logs(self, logs: dict[str, float]) -> None:
        """Add this step's ``pss/…`` numbers."""
        if self.report is not None:
            logs.update(log_scalars(self.report.scalars))

    # ---- the Trainer's events ----

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build the controller on the prepared model, and continue where a checkpoint left off."""
        if model is None:
            raise ConfigurationError("PSSCallback needs the model in on_train_begin; got none.")
        self.stop_listening()  # to a run that something ended within a step
        self.batch_loss = None  # its batch, and its model, may be another run's
        if not self.goes_back:  # whose trackers' runs go on
            self._reporters = None
        self._grad_norm = self._device_loss = self._loss = self.report = None
        self._norm_is_new = self._floor_has_acted = False
        self._first_reading = self._last_reading = None
        self._speaks = state.is_world_process_zero
        # Accelerate wraps the optimizer; its state is the inner one's.
        self.controller = PSSController(
            model,
            self.config_for(args),
            optimizer=getattr(optimizer, "optimizer", optimizer),
            evaluate_loss=self._evaluate_loss,
            speaks=False,
        )
        self.tries_interventions = self.controller.tries_interventions
        if self._speaks and not self.goes_back:
            self._announce(self.controller, args)
        if self.controller.health is not None and not args.torch_compile:
            self.controller.health.watch_attention(attention_watch(model))
        smoothed_in = _attribute(state, type(self).__name__, "smoothed_in")
        self._smoothed_in = smoothed_in if isinstance(smoothed_in, str) else None
        self._resume(state)
        # The Trainer saves into this entry and fails where a resumed file lacks it.
        state.stateful_callbacks[type(self).__name__] = self.state()
        is_plain = self.controller.health is None and self.controller.config.health_every_steps > 0
        wants_health = state.global_step == 0 and is_plain
        first_health = self.controller.stable_ranks() if wants_health else None  # on every rank
        if state.is_world_process_zero:
            folder, step = Path(args.output_dir), state.global_step
            self._events = JsonLines(folder / EVENTS_FILE, resumed_step=step)
            self._health = JsonLines(folder / HEALTH_FILE, resumed_step=step)
            if first_health is not None:
                self._health.write([health_line(step, first_health)])
            self._tracker_args = args
        if state.global_step > 0 and self.controller.config.smooth_on_resume:
            self._smooth_once(self.controller, args.output_dir)
        if self._speaks:
            logger.info("PSS watches these matrices:\n%s", self.controller.selection.table())

    def _announce(self, controller: PSSController, args: TrainingArguments) -> None:
        """Say in one line the preset, what is watched, what is not, and where to change it."""
        config, selection = controller.config, controller.selection
        counts = [
            f"{count} {one if count == 1 else many}"
            for count, one, many in (
                (len(matrix_names(selection.matrices)), "matrix", "matrices"),
                (len(selection.adapters), "LoRA product", "LoRA products"),
            )
            if count
        ]
        # Arguments that say the same as the config are what the user wrote.
        in_args = isinstance(args, PSSTrainingArguments) and args.pss_config() == config
        caution = controller.caution("pss_{}" if in_args else "PSSConfig({})")
        watched = (
            f"PSS: {config.describe()}, {' and '.join(counts) or 'no matrix'} watched "
            f"({', '.join(config.detectors) or 'non-finite steps only'})."
        )
        options = "PSSTrainingArguments" if in_args else "PSSConfig or PSSTrainingArguments"
        told = [watched, caution, f"Options: {options}."] if self.announces else [caution]
        if any(told):  # as a warning, because an ordinary script shows no less
            logger.warning("%s", " ".join(part for part in told if part))

    def _smooth_once(self, controller: PSSController, output_dir: str) -> None:
        own = [os.path.abspath(output_dir)]
        broadcast_object_list(own)  # smoothing is done by all ranks, or by none
        is_done, self._smoothed_in = self._smoothed_in == own[0], own[0]
        if self.repairs and not is_done:
            self.write_records([controller.smooth_now()])
        elif self.repairs and self._speaks:
            logger.warning(
                "smooth_on_resume: this run was smoothed when it was first resumed, and goes on. "
                "To smooth once more, let it write to another output_dir."
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge the gradient; drop it where the update must not happen."""
        controller = self._ready()
        try:
            apply_update = controller.before_update(
                self._grad_norm,
                self._loss,
                loss_scaled=self._scaler_is_active,
                discarded=self._update_is_discarded,
            )
        except NonFiniteError:
            self.write_records(controller.pending_records)
            raise
        finally:
            self._norm_is_new = False
        if not apply_update and model is not None:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers pass over parameters without a gradient

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Judge the weights and smooth: before this step is logged, evaluated or saved."""
        if self.controller is not None:
            self._after_update(self.controller)
        super().on_step_end(args, state, control, optimizer)

    def _evaluate_loss(self) -> Tensor | None:
        if self.batch_loss is None or self.controller is None:
            return None
        return self.batch_loss(is_sound=not self.controller.is_in_trouble)

    def _after_update(self, controller: PSSController) -> None:
        try:
            self.report = report = controller.after_update()
        except NonFiniteError:
            self.write_records(controller.pending_records)
            raise
        if self.batch_loss is not None:
            self.batch_loss.end_step(is_sound=not report.is_in_trouble)
        self.write_records(report.records)
        if self._health is not None and report.stable_ranks is not None:
            self._health.write([health_line(report.step, report.stable_ranks)])
        if report.health is not None:
            self._first_reading = self._first_reading or report.health
            self._last_reading = report.health
            if self._health is not None:
                self._health.write([reading_line(report.health)])
            if (reporters := self._ready_reporters()) is not None:
                reporters.report(report.health)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Forget what a run that is resumed from this checkpoint does not know."""
        if self.batch_loss is not None:
            self.batch_loss.forget()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leave the averaged weights in the model, and `end`."""
        super().on_train_end(args, state, control, optimizer)
        self.batch_loss = None
        self.end()

    def stop_listening(self) -> None:
        """Take away the hooks that a step which did not end has left in the model."""
        if self.controller is not None and self.controller.health is not None:
            self.controller.health.stop()

    def end(self) -> None:
        """Say in one line what PSS did, and in a table which matrices look ill; finish trackers.

        `on_train_end` does it, and where an error of PSS ends the run, `Survival`.
        """
        self.stop_listening()
        if self._speaks:
            self._tell_health()
        if self._reporters is not None:
            self._reporters.finish()
        self._reporters = self._tracker_args = None
        if self.report is not None:
            numbers = self.report.scalars
            if self._speaks:
                logger.info(
                    "PSS: %d interventions, %d non-finite steps, %.2f s.",
                    numbers["interventions"],
                    numbers["nonfinite_steps"],
                    numbers["seconds"],
                )

    def _tell_health(self) -> None:
        try:
            summary = self.health_summary
        except Exception as error:  # numbers that it has no words for: never the run's end
            logger.warning("PSS has no summary of the model's health: %s", error)
            return
        if summary is not None:
            logger.info("%s", summary)

    # ---- the checkpoint ----

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into trainer_state.json."""
        controller = self.controller
        attributes: dict[str, Any] = {
            "saved_state": controller.state_dict() if controller else None
        }
        if controller is not None and controller.health is not None:
            attributes["health_state"] = controller.health.state()
        if self._smoothed_in is not None:
            attributes["smoothed_in"] = self._smoothed_in
        return {"args": {}, "attributes": attributes}

    def _resume(self, state: TrainerState) -> None:
        controller = self._ready(check_norm=False)
        if state.global_step == 0:
            return
        try:
            controller.load_state_dict(_saved_state(state, type(self).__name__))
            if controller.step_number != state.global_step:
                raise StateError(
                    f"The PSS state is of step {controller.step_number}: steps after it were "
                    "trained without PSS."
                )
        except StateError as error:
            if self._speaks:
                logger.warning(
                    "PSS starts with a fresh baseline at step %d. %s", state.global_step, error
                )
            controller.reset(step_number=state.global_step)
        else:
            self._resume_health(controller, state)

    def _resume_health(self, controller: PSSController, state: TrainerState) -> None:
        found = _attribute(state, type(self).__name__, "health_state")
        if controller.health is None or found is None:  # written by a run that measured none
            return
        try:
            controller.health.restore(found)
        except StateError as error:
            if self._speaks:
                logger.warning("The health metrics' windows begin anew. %s", error)

    # ---- inside ----

    def _ready_reporters(self) -> Reporters | None:
        """Return the trackers' reporters, made once: by then the trackers have opened their runs.

        None on all but the first process.
        """
        if self._reporters is None and self._tracker_args is not None:
            fellows = self.handler.callbacks if self.handler is not None else ()
            self._reporters = reporters_for(self._tracker_args, fellows)
        return self._reporters

    def config_for(self, args: TrainingArguments) -> PSSConfig:
        """Return the options that hold for a trainer: one's own, or those of its arguments.

        Raises:
            ConfigurationError: Both were given, and they differ.
        """
        from_args = args.pss_config() if isinstance(args, PSSTrainingArguments) else PSSConfig()
        if self.config is None:
            return from_args
        if from_args not in (PSSConfig(), self.config):
            raise ConfigurationError(
                "You gave PSS options twice, in PSSTrainingArguments and as a PSSConfig, and they "
                "differ. Give them once."
            )
        return self.config

    def _ready(self, *, check_norm: bool = True) -> PSSController:
        if self.controller is None or (check_norm and not self._norm_is_new):
            raise ConfigurationError(
                "PSSCallback does not hear this trainer's gradient norms. Use "
                "PSSCallback(...).attach(trainer) instead of callbacks=[...], or PSSTrainer."
            )
        return self.controller

    def write_records(self, records: Sequence[Record]) -> None:
        """Put records into the events file, and tell the trackers and the log of them."""
        for record in records:
            if isinstance(record, Intervention) and self._speaks:
                logger.log(self._level_of(record), "%s", describe(record))
        if self._events is not None:
            self._events.write_records(records)
        if records and (reporters := self._ready_reporters()) is not None:
            for record in records:
                reporters.alert(record)

    def _level_of(self, record: Intervention) -> int:
        """Every spike is news; the floor is upkeep and acts often: its first act is news.

        An alarm that left sound weights alone is none.
        """
        if not record.num_changed:
            return logging.INFO
        if record.event.kind is not EventKind.FLOOR:  # a repair on resume is news, too
            return logging.WARNING
        is_first, self._floor_has_acted = not self._floor_has_acted, True
        return logging.WARNING if is_first else logging.INFO


def describe(intervention: Intervention) -> str:
    """Return one line for people: what was noticed, and what was done."""
    return (
        f"PSS, step {intervention.event.step}: {_noticed(intervention.event)}; "
        f"{describe_answer(intervention)} More in {EVENTS_FILE}."
    )


def _noticed(event: Event) -> str:
    if event.kind is EventKind.RESUME:
        return "resumed from a checkpoint, smoothing as asked for"
    value, baseline, threshold = event.value or 0.0, event.baseline, event.threshold or 0.0
    if event.kind is EventKind.FLOOR:
        return f"stable rank {value:.3g} below its floor of {threshold:.3g}"
    name = event.detector.removesuffix("_ratio").replace("_", " ")
    if not baseline:
        return f"{name} {value:.3g} against a threshold of {threshold:.3g}"
    return (
        f"{name} {value:.3g}, {value / baseline:.2g} × its average of {baseline:.3g} "
        f"(limit {threshold / baseline:.2g} ×)"
    )


def _attribute(state: TrainerState, name: str, attribute: str) -> Any:
    """Return what a callback has saved; None where there is nothing."""
    saved = state.stateful_callbacks.get(name)
    attributes = saved.get("attributes") if isinstance(saved, dict) else None
    return attributes.get(attribute) if isinstance(attributes, dict) else None


def _saved_state(state: TrainerState, name: str) -> Any:
    saved = state.stateful_callbacks.get(name)
    if saved is None:
        raise StateError("The checkpoint holds no PSS state: it was written without PSS.")
    try:
        return saved["attributes"]["saved_state"]
    except (KeyError, TypeError) as error:
        raise StateError("The checkpoint's PSS state is damaged.") from error
