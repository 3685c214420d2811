"""How to go on: the command that resumes a run from the chosen checkpoint, with smoothing.

The launch of a run is known where `hf-pss train` wrote it: its options beside the checkpoints, the
steps in trainer_state.json, the number of its processes by their random states. Other scripts leave
theirs in training_args.bin alone, a pickle that is never opened here, so that for them the options
to add are given.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_pss.errors import ConfigurationError
from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import History
from hf_pss.rescue.launch import LR_SCALE, Launch, num_processes, read_launch
from hf_pss.rescue.rates import rise_after, scale_to_hold
from hf_pss.rescue.remarks import (
    about_batches,
    about_changes,
    about_command,
    about_rate,
    about_smoothing,
    about_steps_left,
)

__all__ = ["ResumePlan", "plan_resume"]

_FLOOR, _DEFAULT = "floor", "anchored"
_TRAIN = ("hf-pss", "train")
# Of the run's own guard, what is not taken over: it did not hold, or speaks of another start.
_REPLACED = ("preset", "detectors", "floor_reference", "observe_only", "smooth_on_resume")


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """What to run."""

    options: tuple[str, ...]
    """Words to add to the launch command of any script that reads PSSTrainingArguments."""
    command: tuple[str, ...] | None
    """The whole of it, for a run of `hf-pss train`; None where the launch is not known."""
    remarks: tuple[str, ...]
    train_words: tuple[str, ...] | None = None
    """Those behind the launcher, where it was `hf-pss train`."""

    @property
    def shell(self) -> str:
        """The command for a shell; what is not known of it stands in angle brackets."""
        if self.command is not None:
            return shlex.join(self.command)
        if self.train_words is not None:
            return f"<your launcher> {shlex.join(self.train_words)}"
        return f"<your launch command> {shlex.join(self.options)}"

    @property
    def python(self) -> str:
        """The same for a script without a command line."""
        pairs = dict(zip(self.options[::2], self.options[1::2], strict=True))
        resumed = pairs.pop("--resume_from_checkpoint")
        words = [f"{name.removeprefix('--')}={_literal(value)}" for name, value in pairs.items()]
        return (
            f"args = PSSTrainingArguments(..., {', '.join(words)})\n"
            "PSSTrainer(model=model, args=args, train_dataset=dataset).train(\n"
            f"    resume_from_checkpoint={resumed!r}\n"
            ")"
        )


def plan_resume(
    run_dir: Path,
    history: History | None,
    chosen: CheckpointReport,
    *,
    smoothing: str,
    is_last_resort: bool,
    failure: Failure | None = None,
    lr_scale: float | None = None,
    repaired: Path | None = None,
    skipped: int = 0,
) -> ResumePlan:
    """Say how to go on.

    Args:
        run_dir: The run's folder.
        history: Its log.
        chosen: Where to go on from.
        smoothing: ``floor``, the name of a smoothing function, or ``none``.
        is_last_resort: Whether the weights may be damaged: then the floor is that of noise.
        failure: How it failed; after a spike the guard watches for spikes, too.
        lr_scale: Factor on the schedule, which a copy holds already; None where the log is to say
            (`scale_to_hold`).
        repaired: A copy to go on from instead, smoothed as far as it is to be.
        skipped: Updates whose batches that copy passes over.

    Raises:
        ConfigurationError: `lr_scale`, times the run's own, is no finite number above 0.
    """
    source, is_copy = (repaired or chosen.path).resolve(), repaired is not None
    options = ["--resume_from_checkpoint", str(source), "--output_dir", str(_free_folder(run_dir))]
    if smoothing == _FLOOR and chosen.is_adapter:
        smoothing = _DEFAULT
    options += _guard(smoothing, is_last_resort, failure, is_copy=is_copy)
    launch = read_launch(chosen.path.resolve(), history, without=_replaced(smoothing, options))
    rise = rise_after(history, chosen.step)
    factor = scale_to_hold(rise, failure) if lr_scale is None else lr_scale
    is_in_files = is_copy and lr_scale is not None
    options += _lr_scale(factor, launch, is_in_files=is_in_files)
    is_left = lr_scale == 1.0  # as it was, by the user's own word
    is_exact = launch is not None or is_in_files
    told_of_rate = () if is_left else tuple(about_rate(rise, failure, factor, is_exact=is_exact))
    processes = num_processes(chosen.path) if chosen.layout == "whole" else None
    words = None if launch is None else (*_TRAIN, *options, *launch.words)
    return ResumePlan(
        tuple(options),
        None if words is None or processes is None else (*_launcher(processes), *words),
        (
            *about_steps_left(history, chosen, skipped=skipped),
            *told_of_rate,
            *about_batches(failure, history, chosen, skipped=skipped),
            *about_command(
                chosen,
                is_known=launch is not None,
                is_whole=launch is not None and launch.is_whole,
                processes=processes,
            ),
            *about_smoothing(smoothing, is_last_resort=is_last_resort, is_copy=is_copy),
            *about_changes(is_rate_told=bool(told_of_rate) or is_left, is_copy=is_copy),
        ),
        words,
    )


def _free_folder(run_dir: Path) -> Path:
    """Name a folder beside the run's that is not there: an earlier rescue may be."""
    run = run_dir.resolve()
    endings = itertools.chain(("",), (f"-{number}" for number in itertools.count(2)))
    paths = (run.parent / f"{run.name}-rescued{ending}" for ending in endings)
    return next(path for path in paths if not os.path.lexists(path))


