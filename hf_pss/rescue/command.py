"""Build the command that resumes a run from the chosen checkpoint, with smoothing.

For a run of `hf-pss train`, the complete command is known. The options are in a file beside the
checkpoints, the number of steps is in trainer_state.json, and the random states show the number of
processes. Other scripts keep their arguments only in training_args.bin, a pickle that this package
never opens. For these scripts, only the options to add are given.

No option is given with which the run cannot start, and none that can destroy trained weights. So
adapters get no floor, a model without a matrix to smooth gets only the guard against non-finite
steps, and weights that look trained get neither the noise floor nor a reset of the moments.

If a run suffered slow damage while its learning rate was rising, the schedule is scaled. We chose
the following rule. The factor is the largest one under which the rate does not exceed the rate at
the checkpoint. It is at least 0.1, because it also scales the rate at the checkpoint itself.
After a collapse nothing is scaled, because the floor alone did better than the floor with a lower
rate (see docs/experiments.md).
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_pss.errors import ConfigurationError
from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.diagnosis import RunFailure
from hf_pss.rescue.investigate import Investigation
from hf_pss.runs.options import LR_SCALE, Launch, num_processes, read_launch
from hf_pss.runs.records_files import RunLog
from hf_pss.view.numbers import plural

_LEAST_RISE = 1.1
_LEAST_SCALE = 0.1
_PLATEAU = "reduce_lr_on_plateau"
_FLOOR, _DEFAULT = "floor", "anchored"
_TRAIN = ("hf-pss", "train")
_LAUNCHER, _LAUNCH = "<your launcher>", "<your launch command>"
_UNKNOWN = re.compile(rf"{_LAUNCHER}|{_LAUNCH}|<more than \d+>")
_OF_RESCUE = re.compile(r"-rescued(-\d+)?$")
# PSS options of the failed run that the new command does not take over, because they did not
# protect the run or apply only to its original start.
_REPLACED = ("preset", "detectors", "floor_reference", "observe_only", "smooth_on_resume")


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """How to resume a run."""

    options: tuple[str, ...]
    """Words to add to the launch command of any script that reads PSSTrainingArguments."""
    words: tuple[str, ...]
    """All words of the command. Unknown parts are in angle brackets."""
    remarks: tuple[str, ...]
    is_own_launch: bool = False
    """Whether `hf-pss train` started the run, so that no other option has to be given."""

    @property
    def command(self) -> tuple[str, ...] | None:
        """The complete command, or None if a part of it is unknown."""
        return None if any(map(_UNKNOWN.fullmatch, self.words)) else self.words

    @property
    def shell(self) -> str:
        """The command for a shell. Unknown parts are in angle brackets."""
        quoted = (w if _UNKNOWN.fullmatch(w) else shlex.quote(w) for w in self.words)
        return " ".join(quoted)

    @property
    def python(self) -> str:
        """The equivalent Python code for a script without a command line."""
        pairs = dict(zip(self.options[::2], self.options[1::2], strict=True))
        resumed = pairs.pop("--resume_from_checkpoint")
        words = [f"{name.removeprefix('--')}={_literal(value)}" for name, value in pairs.items()]
        return (
            f"args = PSSTrainingArguments(..., {', '.join(words)})\n"
            "PSSTrainer(model=model, args=args, train_dataset=dataset).train(\n"
            f"    resume_from_checkpoint={resumed!r}\n"
            ")"
        )


@dataclass(frozen=True, slots=True)
class _Rise:
    """A learning rate that rises by more than a tenth after a checkpoint."""

    rate: float
    """The rate at the checkpoint."""
    next: float
    """The rate of the first row after the checkpoint."""
    begins: int
    """The step at which the rate had risen by a tenth."""
    highest: float
    """The highest logged rate after the checkpoint."""
    step: int
    """The step of the highest rate."""

    @property
    def held(self) -> float:
        """The factor that keeps the rate at the level of the checkpoint, but at least 0.1."""
        return max(_LEAST_SCALE, self.rate / self.highest)


def plan_resume(
    found: Investigation,
    chosen: CheckpointReport,
    *,
    smoothing: str,
    lr_scale: float | None = None,
    repaired: Path | None = None,
    skipped: int = 0,
) -> ResumePlan:
    """Return the command that resumes a run, and what the user must know about it.

    Args:
        found: The findings about the run. After a spike, PSS also detects spikes in the resumed
            run.
        chosen: The checkpoint to resume from.
        smoothing: ``floor``, the name of a smoothing function, or ``none``. Adapters have no floor.
            If the weights hold nothing to smooth, the run only skips steps that are not finite.
        lr_scale: The factor on the schedule. The files of a repaired copy already contain it. If it
            is None, the log determines the factor.
        repaired: A repaired copy to resume from instead. It is already smoothed.
        skipped: The number of updates whose batches the copy skips.

    Raises:
        ConfigurationError: The product of `lr_scale` and the run's original factor is not a finite
            number above 0, or the schedule cannot be scaled.
        OSError: The checkpoint cannot be read.
    """
    source, is_copy = (repaired or chosen.path).resolve(), repaired is not None
    folder = _free_folder(found.run_dir)
    options = ["--resume_from_checkpoint", str(source), "--output_dir", str(folder)]
    has_nothing = smoothing != "none" and chosen.has_nothing_to_smooth
    if has_nothing or (smoothing == _FLOOR and chosen.is_adapter):
        smoothing = _DEFAULT
    options += _guard(smoothing, found, is_copy=is_copy)
    if chosen.has_only_weights:
        options += ["--pss_missing_state", "fresh"]
    launch = read_launch(chosen.path.resolve(), found.log, without=_replaced(smoothing, options))
    rise = _rise_after(found.log, chosen.step)
    why = _why_unscalable(chosen, launch)
    if why and lr_scale not in (None, 1.0):
        raise ConfigurationError(f"The run cannot start with --lr-scale. {why} Leave it out.")
    factor = lr_scale or (1.0 if why else _scale_to_hold(rise, found.failure))
    is_in_files = is_copy and lr_scale is not None
    options += _lr_scale(factor, launch, is_in_files=is_in_files)
    is_left = lr_scale == 1.0  # the user wants the rates unchanged
    is_exact = launch is not None or is_in_files
    about_rate = [why] if why else [*_about_rate(rise, found.failure, factor, is_exact=is_exact)]
    about_rate = [] if is_left else about_rate
    is_rate_covered = bool(about_rate) or is_left
    about_batches = [*_about_batches(found, chosen, skipped)]
    processes = num_processes(chosen.path) if chosen.layout == "whole" else None
    remarks = (
        *_about_command(chosen, launch, processes),
        *_about_steps_left(found.log, chosen, skipped),
        *about_rate,
        *about_batches,
        *_about_smoothing(
            smoothing,
            found,
            has_nothing=has_nothing,
            is_copy=is_copy,
            is_rate_covered=is_rate_covered,
            is_skip_covered=bool(about_batches),
        ),
    )
    words = (_LAUNCH, *options)
    if launch is not None:
        is_done = _has_no_steps_left(found.log, chosen, skipped)
        words = (*_launcher(processes), *_TRAIN, *options, *_with_steps(launch.words, is_done))
    return ResumePlan(tuple(options), words, remarks, launch is not None)


def _rise_after(log: RunLog | None, step: int) -> _Rise | None:
    """Return how the logged rate rose after a checkpoint, or None if it did not rise."""
    rows = () if log is None else log.rows
    rates = [(rate, row.step) for row in rows if 0 < (rate := row.learning_rate or 0) < math.inf]
    before = [rate for rate, at in rates if at <= step]
    later = [(rate, at) for rate, at in rates if at > step]
    limit = _LEAST_RISE * before[-1] if before else math.inf
    higher = [(rate, at) for rate, at in later if rate > limit]
    if not higher:
        return None
    highest, at = max(higher)
    return _Rise(before[-1], later[0][0], higher[0][1], highest, at)


def _scale_to_hold(rise: _Rise | None, failure: RunFailure | None) -> float:
    """Return the factor that keeps a schedule from doing slow damage again, or 1 for no change.

    Nothing is scaled after a spike, because a batch may have caused it. Nothing is scaled
    either if the rate rose only after the damage was noticed, because that rise cannot have
    caused the damage.
    """
    if rise is None or failure is None or failure.kind != "slow_damage":
        return 1.0
    return rise.held if rise.begins <= failure.noticed_step else 1.0


def _free_folder(run_dir: Path) -> Path:
    """Return an unused path beside the run's folder, where an earlier rescue may have written."""
    run = run_dir.resolve()
    name = f"{_OF_RESCUE.sub('', run.name)}-rescued"
    path, number = run.with_name(name), 1
    while os.path.lexists(path):
        number += 1
        path = run.with_name(f"{name}-{number}")
    return path


