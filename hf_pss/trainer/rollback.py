"""What becomes of a run in which smoothing does not help: back to a healthy checkpoint, or stop."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy, TrainOutput

from hf_pss.config import PSSConfig
from hf_pss.detection import Verdict
from hf_pss.detection.policy import Action, Failure, FailureWatch
from hf_pss.errors import NonFiniteError, TrainingFailedError
from hf_pss.records.events import Event, EventKind, Intervention
from hf_pss.runs.folder import ABANDONED
from hf_pss.runs.rotation import Lineage, abandon
from hf_pss.trainer.rates import ScaledRates
from hf_pss.trainer.safe_checkpoints import SafeCheckpoints

__all__ = ["Survival"]

logger = logging.getLogger(__name__)

_UPKEEP = (EventKind.FLOOR, EventKind.RESUME)


class Survival(ScaledRates, SafeCheckpoints):
    """Mixin, left of a Trainer class: safe checkpoints, and ``on_failure``.

    ``rollback`` ends the Trainer's loop and calls its own ``train(resume_from_checkpoint=...)``:
    weights, optimizer, schedule and random state are the checkpoint's. Steps count on from the
    failure: the step number, the place in the data and the schedule move past the batches that led
    there, so that a later resume, which reads all three from the step, is exact. The run takes so
    many updates less. It costs a resume, loading and fast-forwarding the data, and a save: where it
    goes on is saved at once, so that a crash does not undo it. To the other callbacks it is no end.

    It goes back to its own checkpoints only: what it was resumed from, older ones beside that, and
    what it has saved since. What else lies in the folder is another run's.

    An `IterableDataset` that is shorter than the run is read in several passes, of which the
    Trainer keeps no count: after going back, as after any resume, the rest of one pass is passed
    over, and the next one begins at its first row.
    """

    _failure: Failure | None = None
    _failure_watch: FailureWatch | None = None
    _nonfinite_since: int | None = None
    _seen_step = -1
    _skip_to: int | None = None
    _last_target: int | None = None
    _lineage = Lineage()
    _is_to_be_settled = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; go back and on where interventions fail, if that was asked for.

        Raises:
            TrainingFailedError: Interventions failed, and ``on_failure`` is ``stop``, or
                ``rollback`` after ``max_rollbacks`` of these, or under FSDP or DeepSpeed, where a
                second train() cannot shard a second time. What was saved since they began to fail
                is out of a resume's sight.
            NonFiniteError: As before, where ``on_failure`` is ``smooth`` or there is no checkpoint
                to go back to.
        """
        self._last_target = self._skip_to = None
        self._lineage, self._is_to_be_settled = Lineage(), False
        self._say_where_there_is_no_way_back(resume_from_checkpoint)
        trainer: Any = self
        try:
            return self._train_and_go_back(resume_from_checkpoint, *args, **kwargs)
        except (NonFiniteError, TrainingFailedError):
            if (listener := trainer._listener()) is not None:
                listener.end()
            raise

    def _train_and_go_back(self, resume: Any, *args: Any, **kwargs: Any) -> Any:
        num_rollbacks = 0
        self._tell_listener(goes_back=False, repairs=True)
        while True:
            self._begin_watch()
            cause: NonFiniteError | None = None
            try:
                result = super().train(resume, *args, **kwargs)
                failure = self._failure
            except BaseException as error:
                self._clean_up_()
                if not isinstance(error, NonFiniteError):
                    raise
                failure, cause = self._nonfinite_failure(error), error
            if failure is None:
                return result
            resume = self._way_back(failure, cause, num_rollbacks)
            num_rollbacks += 1

    def _tell_listener(self, *, goes_back: bool, repairs: bool) -> None:
        trainer: Any = self
        if (listener := trainer._listener()) is not None:
            listener.goes_back, listener.repairs = goes_back, repairs

    def _clean_up_(self) -> None:
        """Take away what the Trainer's loop takes away at its end only (transformers 5.23)."""
        trainer: Any = self
        trainer.is_in_train = False
        if (handle := getattr(trainer, "neftune_hook_handle", None)) is not None:
            handle.remove()
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            with suppress(AssertionError):  # no loss was scaled yet
                # The scale stays. What was unscaled in the last step would be refused in the next.
                scaler.update(new_scale=scaler.get_scale())
        if (listener := trainer._listener()) is not None:
            listener.stop_listening()

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self._failure is None:
            self._settle(trial)
            return super()._finalize_training(trial, *args, **kwargs)
        # Not the end: nobody is told so, no best model is loaded, no checkpoint removed.
        trainer: Any = self
        trainer._finish_current_push()
        self._clean_up_()
        return TrainOutput(trainer.state.global_step, math.nan, {})

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
        answers = [
            record
            for record in listener.report.records
            if isinstance(record, Intervention) and record.event.kind not in _UPKEEP
        ]
        loss, _ = listener.readings
        if listener.report.verdict is not Verdict.NON_FINITE:
            self._nonfinite_since = None
        elif self._nonfinite_since is None:
            self._nonfinite_since = trainer.state.global_step
        failure = watch.see(
            trainer.state.global_step,
            loss=loss,
            has_intervened=bool(answers),
            has_changed_weights=any(answer.has_changed_weights for answer in answers),
        )
        if failure is None:
            return
        if self._ends_the_loop(failure):
            self._failure = failure
        else:
            self._record(failure, Action.OBSERVE, "there is no whole checkpoint to go back to")

    def _ends_the_loop(self, failure: Failure) -> bool:
        """Whether to stop or to go back; smoothing goes on where going back was asked for in vain.

        Where a backend cannot go back, the error names what a new process can go back to.
        """
        if self._mode() == "stop" or self._backend_of_no_return() is not None:
            return True
        return self._target(failure) is not None

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
        if self._backend_of_no_return() is not None:
            raise error
        step = listener.controller.step_number
        onset = min(step, self._onset_step() or step)
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
        if self._ends_the_loop(failure):
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
        target, backend = self._target(failure), self._backend_of_no_return()
        if mode == "stop" or backend or target is None or num_rollbacks >= most:
            why = f"{failure.reason}"
            if mode == "rollback":
                why += (
                    f"; there is no going back under {backend}"
                    if backend
                    else f", after {num_rollbacks} of at most {most} rollbacks"
                )
            self._record(failure, Action.STOP, why)
            abandoned = self._abandon_after(target[0]) if target is not None else ""
            raise TrainingFailedError(
                f"Stopped at step {failure.step}: {why}. Nothing was saved since it was noticed; "
                f"{_advice(target)}{abandoned}"
            ) from cause
        step, path = target
        skip_to = min(failure.step, trainer.state.max_steps)
        self._record(
            failure,
            Action.ROLL_BACK,
            f"{failure.reason}; back to checkpoint-{step}, batches of steps {step + 1} to "
            f"{skip_to} skipped, rollback {num_rollbacks + 1} of at most {most}",
        )
        is_the_source = Path(path) == self._lineage.source
        self._abandon_after(step)
        self._last_target, self._skip_to, self._is_to_be_settled = step, skip_to, True
        self._tell_listener(goes_back=True, repairs=is_the_source)
        return path

    def _target(self, failure: Failure) -> tuple[int, str] | None:
        """Return step and path of the newest whole checkpoint before the onset."""

        def look() -> tuple[int, str] | None:
            found = self._lineage.newest_before(failure.onset_step)
            if found is None:
                return None
            if found.step in (self._last_target, self._skip_to):
                # What it led to has failed: farther back, where there is something.
                found = self._lineage.newest_before(self._last_target or 0) or found
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
        state.global_step, state.epoch = step, step / steps_per_epoch
        _count_on_(state.stateful_callbacks.get(type(trainer._listener()).__name__), step)
        in_epoch = 0 if trainer.args.ignore_data_skip else step % steps_per_epoch
        return step // steps_per_epoch, in_epoch * trainer.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._skip_to is None or self._last_target is None:
            self._lineage = Lineage.of(Path(checkpoint) if checkpoint is not None else None)
            return
        scheduler = self.lr_scheduler  # type: ignore[attr-defined]
        if "metrics" in inspect.signature(scheduler.step).parameters:
            return  # it goes by evaluations
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps without an update, which are meant
            for _ in range(self._skip_to - self._last_target):
                scheduler.step()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._settle(kwargs.get("trial"))
        super()._run_epoch(*args, **kwargs)

    def _settle(self, trial: Any) -> None:
        """Save, once, where the run goes on after going back: nothing of it is in a file yet."""
        trainer: Any = self
        if not self._is_to_be_settled:
            return
        self._is_to_be_settled = False
        if trainer.args.save_strategy == SaveStrategy.NO:
            return
        # As it will be after the fast-forward, where the Trainer loads it once more.
        trainer._load_rng_state(str(self._lineage.folders[-1]))
        before = self._lineage
        trainer._save_checkpoint(trainer.model_wrapped, trial)
        if self._lineage != before:
            tell = trainer.callback_handler.on_save
            trainer.control = tell(trainer.args, trainer.state, trainer.control)

    # ---- the run's own checkpoints ----

    def _publish(self, staged: Path, run_dir: str) -> None:
        super()._publish(staged, run_dir)
        self._lineage = self._lineage.with_saved(Path(run_dir, staged.name))

    def _onset_step(self) -> int | None:
        """Return when what is under watch began; None in a run that is well."""
        watched = self._failure_watch.onset_step if self._failure_watch is not None else None
        began = [step for step in (watched, self._nonfinite_since) if step is not None]
        return min(began, default=None)

    def _wanted_checkpoints(self) -> set[str]:
        """Keep the one to go back to while something is under watch."""
        trainer: Any = self
        if trainer.state.global_step == self._skip_to:  # a copy of an older one pushes none out
            return self._lineage.names
        onset = self._onset_step()
        if self._failure_watch is None or onset is None:
            return set()
        before = self._lineage.name_before(onset)
        return set() if before is None else {before}

    def _abandon_after(self, step: int) -> str:
        """Take this run's later checkpoints out of sight, and return the sentence for it."""
        trainer: Any = self
        run_dir = Path(trainer.args.output_dir)
        before, self._lineage = self._lineage, self._lineage.up_to(step)
        later = [path for path in before.folders if path not in self._lineage.folders]
        has_moved = trainer.args.should_save and abandon(run_dir, later)
        self._wait()
        return f" What was saved after it lies in {run_dir / ABANDONED}." if has_moved else ""

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

    def _say_where_there_is_no_way_back(self, resume: Any) -> None:
        trainer: Any = self
        if self._mode() != "rollback" or not trainer.is_world_process_zero():
            return
        if (backend := self._backend_of_no_return()) is not None:
            logger.warning(
                "on_failure='rollback' cannot go back under %s, where a second train() cannot "
                "shard a second time: a failure is an error that names the checkpoint, as with "
                "'stop'. Resume from that in a new process.",
                backend,
            )
        elif not resume and (saves := _why_nothing_to_go_back_to(trainer.args)) is not None:
            logger.warning(
                "on_failure='rollback' can never go back in this run: %s. Smoothing goes on where "
                "interventions fail.",
                saves,
            )

    def _backend_of_no_return(self) -> str | None:
        """Name what cannot train twice in one process; None where nothing is in the way."""
        trainer: Any = self
        if trainer.is_deepspeed_enabled:
            return "DeepSpeed"
        return "FSDP" if trainer.is_fsdp_enabled else None

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


def _advice(target: tuple[int, str] | None) -> str:
    if target is None:
        return "there is no checkpoint from before: begin anew, with a lower learning rate."
    return (
        f"resume from {target[1]}, the last from before, with a lower learning rate or behind "
        "these batches."
    )


def _why_nothing_to_go_back_to(args: Any) -> str | None:
    if args.save_strategy == SaveStrategy.NO:
        return "save_strategy='no' saves nothing"
    if args.save_only_model:
        return "save_only_model=True saves no optimizer, and without it no checkpoint is whole"
    return None
