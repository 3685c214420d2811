"""A fault of one rank alone ends every rank's run with an error, or all ranks go on together."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import launch_ranks

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")]
BACKENDS = ["ddp", "fsdp2-full", *SLOW]
LAST_STEP = 8
AGREED_STEP = 5  # where ranks that log, evaluate and save nothing next agree


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rank_ends_well_with_weights_that_others_do_not_have(
    backend: str, tmp_path: Path
) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test` installs it")
    # DeepSpeed ZeRO-2 makes a process group of its own, with torch's time-out of 30 minutes.
    hang = () if backend == "zero2" else ("hang",)
    faults = ("weight", "moment", "last weight", "stop", *hang)
    run = launch_ranks("faults_worker.py", tmp_path, backend, ",".join(faults), num_ranks=2)
    assert (run.returncode != 0) == bool(hang), run.errors[-3000:]
    first, second = run.ranks
    for rank in run.ranks:
        for fault in ("weight", "moment"):
            assert rank[fault]["error"].startswith("NonFiniteError: Stopped before the update")
            assert "skipping steps cannot repair" in rank[fault]["error"]
            assert rank[fault]["step"] < LAST_STEP
        for fault in ("weight", "last weight"):
            assert "of rank 1 is not finite" in rank[fault]["error"]
        assert rank["stop"]["error"] is None
        assert rank["stop"]["step"] == AGREED_STEP
    assert "model.embed_tokens.weight of rank 1" in second["weight"]["error"]
    assert first["stop"]["digest"] == second["stop"]["digest"]
    if hang:
        assert "Timed out" in first["hang"]["error"]
