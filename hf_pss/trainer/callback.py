"""PSSCallback, which calls the PSS controller at the right points of each Trainer step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback

from hf_pss.config import (
    PSSConfig,
    RecoveryConfig,
    check_config,
    spelt,
    spelt_as_arguments,
)
from hf_pss.controller import PSSController
from hf_pss.detection.detectors import Verdict
from hf_pss.errors import ConfigurationError, NonFiniteError, StateError
from hf_pss.models.batching import matrix_names
from hf_pss.records.events import EventKind, Intervention, Record, StepReport
from hf_pss.runs.records_files import log_scalars
from hf_pss.trainer.arguments import PSSTrainingArguments
from hf_pss.trainer.backend_refusals import refuse_backends
from hf_pss.trainer.batch_loss import BatchLoss
from hf_pss.trainer.log_level import follow_log_level
from hf_pss.trainer.optimizers import OptimizerMixin
from hf_pss.trainer.optional import optional_part
from hf_pss.trainer.recorder import RunRecorder
from hf_pss.trainer.recovery import StepOutcome, TrainingMonitor
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.seams import (
    folder_of,
    link_loaded_moments,
    trainer_of,
    wrapped,
)
from hf_pss.view.numbers import plural

logger = logging.getLogger(__name__)

_NO_TRAINER = (
    "PSSCallback cannot find the Trainer that calls it. Pass it to the Trainer, in "
    "callbacks=[PSSCallback()] or with PSSCallback().attach(trainer). In a training loop of your "
    "own, use PSSController."
)
# These interventions are routine. They do not respond to a spike.
_UPKEEP = (EventKind.FLOOR, EventKind.RESUME)
# A run that has exploded spikes at every step. Of these steps, every tenth is measured [ours].
_EVIDENCE_EVERY_STEPS = 10


@dataclass(slots=True)
class StepReadings:
    """The numbers that the Trainer provides in one optimizer step, before the update."""

    device_loss: Tensor | None = None
    """The sum of the losses of the micro-batches so far, as a scalar on the device."""
    loss: float | None = None
    """The same sum on the host. It is None until the gradient norm is known."""
    grad_norm: float | None = None
    """The global gradient norm before clipping."""
    measured_ids: frozenset[int] = frozenset()
    """The ids of the parameters whose gradients ``grad_norm`` covers."""
    update_is_discarded: bool = False
    """Whether DeepSpeed has already skipped the update."""

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch. If there is one loss per device, add their mean."""
        loss = torch.as_tensor(loss).detach()
        loss = loss.float().mean() if loss.dim() else loss
        self.device_loss = loss if self.device_loss is None else self.device_loss + loss