def _guard(smoothing: str, found: Investigation, *, is_copy: bool) -> Sequence[str]:
    if smoothing == "none":
        return ["--pss_observe_only", "true"]  # otherwise the default preset would smooth
    if smoothing == _DEFAULT:
        return ["--pss_preset", _DEFAULT]
    if smoothing == _FLOOR:
        # The floor of healthy weights is derived from these weights, so there is nothing to smooth
        # on resume. Damaged weights need the floor of noise, because their own values would be
        # taken for healthy.
        is_damaged = found.may_raise_to_noise
        spiked = found.failure is not None and found.failure.kind == "spike"
        options = ["--pss_preset", _DEFAULT if spiked else _FLOOR]
        options += ["--pss_floor_reference", "noise" if is_damaged else "start"]
        smooths, moments = is_damaged, ["--pss_moments", "reset"]
    else:
        options = ["--pss_preset", "paper", "--pss_trial", "spikes", "--pss_smoothing", smoothing]
        smooths, moments = True, ["--pss_moments", "reset"] if found.may_raise_to_noise else []
    if smooths and not is_copy:
        options += ["--pss_smooth_on_resume", "true", *moments]
    return options


def _why_unscalable(chosen: CheckpointReport, launch: Launch | None) -> str:
    """Return why ``pss_lr_scale`` would be refused, or an empty text."""
    if chosen.layout == "deepspeed" and not (chosen.path / "scheduler.pt").is_file():
        return "DeepSpeed's configuration has a scheduler of its own: change the rates there."
    if launch is not None and _PLATEAU in launch.words:
        return f"The rates of {_PLATEAU} are not multiples of a base rate."
    return ""


