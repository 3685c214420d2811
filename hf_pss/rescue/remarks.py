"""What to know before going on: the sentences beside the printed command."""

from __future__ import annotations

from collections.abc import Iterator

from hf_pss.rescue.checkpoints import CheckpointReport
from hf_pss.rescue.diagnosis import Failure
from hf_pss.rescue.history import History
from hf_pss.rescue.rates import Rise, scale_against

__all__ = [
    "about_batches",
    "about_changes",
    "about_command",
    "about_rate",
    "about_smoothing",
    "about_steps_left",
]


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
