"""Whether what would be saved is finite: found out on the device, one read back.

Checkpoints of a Trainer that are written whole or not at all, and resumed only when whole.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_pss.errors import StateError
from hf_pss.runs.checkpoint import examine, unfit_state, write_marker
from hf_pss.runs.durable import move_into_place, sync_tree
from hf_pss.runs.folder import STAGING, checkpoints_by_step
from hf_pss.runs.rotation import claim_, rotate, supersede_later_
from hf_pss.trainer.resuming import checkpoint_to_resume, load_what_is_there_
from hf_pss.trainer.schedule_free import schedule_free
from hf_pss.trainer.stop_signals import StopWish, leave

__all__ = ["SafeCheckpoints", "first_nonfinite"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def first_nonfinite(model: nn.Module, optimizer: Any = None) -> str | None:
    """Return the name of the first tensor that holds NaN or inf; None where all are finite.

    Trained weights and the optimizer's state must be finite. Buffers that are saved may hold inf,
    as masks do, but no NaN. Frozen weights are as they were loaded and are not read.

    Cost: one read of weights and state by the device, one of a bool each by the host.

    Args:
        model: What is trained; of a sharded one, what this rank keeps.
        optimizer: Wrapped or not; None where its state is not saved.
    """
    named = list(_tensors(model, optimizer))
    if not named:
        return None
    device = named[0][1].device
    largest = torch.stack([_largest(tensor).to(device) for _, tensor, _ in named])
    may_be_inf = torch.tensor([may for _, _, may in named], device=device)
    is_bad = largest.isnan() | (largest.isinf() & ~may_be_inf)
    flags = is_bad.tolist()
    return next((name for (name, _, _), bad in zip(named, flags, strict=True) if bad), None)


def _largest(tensor: Tensor) -> Tensor:
    """Return max |x| as float32; NaN where there is one. No copy of the tensor is made."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    largest: Tensor = torch.linalg.vector_norm(tensor, torch.inf).float()
    return largest


def _tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield names, tensors, and whether these may hold inf."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        if parameter.requires_grad:
            # DeepSpeed ZeRO-3 leaves an empty shell and keeps its share here.
            yield from _readable(name, getattr(parameter, "ds_tensor", parameter), may_be_inf=False)
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield from _readable(f"{prefix}.{name}".lstrip("."), buffer, may_be_inf=True)
    for parameter, state in _state_of(optimizer).items():
        owner = names.get(id(parameter), "a parameter")
        for name, value in state.items():
            # Those without a dimension are counters.
            if isinstance(value, Tensor) and value.dim() > 0:
                yield from _readable(f"{name} of {owner}", value, may_be_inf=False)


def _state_of(optimizer: Any) -> dict[Any, dict[str, Any]]:
    """Return the state of the innermost optimizer: Accelerate's and DeepSpeed's wrap it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    state: dict[Any, dict[str, Any]] = getattr(optimizer, "state", {})
    return {key: value for key, value in state.items() if isinstance(value, dict)}


def _readable(name: str, tensor: Any, *, may_be_inf: bool) -> Iterator[tuple[str, Tensor, bool]]:
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor: no collective, this rank's own
    # Eight-bit floats are quantised storage, which nothing trains directly.
    if local.is_floating_point() and local.element_size() > 1:
        yield name, local.detach(), may_be_inf


# Of several ranks one alone may have been told to stop, and asking the others costs a collective.
_AGREE_EVERY_STEPS = 5
# One save may fail for want of space that others free again; this many in a row are no accident.
_ALARMING_FAILURES = 3


class _NotSavedError(Exception):
    """Ends the Trainer's `_maybe_log_save_evaluate` where there is no save to tell others of."""