def _lr_scale(factor: float, launch: Launch | None, *, is_in_files: bool) -> Sequence[str]:
    """Return the option that scales the rates, including the run's original factor if known."""
    own = None if launch is None else launch.lr_scale
    # A resume takes the rates of the checkpoint.
    if (own is None and factor == 1.0) or (launch is None and is_in_files):
        return []
    total = factor * (1.0 if own is None else own)
    if not 0 < total < math.inf:
        raise ConfigurationError(
            f"--lr-scale {factor:g} multiplied by the run's own factor of {own:g} is {total:g}: "
            "give another."
        )
    return [f"--{LR_SCALE}", f"{total:.4g}"]


def _replaced(smoothing: str, options: Sequence[str]) -> set[str]:
    """Return the names of the run's options that the new options replace.

    If nothing is smoothed, PSS only observes, so the options of its detectors are kept.
    """
    own = _REPLACED[-2:] if smoothing == "none" else _REPLACED
    return {
        LR_SCALE,
        *(f"pss_{name}" for name in own),
        *(word.removeprefix("--") for word in options[::2]),
    }


def _launcher(processes: int | None) -> tuple[str, ...]:
    if processes is None:
        return (_LAUNCHER,)
    if processes == 1:
        return ()
    # --standalone picks a free port on this machine. `hf-pss` is a program and not a Python file.
    return ("torchrun", "--standalone", f"--nproc-per-node={processes}", "--no-python")


