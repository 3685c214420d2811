"""RollbackMixin, which returns a failed run to its last healthy checkpoint or stops the run."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy, TrainOutput

from hf_pss.detection.explosion import FailedInterventions, TrainingFailure
from hf_pss.detection.policy import Action
from hf_pss.errors import NonFiniteError, TrainingFailedError
from hf_pss.records.events import Event, EventKind
from hf_pss.runs.checkpoint import Examination, Lineage, abandon
from hf_pss.runs.folder import ABANDONED
from hf_pss.trainer.recovery import TrainingMonitor
from hf_pss.trainer.safe_checkpoints import SafeCheckpointsMixin

logger = logging.getLogger(__name__)


class RollbackMixin(SafeCheckpointsMixin):
    """Mixin that adds safe checkpoints and the option ``on_failure`` of `RecoveryConfig`.

    List it to the left of a Trainer class. It learns of a failure in two ways. The
    `TrainingMonitor` among the trainer's callbacks, such as `PSSCallback`, reports the outcome of
    each step. In addition, with or without a monitor, a state that is about to be saved but is not
    finite counts as a failure.

    ``rollback`` ends the Trainer's loop and calls ``train(resume_from_checkpoint=...)`` again. The
    weights, the optimizer, the schedule and the random state come from the checkpoint. The step
    number, the position in the data and the schedule move past the failed batches, so the run takes
    fewer updates. A later resume derives all three from the step number, so it is exact. The new
    state is saved at once. A rollback costs one resume, including the fast-forward through the
    data, and one save. It does not call ``on_train_end`` of the callbacks.

    The run returns only to its own checkpoints. These are the checkpoint that it was resumed from,
    older checkpoints in the same folder as that one, and the checkpoints that it has saved. Other
    checkpoints in the folder belong to other runs.

    The Trainer does not count the passes through an `IterableDataset` that is shorter than the run.
    After a rollback, as after any resume, the rest of the current pass is skipped, and the next
    pass starts at the first row.
    """

    control: Any
    _failure: TrainingFailure | None = None
    _failure_watch: FailedInterventions | None = None
    _nonfinite_since: int | None = None
    _seen_step = -1
    _skip_to: int | None = None
    _last_target: int | None = None
    _lineage = Lineage()
    _is_to_be_settled = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and roll back if interventions fail and ``on_failure`` is ``rollback``.

        Raises:
            TrainingFailedError: Interventions failed, and ``on_failure`` is ``stop``. The error is
                also raised with ``rollback`` if the run has used all ``max_rollbacks``, or if it
                uses FSDP or DeepSpeed, where a second train() cannot shard the model again.
                Checkpoints that were saved after the failure began are moved to a folder where no
                resume finds them.
            NonFiniteError: A step was not finite, and ``on_failure`` is ``smooth`` or there is no
                checkpoint to return to.
        """
        self._last_target = self._skip_to = None
        self._lineage, self._is_to_be_settled = Lineage(), False
        self._warn_if_impossible(resume_from_checkpoint)
        self._monitor.before_training(is_rollback=False, may_repair=True)
        resume, num_rollbacks = resume_from_checkpoint, 0
        try:
            while True:
                self._begin_watch()
                cause: NonFiniteError | None = None
                try:
                    result = super().train(resume, *args, **kwargs)
                except BaseException as error:
                    self._clean_up_()
                    if not isinstance(error, NonFiniteError):
                        raise
                    self._failure, cause = self._nonfinite_failure(error), error
                if self._failure is None:
                    return result
                resume = self._way_back(self._failure, cause, num_rollbacks)
                num_rollbacks += 1
        except (NonFiniteError, TrainingFailedError):
            self._monitor.close()
            raise

    @property
    def _monitor(self) -> TrainingMonitor:
        callbacks = self.callback_handler.callbacks
        return next((c for c in callbacks if isinstance(c, TrainingMonitor)), TrainingMonitor())

    def _clean_up_(self) -> None:
        """Do the clean-up that the loop of transformers 5.23 does only at its regular end."""
        self.is_in_train = False
        if (handle := getattr(self, "neftune_hook_handle", None)) is not None:
            handle.remove()
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            with suppress(AssertionError):  # raised if no loss has been scaled yet
                # This keeps the scale and resets the record that the gradients of this step were
                # unscaled. Without the reset the next step would fail.
                scaler.update(new_scale=scaler.get_scale())
        self._monitor.abort_step()

    def _end_early(self, trial: Any) -> TrainOutput | None:
        if self._failure is None:
            self._before_epoch(trial)  # a run that was rolled back to its end has no epoch
            return None
        # The run continues, so no callback sees its end, and the Trainer neither loads the best
        # model nor removes a checkpoint.
        self._finish_current_push()
        self._clean_up_()
        return TrainOutput(self.state.global_step, math.nan, {})

    # ---- detecting a failure ----

    def _after_step(self) -> None:
        if self._failure_watch is not None and self.state.global_step != self._seen_step:
            self._seen_step = self.state.global_step
            self._look_for_failure(self._failure_watch)
        if self._failure is not None:
            self.control.should_training_stop = True
            self.control.should_save = self.control.should_evaluate = False

    def _look_for_failure(self, watch: FailedInterventions) -> None:
        if (outcome := self._monitor.outcome()) is None:
            return
        if outcome.is_finite:
            self._nonfinite_since = None
        elif self._nonfinite_since is None:
            self._nonfinite_since = self.state.global_step
        failure = watch.update(
            self.state.global_step,
            loss=outcome.loss,
            has_intervened=outcome.has_intervened,
            has_changed_weights=outcome.has_changed_weights,
        )
        if failure is None:
            return
        if self._ends_the_loop(failure):
            self._failure = failure
        else:
            self._record(failure, Action.OBSERVE, "there is no complete checkpoint to return to")

    def _ends_the_loop(self, failure: TrainingFailure) -> bool:
        """Return whether this failure ends the loop.

        If there is no checkpoint to return to, smoothing continues. If the backend cannot roll
        back, the run stops, and the error names the checkpoint.
        """
        if self._mode() == "stop" or self._backend() is not None:
            return True
        return self._target(failure) is not None

    def _begin_watch(self) -> None:
        config = self.recovery_config()
        self._failure, self._nonfinite_since, self._seen_step = None, None, -1
        self._failure_watch = None
        if config.on_failure != "smooth":
            self._failure_watch = FailedInterventions(
                window_steps=config.failure_window_steps, max_failed=config.max_failed_interventions
            )

    def _nonfinite_failure(self, error: NonFiniteError) -> TrainingFailure:
        """Turn the error of a non-finite step into a failure to roll back from.

        Raises:
            NonFiniteError: A rollback is not possible, so the error is raised again.
        """
        step = self._monitor.step
        onset = min(step, self._onset_step() or step)
        failure = TrainingFailure(onset, step, "the run stopped at a step that was not finite")
        is_possible = self._mode() == "rollback" and self._backend() is None
        if not is_possible or self._target(failure) is None:
            raise error
        return failure

    def _refuse_to_save(self, broken: str) -> None:
        """Record that a state was not finite, and roll back if possible.

        Smoothing cannot repair such a state, so the run needs an older checkpoint.
        """
        super()._refuse_to_save(broken)
        step = self.state.global_step
        event = Event(
            step=step,
            kind=EventKind.NON_FINITE,
            detector="checkpoint",
            fired=(broken,),
            decision=Action.OBSERVE,
            reason="not saved",
        )
        self._monitor.write_records([event])
        onset, why = self._nonfinite_since or step, f"{broken} is not finite"
        failure = TrainingFailure(onset, step, why)
        is_new = self._mode() == "rollback" and self._failure is None
        if is_new and self._ends_the_loop(failure):
            self._failure = failure
            self.control.should_training_stop = True

    def _note_failed_save(self, folder: Path, error: Exception) -> None:
        super()._note_failed_save(folder, error)
        event = Event(
            step=self.state.global_step,
            kind=EventKind.ERROR,
            detector="save",
            decision=Action.OBSERVE,
            reason=f"{folder.name} could not be written: {error}",
        )
        self._monitor.write_records([event])

    # ---- going back ----

    def _way_back(
        self, failure: TrainingFailure, cause: Exception | None, num_rollbacks: int
    ) -> str:
        """Prepare a rollback, and return the checkpoint to resume from.

        Raises:
            TrainingFailedError: A rollback is impossible or not wanted.
        """
        mode, most = self._mode(), self.recovery_config().max_rollbacks
        target, backend = self._target(failure), self._backend()
        if mode == "stop" or backend or target is None or num_rollbacks >= most:
            why = failure.reason
            if mode == "rollback" and backend:
                why += f"; a rollback is not possible under {backend}"
            elif mode == "rollback":
                why += f", after {num_rollbacks} of at most {most} rollbacks"
            self._record(failure, Action.STOP, why)
            abandoned = self._abandon_after(target.step) if target is not None else ""
            raise TrainingFailedError(
                f"Stopped at step {failure.step}: {why}. Nothing was saved after that step; "
                f"{_advice(target)}{abandoned}"
            ) from cause
        step, skip_to = target.step, min(failure.step, self.state.max_steps)
        self._record(
            failure,
            Action.ROLL_BACK,
            f"{failure.reason}; back to checkpoint-{step}, batches of steps {step + 1} to "
            f"{skip_to} skipped, rollback {num_rollbacks + 1} of at most {most}",
        )
        is_the_source = target.path == self._lineage.source
        self._abandon_after(step)
        self._last_target, self._skip_to, self._is_to_be_settled = step, skip_to, True
        self._monitor.before_training(is_rollback=True, may_repair=is_the_source)
        return str(target.path)

    def _target(self, failure: TrainingFailure) -> Examination | None:
        """Return the newest complete checkpoint before the failure began."""

        def look() -> Examination | None:
            found = self._lineage.newest_before(failure.onset_step)
            if found is not None and found.step in (self._last_target, self._skip_to):
                # The run failed again after the last rollback to it, so take an older one if any.
                found = self._lineage.newest_before(self._last_target or 0) or found
            return found

        target: Examination | None = self._agreed(look)
        return target

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self._skip_to is None:
            return epochs, batches
        steps_per_epoch = int(args[1] if len(args) > 1 else kwargs["num_update_steps_per_epoch"])
        state, step = self.state, self._skip_to
        state.global_step, state.epoch = step, step / steps_per_epoch
        in_epoch = 0 if self.args.ignore_data_skip else step % steps_per_epoch
        return step // steps_per_epoch, in_epoch * self.args.gradient_accumulation_steps

    def _after_loading(self, checkpoint: str | None) -> None:
        if self._skip_to is None or self._last_target is None:
            self._lineage = Lineage.of(Path(checkpoint) if checkpoint is not None else None)
            return
        scheduler = self.lr_scheduler
        if "metrics" in inspect.signature(scheduler.step).parameters:
            return  # ReduceLROnPlateau counts evaluations, not steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about steps without an update
            for _ in range(self._skip_to - self._last_target):
                scheduler.step()

    def _before_epoch(self, trial: Any) -> None:
        """Save once after a rollback, because no file holds the state at the new step yet."""
        if not self._is_to_be_settled:
            return
        self._is_to_be_settled = False
        if self.args.save_strategy == SaveStrategy.NO:
            return
        # The Trainer loads the same random state again after the fast-forward.
        self._load_rng_state(str(self._lineage.folders[-1]))
        before = self._lineage
        self._save_checkpoint(self.model_wrapped, trial)
        if self._lineage != before:
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # ---- the run's own checkpoints ----

    def _on_saved(self, folder: Path) -> None:
        self._lineage = self._lineage.with_saved(folder)

    def _onset_step(self) -> int | None:
        """Return the step at which a suspected failure began, or None if the run is healthy."""
        watched = self._failure_watch.onset_step if self._failure_watch is not None else None
        began = [step for step in (watched, self._nonfinite_since) if step is not None]
        return min(began, default=None)

    def _wanted_checkpoints(self) -> set[str]:
        """Return the checkpoints that a rollback may need, so that rotation keeps them."""
        # The save after a rollback must not remove an older checkpoint.
        if self.state.global_step == self._skip_to:
            return self._lineage.names
        onset = self._onset_step()
        if self._failure_watch is None or onset is None:
            return set()
        before = self._lineage.name_before(onset)
        return set() if before is None else {before}

    def _abandon_after(self, step: int) -> str:
        """Move later checkpoints of this run to another folder, and return a sentence about it."""
        run_dir = Path(self.args.output_dir)
        before, self._lineage = self._lineage, self._lineage.up_to(step)
        later = [path for path in before.folders if path not in self._lineage.folders]
        has_moved = self.args.should_save and abandon(run_dir, later)
        self._wait()
        return f" Later checkpoints were moved to {run_dir / ABANDONED}." if has_moved else ""

    # ---- records ----

    def _record(self, failure: TrainingFailure, decision: Action, reason: str) -> None:
        event = Event(
            step=failure.step,
            kind=EventKind.FAILURE,
            detector="interventions",
            value=failure.loss,
            baseline=failure.loss_before,
            loss=failure.loss,
            decision=decision,
            reason=reason,
        )
        self._monitor.write_records([event])
        if self.is_world_process_zero():
            logger.warning("Step %d, %s: %s.", failure.step, decision.value, reason)

    def _warn_if_impossible(self, resume: Any) -> None:
        if self._mode() != "rollback" or not self.is_world_process_zero():
            return
        option = "pss_on_failure" if self.recovery is None else "on_failure"
        if (backend := self._backend()) is not None:
            logger.warning(
                "%s='rollback' is not possible under %s, where a second train() cannot shard the "
                "model again. A failure stops the run, as with 'stop', and names the checkpoint. "
                "Resume from that in a new process.",
                option,
                backend,
            )
        elif not resume and (
            self.args.save_strategy == SaveStrategy.NO or self.args.save_only_model
        ):
            logger.warning(
                "%s='rollback' has no effect in this run: %s. If interventions fail, smoothing "
                "continues.",
                option,
                "save_strategy='no' saves nothing"
                if self.args.save_strategy == SaveStrategy.NO
                else "save_only_model=True saves no optimizer, so no checkpoint is complete",
            )

    def _mode(self) -> str:
        return self.recovery_config().on_failure


def _advice(target: Examination | None) -> str:
    if target is None:
        return "there is no earlier checkpoint: start again with a lower learning rate."
    return (
        f"resume from {target.path}, the last checkpoint before the failure, with a lower learning "
        "rate or after these batches."
    )
