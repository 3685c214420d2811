"""What becomes of a run in which smoothing does not help: back to a healthy checkpoint, or stop."""

from __future__ import annotations

import logging
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from hf_pss.config import PSSConfig
from hf_pss.detection import Verdict
from hf_pss.errors import NonFiniteError, StateError, TrainingFailedError
from hf_pss.events import Event, EventKind, Intervention
from hf_pss.integration.checkpoints.judge import checkpoints_by_step
from hf_pss.integration.checkpoints.resuming import newest_whole
from hf_pss.integration.checkpoints.saving import SafeCheckpoints
from hf_pss.policy import Action, Failure, FailureWatch

__all__ = ["Survival"]

logger = logging.getLogger(__name__)

_ABANDONED = "_pss_abandoned"
_UPKEEP = (EventKind.FLOOR, EventKind.RESUME)


class Survival(SafeCheckpoints):
    """Mixin, left of a Trainer class: safe checkpoints, and ``on_failure``.

    ``rollback`` ends the Trainer's loop and calls its own ``train(resume_from_checkpoint=...)``:
    weights, optimizer, schedule and random state are the checkpoint's. Steps count on from the
    failure: the step number, the place in the data and the schedule move past the batches that led
    there, so that a later resume, which reads all three from the step, is exact. The run takes so
    many updates less. It costs a resume: loading, and fast-forwarding the data.
    """

    _failure: Failure | None = None
    _failure_watch: FailureWatch | None = None
    _nonfinite_since: int | None = None
    _seen_step = -1
    _skip_to: int | None = None
    _last_target: int | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; go back and on where interventions fail, if that was asked for.

        Raises:
            TrainingFailedError: Interventions failed, and ``on_failure`` is ``stop``, or
                ``rollback`` after ``max_rollbacks`` of these.
            NonFiniteError: As before, where ``on_failure`` is ``smooth`` or there is no checkpoint
                to go back to.
        """
        resume, num_rollbacks = resume_from_checkpoint, 0
        self._last_target = self._skip_to = None
        while True:
            self._begin_watch()
            cause: NonFiniteError | None = None
            try:
                result = super().train(resume, *args, **kwargs)
                failure = self._failure
            except NonFiniteError as error:
                failure, cause = self._nonfinite_failure(error), error
            if failure is None:
                return result
            resume = self._way_back(failure, cause, num_rollbacks)
            num_rollbacks += 1

    # ---- noticing ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if self._failure_watch is not None and trainer.state.global_step != self._seen_step:
            self._seen_step = trainer.state.global_step
            self._look_for_failure(self._failure_watch)
        if self._failure is not None:
            trainer.control.should_training_stop = True
            trainer.control.should_save = trainer.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _look_for_failure(self, watch: FailureWatch) -> None:
        trainer: Any = self
        listener = trainer._listener()
        if listener is None or listener.report is None:
            return
        has_intervened = any(
            isinstance(record, Intervention) and record.event.kind not in _UPKEEP
            for record in listener.report.records
        )
        loss, _ = listener.readings
        if listener.report.verdict is not Verdict.NON_FINITE:
            self._nonfinite_since = None
        elif self._nonfinite_since is None:
            self._nonfinite_since = trainer.state.global_step
        failure = watch.see(trainer.state.global_step, loss=loss, has_intervened=has_intervened)
        if failure is None:
            return
        if self._mode() == "rollback" and self._target(failure) is None:
            self._record(failure, Action.OBSERVE, "there is no whole checkpoint to go back to")
            return
        self._failure = failure

    def _begin_watch(self) -> None:
        config = self._config()
        self._failure, self._nonfinite_since, self._seen_step = None, None, -1
        self._failure_watch = (
            None
            if config.on_failure == "smooth"
            else FailureWatch(
                window_steps=config.failure_window_steps,
                max_failed=config.max_failed_interventions,
            )
        )

    def _nonfinite_failure(self, error: NonFiniteError) -> Failure:
        """Return the failure that a stop of the policy is; or raise it, where that is the answer.

        Raises:
            NonFiniteError: The error, where there is no going back.
        """
        trainer: Any = self
        listener = trainer._listener()
        if self._mode() != "rollback" or listener is None or listener.controller is None:
            raise error
        step = listener.controller.step_number
        watched = self._failure_watch.onset_step if self._failure_watch is not None else None
        began = [one for one in (watched, self._nonfinite_since) if one is not None]
        onset = min([*began, step])
        failure = Failure(onset, step, "the run was to stop at a step that was not finite")
        if self._target(failure) is None:
            raise error
        return failure

    def _refuse_to_save(self, broken: str) -> None:
        """Put on record that a state was not finite; only an older one mends it."""
        super()._refuse_to_save(broken)
        trainer: Any = self
        step = trainer.state.global_step
        why = f"{broken} is not finite"
        self._record(
            Failure(step, step, why),
            Action.OBSERVE,
            "not saved",
            kind=EventKind.NON_FINITE,
            detector="checkpoint",
            fired=(broken,),
        )
        if self._mode() != "rollback" or self._failure is not None:
            return
        failure = Failure(self._nonfinite_since or step, step, why)
        if self._target(failure) is not None:
            self._failure = failure
            trainer.control.should_training_stop = True

    def _note_failed_save(self, folder: Path, error: Exception) -> None:
        super()._note_failed_save(folder, error)
        trainer: Any = self
        step = trainer.state.global_step
        why = f"{folder.name} could not be written: {error}"
        self._record(
            Failure(step, step, why), Action.OBSERVE, why, kind=EventKind.ERROR, detector="save"
        )

    # ---- going back ----

    def _way_back(self, failure: Failure, cause: Exception | None, num_rollbacks: int) -> str:
        """Return the checkpoint to go on from, everything prepared.

        Raises:
            TrainingFailedError: There is no way back, or none is wanted.
        """
        trainer: Any = self
        mode, most = self._mode(), self._config().max_rollbacks
        target = self._target(failure) if mode == "rollback" else None
        if mode == "stop" or target is None or num_rollbacks >= most:
            why = f"{failure.reason}"
            if mode == "rollback":
                why += f", after {num_rollbacks} of at most {most} rollbacks"
            self._record(failure, Action.STOP, why)
            raise TrainingFailedError(
                f"Stopped at step {failure.step}: {why}. Nothing was saved since it was noticed; "
                f"{self._advice(failure)}"
            ) from cause
        step, path = target
        skip_to = min(failure.step, trainer.state.max_steps)
        self._record(
            failure,
            Action.ROLL_BACK,
            f"{failure.reason}; back to checkpoint-{step}, batches of steps {step + 1} to "
            f"{skip_to} skipped, rollback {num_rollbacks + 1} of at most {most}",
        )
        if trainer.args.should_save:
            _abandon(Path(trainer.args.output_dir), after_step=step)
        self._wait()
        self._last_target, self._skip_to = step, skip_to
        return path

    def _target(self, failure: Failure) -> tuple[int, str] | None:
        """Return step and path of the newest whole checkpoint before the onset."""
        trainer: Any = self
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return None  # a second train() cannot shard a second time

        def look() -> tuple[int, str] | None:
            run_dir = Path(trainer.args.output_dir)
            try:
                found = newest_whole(run_dir, before_step=failure.onset_step)
                if found.step == self._last_target:  # what it led to has failed: farther back
                    with suppress(StateError):
                        found = newest_whole(run_dir, before_step=found.step)
            except StateError:
                return None
            return found.step, str(found.path)

        target: tuple[int, str] | None = self._agreed(look)
        return target

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)  # type: ignore[misc]
        if self._skip_to is None:
            return epochs, batches
        trainer: Any = self
        steps_per_epoch = int(args[1] if len(args) > 1 else kwargs["num_update_steps_per_epoch"])
        state, step = trainer.state, self._skip_to
        state.global_step = step
        _count_on_(state.stateful_callbacks.get(type(trainer._listener()).__name__), step)
        in_epoch = 0 if trainer.args.ignore_data_skip else step % steps_per_epoch
        return step // steps_per_epoch, in_epoch * trainer.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._skip_to is None or self._last_target is None:
            return
        scheduler = self.lr_scheduler  # type: ignore[attr-defined]
        if isinstance(scheduler, ReduceLROnPlateau):
            return  # it goes by evaluations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps without an update, which are meant
            for _ in range(self._skip_to - self._last_target):
                scheduler.step()

    def _wanted_checkpoints(self) -> set[str]:
        """Keep the one to go back to while interventions are under watch."""
        trainer: Any = self
        watch = self._failure_watch
        if watch is None or watch.onset_step is None or self._mode() != "rollback":
            return set()
        before = [
            path.name
            for path in checkpoints_by_step(Path(trainer.args.output_dir))
            if int(path.name.rpartition("-")[2]) < watch.onset_step
        ]
        return set(before[-1:])

    # ---- saying so ----

    def _record(
        self,
        failure: Failure,
        decision: Action,
        reason: str,
        *,
        kind: EventKind = EventKind.FAILURE,
        detector: str = "interventions",
        fired: tuple[str, ...] = (),
    ) -> None:
        trainer: Any = self
        event = Event(
            step=failure.step,
            kind=kind,
            detector=detector,
            value=failure.loss,
            baseline=failure.loss_before,
            threshold=None,
            fired=fired,
            new_level=(),
            loss=failure.loss,
            decision=decision,
            reason=reason,
        )
        listener = trainer._listener()
        if listener is not None:
            listener.write_records([event])
        if kind is EventKind.FAILURE and trainer.is_world_process_zero():
            logger.warning("PSS, step %d, %s: %s.", failure.step, decision.value, reason)

    def _advice(self, failure: Failure) -> str:
        trainer: Any = self
        try:
            found = newest_whole(Path(trainer.args.output_dir), before_step=failure.onset_step)
        except StateError:
            return "there is no checkpoint from before: begin anew, with a lower learning rate."
        return (
            f"resume from {found.path}, the last from before, with a lower learning rate or behind "
            "these batches."
        )

    def _mode(self) -> str:
        return self._config().on_failure

    def _config(self) -> PSSConfig:
        trainer: Any = self
        listener = trainer._listener()
        config = listener.config_for(trainer.args) if listener is not None else None
        return config if isinstance(config, PSSConfig) else PSSConfig()  # others are refused later

    def _accepts_fresh_state(self) -> bool:
        return self._config().missing_state == "fresh"


def _count_on_(saved: Any, step: int) -> None:
    """Let the state that PSS saved be of this step: the steps between were not trained at all."""
    try:
        saved["attributes"]["saved_state"]["step"] = step
    except (KeyError, TypeError):
        return  # the callback will say so


def _abandon(run_dir: Path, *, after_step: int) -> None:
    """Take the checkpoints of an abandoned branch out of sight; those of the last one go."""
    later = [path for path in checkpoints_by_step(run_dir) if int(path.name[11:]) > after_step]
    if not later:
        return
    folder = run_dir / _ABANDONED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in later:
        path.rename(folder / path.name)
    logger.warning(
        "%s: written after interventions began to fail; now in %s, where no resume looks.",
        ", ".join(path.name for path in later),
        folder,
    )
