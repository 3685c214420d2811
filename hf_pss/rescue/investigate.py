"""A run's folder, read as a whole: its log, its checkpoints, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_pss.errors import ConfigurationError, PSSError, StateError
from hf_pss.inspection.matrix_survey import Progress
from hf_pss.records.strict_json import visible
from hf_pss.rescue.candidates import (
    CheckpointReport,
    Choice,
    checkpoint_folders,
    choose,
    judged,
    num_weight_bytes,
    rank_ratios,
    report_on,
)
from hf_pss.rescue.diagnosis import Diagnosis, Failure, diagnose
from hf_pss.rescue.early_ranks import early_damage
from hf_pss.runs.log import STATE_FILE, History, differ_at, leads_out, read_history
from hf_pss.runs.notes import read_notes
from hf_pss.runs.options import recorded_entropy

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
            log: a rate that was too high from the beginning shows in a comparison, or in the
            weights of small networks (`early_damage`).
        begin: Told how many bytes of weights will be read.
        progress: Told after each tensor.

    Raises:
        ConfigurationError: No such folder, or nothing of a run in it.
        StateError: There is no checkpoint, and no log that can be read.
        OSError: The folder cannot be read.
    """
    folders = checkpoint_folders(run_dir)
    history, of_others, unreadable = _newest_history(run_dir, folders)
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
        entropy = unigram_entropy or _known_entropy(run_dir, folders, reports)
        ranks = notes.rank_ratios or rank_ratios(reports)
        diagnosis = diagnose(history, notes, ranks=ranks, unigram_entropy=entropy)
        diagnosis = replace(diagnosis, notes=(*of_others, *diagnosis.notes))
        if entropy is not None:
            earlier = early_damage(history, reports, entropy, diagnosis.failure)
            diagnosis = diagnosis if earlier is None else _instead(diagnosis, earlier)
        margin_steps = max(margin_steps, history.log_interval)
    if failed_at is not None:
        diagnosis = _told(diagnosis or Diagnosis(None, (), None), failed_at)
    failure = None if diagnosis is None else diagnosis.failure
    checked = judged(reports, failure)
    choice = choose(checked, failure, margin_steps=margin_steps)
    return Investigation(run_dir, history, diagnosis, checked, choice, tuple(unreadable))


def _newest_history(
    run_dir: Path, folders: Sequence[Path]
) -> tuple[History | None, tuple[str, ...], list[str]]:
    """Return the log of the newest attempt as far as it is known, what to say of others, and why.

    A folder may hold the logs of two attempts, where a run was resumed in place: the newest is that
    which was written last, and of those that agree with it the one that reaches farthest is taken.

    Returns:
        The log; notes; files that could not be read, each with the reason.
    """
    unreadable: list[str] = []
    found: list[tuple[float, History]] = []
    for folder in dict.fromkeys([run_dir, *reversed(folders)]):
        path = folder / STATE_FILE
        if leads_out(folder, run_dir) or not path.exists():
            continue
        try:
            found.append((path.stat().st_mtime, read_history(path)))
        except (PSSError, OSError) as error:
            unreadable.append(f"{visible(path)}: {_reason(error)}")
    if not found:
        return None, (), unreadable
    _, last = max(found, key=lambda one: (one[0], one[1].global_step))
    histories = [history for _, history in found]
    taken = max((one for one in histories if differ_at(one, last) is None), key=_reach)
    others = [one for one in histories if differ_at(one, taken) is not None]
    said = (_of_another(taken, max(others, key=_reach)),) if others else ()
    return taken, said, unreadable


def _of_another(taken: History, other: History) -> str:
    names = [visible(f"{one.path.parent.name}/{STATE_FILE}") for one in (taken, other)]
    return (
        f"{names[0]} (up to step {taken.global_step}) and {names[1]} (up to step "
        f"{other.global_step}) differ from step {differ_at(taken, other)} on: the run was "
        "resumed or rolled back in place. Judged is the log that was written last; checkpoints "
        "may be of either attempt."
    )


def _reach(history: History) -> int:
    return history.global_step


def _told(diagnosis: Diagnosis, step: int) -> Diagnosis:
    kind = "slow_damage" if diagnosis.failure is None else diagnosis.failure.kind
    text = f"The run was bad from step {step} on, as you said."
    return _instead(diagnosis, Failure(kind, step, step, text))


def _instead(diagnosis: Diagnosis, failure: Failure) -> Diagnosis:
    """Put another failure in the place of the log's, which is told beside it."""
    found = diagnosis.failure
    notes = diagnosis.notes if found is None else (*diagnosis.notes, f"Found besides: {found.text}")
    return replace(diagnosis, failure=failure, notes=notes)


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
