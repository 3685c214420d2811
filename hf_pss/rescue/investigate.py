"""A run's folder, read as a whole: its log, its checkpoints, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.names import visible
from hf_pss.inspection.survey import Progress
from hf_pss.rescue.checkpoints import (
    CheckpointReport,
    checkpoint_folders,
    judged,
    num_weight_bytes,
    rank_ratios,
    report_on,
)
from hf_pss.rescue.choice import Choice, choose
from hf_pss.rescue.command import recorded_entropy
from hf_pss.rescue.diagnosis import Diagnosis, Failure, diagnose
from hf_pss.rescue.history import STATE_FILE, History, read_history
from hf_pss.rescue.notes import read_notes

__all__ = ["Investigation", "investigate"]

_MOST_TOKENS = 10**8


@dataclass(frozen=True, slots=True)
class Investigation:
    """What was found, and what was chosen."""

    run_dir: Path
    history: History | None
    """None where no log could be read."""
    diagnosis: Diagnosis | None
    checkpoints: tuple[CheckpointReport, ...]
    """The oldest first."""
    choice: Choice
    unreadable: tuple[str, ...]
    """Logs that could not be read, and why."""


def investigate(
    run_dir: Path,
    *,
    margin_steps: int,
    unigram_entropy: float | None = None,
    failed_at: int | None = None,
    begin: Callable[[int], None] = lambda num_bytes: None,
    progress: Progress | None = None,
) -> Investigation:
    """Read a run; cost: all its safetensors are read once, one tensor at a time.

    Args:
        run_dir: Its folder, or that of one checkpoint.
        margin_steps: See `choose`.
        unigram_entropy: Of the training text, in nats; where None, what `hf-pss train` kept, or
            ln(vocab_size).
        failed_at: The step from which on the run was bad, where the caller knows better than the
            log: a rate that was too high from the beginning shows in a comparison alone.
        begin: Told how many bytes of weights will be read.
        progress: Told after each tensor.

    Raises:
        ConfigurationError: No such folder, or nothing of a run in it.
        StateError: There is no checkpoint, and no log that can be read.
        OSError: The folder cannot be read.
    """
    folders = checkpoint_folders(run_dir)
    history, unreadable = _newest_history(run_dir, folders)
    if not folders and history is None:
        if unreadable:
            raise StateError(unreadable[0])
        raise ConfigurationError(
            f"{visible(run_dir)} holds no checkpoint-… and no {STATE_FILE}. Give the output_dir "
            "of a run."
        )
    begin(num_weight_bytes(folders))
    reports = [report_on(folder, progress) for folder in folders]
    diagnosis = None
    if history is not None:
        notes = read_notes(run_dir)
        diagnosis = diagnose(
            history,
            notes,
            ranks=notes.rank_ratios or rank_ratios(reports),
            unigram_entropy=unigram_entropy or _known_entropy(run_dir, folders, reports),
        )
        margin_steps = max(margin_steps, history.log_interval)
    if failed_at is not None:
        diagnosis = _told(diagnosis or Diagnosis(None, (), None), failed_at)
    failure = None if diagnosis is None else diagnosis.failure
    checked = judged(reports, failure)
    choice = choose(checked, failure, margin_steps=margin_steps)
    return Investigation(run_dir, history, diagnosis, checked, choice, tuple(unreadable))


def _newest_history(run_dir: Path, folders: Sequence[Path]) -> tuple[History | None, list[str]]:
    """Return the log that reaches farthest, of the run or of its newest readable checkpoint."""
    unreadable: list[str] = []
    found: list[History] = []
    for folder in dict.fromkeys([run_dir, *reversed(folders)]):
        path = folder / STATE_FILE
        if not path.exists():
            continue
        try:
            found.append(read_history(path))
        except (PSSError, OSError) as error:
            unreadable.append(f"{visible(path)}: {_reason(error)}")
            continue
        if folder != run_dir:
            break
    return max(found, key=lambda one: one.global_step, default=None), unreadable


def _told(diagnosis: Diagnosis, step: int) -> Diagnosis:
    found = diagnosis.failure
    notes = diagnosis.notes if found is None else (*diagnosis.notes, f"By its log: {found.text}")
    kind = "slow_damage" if found is None else found.kind
    text = f"The run was bad from step {step} on, as you said."
    return replace(diagnosis, failure=Failure(kind, step, step, text), notes=notes)


def _known_entropy(
    run_dir: Path, folders: Sequence[Path], reports: Sequence[CheckpointReport]
) -> float | None:
    kept = recorded_entropy(folders[-1].parent if folders else run_dir)
    return _entropy_bound(reports) if kept is None else kept


def _entropy_bound(reports: Sequence[CheckpointReport]) -> float | None:
    for one in reversed(reports):
        if one.inspection is None:
            continue
        config = one.inspection.checkpoint.config
        for part in (config, config.get("text_config")):
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if type(size) is int and 1 < size <= _MOST_TOKENS:
                return math.log(size)
    return None


def _reason(error: Exception) -> str:
    return visible(error.strerror if isinstance(error, OSError) else error)
