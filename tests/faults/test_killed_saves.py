"""kill -9 in every phase of a save, and at random moments: nothing is lost, nothing begins anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preloaded import PATIENCE_SECONDS, start

HERE = Path(__file__).parent
SEED = 7
NUM_KILLS = 200


def run_worker(
    out: Path, *words: str, timeout_seconds: float = PATIENCE_SECONDS
) -> list[dict[str, Any]]:
    with start(HERE / "kill_worker.py", out, *words) as worker:
        _, errors = worker.communicate(timeout_seconds)
        assert worker.returncode == 0, errors[-3000:]
    found: list[dict[str, Any]] = json.loads((out / "result.json").read_text())
    return found


# Both save with SafeCheckpointsMixin; SafeTrainer is a Trainer with this mixin and without PSS.
@pytest.fixture(
    scope="module",
    params=["PSSTrainer", pytest.param("SafeTrainer", marks=pytest.mark.slow)],
)
def lives(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run_worker(tmp_path_factory.mktemp("phases"), "phases", request.param)


def test_a_kill_in_any_phase_of_a_save_loses_at_most_that_save(lives: list[dict[str, Any]]) -> None:
    assert len(lives) == 11
    for life in lives:
        assert life["killed"] == -9, life
        assert life["ended"] == 0, life
        # The fifth save was being written, or was there already.
        assert life["began"] in (4, 5), life
        assert life["began"] >= life["newest"] or life["phase"].startswith("half"), life
        assert life["differences"] == [], life
        assert "_pss_saving" not in life["left"], life
    kept = {life["phase"]: life["began"] for life in lives}
    # From the marker on, a save is kept although it had no name yet.
    assert kept["marker written"] == kept["before it gets its name"] == 5
    assert kept["between two names"] == 5
    assert kept["all on the disk"] == 4


def test_a_kill_in_any_phase_leaves_no_checkpoint_half_removed(lives: list[dict[str, Any]]) -> None:
    """Rotation is one of the phases: it must take a checkpoint's name away before the files."""
    assert {life["phase"]: life["half_removed"] for life in lives if life["half_removed"]} == {}


def kill(out: Path, kind: str, num_kills: int, timeout_seconds: float) -> None:
    runs = run_worker(out, kind, str(num_kills), str(SEED), timeout_seconds=timeout_seconds)
    assert sum(run["lives"] for run in runs) >= num_kills
    assert sum(run["fresh_starts"] for run in runs) == 0
    assert sum(run["failed"] for run in runs) == 0
    assert [run["differences"] for run in runs] == [[]] * len(runs)
    assert [run["half_removed"] for run in runs] == [[]] * len(runs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["moments", "operations"])
def test_200_kills_lose_no_run(kind: str, tmp_path: Path) -> None:
    """``pytest tests/faults/test_killed_saves.py -m slow -k operations`` runs the 200 at files."""
    kill(tmp_path, kind, NUM_KILLS, timeout_seconds=1700)
