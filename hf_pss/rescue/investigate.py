"""Read the folder of a run: its log, its checkpoints, and the checkpoint to continue from.

The log cannot show that the learning rate was too high from the beginning. The loss still falls,
only by less. But if the network began from noise, its stable ranks fall farther within
the first hundred steps than in a sound run, so `early_damage` detects the harm from the weights
alone. We chose the following rule. For each matrix of the repeated blocks, divide the stable
rank by the stable rank of noise of the same shape. The rule is met if the median of these shares is
below `LOW_SHARE` in a checkpoint of the first `_EARLY_STEPS` steps.

We measured the lowest share of each run with GPT-2 (2 layers, width 64, AdamW, 240 steps, a
checkpoint every 20 steps, seeds 0 to 9). At a learning rate of 3e-3 it was 0.195 to 0.308. At 1e-2
it was 0.100 to 0.184, and in 9 of 10 runs it was below a sixth. The share follows the harm rather
than the rate. At 5e-3, the four runs below a sixth ended 0.16 to 0.32 nats above the runs at 3e-3.
The six other runs had shares of 0.187 to 0.265 and ended at most 0.05 nats above.

The rule also holds at widths 128 and 256 and with 6 layers. It missed two Llama runs at 1e-2, whose
shares were 0.207 and 0.228. One run at 1e-2 that it found was hardly worse. Pretrained weights have
lower stable ranks by nature, and larger networks and longer runs may have them as well, so the rule
is not applied to these.

A network from noise is known by the options of `hf-pss train` or by its first loss. If the first
logged loss is the mean of several steps, the loss of the first step is estimated. If that remains
below the entropy, the log does not show how the run began, and the low ranks become a note.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.matrix_survey import Progress
from hf_pss.inspection.post_mortem import PostMortem, read_post_mortem
from hf_pss.records.strict_json import finite_or_none, reason_of, visible
from hf_pss.rescue.candidates import (
    CheckpointReport,
    Choice,
    Inspected,
    checkpoint_folders,
    choose,
    judged,
    num_weight_bytes,
    report_on,
)
from hf_pss.rescue.diagnosis import FailureKind, RunFailure, diagnose
from hf_pss.runs.folder import STATE_FILE, leads_out
from hf_pss.runs.options import began_from_noise, recorded_entropy
from hf_pss.runs.records_files import RunLog, differ_at, rank_ratios, read_log, read_run_records

_MOST_TOKENS = 10**8
_REACH = attrgetter("global_step")

LOW_SHARE = 1 / 6
_EARLY_STEPS = 1000
_RISES = ("spike", "slow_damage")
# The largest allowed size of the smaller side of a matrix.
_WIDEST = 256
_FEWEST_MATRICES = 8
# If a network has learned nothing, its first loss is at least the entropy minus this number.
_WITHIN_NATS = 0.1
# The loss of other tasks can be far above any entropy [ours].
_MOST_ABOVE_NATS = 1.0
# The first loss is estimated from a mean as if it were that of at most this many steps, because
# the estimate multiplies the noise of the losses by this number [ours].
_MOST_ESTIMATED_STEPS = 10


@dataclass(frozen=True, slots=True)
class Investigation:
    """The findings about a run, and the choice of a checkpoint."""

    run_dir: Path
    log: RunLog | None
    """The log of the run, or None if no log could be read."""
    failure: RunFailure | None
    """How the run failed, or None if no failure was found."""
    notes: tuple[str, ...]
    """Further findings in the log. See `Diagnosis`."""
    checkpoints: tuple[CheckpointReport, ...]
    """The checkpoints, oldest first."""
    choice: Choice
    unreadable: tuple[str, ...]
    """The logs that could not be read, each with the reason."""
    began_from_noise: bool = False
    """Whether the run is known to have begun from random weights."""
    post_mortem: PostMortem | None = None
    """What the run has recorded about its spike, or None if it has recorded no spike."""

    @property
    def may_raise_to_noise(self) -> bool:
        """Whether the noise floor on the chosen checkpoint can destroy nothing that was learned.

        This holds only for a last resort. Either its weights do not look trained, or the damage
        began so soon after a start from random weights that the low stable ranks are the damage.
        """
        chosen, failure = self.choice.chosen, self.failure
        if chosen is None or chosen.is_adapter or not self.choice.is_last_resort:
            return False
        is_early = failure is not None and failure.onset_step <= _EARLY_STEPS
        return not chosen.may_be_trained or (self.began_from_noise and is_early)


def investigate(
    run_dir: Path,
    *,
    margin_steps: int,
    unigram_entropy: float | None = None,
    failed_at: int | None = None,
    begin: Callable[[int], None] = lambda num_bytes: None,
    progress: Progress | None = None,
) -> Investigation:
    """Find out how a run failed, and choose a checkpoint. All safetensors are read once.

    The function reads one tensor at a time.

    Args:
        run_dir: The folder of the run, or the folder of one checkpoint.
        margin_steps: The margin that `hf_pss.rescue.candidates` describes.
        unigram_entropy: The unigram entropy of the training text in nats. If it is None, the value
            that `hf-pss train` has saved is used. If there is none, no loss is compared with an
            entropy, because the log does not tell the unit of the loss.
        failed_at: The first step at which the run was bad, if the caller knows more than the log
            shows. For example, a learning rate that was too high from the beginning shows only in a
            comparison with other runs, or in the weights of small networks (`early_damage`).
        begin: A function that is called with the number of bytes of weights to read.
        progress: A function that is called after each tensor.

    Raises:
        ConfigurationError: The folder does not exist, or it holds no files of a run.
        StateError: The folder holds neither a checkpoint nor a readable log.
        OSError: The folder cannot be read.
    """
    folders = checkpoint_folders(run_dir)
    log, of_others, unreadable = _newest_log(run_dir, folders)
    if not folders and log is None:
        if unreadable:
            raise StateError(unreadable[0])
        raise ConfigurationError(
            f"{visible(run_dir)} holds no checkpoint-N and no {STATE_FILE}. Give the output_dir "
            "of a run, or one checkpoint."
        )
    begin(num_weight_bytes(folders))
    inspected: Inspected = {}
    read = [report_on(folder, progress, inspected=inspected) for folder in folders]
    reports = [one for one in read if one.path.is_dir()]
    failures: list[RunFailure] = []  # the last one counts
    notes = [
        f"{visible(one.path.name)} was removed while rescue was reading, so the run may still be "
        "alive."
        for one in read
        if one not in reports
    ]
    own = began_from_noise(folders[-1].parent if folders else run_dir)
    is_from_noise = own is True
    if log is not None:
        records = read_run_records(run_dir)
        known = unigram_entropy or recorded_entropy(folders[-1].parent if folders else run_dir)
        ranks = records.rank_ratios or rank_ratios((one.step, one.stable_ranks) for one in reports)
        diagnosis = diagnose(log, records, ranks=ranks, unigram_entropy=known)
        entropy = known or _entropy_of_vocabulary(reports)
        early = early_damage(log, reports, diagnosis.failure)
        is_fresh = _began_from_noise(log, entropy) if own is None else own
        failures += [one for one in (diagnosis.failure, early if is_fresh else None) if one]
        notes += [*of_others, *diagnosis.notes]
        if early is not None and is_fresh is None:
            notes.append(
                f"If the run began from random weights, it was damaged early. {early.text} In this "
                f"case call hf-pss rescue with --failed-at {early.onset_step}."
            )
        is_from_noise = is_from_noise or (own is None and _shows_noise(log, entropy))
        margin_steps = max(margin_steps, log.log_interval)
    if failed_at is not None:
        kind: FailureKind = failures[-1].kind if failures else "slow_damage"
        text = f"You stated that the run was bad from step {failed_at} on."
        failures.append(RunFailure(kind, failed_at, failed_at, text))
    notes += [f"Also found: {one.text}" for one in failures[:-1]]
    failure = failures[-1] if failures else None
    checked = judged(reports, failure)
    choice = choose(checked, failure, margin_steps=margin_steps)
    return Investigation(
        *(run_dir, log, failure, tuple(notes), checked, choice, tuple(unreadable)),
        is_from_noise,
        read_post_mortem(run_dir, around_step=_first_step_of(failure, log)),
    )


def _first_step_of(failure: RunFailure | None, log: RunLog | None) -> int | None:
    """Return the first step at which a failure may have begun. A logged row covers many steps."""
    if failure is None:
        return None
    return failure.onset_step - (0 if log is None else log.log_interval - 1)


def _newest_log(
    run_dir: Path, folders: Sequence[Path]
) -> tuple[RunLog | None, tuple[str, ...], list[str]]:
    """Return the log of the newest attempt, notes on other attempts, and unreadable files.

    If a run was resumed in place, its folder may hold the logs of two attempts. The log that was
    written last belongs to the newest attempt. Several logs may agree with that one, and the
    function returns the longest of them.
    """
    unreadable: list[str] = []
    found: list[tuple[float, RunLog]] = []
    seen = set()
    for folder in dict.fromkeys([run_dir, *reversed(folders)]):
        path = folder / STATE_FILE
        if leads_out(folder, run_dir) or not path.exists() or os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))  # several links to one log would take its memory each
        try:
            found.append((path.stat().st_mtime, read_log(path)))
        except (PSSError, OSError) as error:
            unreadable.append(f"{visible(path)}: {reason_of(error)}")
    if not found:
        return None, (), unreadable
    _, last = max(found, key=lambda one: (one[0], one[1].global_step))
    logs = [log for _, log in found]
    taken = max((one for one in logs if differ_at(one, last) is None), key=_REACH)
    others = [one for one in logs if differ_at(one, taken) is not None]
    if not others:
        return taken, (), unreadable
    other = max(others, key=_REACH)
    names = [visible(f"{one.path.parent.name}/{STATE_FILE}") for one in (taken, other)]
    note = (
        f"{names[0]} (up to step {taken.global_step}) and {names[1]} (up to step "
        f"{other.global_step}) differ from step {differ_at(taken, other)} on: the run was "
        "resumed or rolled back in place. The diagnosis uses the log that was written last. The "
        "checkpoints may belong to either attempt."
    )
    return taken, (note,), unreadable


def _entropy_of_vocabulary(reports: Sequence[CheckpointReport]) -> float | None:
    for one in reversed(reports):
        config = {} if one.inspection is None else one.inspection.checkpoint.config
        for part in (config, config.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and 1 < size <= _MOST_TOKENS:
                return math.log(size)
    return None


def _began_from_noise(log: RunLog, unigram_entropy: float | None) -> bool | None:
    """Return whether the first loss shows weights that knew nothing, or None if it is not logged.

    The first row can hold the mean of k steps. If the loss falls, no other of these steps is below
    the mean of the next row. So the loss of the first step is at most k - 1 times the difference of
    the two means above the first mean.
    """
    rows = log.training[:2]
    if unigram_entropy is None or not rows:
        return False
    losses = [math.nan if row.loss is None else row.loss for row in rows]
    least, first_step = unigram_entropy - _WITHIN_NATS, rows[0].step
    if losses[0] >= least or first_step == 1:
        return losses[0] >= least
    num_others = min(first_step, _MOST_ESTIMATED_STEPS) - 1
    return losses[0] + num_others * (losses[0] - losses[-1]) >= least or None


def _shows_noise(log: RunLog, unigram_entropy: float | None) -> bool:
    """Return whether the loss of the first step alone is that of random weights."""
    row = next(iter(log.training), None)
    if unigram_entropy is None or row is None or row.step != 1 or row.loss is None:
        return False
    return -_WITHIN_NATS <= row.loss - unigram_entropy <= _MOST_ABOVE_NATS


def early_damage(
    log: RunLog, reports: Sequence[CheckpointReport], found: RunFailure | None
) -> RunFailure | None:
    """Apply the rule to a run that began from noise. The cost is negligible.

    Args:
        log: The log of the run.
        reports: The reports on all checkpoints. Only checkpoints that could be measured count.
        found: The failure that the log shows. A rise in the first steps may itself be the result of
            earlier harm, so the rule is applied to the checkpoints before it.
    """
    if found is not None and (found.kind not in _RISES or found.onset_step > _EARLY_STEPS):
        return None
    last = _EARLY_STEPS if found is None else found.onset_step - 1
    early = [one for one in reports if one.step <= last and one.problem is None]
    shares = [(one.step, share) for one in early if (share := noise_share(one)) is not None]
    low = [(step, share) for step, share in sorted(shares) if share < LOW_SHARE]
    if not low:
        return None
    step, share = low[0]
    least = min(share for _, share in low)
    rates = [rate for row in log.rows if (rate := finite_or_none(row.learning_rate)) is not None]
    peak = f" ({max(rates):.2g} at its peak)" if rates else ""
    return RunFailure(
        kind="slow_damage",
        onset_step=1,
        noticed_step=step,
        text=f"The loss does not show it, but the weights do: at step {step} the median matrix of "
        f"the blocks had {share:.1%} of the stable rank of noise of its shape, at the lowest "
        f"{least:.1%}. In sound runs of small networks it stays above {LOW_SHARE:.1%}. The likely "
        f"cause is a learning rate that was too high from the beginning{peak}.",
    )


def noise_share(report: CheckpointReport) -> float | None:
    """Return the median ratio of a block matrix's stable rank to the stable rank of noise.

    The result is None if the checkpoint has too few matrices, or if a matrix is larger than those
    for which the rule was measured.
    """
    matrices = () if report.inspection is None else report.inspection.matrices
    blocks = [one.health for one in matrices if one.health.place.block is not None]
    if len(blocks) < _FEWEST_MATRICES or max(min(one.shape) for one in blocks) > _WIDEST:
        return None
    shares = [one.stable_rank / one.noise for one in blocks]
    return statistics.median(shares) if all(map(math.isfinite, shares)) else None
