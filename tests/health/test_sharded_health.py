"""Three ranks measure what one does: FSDP2's DTensors and DDP's replicas, with gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from preloaded import start_ranks

WORKER = Path(__file__).with_name("sharded_health_worker.py")
# Relative; of alignments, which may be near 0, absolute. Matrices are gathered bit for bit, sums
# over shards are not; nor are products whose batch another shape of stack has changed.
TOLERANCE = 6e-7  # 2.1e-7
# With shards the last reading decides which matrices need more rounds, in one process the present.
FOLLOWED_TOLERANCE = 1e-3  # 3.5e-4


@pytest.mark.slow
def test_shards_and_replicas_are_measured_as_the_whole(tmp_path: Path) -> None:
    with start_ranks(3, WORKER, tmp_path) as group:
        _, errors = group.communicate()
        assert group.returncode == 0, errors
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank*.json"))]
    assert len(ranks) == 3
    for rank in ranks:
        for kind, drifts in rank.items():
            for metric, drift in drifts.items():
                limit = FOLLOWED_TOLERANCE if metric == "followed" else TOLERANCE
                assert drift <= limit, (kind, metric)