def _guard(
    smoothing: str, is_last_resort: bool, failure: Failure | None, *, is_copy: bool
) -> Sequence[str]:
    if smoothing == "none":
        return ["--pss_observe_only", "true"]  # or the default preset would smooth
    if smoothing == _DEFAULT:
        return ["--pss_preset", _DEFAULT]
    if smoothing == _FLOOR:
        # Healthy weights are their own measure; damaged ones would be taken for healthy.
        own = ["--pss_floor_reference", "noise" if is_last_resort else "start"]
        spiked = failure is not None and failure.kind == "spike"
        options = ["--pss_preset", _DEFAULT if spiked else _FLOOR, *own]
    else:
        options = ["--pss_preset", "paper", "--pss_trial", "spikes", "--pss_smoothing", smoothing]
    if not is_copy:
        options += ["--pss_smooth_on_resume", "true"]
    return [*options, *(["--pss_moments", "reset"] if is_last_resort and not is_copy else [])]


def _lr_scale(factor: float, launch: Launch | None, *, is_in_files: bool) -> Sequence[str]:
    """Scale the rates that were given: with the run's own factor, too, where that is known."""
    own = None if launch is None else launch.lr_scale
    if own is None and factor == 1.0:
        return []  # a resume takes the checkpoint's rates
    if launch is None and is_in_files:
        return []
    total = factor * (1.0 if own is None else own)
    if not 0 < total < math.inf:
        raise ConfigurationError(
            f"--lr-scale {factor:g} of a run with {own:g} times its rates is {total:g}: give "
            "another."
        )
    return [f"--{LR_SCALE}", f"{total:.4g}"]


def _replaced(smoothing: str, options: Sequence[str]) -> set[str]:
    """Name the run's options that the new ones stand for; a guard that only watches is kept."""
    own = _REPLACED[-2:] if smoothing == "none" else _REPLACED
    return {
        LR_SCALE,
        *(f"pss_{name}" for name in own),
        *(word.removeprefix("--") for word in options[::2]),
    }


def _launcher(processes: int) -> tuple[str, ...]:
    if processes == 1:
        return ()
    # A free port on this machine; and the program itself, which is no file of Python's.
    return ("torchrun", "--standalone", f"--nproc-per-node={processes}", "--no-python")


def _literal(value: str) -> str:
    try:
        float(value)
    except ValueError:
        return {"true": "True", "false": "False"}.get(value, repr(value))
    return value