def _with_steps(words: Sequence[str], is_done: bool) -> Iterator[str]:
    """Yield the words of a launch. If no step is left, the number of steps is unknown."""
    for before, word in zip(("", *words), words, strict=False):
        yield f"<more than {word}>" if is_done and before == "--max_steps" else word


def _literal(value: str) -> str:
    try:
        float(value)
    except ValueError:
        return {"true": "True", "false": "False"}.get(value, repr(value))
    return value


# ---- The remarks that accompany the command ----


def _has_no_steps_left(log: RunLog | None, chosen: CheckpointReport, skipped: int) -> bool:
    end = None if log is None else log.max_steps
    return end is not None and 0 < end <= chosen.step + skipped


def _about_steps_left(log: RunLog | None, chosen: CheckpointReport, skipped: int) -> Iterator[str]:
    if not _has_no_steps_left(log, chosen, skipped):
        return
    end = "The copy skips all remaining" if skipped else "The run has completed all its"
    yield (
        f"{end} steps, so the training command needs a larger --max_steps to continue. If you know "
        "the step at which the run went wrong, call hf-pss rescue with --failed-at STEP."
    )


def _about_rate(
    rise: _Rise | None, failure: RunFailure | None, factor: float, *, is_exact: bool
) -> Iterator[str]:
    """Describe the learning rate, if it may have caused the harm or if it is scaled.

    Args:
        rise: How the logged rate rose after the checkpoint, or None if it did not.
        failure: How the run failed.
        factor: The factor on the schedule from the checkpoint on.
        is_exact: Whether the factor already includes the run's original factor.
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
            "To leave them as they were, call hf-pss rescue with --lr-scale 1."
        )
        if not is_exact:
            yield (
                "--pss_lr_scale multiplies the rates that your script gives. If the run was "
                "already scaled, in its own launch or an earlier one, multiply the two factors."
            )
    elif rise is not None:
        yield (
            f"{rose}, so the run may fail again. To lower it, call hf-pss rescue with --lr-scale "
            f"{rise.held:.2g}."
        )
    elif failure is not None and failure.kind == "slow_damage":
        yield (
            "The learning rate stays as it was. If it did the harm and does it again, lower it: "
            "call hf-pss rescue with --lr-scale 0.3."
        )


def _about_batches(found: Investigation, chosen: CheckpointReport, skipped: int) -> Iterator[str]:
    """State how many batches to skip so that the run passes the batch at which it failed.

    The checkpoint precedes that batch by a margin, so fewer steps would skip only sound batches.
    """
    failure, log = found.failure, found.log
    if failure is None or log is None or failure.kind not in ("spike", "non_finite"):
        return
    needed = failure.noticed_step - chosen.step + log.log_interval
    if failure.noticed_step < chosen.step or skipped >= needed:
        return
    text = (
        f"A batch may have caused the failure{_or_the_rate(log, failure)}. The resumed run reaches "
        f"this batch again by step {failure.noticed_step}. To skip it, call hf-pss rescue with "
        f"--write OUT --skip-batches {needed}. This costs the data of "
        f"{plural(needed, 'update')}, and the run ends that much earlier. Most of this data is "
        "sound."
    )
    end = chosen.step + needed
    if log.max_steps is not None and end >= log.max_steps:
        text += (
            " That leaves none of its steps: give the training command more than "
            f"--max_steps {end}."
        )
    yield text


def _or_the_rate(log: RunLog, failure: RunFailure) -> str:
    """Name the learning rate as a cause, unless the run has survived a higher rate before."""
    rates = [
        rate
        for row in log.rows
        if row.step <= failure.noticed_step and 0 < (rate := row.learning_rate or 0) < math.inf
    ]
    if not rates or not min(rates) < rates[-1] == max(rates):
        return ""
    return f", or a learning rate that is too high: {rates[-1]:.2g} was its highest value so far"


def _about_command(
    chosen: CheckpointReport, launch: Launch | None, processes: int | None
) -> Iterator[str]:
    """State which options the command holds, and which options the user must add."""
    if launch is None:
        yield (
            "The script must read PSSTrainingArguments, train with PSSTrainer, and pass "
            "args.resume_from_checkpoint to its train(). Give all other options as before: the "
            "same data, steps, batch size and number of processes."
        )
    elif launch.is_whole:
        yield (
            "Model, data, steps, batch size, seed, schedule, optimizer and the other options of "
            "PSS are those of the run. Add further options that you gave, such as --report_to."
        )
    else:
        yield (
            "An earlier version kept the options of the run. Model, data, steps, seed and schedule "
            "are in the command; give --pss_optim, --optim_args and other options of PSS as before."
        )
    if chosen.layout != "whole":
        yield "Start it as it was trained, under the same backend and launcher."
    elif processes is None:
        yield (
            "Several processes trained the run, and the random states of some are missing. Start "
            "the same number of processes with the launcher that you used before."
        )
    elif processes > 1:
        yield (
            f"{processes} processes trained the run, and the command starts the same number. If "
            "they were on several nodes, start the run as you did before."
        )


def _about_smoothing(
    smoothing: str,
    found: Investigation,
    *,
    has_nothing: bool,
    is_copy: bool,
    is_rate_covered: bool,
    is_skip_covered: bool,
) -> Iterator[str]:
    """Describe the smoothing, and what the user can change in the command.

    Args:
        smoothing: As in `plan_resume`.
        found: The findings about the run.
        has_nothing: Whether the weights hold nothing to smooth.
        is_copy: Whether the run continues from a repaired copy, which has the changes already.
        is_rate_covered: Whether other remarks describe the learning rate.
        is_skip_covered: Whether another remark describes how to skip batches.
    """
    if smoothing == "none":
        yield (
            "Nothing is smoothed, because PSS only observes. Leave --pss_observe_only out if PSS "
            "is to guard the resumed run."
        )
    if has_nothing:
        yield (
            "The weights hold no matrix that PSS smooths, so the run warns once and PSS only "
            "skips steps that are not finite."
        )
    if is_copy:
        return
    if smoothing == _DEFAULT and not has_nothing:
        yield (
            "Adapters start at zero and have no stable-rank floor. Nothing is smoothed when the "
            "run is resumed. After that, the default preset of PSS guards it."
        )
    if smoothing == _FLOOR and found.may_raise_to_noise:
        yield (
            "The weights may be damaged, so the floor is the stable rank of noise of their shapes."
        )
    elif smoothing == _FLOOR and found.choice.is_last_resort:
        yield (
            "The weights may be damaged, but they may also hold what a long training has learned, "
            "which the stable rank of noise as a floor would destroy. So the floor is taken from "
            "the checkpoint itself. Weights that you started from, such as pretrained ones, are "
            "the better start if they are at hand. If the run began from random weights, change "
            "the command to --pss_floor_reference noise and add --pss_smooth_on_resume true "
            "--pss_moments reset."
        )
    elif smoothing == _FLOOR:
        yield (
            "The floor is taken from the checkpoint itself, so nothing is smoothed at the start. "
            "Later it lets no matrix fall below the floor."
        )
    if not is_rate_covered:
        yield (
            "--learning_rate alone has no effect here, because a resumed run takes its base rate "
            "from scheduler.pt. To lower the rate, call hf-pss rescue with --lr-scale 0.5."
        )
    if not is_skip_covered:
        yield "To skip batches, call hf-pss rescue with --write OUT --skip-batches N."