class PSSCallback(TrainerCallback, ExportableState, TrainingMonitor):
    """Parametric Singularity Smoothing for a Trainer of any class.

    ```python
    trainer = SFTTrainer(..., callbacks=[PSSCallback()])
    trainer.train()
    ```

    The callback does not change the trainer's class, the way it saves, or its signal handlers.
    `PSSTrainer` adds safe checkpoints, rollback and ``pss_optim``.

    Args:
        config: The options. If it is None, the options come from the trainer's
            `PSSTrainingArguments`. A trainer with other arguments gets the preset ``anchored``.

    Raises:
        ConfigurationError: ``config`` is not a PSSConfig. Or, when the callback joins a trainer,
            the trainer already has a PSSCallback, runs on a backend that PSS does not support, or
            has ``pss_*`` arguments that need `PSSTrainer`.
    """

    announces = True
    """Whether to log at the start which matrices PSS watches. Warnings are always logged."""

    def __init__(self, config: PSSConfig | None = None) -> None:
        if config is not None:
            check_config(config)
        self.config = config
        self.controller: PSSController | None = None
        self.report: StepReport | None = None
        self.batch_loss: BatchLoss | None = None
        self._readings = StepReadings()
        self._recorder: RunRecorder | None = None
        self._wrappers = ExitStack()
        self._trainer: Any = None
        """The Trainer of the last run."""
        self._smoothed_in: str | None = None
        """The folder of the run, once ``smooth_on_resume`` has smoothed its weights, or None."""
        self._is_rollback, self._may_repair = False, True
        self._evidence_step = -_EVIDENCE_EVERY_STEPS

    @classmethod
    def of(cls, trainer: Trainer) -> PSSCallback:
        """Return the trainer's PSSCallback.

        Raises:
            ConfigurationError: The trainer has no PSSCallback.
        """
        found = next((c for c in trainer.callback_handler.callbacks if isinstance(c, cls)), None)
        if found is None:
            raise ConfigurationError("This trainer has no PSSCallback: attach one to it.")
        return found

    def attach(self, trainer: Trainer) -> PSSCallback:
        """Add this callback to an existing trainer.

        Raises:
            ConfigurationError: For the reasons that the class lists.
        """
        self._join(trainer)
        trainer.add_callback(self)
        return self

    def config_for(self, args: TrainingArguments) -> PSSConfig:
        """Return the options for a trainer, from this callback or from the trainer's arguments.

        Raises:
            ConfigurationError: Both were given, and they differ.
        """
        given = self.config
        from_args = args.pss_config() if isinstance(args, PSSTrainingArguments) else PSSConfig()
        if given is None:
            return from_args
        if from_args not in (PSSConfig(), given):
            raise ConfigurationError(
                "You gave PSS options twice, in PSSTrainingArguments and as a PSSConfig, and they "
                "differ. Give them once."
            )
        return given

    @property
    def readings(self) -> tuple[float | None, float | None]:
        """The loss and the unclipped gradient norm of this step, each None until it is read."""
        return self._readings.loss, self._readings.grad_norm

    @property
    def health_summary(self) -> str | None:
        """A table of the matrices that look unhealthy at the end of the last run, and the reasons.

        The worst matrix comes first. The value is None if ``health`` is off or if the run ended
        before its first reading.
        """
        return self._recorder.health_summary if self._recorder is not None else None

    @property
    def last_health(self) -> Any:
        """The last `HealthReading`, or None if there is none."""
        return self._recorder.last_reading if self._recorder is not None else None

    # ---- joining a trainer ----

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Connect this callback to the trainer that was built with it."""
        if (trainer := trainer_of(self)) is not None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        for other in trainer.callback_handler.callbacks:
            if isinstance(other, PSSCallback) and other is not self:
                raise ConfigurationError(
                    "This trainer has a PSSCallback already, and it can have only one. Give "
                    "PSSTrainer its options through pss_config or PSSTrainingArguments."
                )
        if vars(trainer).get("pss_callback") is not self:
            follow_log_level(trainer.args)
        refuse_backends(trainer)
        if isinstance(trainer.args, PSSTrainingArguments):
            _refuse_unread_arguments(trainer)
            trainer.args.pss_is_heard = True
        trainer.pss_callback = self

    def _original(self, trainer: Trainer) -> PSSCallback:
        """Return the callback that the user gave, and put it back into the trainer if necessary.

        If ``restore_callback_states_from_checkpoint`` is set, the Trainer replaces each callback by
        a new object that lacks the user's options. PSS restores its own state in the original
        object, so the original can take its place again.

        Raises:
            ConfigurationError: The Trainer has replaced a callback before it was connected
                to the trainer.
        """
        if "saved_state" not in vars(self):  # the Trainer sets it on the callbacks that it creates
            return self
        original: PSSCallback | None = vars(trainer).get("pss_callback")
        if original is None:
            raise ConfigurationError(
                "restore_callback_states_from_checkpoint has replaced the PSSCallback that you "
                "gave to add_callback() by one without your options. Pass yours in callbacks=[...] "
                "or attach it with attach()."
            )
        callbacks = trainer.callback_handler.callbacks
        callbacks[next(i for i, one in enumerate(callbacks) if one is self)] = original
        return original

    # ---- the Trainer's events ----

    def on_train_begin(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Build the controller on the prepared model, and restore its state from a checkpoint."""
        trainer = trainer_of(self)
        if trainer is None or model is None:
            raise ConfigurationError(_NO_TRAINER)
        original = self._original(trainer)
        original._join(trainer)
        original._begin(trainer, model, kwargs.get("optimizer"))

    def _begin(self, trainer: Trainer, model: nn.Module, optimizer: Any) -> None:
        args, state = trainer.args, trainer.state
        self.abort_step()  # an exception may have ended the last run within a step
        if trainer is not self._trainer:  # a rollback of another trainer does not count here
            self._is_rollback, self._may_repair = False, True
        self._readings, self.report = StepReadings(), None
        self._evidence_step = -_EVIDENCE_EVERY_STEPS
        config = self.config_for(args)
        # If the arguments equal the config, assume that the user set the options there.
        in_args = isinstance(args, PSSTrainingArguments) and args.pss_config() == config
        spelling = partial(spelt_as_arguments, PSSConfig) if in_args else nullcontext
        with spelling():
            self.controller = controller = PSSController(
                model,
                config,
                # Accelerate wraps the optimizer. The inner optimizer holds the state.
                optimizer=getattr(optimizer, "optimizer", optimizer),
                evaluate_loss=self._evaluate_loss,
                speaks=False,
            )
        # An older BatchLoss holds the batch and the model of the last run.
        self.batch_loss = BatchLoss(trainer) if controller.tries_interventions else None
        if self._recorder is not None and self._is_rollback:
            self._recorder.restart(resumed_step=state.global_step)
        else:
            self._recorder = RunRecorder(
                args,
                folder_of(trainer),
                trainer.callback_handler,
                is_first_process=state.is_world_process_zero,
                resumed_step=state.global_step,
            )
        if state.is_world_process_zero and not self._is_rollback:
            self._announce(controller, in_args)
        if controller.health is not None and not args.torch_compile:
            controller.health.watch_attention(optional_part("attention_watch")(model))
        self._wrap(trainer)
        self._resume(controller, state)
        # The Trainer saves into this entry and fails if a resumed file lacks it.
        state.stateful_callbacks[type(self).__name__] = self.state()
        is_plain = controller.health is None and controller.config.health_every_steps > 0
        if state.global_step == 0 and is_plain:
            ranks = controller.stable_ranks()  # on every rank
            self._recorder.write_stable_ranks(0, ranks)
        if state.global_step > 0 and controller.config.smooth_on_resume:
            link_loaded_moments(trainer)
            with spelling():
                self._smooth_once(controller, args.output_dir)
        if state.is_world_process_zero:
            logger.info("PSS watches these matrices:\n%s", controller.selection.table())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Discard the readings of the last step."""
        self._readings = StepReadings()

    def on_pre_optimizer_step(
        self, *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check the gradients, and remove them if the update must not happen."""
        controller, readings = self.controller, self._readings
        if controller is None or not readings.measured_ids:
            raise ConfigurationError(
                "PSSCallback received no gradient norm in this step: this Trainer does not clip "
                "through Accelerator.clip_grad_norm_. Make its _clip_grad_norm call that method."
            )
        try:
            apply_update = controller.before_update(
                readings.grad_norm,
                readings.loss,
                loss_scaled=_is_scaled(self._trainer),
                discarded=readings.update_is_discarded,
            )
        except NonFiniteError:
            self.write_records(controller.pending_records)
            self._write_evidence(controller)
            raise
        self._write_evidence(controller)
        if not apply_update and model is not None:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers skip parameters without a gradient

    def _write_evidence(self, controller: PSSController) -> None:
        """Record the matrices and the batch of a step that spiked. All ranks make this call."""
        step, recorder = controller.step_number, self._recorder
        if not controller.is_in_trouble or recorder is None:
            return
        if 0 <= step - self._evidence_step < _EVIDENCE_EVERY_STEPS:
            return
        self._evidence_step = step
        matrices = controller.matrix_metrics()
        if recorder.is_first_process:
            evidence = optional_part("evidence_of")(self._trainer, step, matrices)
            recorder.write_evidence(evidence)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Check the weights and smooth them, before this step is logged, evaluated or saved."""
        controller, recorder = self.controller, self._recorder
        if controller is None or recorder is None:
            return
        try:
            self.report = report = controller.after_update()
        except NonFiniteError:
            self.write_records(controller.pending_records)
            raise
        if self.batch_loss is not None:
            self.batch_loss.end_step(is_sound=not report.is_in_trouble)
        self.write_records(report.records)
        if report.stable_ranks is not None:
            recorder.write_stable_ranks(report.step, report.stable_ranks)
        if report.health is not None:
            recorder.write_reading(report.health)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Forget the kept batch, which a run resumed from this checkpoint would not have."""
        if self.batch_loss is not None:
            self.batch_loss.forget()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Log a summary, finish the trackers and unwrap the trainer."""
        self.batch_loss = None
        self.close()

    # ---- the wrapped methods ----

    def _wrap(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._wrappers.close()
        for owner, name, around in (
            (trainer, "training_step", self._around_training_step),
            (trainer, "log", self._around_log),
            (trainer.accelerator, "clip_grad_norm_", self._around_clipping),
        ):
            self._wrappers.enter_context(wrapped(owner, name, around))

    def _around_training_step(self, training_step: Any, *args: Any, **kwargs: Any) -> Tensor:
        listening = self.batch_loss.listening() if self.batch_loss is not None else nullcontext()
        with listening:
            loss: Tensor = training_step(*args, **kwargs)
        self._readings.add_loss(loss)
        return loss

    def _around_clipping(
        self, clip_grad_norm_: Any, parameters: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Copy the norm and the loss of this step to the host.

        In a step without an event, this is the only time that PSS reads from the device. The
        Trainer receives the norm as a CPU tensor, so it can log the norm without another read.

        A subclass may override ``_clip_grad_norm`` and clip in groups. This method combines the
        norms of the groups. The override may also return nothing, and then the Trainer measures
        again after clipping. This method ignores a second norm of the same parameters.
        """
        controller, readings = self.controller, self._readings
        chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        measure = partial(clip_grad_norm_, chosen, *args, **kwargs)
        ids = frozenset(map(id, chosen))
        if controller is None or ids <= readings.measured_ids:
            return measure()
        if not readings.measured_ids:
            controller.inspect_gradients()  # after clipping, one NaN makes every gradient NaN
        norm = measure()
        if self._trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Before 0.19, DeepSpeed returns -1 for a norm that is not finite.
            norm = math.inf if norm is not None and norm < 0 else norm
            readings.update_is_discarded = not self._trainer.model_wrapped.was_step_applied()
        on_host, readings.loss = controller.to_host(norm, readings.device_loss)
        is_a_group = readings.measured_ids and ids.isdisjoint(readings.measured_ids)
        if is_a_group and on_host is not None and readings.grad_norm is not None:
            readings.grad_norm = math.hypot(readings.grad_norm, on_host)
        else:
            readings.grad_norm = on_host
        readings.measured_ids |= ids
        if isinstance(norm, Tensor) and on_host is not None:
            return torch.tensor(on_host, dtype=norm.dtype)
        return norm

    def _around_log(self, log: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.report is not None and "loss" in logs:
            logs.update(log_scalars(self.report.scalars))
        log(logs, *args, **kwargs)

    def _evaluate_loss(self) -> Tensor | None:
        if self.batch_loss is None or self.controller is None:
            return None
        return self.batch_loss(is_sound=not self.controller.is_in_trouble)

    # ---- TrainingMonitor, the interface that recovery reads ----

    @property
    def step(self) -> int:
        """The number of the optimizer step in progress."""
        return self.controller.step_number if self.controller is not None else 0

    def outcome(self) -> StepOutcome | None:
        """Return the loss of the last step, whether it was finite, and whether PSS intervened."""
        if self.report is None:
            return None
        interventions = [one for one in self.report.records if isinstance(one, Intervention)]
        answers = [one for one in interventions if one.event.kind not in _UPKEEP]
        return StepOutcome(
            loss=self._readings.loss,
            is_finite=self.report.verdict is not Verdict.NON_FINITE,
            has_intervened=bool(answers),
            has_changed_weights=any(answer.has_changed_weights for answer in answers),
        )

    def write_records(self, records: Sequence[Record]) -> None:
        """Append records to the events file, log interventions and alert the trackers."""
        if self._recorder is not None:
            self._recorder.write_records(records)

    def before_training(self, *, is_rollback: bool, may_repair: bool) -> None:
        """Prepare for a call of ``train``.

        After a rollback, the tracker runs continue. ``smooth_on_resume`` smooths only the
        checkpoint that the user chose.
        """
        self._is_rollback, self._may_repair = is_rollback, may_repair

    def abort_step(self) -> None:
        """Remove the hooks that an unfinished step has left in the model."""
        if self.controller is not None and self.controller.health is not None:
            self.controller.health.stop()

    def close(self) -> None:
        """Log a summary, finish the trackers and unwrap the trainer."""
        self.abort_step()
        self._wrappers.close()
        if self._recorder is not None:
            self._recorder.close(self.report)

    # ---- the checkpoint ----

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes into trainer_state.json."""
        controller = self.controller
        attributes: dict[str, Any] = {
            "saved_state": controller.state_dict() if controller else None
        }
        if controller is not None and controller.health is not None:
            attributes["health_state"] = controller.health.state()
        if self._smoothed_in is not None:
            attributes["smoothed_in"] = self._smoothed_in
        return {"args": {}, "attributes": attributes}

    def _resume(self, controller: PSSController, state: TrainerState) -> None:
        entry = state.stateful_callbacks.get(type(self).__name__)
        saved = entry.get("attributes") if isinstance(entry, dict) else None
        saved = saved if isinstance(saved, dict) else {}
        smoothed_in = saved.get("smoothed_in")
        self._smoothed_in = smoothed_in if isinstance(smoothed_in, str) else None
        if state.global_step == 0:
            return
        try:
            if entry is None:
                raise StateError("The checkpoint holds no PSS state: it was written without PSS.")
            if "saved_state" not in saved:
                raise StateError("The checkpoint's PSS state is damaged.")
            self._restore(controller, saved["saved_state"], state.global_step)
        except StateError as error:
            if state.is_world_process_zero:
                logger.warning(
                    "PSS starts with a fresh baseline at step %d. %s", state.global_step, error
                )
            controller.reset(step_number=state.global_step)
            return
        if controller.health is not None and "health_state" in saved:
            try:
                controller.health.restore(saved["health_state"])
            except StateError as error:
                if state.is_world_process_zero:
                    logger.warning("The health metrics start with empty windows. %s", error)

    def _restore(self, controller: PSSController, saved: Any, global_step: int) -> None:
        if self._is_rollback and isinstance(saved, dict) and "step" in saved:
            saved["step"] = global_step  # the steps between were skipped, not trained
        controller.load_state_dict(saved)
        if controller.step_number != global_step:
            raise StateError(
                f"The PSS state is of step {controller.step_number}: later steps were trained "
                "without PSS."
            )

    def _smooth_once(self, controller: PSSController, output_dir: str) -> None:
        own = [os.path.abspath(output_dir)]
        broadcast_object_list(own)  # so that either all ranks smooth or none does
        is_done, self._smoothed_in = self._smoothed_in == own[0], own[0]
        if self._may_repair and not is_done:
            self.write_records([controller.smooth_now()])
        elif self._may_repair and self._recorder is not None and self._recorder.is_first_process:
            text = (
                "smooth_on_resume: the weights were smoothed when this run was first resumed. They "
                "are not smoothed again. To smooth once more, choose another output_dir."
            )
            logger.warning("%s", spelt(text))

    def _announce(self, controller: PSSController, in_args: bool) -> None:
        """Log one line with the preset, the watched matrices and the place to change options."""
        config, selection = controller.config, controller.selection
        num_matrices, num_products = len(matrix_names(selection.matrices)), len(selection.adapters)
        counts = []
        if num_matrices:
            counts.append(plural(num_matrices, "matrix", "matrices"))
        if num_products:
            counts.append(plural(num_products, "LoRA product"))
        caution = controller.caution("pss_{}" if in_args else "PSSConfig({})")
        watched = (
            f"PSS: {config.describe()}, {' and '.join(counts) or 'no matrix'} watched "
            f"({', '.join(config.detectors) or 'non-finite steps only'})."
        )
        options = "PSSTrainingArguments" if in_args else "PSSConfig or PSSTrainingArguments"
        parts = [watched, caution, f"Options: {options}."] if self.announces else [caution]
        if any(parts):  # at level WARNING, because most scripts show nothing below it
            logger.warning("%s", " ".join(part for part in parts if part))


def _refuse_unread_arguments(trainer: Trainer) -> None:
    """Reject arguments that need the mixins of `PSSTrainer` if the trainer lacks these mixins."""
    args = trainer.args
    options = {spec.name: getattr(args, spec.name) for spec in fields(args)}
    given = []
    if not isinstance(trainer, OptimizerMixin):
        given += [n for n in ("pss_optim", "pss_lr_scale") if options[n] is not None]
    if not isinstance(trainer, RollbackMixin):
        unset = RecoveryConfig().to_dict()
        given += [f"pss_{n}" for n, v in unset.items() if options[f"pss_{n}"] not in (None, v)]
    if given:
        name = type(trainer).__name__
        verb = "needs" if len(given) == 1 else "need"
        raise ConfigurationError(
            f"{' and '.join(given)} {verb} more than a callback. Use PSSTrainer, or class "
            f"My{name}(PSSTrainerMixin, {name}), or leave the option out."
        )


def _is_scaled(trainer: Trainer) -> bool:
    """Whether losses are scaled. If they are, gradients overflow occasionally by design."""
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and trainer.args.fp16:
        return True  # DeepSpeed scales fp16 losses itself
    scaler = getattr(trainer.accelerator, "scaler", None)
    return scaler is not None and scaler.is_enabled()
