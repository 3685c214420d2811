"""A run with `full` on two ranks measures what one process does, and a rank's error hangs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import Run, launch_ranks

OPTIONS = {"name": "paper", "health": "full", "health_every_steps": 4}
# Relative; of alignments, which may be near 0, absolute. Sums over ranks come in another order.
TOLERANCE = 5e-7  # 1.7e-7 sharded, 0 replicated
# Shards are told which matrices need more rounds by the last reading, four steps before.
FOLLOWED_TOLERANCE = 5e-2  # 2.2e-2, of the stable rank
FOLLOWED = {"spectral_norm", "stable_rank"}
# Means of two samples are not the numbers of both together; quotients of small differences.
NOT_COMPARED = ("step", "scalars", "sign_", "token_", "gram_", "spectral_norm_", "frobenius_norm_")
NOT_COMPARED += ("effective_rank_",)
FAILED = {"effective_rank", "low_rank_distance", "neighbour_alignment", "representations"}


def run(backend: str, folder: Path, *flags: str) -> tuple[Run, list[dict[str, Any]]]:
    found = launch_ranks(
        "health_worker.py",
        folder,
        backend,
        *("--options", json.dumps(OPTIONS), *flags),
        num_ranks=0 if backend == "one" else 2,
    )
    assert found.returncode == 0, found.errors
    assert all(rank["error"] is None for rank in found.ranks)
    lines = (folder / "pss_health.jsonl").read_text().splitlines()
    return found, [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2-full"])
def test_two_ranks_measure_what_one_does(backend: str, tmp_path: Path) -> None:
    _, alone = run("one", tmp_path / "one")
    _, together = run(backend, tmp_path / backend)
    assert [row["step"] for row in together] == [row["step"] for row in alone] == [4, 8]
    drifts: dict[str, float] = {}
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for metric in (key for key in one if not key.startswith(NOT_COMPARED)):
            assert one[metric].keys() == two[metric].keys()
            for name, expected in one[metric].items():
                scale = 1.0 if metric == "neighbour_alignment" else abs(expected)
                drift = abs(two[metric][name] - expected) / (scale or 1.0)
                drifts[metric] = max(drifts.get(metric, 0.0), drift)
    assert {"attention_logit_max", "attention_logit_bound", "spectral_norm"} <= drifts.keys()
    looser = FOLLOWED if backend != "ddp" else set()
    limits = {m: FOLLOWED_TOLERANCE if m in looser else TOLERANCE for m in drifts}
    assert {m: d for m, d in drifts.items() if d > limits[m]} == {}


@pytest.mark.slow
def test_metrics_that_raise_on_one_rank_hang_nobody(tmp_path: Path) -> None:
    found, rows = run("ddp", tmp_path, "--broken")
    assert [row["step"] for row in rows] == [4, 8]
    assert "spectral_norm" in rows[-1]
    assert "relative_update" in rows[-1]
    assert not FAILED & rows[-1].keys()
    for metric in FAILED:
        assert f"health metric {metric} failed" in found.errors
