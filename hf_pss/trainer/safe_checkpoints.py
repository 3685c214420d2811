"""SafeCheckpointsMixin, which writes the checkpoints of a Trainer completely or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from hf_pss.config import RecoveryConfig
from hf_pss.errors import NonFiniteError, StateError
from hf_pss.models.measurements import first_nonfinite
from hf_pss.records.messages import name_on_ranks
from hf_pss.runs.checkpoint import (
    claim_,
    examine,
    rotate,
    supersede_later_,
    unfit_state,
    write_marker,
)
from hf_pss.runs.folder import (
    STAGING,
    UNFINISHED,
    checkpoints_by_step,
    locked,
    move_into_place,
    sync_tree,
)
from hf_pss.trainer.resuming import (
    backend_of,
    check_backend,
    checkpoint_to_resume,
    load_what_is_there_,
    place_in_data,
)
from hf_pss.trainer.seams import TrainerPart
from hf_pss.trainer.stop_signals import DelayedSignals

logger = logging.getLogger(__name__)


def _tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield each tensor that must be finite, with its name and whether it may hold inf.

    Saved buffers may hold inf, as masks do. Frozen weights are left out, because they have not
    changed since they were loaded.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        if parameter.requires_grad:
            yield name, parameter, False
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer, True
    # The state is in the optimizer inside Accelerate's and DeepSpeed's wrappers.
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    states = getattr(optimizer, "state", {}).items()
    of_parameters = [(key, state) for key, state in states if isinstance(state, dict)]
    for parameter, state in of_parameters:
        owner = names.get(id(parameter), "a parameter")
        for name, value in state.items():
            for tensor in _tensors_in(value):
                yield f"{name} of {owner}", tensor, False


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a value of an optimizer's state. SOAP and LBFGS keep some in lists."""
    if isinstance(value, Tensor):
        if value.dim() > 0:  # scalars are step counters, which need no check
            yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


# A signal may reach only one rank, and a callback may ask only one rank to stop. The ranks agree on
# both by a collective, which would be too costly in every step.
_AGREE_EVERY_STEPS = 5
# One failed save is a warning, because a full disk may have space again at the next save. This many
# failures in a row are logged as an error.
_ALARMING_FAILURES = 3


class _NotSavedError(Exception):
    """Makes the Trainer's `_maybe_log_save_evaluate` end before it calls ``on_save``."""


class _EvaluationStoppedError(Exception):
    """Ends an evaluation after a signal. Only the save of this step is still to be done."""


