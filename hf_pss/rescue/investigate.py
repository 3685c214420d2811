"""Read the folder of a run: its log, its checkpoints, and the checkpoint to continue from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.matrix_survey import Progress
from hf_pss.records.strict_json import reason_of, visible
from hf_pss.rescue.candidates import (
    CheckpointReport,
    Choice,
    checkpoint_folders,
    choose,
    judged,
    num_weight_bytes,
    report_on,
)
from hf_pss.rescue.diagnosis import Diagnosis, RunFailure, diagnose
from hf_pss.rescue.early_ranks import early_damage
from hf_pss.runs.folder import STATE_FILE, leads_out
from hf_pss.runs.log import RunLog, differ_at, read_log
from hf_pss.runs.options import recorded_entropy
from hf_pss.runs.records_files import rank_ratios, read_run_records

__all__ = ["Investigation", "investigate"]

_MOST_TOKENS = 10**8
_REACH = attrgetter("global_step")


@dataclass(frozen=True, slots=True)
class Investigation:
    """The findings about a run, and the choice of a checkpoint."""

    run_dir: Path
    log: RunLog | None
    """The log of the run, or None if no log could be read."""
    diagnosis: Diagnosis | None
    checkpoints: tuple[CheckpointReport, ...]
    """The checkpoints, oldest first."""
    choice: Choice
    unreadable: tuple[str, ...]
    """The logs that could not be read, each with the reason."""

    @property
    def failure(self) -> RunFailure | None:
        """How the run failed, or None if no failure was found."""
        return None if self.diagnosis is None else self.diagnosis.failure


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
            that `hf-pss train` has saved is used, or else ln(vocab_size).
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
            f"{visible(run_dir)} holds no checkpoint-… and no {STATE_FILE}. Give the output_dir "
            "of a run."
        )
    begin(num_weight_bytes(folders))
    reports = [report_on(folder, progress) for folder in folders]
    diagnosis = None
    if log is not None:
        records = read_run_records(run_dir)
        entropy = unigram_entropy or _known_entropy(run_dir, folders, reports)
        ranks = records.rank_ratios or rank_ratios((one.step, one.stable_ranks) for one in reports)
        diagnosis = diagnose(log, records, ranks=ranks, unigram_entropy=entropy)
        diagnosis = replace(diagnosis, notes=(*of_others, *diagnosis.notes))
        if entropy is not None:
            earlier = early_damage(log, reports, entropy, diagnosis.failure)
            diagnosis = diagnosis if earlier is None else _instead(diagnosis, earlier)
        margin_steps = max(margin_steps, log.log_interval)
    if failed_at is not None:
        diagnosis = diagnosis or Diagnosis(None, (), None)
        kind = "slow_damage" if diagnosis.failure is None else diagnosis.failure.kind
        text = f"You stated that the run was bad from step {failed_at} on."
        diagnosis = _instead(diagnosis, RunFailure(kind, failed_at, failed_at, text))
    failure = None if diagnosis is None else diagnosis.failure
    checked = judged(reports, failure)
    choice = choose(checked, failure, margin_steps=margin_steps)
    return Investigation(run_dir, log, diagnosis, checked, choice, tuple(unreadable))


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
    for folder in dict.fromkeys([run_dir, *reversed(folders)]):
        path = folder / STATE_FILE
        if leads_out(folder, run_dir) or not path.exists():
            continue
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


def _instead(diagnosis: Diagnosis, failure: RunFailure) -> Diagnosis:
    """Replace the failure that the log shows, and mention the replaced failure in a note."""
    found = diagnosis.failure
    notes = diagnosis.notes if found is None else (*diagnosis.notes, f"Also found: {found.text}")
    return replace(diagnosis, failure=failure, notes=notes)


def _known_entropy(
    run_dir: Path, folders: Sequence[Path], reports: Sequence[CheckpointReport]
) -> float | None:
    kept = recorded_entropy(folders[-1].parent if folders else run_dir)
    if kept is not None:
        return kept
    for one in reversed(reports):
        config = {} if one.inspection is None else one.inspection.checkpoint.config
        for part in (config, config.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and 1 < size <= _MOST_TOKENS:
                return math.log(size)
    return None