class SafeCheckpoints:
    """Mixin, left of a Trainer class: a checkpoint is there in full, finite, or not there.

    - A save goes into a folder beside its target, is brought to the disk, gets its marker, and only
      then its name. What fails on the way is a warning: the run and its older checkpoints go on.
    - Weights or optimizer state that are not finite are not saved. Under another name they would
      take space and nobody could go on from them.
    - Nobody is told (`on_save`) of a save that did not happen, nor is its step the best.
    - `save_total_limit` removes by step number, never by the clock, and never what was just saved.
      What another run has left behind of later steps goes first, and is not resumed.
    - ``resume_from_checkpoint=True`` takes the newest whole one. One that was named and is not
      whole is refused.
    - SIGTERM and SIGINT save at the end of the step and leave with 128 + n, unless
      ``save_strategy`` is ``no``. Nothing is evaluated or removed on the way out.
    """

    _staging: Path | None = None
    _wish: StopWish | None = None
    _agreed_signum = 0
    _finite_step: int | None = None
    _held_back_push: str | None = None
    _is_in_step = False
    _num_failed_saves = 0
    _last_saved_step: int | None = None

    # ---- resuming ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a checkpoint is judged before anything of it is loaded.

        Raises:
            StateError: There is no checkpoint to go on from, or the one that was named lacks
                something; the message says what the choices are.
            KeyboardInterrupt: After a SIGINT, once the step is saved.
            SystemExit: After a SIGTERM, likewise, with 143.
        """
        trainer: Any = self
        run_dir = Path(trainer.args.output_dir)
        if trainer.args.should_save:
            _tidy(run_dir)
        self._wait()
        resume = self._agreed(
            lambda: checkpoint_to_resume(
                resume_from_checkpoint, run_dir, accepts_fresh=self._accepts_fresh_state()
            )
        )
        if resume is not None and trainer.args.should_save:
            claim_(Path(resume))
        self._finite_step, self._agreed_signum = None, 0
        self._last_saved_step, self._num_failed_saves = None, 0
        try:
            with StopWish(_heeded(trainer.args)) as self._wish:
                # Somebody's override of train() may take nothing.
                given = (resume, *args) if resume is not None or args else ()
                result = super().train(*given, **kwargs)  # type: ignore[misc]
                signum = self._agreed_signum or self._agree_on(self._wish.signum)
        finally:
            self._wish = None
        if signum:
            leave(signum)
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        missing = self._missing_state(checkpoint)
        has_optimizer = not any(name.startswith("optimizer") for name in missing)
        if checkpoint is None or (has_optimizer and "scheduler.pt" not in missing):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        elif has_optimizer and not Path(checkpoint, "optimizer.pt").is_file():
            raise StateError(
                f"{checkpoint} has an FSDP optimizer's state without scheduler.pt, which can only "
                "be loaded together. Name another checkpoint; or move optimizer.bin (optimizer_0) "
                "away, and missing_state='fresh' begins both anew."
            )
        else:  # where one of the two is missing the Trainer would load neither
            load_what_is_there_(trainer.optimizer, trainer.lr_scheduler, Path(checkpoint), missing)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        args = self.args  # type: ignore[attr-defined]
        own = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
        if own not in self._missing_state(checkpoint):  # it was said when the resume began
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _missing_state(self, checkpoint: str | None) -> frozenset[str]:
        """Return the files that are to begin anew, as asked for; without that they are an error."""
        if checkpoint is None or not self._accepts_fresh_state():
            return frozenset()
        return frozenset(unfit_state(Path(checkpoint)))

    def _accepts_fresh_state(self) -> bool:
        """Whether a checkpoint without optimizer or schedule may be resumed all the same."""
        return False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if 0 < trainer.state.max_steps <= trainer.state.global_step:
            # Resumed at its end: the Trainer would take one step more (transformers 5.23).
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        control, state = trainer.control, trainer.state
        if self._is_to_stop():
            control.should_save = control.should_training_stop = True
            if (switched := schedule_free(trainer.optimizer)) is not None:
                switched.eval()  # as before each save: its callback could not know of this one
        elif self._agreed_signum:
            control.should_save = False  # the epoch's end: the step is saved
        if self._agreed_signum:
            control.should_evaluate = False  # what time is left is for the save
        is_refused = False
        if control.should_save and (broken := self._broken()) is not None:
            control.should_save, is_refused = False, True
            self._refuse_to_save(broken)
        best = state.best_metric, state.best_global_step
        self._is_in_step = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except _NotSavedError:
            control.should_save, is_refused = False, True
        finally:
            self._is_in_step = False
        if is_refused:  # what is not there is not the best
            state.best_metric, state.best_global_step = best

    def _is_to_stop(self) -> bool:
        state = self.state  # type: ignore[attr-defined]
        if self._wish is None or self._agreed_signum:
            return False
        is_between = state.global_step % _AGREE_EVERY_STEPS and state.global_step < state.max_steps
        if is_between and self.args.world_size > 1:  # type: ignore[attr-defined]
            return False
        self._agreed_signum = self._agree_on(self._wish.signum)
        return self._agreed_signum != 0

    def _agree_on(self, signum: int) -> int:
        """Return the signal that any rank was sent; 0 for none. Every rank must ask."""
        trainer: Any = self
        if trainer.args.world_size <= 1:
            return signum
        mine = torch.tensor([signum], device=trainer.args.device)
        return int(trainer.accelerator.gather(mine).max())

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state  # type: ignore[attr-defined]
        best = state.best_model_checkpoint
        if self._agreed_signum:
            # With a limit of one the Trainer would load the best and remove all others: also what
            # the signal has just saved.
            state.best_model_checkpoint = None
        result = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        state.best_model_checkpoint = best
        return result

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        # Of every method of the Trainer that `_save_checkpoint` calls this one alone says where.
        own: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return own if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        else:  # an upload in the background would read what is about to be renamed
            self._held_back_push = Path(checkpoint_folder).name

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        if (broken := self._broken()) is not None:
            self._refuse_to_save(broken)
            self._leave_unsaved()
            return
        run_dir = str(super()._get_output_dir(trial))  # type: ignore[misc]
        name = f"checkpoint-{trainer.state.global_step}"
        staging = Path(run_dir, STAGING)
        best, self._held_back_push = trainer.state.best_model_checkpoint, None
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._wait()
        try:
            self._staging = staging
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._staging = None
            self._wait()
            self._publish(staging / name, run_dir)
        except (OSError, SafetensorError, RuntimeError) as error:
            if trainer.args.world_size > 1 or not _is_of_the_disk(error):
                raise  # other ranks wait in the middle of this: they end together
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the space
            trainer.state.best_model_checkpoint = best  # the Trainer has named the staging folder
            self._note_failed_save(Path(run_dir, name), error)
            self._leave_unsaved()
            return
        finally:
            self._staging = None
        self._wait()
        if trainer.args.local_process_index == 0 and (staging / name).is_dir():
            # A node with a disk of its own: its ranks' random states lie there, nothing else.
            move_into_place(staging / name, Path(run_dir, name))
        self._last_saved_step, self._num_failed_saves = trainer.state.global_step, 0
        self._push_held_back(Path(run_dir))
        if trainer.args.should_save:
            self._rotate(Path(run_dir), just_saved=name)

    def _push_held_back(self, run_dir: Path) -> None:
        if self._held_back_push is None:
            return
        folder, self._held_back_push = run_dir / self._held_back_push, None
        try:
            super()._push_from_checkpoint(str(folder))  # type: ignore[misc]
        except (OSError, SafetensorError) as error:
            logger.warning("%s is saved, and could not be prepared for the Hub: %s.", folder, error)

    def _leave_unsaved(self) -> None:
        """Keep the Trainer from telling its callbacks of a save, where it would."""
        if self._is_in_step:
            raise _NotSavedError

    def _publish(self, staged: Path, run_dir: str) -> None:
        trainer: Any = self
        before = trainer.state.best_model_checkpoint
        _point_at_best_(trainer.state, run_dir)
        if not trainer.args.should_save:
            return
        if trainer.state.best_model_checkpoint != before:
            trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        sync_tree(staged)
        write_marker(staged, step=trainer.state.global_step)
        sync_tree(staged.parent)
        move_into_place(staged, Path(run_dir, staged.name))

    def _broken(self) -> str | None:
        """Name what is not finite in the present state; None, on all ranks, where it may be saved.

        Asked twice in a step, it looks once.
        """
        trainer: Any = self
        step = trainer.state.global_step
        if self._finite_step == step:
            return None
        optimizer = None if trainer.args.save_only_model else trainer.optimizer
        broken = first_nonfinite(trainer.model, optimizer)
        if trainer.args.world_size > 1:
            mine = torch.tensor([float(broken is not None)], device=trainer.args.device)
            if bool(trainer.accelerator.gather(mine).max() > 0):
                return broken or "what another rank holds"
        if broken is None:
            self._finite_step = step
        return broken

    def _refuse_to_save(self, broken: str) -> None:
        trainer: Any = self
        if trainer.is_world_process_zero():
            logger.warning(
                "Step %d is not saved: %s is not finite. Earlier checkpoints are as they were.",
                trainer.state.global_step,
                broken,
            )

    def _note_failed_save(self, folder: Path, error: Exception) -> None:
        self._num_failed_saves += 1
        is_alarming = self._num_failed_saves >= _ALARMING_FAILURES
        last = self._last_saved_step
        since = f"no save since step {last}" if last is not None else "no save in this run so far"
        logger.log(
            logging.ERROR if is_alarming else logging.WARNING,
            "%s could not be written: %s. %sTraining goes on; earlier checkpoints are as they "
            "were.",
            folder,
            error,
            f"That is {self._num_failed_saves} in a row, {since}. " if is_alarming else "",
        )

    def _rotate(self, run_dir: Path, *, just_saved: str) -> None:
        """Remove what `save_total_limit` allows; never what was just saved, nor the best."""
        trainer: Any = self
        best, step = trainer.state.best_model_checkpoint, trainer.state.global_step
        kept = {just_saved, *self._wanted_checkpoints(), Path(best).name if best else just_saved}
        rotate(run_dir, limit=trainer.args.save_total_limit, step=step, kept=kept)
        supersede_later_(run_dir, step=step)

    def _wanted_checkpoints(self) -> set[str]:
        """Return names that rotation keeps for a reason of its own."""
        return set()

    # ---- ranks ----

    def _wait(self) -> None:
        trainer: Any = self
        if trainer.args.world_size > 1:
            trainer.accelerator.wait_for_everyone()

    def _agreed(self, decide: Any) -> Any:
        """Return what the first rank decides, or raise on every rank what it raises there."""
        trainer: Any = self
        if trainer.args.world_size <= 1:
            return decide()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None]
        if trainer.args.process_index == 0:
            try:
                outcome = [decide()]
            except Exception as error:  # for the others
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _point_at_best_(state: TrainerState, run_dir: str) -> None:
    """Name the best checkpoint as the Trainer does, which has looked in the staging folder."""
    if not state.best_global_step:
        return
    best = os.path.join(run_dir, f"checkpoint-{state.best_global_step}")
    if state.best_global_step == state.global_step or os.path.exists(best):
        state.best_model_checkpoint = best


def _is_of_the_disk(error: Exception) -> bool:
    """Tell whether a write failed; torch says so with a RuntimeError of its archive writer."""
    if isinstance(error, RuntimeError):
        return any(
            word in str(error) for word in ("inline_container", "PytorchStreamWriter", "iostream")
        )
    return True


def _heeded(arguments: Any) -> tuple[signal.Signals, ...]:
    """Return the signals that save: none where nothing is saved, and not what others heed."""
    strategy = getattr(arguments.save_strategy, "value", arguments.save_strategy)
    if strategy == "no":
        return ()
    if getattr(arguments, "enable_jit_checkpoint", False):  # transformers' own, for SIGTERM
        return (signal.SIGINT,)
    return (signal.SIGTERM, signal.SIGINT)


def _tidy(run_dir: Path) -> None:
    """Finish or remove what a killed process left behind in the middle of a save."""
    staging = run_dir / STAGING
    if not staging.is_dir():
        return
    try:
        for staged in checkpoints_by_step(staging):
            found = examine(staged)
            if found.is_marked and found.problem is None:
                logger.warning("%s was saved in full before a crash; it is kept.", staged.name)
                move_into_place(staged, run_dir / staged.name)
                return
        logger.warning("Removing %s: a crash ended the save that wrote it.", staging)
        shutil.rmtree(staging)
    except OSError as error:
        logger.warning("Cannot tidy %s: %s.", staging, error)