class SafeCheckpointsMixin(TrainerPart):
    """Mixin that makes every checkpoint of a Trainer complete and finite.

    - The mixin writes a save to a staging folder, flushes it to the disk and marks it as complete.
      Only then does the folder get its final name. If writing fails, the mixin logs a warning, and
      training continues with the older checkpoints.
    - The mixin does not save weights or optimizer state that are not finite.
    - If a save did not happen, ``on_save`` is not called and its step does not become the best.
    - `save_total_limit` removes checkpoints by step number, not by time, and never removes the
      newest one. If an earlier run left checkpoints with later step numbers, these are removed
      first, and the run does not resume from them.
    - ``resume_from_checkpoint=True`` takes the newest complete checkpoint. If you name an
      incomplete checkpoint, the mixin raises an error.
    - After SIGTERM, SIGINT or SIGHUP, the trainer saves at the end of the step and exits with code
      128 + n, where n is the signal's number, unless ``save_strategy`` is ``no``. It skips
      evaluation, or ends the one that is running, and removes no checkpoint.
    - If several ranks train together and one of them wants to stop, all of them stop together. They
      agree on it when they log, evaluate or save, at the end of an epoch and at every fifth step.

    List the mixin to the left of a Trainer class. It does not need PSS:

        class SafeTrainer(SafeCheckpointsMixin, Trainer):
            pass

    Args:
        args: The positional arguments of the Trainer.
        recovery: The options. If it is None, they come from the training arguments. Arguments
            without such options give the defaults.
        kwargs: The keyword arguments of the Trainer.
    """

    recovery: RecoveryConfig | None = None
    """The options. None takes them from the training arguments, or else the defaults."""
    _is_active = True
    """The result of `_is_on` for the current run."""
    _staging: Path | None = None
    _signals: DelayedSignals | None = None
    _agreed_signum = 0
    _held_back_push: str | None = None
    _is_in_step = False
    _num_predictions = 0
    _wants_to_stop = False
    _has_agreed_to_stop = False
    _ended_step: int | None = None
    _num_failed_saves = 0
    _last_saved_step: int | None = None

    def __init__(self, *args: Any, recovery: RecoveryConfig | None = None, **kwargs: Any) -> None:
        self.recovery = recovery
        super().__init__(*args, **kwargs)

    def recovery_config(self) -> RecoveryConfig:
        """Return the options in effect, from the trainer or from its training arguments."""
        if self.recovery is not None:
            return self.recovery
        options: RecoveryConfig = getattr(self.args, "recovery_config", RecoveryConfig)()
        return options

    # ---- for subclasses ----

    def _is_on(self) -> bool:
        """Whether the mixin is active. If not, every method behaves like that of the Trainer."""
        return True

    def _after_loading(self, checkpoint: str | None) -> None:
        """React after the weights, the optimizer and the schedule are loaded.

        `checkpoint` is None if the run starts from the beginning.
        """

    def _before_epoch(self, trial: Any) -> None:
        """React before an epoch begins."""

    def _after_step(self) -> None:
        """React after all callbacks have seen the end of a step or of an epoch."""

    def _before_saving(self) -> None:
        """React after the decision to log, evaluate or save, before the Trainer acts on it."""

    def _end_early(self, trial: Any) -> Any:
        """Return the result of train() if the loop ended before the run did, and None otherwise."""
        return None

    def _on_saved(self, folder: Path) -> None:
        """React after a checkpoint has got its final name."""

    def _wanted_checkpoints(self) -> set[str]:
        """Return the names of checkpoints that rotation must keep in addition to its own rules."""
        return set()

    # ---- resuming ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train. A checkpoint is checked before any part of it is loaded.

        Raises:
            ConfigurationError: Another process is training in the same output_dir.
            StateError: There is no checkpoint to resume from, or the one that you named is
                incomplete or was saved under another backend. The message lists the choices.
            KeyboardInterrupt: The process received SIGINT, and the step has been saved.
            SystemExit: The process received SIGTERM or SIGHUP, and the step has been saved. The
                code is 143 or 129.
        """
        self._is_active = self._is_on()
        if not self._is_active:
            given = (resume_from_checkpoint, *args) if resume_from_checkpoint or args else ()
            return super().train(*given, **kwargs)
        run_dir = Path(self.args.output_dir)
        with ExitStack() as stack:
            # The trials of a search share this folder, but each saves in a folder of its own.
            if self.args.save_strategy != SaveStrategy.NO and self.hp_search_backend is None:
                self._agreed(lambda: stack.enter_context(locked(run_dir)))
                if self.args.should_save:
                    _tidy(run_dir)
                self._wait()
            resume = self._agreed(lambda: self._checkpoint_to_resume(resume_from_checkpoint))
            if resume is not None and self.args.should_save:
                claim_(Path(resume))
            return self._train(resume, *args, **kwargs)

    def _checkpoint_to_resume(self, wanted: Any) -> str | None:
        run_dir, accepts_fresh = Path(self.args.output_dir), self._accepts_fresh()
        resume = checkpoint_to_resume(wanted, run_dir, accepts_fresh=accepts_fresh)
        if resume is not None:
            check_backend(Path(resume), self._backend(), accepts_fresh=accepts_fresh)
        return resume

    def _train(self, resume: str | None, *args: Any, **kwargs: Any) -> Any:
        self._agreed_signum = 0
        self._last_saved_step, self._num_failed_saves = None, 0
        self._wants_to_stop = self._has_agreed_to_stop = False
        try:
            with DelayedSignals(_signals_to_delay(self.args)) as self._signals:
                # An override of train() may take no arguments.
                given = (resume, *args) if resume is not None or args else ()
                result = super().train(*given, **kwargs)
                signum = self._agreed_signum or self._largest_of_ranks(self._signals.signum)
        finally:
            self._signals = None
        # Exit as if the signal had ended the process.
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum:
            raise SystemExit(128 + signum)
        return result

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        place: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        checkpoint = args[3] if len(args) > 3 else kwargs["resume_from_checkpoint"]
        # The Trainer marks data without a length like this. It then counts all batches as one pass.
        if not self._is_active or not checkpoint or self.state.num_train_epochs != sys.maxsize:
            return place
        passes, batches = place_in_data(Path(checkpoint), self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else batches

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        missing = self._missing_state(checkpoint)
        has_optimizer = not any(name.startswith("optimizer") for name in missing)
        if checkpoint is None or (has_optimizer and "scheduler.pt" not in missing):
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except ValueError as error:
                if checkpoint is None or "parameter group" not in str(error):
                    raise
                self._start_optimizer_fresh(Path(checkpoint), error)
        elif has_optimizer and not Path(checkpoint, "optimizer.pt").is_file():
            raise StateError(
                f"{checkpoint} has an FSDP optimizer's state without scheduler.pt, and the Trainer "
                "loads both or none. Name another checkpoint, or move optimizer.bin (optimizer_0) "
                "away and use missing_state='fresh', which starts both from their initial state."
            )
        else:  # the Trainer loads neither if one of the two is missing
            load_what_is_there_(self.optimizer, self.lr_scheduler, Path(checkpoint), missing)
        self._after_loading(checkpoint)

    def _start_optimizer_fresh(self, checkpoint: Path, error: ValueError) -> None:
        """Load the schedule alone, because the optimizer's state is of other parameters."""
        what = f"the optimizer's state in {checkpoint} is of other parameters than this run trains"
        if not self._accepts_fresh():
            raise StateError(
                f"{what[0].upper()}{what[1:]} ({error}). Build the same model and freeze the same "
                "parameters as before. Or use missing_state='fresh' (--pss_missing_state fresh) "
                "to load the weights and the schedule, and start with a fresh optimizer."
            ) from error
        logger.warning("As requested, the optimizer starts from its initial state: %s.", what)
        load_what_is_there_(self.optimizer, self.lr_scheduler, checkpoint, {"optimizer.pt"})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        suffix = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        if f"rng_state{suffix}.pth" not in self._missing_state(checkpoint):  # warned of before
            super()._load_rng_state(checkpoint)

    def _missing_state(self, checkpoint: str | None) -> Collection[str]:
        """Return the names of files whose state starts fresh because the user asked for it."""
        if not checkpoint or not self._accepts_fresh():
            return ()
        is_foreign = not self._backend() and backend_of(Path(checkpoint)) == "DeepSpeed"
        return {*unfit_state(Path(checkpoint)), *(["optimizer.pt"] if is_foreign else [])}

    def _backend(self) -> str | None:
        """Return the name of a backend with checkpoints of its own, or None."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        return "FSDP" if self.is_fsdp_enabled else None

    def _accepts_fresh(self) -> bool:
        return self.recovery_config().missing_state == "fresh"

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._before_epoch(kwargs.get("trial"))
        if self._is_active and 0 < self.state.max_steps <= self.state.global_step:
            # The run was resumed at its last step. transformers 5.23 would train one more step.
            self.control.should_training_stop = True
            return
        self._ended_step = self.state.global_step
        super()._run_epoch(*args, **kwargs)

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control, state = self.control, self.state
        has_ranks = self._is_active and self.args.world_size > 1
        communicates = control.should_log or control.should_evaluate or control.should_save
        step = state.global_step
        is_end_of_epoch, self._ended_step = step == self._ended_step, step
        if has_ranks and control.should_training_stop and not self._has_agreed_to_stop:
            # Perhaps a callback of this rank alone wants to stop. If this rank left, the others
            # would wait for it in the next step.
            self._wants_to_stop, control.should_training_stop = True, False
        self._after_step()
        if self._is_to_stop(0 if is_end_of_epoch or step >= state.max_steps else step):
            control.should_save = control.should_training_stop = True
        elif self._agreed_signum:
            control.should_save = False  # this is the end of the epoch, after the step was saved
        if self._agreed_signum:
            control.should_evaluate = False  # after a signal there is only time for the save
        self._before_saving()
        if not self._is_active:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        is_refused = False
        best = state.best_metric, state.best_global_step
        self._is_in_step = True
        try:
            try:
                super()._maybe_log_save_evaluate(*args, **kwargs)
            except _EvaluationStoppedError:
                control = self.control
                control.should_evaluate, control.should_save = False, True
                control.should_training_stop = True
                super()._maybe_log_save_evaluate(*args, **kwargs)
        except _NotSavedError:
            control.should_save, is_refused = False, True
        finally:
            self._is_in_step = False
        if is_refused:  # best_model_checkpoint must not name a checkpoint that was not saved
            state.best_metric, state.best_global_step = best
        if has_ranks and communicates:  # on_log or on_evaluate may have asked this rank to stop
            wants = self._wants_to_stop or self.control.should_training_stop
            self._stop_together(self._largest_of_ranks(int(wants)) == 1)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict one batch. After a signal, end the evaluation so that this step is saved."""
        if self._is_in_step:
            self._num_predictions += 1
            if self._is_to_stop(self._num_predictions):
                raise _EvaluationStoppedError
        return super().prediction_step(*args, **kwargs)

    def _is_to_stop(self, count: int) -> bool:
        """Return whether a rank has newly received a signal.

        Several ranks agree on it, and on stops that a callback asks for, only if `count`, which is
        the same on all of them, is a multiple of 5.
        """
        if self._signals is None or self._agreed_signum:
            return False
        if count % _AGREE_EVERY_STEPS and self.args.world_size > 1:
            return False
        own = self._signals.signum
        # 0: no stop; 1: a callback wants to stop; more: a signal
        largest = self._largest_of_ranks(own + 1 if own else int(self._wants_to_stop))
        self._stop_together(largest == 1)
        self._agreed_signum = max(largest - 1, 0)
        return self._agreed_signum != 0

    def _stop_together(self, is_agreed: bool) -> None:
        if is_agreed:
            self._has_agreed_to_stop = self.control.should_training_stop = True

    def _largest_of_ranks(self, number: int) -> int:
        """Return the largest number of any rank. Every rank must call this method."""
        return max(self._of_ranks(number))

    def _of_ranks(self, number: int) -> list[int]:
        """Return the number of every rank. Every rank must call this method."""
        if self.args.world_size <= 1:
            return [number]
        mine = torch.tensor([number], device=self.args.device)
        found: list[int] = self.accelerator.gather(mine).tolist()
        return found

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if (result := self._end_early(trial)) is not None:
            return result
        if self._is_active and self.args.world_size > 1:
            self._broken()  # after the last step, a broken weight of one rank breaks no other step
        state = self.state
        best = state.best_model_checkpoint
        if self._agreed_signum:
            # With save_total_limit=1, the Trainer would load the best checkpoint and remove all
            # others, including the one that was saved after the signal.
            state.best_model_checkpoint = None
        result = super()._finalize_training(trial, *args, **kwargs)
        state.best_model_checkpoint = best
        return result

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        # `_save_checkpoint` gets its folder only from this method.
        own: str = super()._get_output_dir(trial)
        return own if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:  # wait, because a background upload would read a folder that is renamed soon
            self._held_back_push = Path(checkpoint_folder).name

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self._is_active:
            super()._save_checkpoint(model, trial)
            return
        if (broken := self._broken()) is not None:
            self._refuse_to_save(broken)
            self._leave_unsaved()
            return
        run_dir = str(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = Path(run_dir, STAGING)
        best, self._held_back_push = self.state.best_model_checkpoint, None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._wait()
        try:
            if self.args.should_save:
                (staging / name).mkdir(parents=True)
                (staging / name / UNFINISHED).touch()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            self._wait()
            self._publish(staging / name, run_dir)
        except (OSError, SafetensorError, RuntimeError) as error:
            if self.args.world_size > 1 or not _is_of_the_disk(error):
                raise  # other ranks are waiting inside the save, so the run cannot continue
            shutil.rmtree(staging, ignore_errors=True)  # free the disk space
            self.state.best_model_checkpoint = best  # the Trainer set the staging folder
            self._note_failed_save(Path(run_dir, name), error)
            self._leave_unsaved()
            return
        finally:
            self._staging = None
        self._wait()
        if self.args.local_process_index == 0 and (staging / name).is_dir():
            # This node has its own disk. The folder holds only the random states of its ranks.
            move_into_place(staging / name, Path(run_dir, name))
        self._last_saved_step, self._num_failed_saves = self.state.global_step, 0
        self._push_held_back(Path(run_dir))
        if self.args.should_save:
            self._rotate(Path(run_dir), just_saved=name)

    def _push_held_back(self, run_dir: Path) -> None:
        if self._held_back_push is None:
            return
        folder, self._held_back_push = run_dir / self._held_back_push, None
        try:
            super()._push_from_checkpoint(str(folder))
        except (OSError, SafetensorError) as error:
            logger.warning("%s is saved, but could not be prepared for the Hub: %s.", folder, error)

    def _leave_unsaved(self) -> None:
        """Keep the Trainer from calling ``on_save`` for a save that did not happen."""
        if self._is_in_step:
            raise _NotSavedError

    def _publish(self, staged: Path, run_dir: str) -> None:
        before = self.state.best_model_checkpoint
        _point_at_best_(self.state, run_dir)
        folder = Path(run_dir, staged.name)
        if self.args.should_save:
            # If someone removes the folder in the middle of a save, the Trainer makes it again.
            (staged / UNFINISHED).unlink()
            if self.state.best_model_checkpoint != before:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            sync_tree(staged)
            write_marker(staged, step=self.state.global_step)
            sync_tree(staged.parent)
            move_into_place(staged, folder)
        self._on_saved(folder)

    def _broken(self) -> str | None:
        """Return the name of a tensor that is not finite, or None if all ranks have finite tensors.

        Raises:
            NonFiniteError: The weights of some ranks are not finite, while those of others are.
        """
        optimizer = None if self.args.save_only_model else self.optimizer
        broken = first_nonfinite(_tensors(self.model, optimizer))
        is_weight = broken in dict(self.model.named_parameters())
        found = self._of_ranks(0 if broken is None else 2 if is_weight else 1)
        if self.args.world_size <= 1 or not any(found):
            return broken
        where = name_on_ranks(broken, [rank for rank, bad in enumerate(found) if bad])
        if 0 < found.count(2) < len(found):
            raise NonFiniteError(
                f"Stopped after step {self.state.global_step}, which is not saved: {where} is not "
                "finite, and the ranks no longer train one model. Resume from an earlier "
                "checkpoint; if it happens again, look at the device of that rank."
            )
        return where

    def _refuse_to_save(self, broken: str) -> None:
        if self.is_world_process_zero():
            logger.warning(
                "Step %d is not saved: %s is not finite. Earlier checkpoints are unchanged.",
                self.state.global_step,
                broken,
            )

    def _note_failed_save(self, folder: Path, error: Exception) -> None:
        self._num_failed_saves += 1
        is_alarming = self._num_failed_saves >= _ALARMING_FAILURES
        last = self._last_saved_step
        since = f"no save since step {last}" if last is not None else "no save in this run so far"
        logger.log(
            logging.ERROR if is_alarming else logging.WARNING,
            "%s could not be written: %s. %sTraining continues; earlier checkpoints are unchanged.",
            folder,
            error,
            f"That is {self._num_failed_saves} in a row, {since}. " if is_alarming else "",
        )

    def _rotate(self, run_dir: Path, *, just_saved: str) -> None:
        """Apply `save_total_limit`, but always keep the newest checkpoint and the best one."""
        best, step = self.state.best_model_checkpoint, self.state.global_step
        kept = {just_saved, *self._wanted_checkpoints(), Path(best).name if best else just_saved}
        rotate(run_dir, limit=self.args.save_total_limit, step=step, kept=kept)
        supersede_later_(run_dir, step=step)

    # ---- ranks ----

    def _wait(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _agreed(self, decide: Callable[[], Any]) -> Any:
        """Return the first rank's decision on every rank, or raise its error on every rank."""
        if self.args.world_size <= 1:
            return decide()
        outcome: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                outcome = [decide()]
            except Exception as error:  # raised on every rank below
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _point_at_best_(state: TrainerState, run_dir: str) -> None:
    """Set ``best_model_checkpoint``, which the Trainer has looked for in the staging folder."""
    if not state.best_global_step:
        return
    best = os.path.join(run_dir, f"checkpoint-{state.best_global_step}")
    if state.best_global_step == state.global_step or os.path.exists(best):
        state.best_model_checkpoint = best


def _is_of_the_disk(error: Exception) -> bool:
    """Return whether the error is a failed write. torch's archive writer raises RuntimeError."""
    words = ("inline_container", "PytorchStreamWriter", "iostream", "Parent directory")
    return not isinstance(error, RuntimeError) or any(word in str(error) for word in words)


def _signals_to_delay(arguments: Any) -> tuple[signal.Signals, ...]:
    """Return the signals that cause a save.

    There are none if the run does not save. Signals that transformers handles itself are left out.
    """
    if arguments.save_strategy == SaveStrategy.NO:
        return ()
    names = ["SIGINT", "SIGHUP"]  # Windows has no SIGHUP
    if not getattr(arguments, "enable_jit_checkpoint", False):  # transformers handles SIGTERM
        names.append("SIGTERM")
    return tuple(one for one in signal.Signals if one.name in names)


def _tidy(run_dir: Path) -> None:
    """Complete or remove a save that a killed process has left in the staging folder."""
    staging = run_dir / STAGING
    if not staging.is_dir():
        return
    try:
        for staged in checkpoints_by_step(staging):
            found = examine(staged)
            if found.is_marked and found.problem is None:
                logger.warning("%s was complete when the process died; it is kept.", staged.name)
                move_into_place(staged, run_dir / staged.name)
                return
        logger.warning("Removing %s: the process died in a save or a removal.", staging)
        shutil.rmtree(staging)
    except OSError as error:
        logger.warning("Cannot tidy %s: %s.", staging, error)
