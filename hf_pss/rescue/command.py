"""The learning rate after a checkpoint: whether it rises to what did the harm, and by how much.

A run that came to harm slowly, while its rate rose, would come to it again. The rule is ours: its
schedule is scaled, so that the rate rises no higher than where the checkpoint had it, but by no
less than a tenth, for the rate at the checkpoint itself is scaled with it. After a collapse the
floor alone did better than with a lower rate (docs/experiments.md).

What to know before going on: the sentences beside the printed command.

How to go on: the command that resumes a run from the chosen checkpoint, with smoothing.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_pss.errors import ConfigurationError
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.diagnosis import Failure
from hf_pss.runs.log import History
from hf_pss.runs.options import LR_SCALE, Launch, num_processes, read_launch

__all__ = [
    "ResumePlan",
    "Rise",
    "about_batches",
    "about_changes",
    "about_command",
    "about_rate",
    "about_smoothing",
    "about_steps_left",
    "plan_resume",
    "rise_after",
    "scale_against",
    "scale_to_hold",
]

_LEAST_RISE = 1.1
_LEAST_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Rise:
    """A learning rate that rises by more than a tenth."""

    rate: float
    """At the checkpoint."""
    next: float
    """Of the first row after it."""
    begins: int
    """The step at which it had risen so far."""
    highest: float
    """Later on, as logged."""
    step: int
    """Where that was."""


def rise_after(history: History | None, step: int) -> Rise | None:
    """Return how the logged rate rose after a checkpoint; None where it did not."""
    rows = () if history is None else history.rows
    logged = [(row.step, row.learning_rate) for row in rows if row.learning_rate is not None]
    rates = [(at, rate) for at, rate in logged if math.isfinite(rate) and rate > 0]
    before = [rate for at, rate in rates if at <= step]
    later = [(rate, at) for at, rate in rates if at > step]
    limit = _LEAST_RISE * before[-1] if before else math.inf
    higher = [(rate, at) for rate, at in later if rate > limit]
    if not higher:
        return None
    highest, at = max(higher)
    return Rise(before[-1], later[0][0], higher[0][1], highest, at)


def scale_to_hold(rise: Rise | None, failure: Failure | None) -> float:
    """Return the factor that keeps a schedule from doing slow harm again; 1 where none is needed.

    A spike may have been a batch's doing, and a rise after the harm was noticed has not done it:
    there nothing is scaled.
    """
    if rise is None or failure is None or failure.kind != "slow_damage":
        return 1.0
    return scale_against(rise) if rise.begins <= failure.noticed_step else 1.0


def scale_against(rise: Rise) -> float:
    """Return the factor by which the rate rises no higher than at the checkpoint, 0.1 at least."""
    return max(_LEAST_SCALE, rise.rate / rise.highest)


def about_steps_left(
    history: History | None, chosen: CheckpointReport, *, skipped: int
) -> Iterator[str]:
    """Say that there are none, once the batches of `skipped` updates are passed over."""
    if history is None or history.max_steps is None or chosen.step + skipped < history.max_steps:
        return
    end = "The copy passes over all remaining" if skipped else "The run has taken all its"
    yield (
        f"{end} steps: there is nothing to go on with, but with more --max_steps. Where you know "
        "when it went wrong, say so: --failed-at STEP."
    )


def about_rate(
    rise: Rise | None, failure: Failure | None, factor: float, *, is_exact: bool
) -> Iterator[str]:
    """Say where the learning rate goes, if it may have done the harm or is scaled.

    Args:
        rise: Of the logged rate, after the checkpoint.
        failure: How the run failed.
        factor: On the schedule from there on.
        is_exact: Whether a factor that the run had before counts already.
    """
    rose = scaled = ""
    if rise is not None:
        rose = (
            f"The learning rate rises after this checkpoint, from {rise.rate:.2g} to "
            f"{rise.highest:.2g} at step {rise.step}"
        )
    if factor != 1.0:
        if rise is not None:
            scaled = f": {factor * rise.next:.3g} at first, {factor * rise.highest:.2g} there"
            rose += ". "
        yield (
            f"{rose}From here on the run has {factor:.3g} times the rates that it had{scaled}. "
            "--lr-scale 1 leaves them as they were."
        )
        if not is_exact:
            yield (
                "--pss_lr_scale multiplies the rates that your script gives. If the run had been "
                "scaled already, in its own launch or an earlier one, multiply the two factors."
            )
    elif rise is not None:
        yield (
            f"{rose}: what failed then may fail again. Lower it, with --lr-scale "
            f"{scale_against(rise):.2g}."
        )
    elif failure is not None and failure.kind == "slow_damage":
        yield (
            "The learning rate goes on as it was. If it did the harm, and does it again, lower it: "
            "--lr-scale 0.3."
        )


def about_batches(
    failure: Failure | None, history: History | None, chosen: CheckpointReport, *, skipped: int
) -> Iterator[str]:
    """Say that the batch it failed on comes again, and how many to pass over instead.

    The checkpoint lies a margin before it, so that fewer would pass over sound batches alone.
    """
    if failure is None or history is None or failure.kind not in ("spike", "non_finite"):
        return
    needed = failure.noticed_step - chosen.step + history.log_interval
    if failure.noticed_step < chosen.step or skipped >= needed:
        return
    text = (
        f"What it failed on may have been a batch, which comes again by step "
        f"{failure.noticed_step}. A copy goes past it: --write OUT --skip-batches {needed}. It "
        f"costs the data of {needed} updates, sound ones among them, and the run ends as many "
        "updates earlier."
    )
    end = chosen.step + needed
    if history.max_steps is not None and end >= history.max_steps:
        text += f" That leaves none of its steps: give more than --max_steps {end}."
    yield text


def about_command(
    chosen: CheckpointReport, *, is_known: bool, is_whole: bool, processes: int | None
) -> Iterator[str]:
    """Say what the command holds, and what is left to give.

    Args:
        chosen: Where to go on from.
        is_known: Whether the options of the run are.
        is_whole: Whether all that its course depends on was kept.
        processes: That it was trained by, as far as that is known.
    """
    if not is_known:
        yield (
            "Give all else as you gave it then: the same data, steps, batch size and number of "
            "processes. The script must read PSSTrainingArguments and train with PSSTrainer."
        )
    elif is_whole:
        yield (
            "Model, data, steps, batch size, seed, schedule, optimizer and the other options of "
            "PSS are those of the run; add what else you had given, such as --report_to."
        )
    else:
        yield (
            "The options of the run were kept by an earlier version: model, data, steps, seed and "
            "schedule are in the command; give --pss_optim, --optim_args and other options of PSS "
            "as you gave them then."
        )
    if chosen.layout != "whole":
        yield "Start it as it was trained, under the same backend and launcher."
    elif processes is None:
        yield (
            "It was trained by several processes, and the random state of some is missing: start "
            "as many as then, with the launcher that you used."
        )
    elif processes > 1:
        yield (
            f"It was trained by {processes} processes, and goes on with as many; if they were of "
            "several nodes, start it as you did then."
        )


def about_smoothing(smoothing: str, *, is_last_resort: bool, is_copy: bool) -> Iterator[str]:
    """Say what happens to the weights."""
    if smoothing == "none":
        yield (
            "Nothing is smoothed: PSS watches only. Leave --pss_observe_only out to be guarded "
            "from here on."
        )
    if is_copy:
        return
    if smoothing == "anchored":
        yield (
            "Adapters start at zero and have no stable-rank floor: nothing is smoothed when the "
            "run is resumed, and PSS's default guards it from there on."
        )
    if smoothing == "floor":
        yield (
            "The weights may be damaged, so noise of their shapes is the measure of the floor; "
            "pretrained weights lie below it, and for those --smoothing none is safer."
            if is_last_resort
            else "The floor is the checkpoint's own: smoothing changes nothing at the start, and "
            "lets no matrix fall below from there on."
        )


def about_changes(*, is_rate_told: bool, is_copy: bool) -> Iterator[str]:
    """Say how rates are changed, unless that was told; and how batches are passed over."""
    if is_copy:
        return
    if not is_rate_told:
        yield (
            "--learning_rate alone has no effect here: a resumed run takes its base rate from "
            "scheduler.pt. For a lower rate: --lr-scale 0.5."
        )
    yield "To pass over batches: --write OUT --skip-batches N."


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
