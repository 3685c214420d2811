from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import gpt2, make_trainer
from labelled import INTERVALS, VERDICTS, LabelledLog, Part, labelled_logs, logged
from make_labelled_logs import FOLDER, part_of
from transformers import Trainer

from hf_pss.rescue.diagnosis import diagnose
from hf_pss.runs.records_files import RunRecords, read_log


def same(one: float, other: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=1e-3)


def test_each_part_holds_all_verdicts_and_kinds() -> None:
    kinds = {log.kind for log in labelled_logs()}
    assert len(kinds) >= 10
    for part in ("tune", "report"):
        logs = labelled_logs(part)
        assert {log.label.verdict for log in logs} == set(VERDICTS)
        assert len({log.kind for log in logs}) >= len(kinds) - 2


def test_names_are_unique_and_follow_the_rule_of_the_split() -> None:
    logs = labelled_logs(ambiguous=True)
    assert max(collections.Counter(log.name for log in logs).values()) == 1
    for log in logs:
        kind, scenario, seed = log.name.split("/")
        assert log.part == part_of(kind, scenario, int(seed))


def test_the_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.5e6


def test_labels_agree_with_themselves() -> None:
    for log in labelled_logs(ambiguous=True):
        label = log.label
        assert label.counts == (label.verdict != "ambiguous")
        has_failed = label.verdict not in ("sound", "spike_recovered", "ambiguous")
        assert label.is_failure == has_failed, log.name
        assert label.is_failure or not (label.may_go_back or label.may_smooth)
        assert len(log.losses) == len(log.grad_norms) == len(log.learning_rates)
        assert label.began is None or 1 <= label.began <= len(log.losses)


def test_the_derived_rows_are_those_that_the_trainer_logged() -> None:
    checked = [log for log in labelled_logs(ambiguous=True) if log.logged is not None]
    assert checked
    for log in checked:
        rows = log.rows(1)
        assert all(same(row["loss"], v) for row, v in zip(rows, log.logged, strict=True)), log.name


class _Losing(Trainer):
    """A trainer that loses some of its losses."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step + 1 in (3, 5, 6, 9):
            loss = loss * math.nan
        self.seen = [*getattr(self, "seen", []), float(loss)]
        return loss


@pytest.mark.parametrize("nan_filter", [True, False])
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_rows_of_longer_intervals_are_those_of_a_trainer(
    tmp_path: Path, interval: int, nan_filter: bool
) -> None:
    trainer = make_trainer(
        tmp_path,
        None,
        trainer_class=_Losing,
        model=gpt2(),
        max_steps=10,
        logging_steps=interval,
        logging_nan_inf_filter=nan_filter,
        save_strategy="no",
    )
    trainer.train()
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    derived = logged(trainer.seen, interval, nan_filter=nan_filter)
    assert len(rows) == len(derived)
    assert all(map(same, rows, derived))


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_written_log_can_be_read(tmp_path: Path, interval: int) -> None:
    log = next(log for log in labelled_logs("tune") if log.label.verdict == "sound")
    found = read_log(log.write(tmp_path, interval, scale=20.0))
    assert len(found.rows) == len(log.losses) // interval
    assert found.log_interval == interval


# ---- the verdicts of rescue on these logs ----


def verdict(log: LabelledLog, folder: Path, interval: int, scale: float = 1.0) -> str | None:
    found = diagnose(read_log(log.write(folder, interval, scale=scale)), RunRecords()).failure
    return None if found is None else found.kind


@pytest.mark.parametrize(("part", "least"), [("tune", 0.95), ("report", 0.92)])
def test_rescue_tells_failed_runs_from_others(part: Part, least: float, tmp_path: Path) -> None:
    """No sound run has failed. What is missed are mostly runs that have learned nothing."""
    num_right = num_all = 0
    for log in labelled_logs(part):
        for interval in INTERVALS:
            found = verdict(log, tmp_path, interval)
            if log.label.verdict == "sound":
                assert found is None, (log.name, interval)
            if log.label.verdict == "non_finite":
                assert found == "non_finite", (log.name, interval)
            num_right += (found is not None) == log.label.is_failure
            num_all += 1
    assert num_right >= least * num_all


@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e4])
def test_the_unit_of_the_loss_changes_no_verdict(scale: float, tmp_path: Path) -> None:
    for log in labelled_logs():
        expected = verdict(log, tmp_path, 5)
        assert verdict(log, tmp_path, 5, scale) == expected, log.name
