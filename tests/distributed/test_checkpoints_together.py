"""Ranks write one checkpoint together, whole or not at all; and stop, and go back, together."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import launch, launch_ranks

from hf_pss.records.events import EventKind
from hf_pss.runs.checkpoint import examine, read_marker
from hf_pss.runs.folder import checkpoints_by_step
from hf_pss.runs.records_files import parse_record, read_lines

# Of each rank, or of the format, beside what every checkpoint has.
OWN_FILES = {
    "ddp": {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"},
    "fsdp2-full": {"rng_state_1.pth", "optimizer.bin", "pytorch_model_fsdp.bin"},
    "fsdp2-sharded": {"rng_state_1.pth", "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"},
    "zero2": {"rng_state_1.pth", "latest", "scheduler.pt"},
    "zero3": {"rng_state_1.pth", "latest", "scheduler.pt"},
}


@pytest.mark.parametrize(
    "backend",
    [pytest.param(x, marks=[pytest.mark.slow] if "zero" in x else []) for x in OWN_FILES],
)
def test_all_ranks_files_are_in_one_checkpoint_with_one_marker(
    backend: str, tmp_path: Path
) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test` installs it")
    run = launch(backend, tmp_path / "run")
    assert [rank["error"] for rank in run.ranks] == [None, None], run.errors[-3000:]
    found = checkpoints_by_step(run.folder)
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-8"]
    for path in found:
        assert examine(path).is_whole, examine(path)
        marker = read_marker(path)
        assert marker is not None
        assert OWN_FILES[backend] <= marker.keys()
    assert not (run.folder / "_pss_saving").exists()
    resumed = launch(backend, tmp_path / "again", resume=run.checkpoint)
    assert [rank["digest"] for rank in resumed.ranks] == [rank["digest"] for rank in run.ranks]


@pytest.mark.parametrize("backend", ["fsdp2-full", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_resume_at_a_lower_rate(backend: str, tmp_path: Path) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test` installs it")
    run = launch(backend, tmp_path / "run")
    scale = {"pss_lr_scale": 0.25}
    lower = launch(backend, tmp_path / "lower", resume=run.checkpoint, trainer=scale)
    assert [rank["error"] for rank in lower.ranks] == [None, None], lower.errors[-3000:]
    for rank, lower_rank in zip(run.ranks, lower.ranks, strict=True):
        assert lower_rank["rates"] == [rate / 4 for rate in rank["rates"][4:]]
        assert len(lower_rank["rates"]) == 4


def test_one_rank_that_is_to_stop_stops_all_of_them_saved(tmp_path: Path) -> None:
    run = launch_ranks("stop_worker.py", tmp_path, "ddp", num_ranks=2)
    assert [rank["code"] for rank in run.ranks] == [143, 143], run.errors[-3000:]
    assert [rank["step"] for rank in run.ranks] == [5, 5]  # where they next agreed
    (last,) = checkpoints_by_step(tmp_path)
    assert last.name == "checkpoint-5"
    assert examine(last).is_whole


@pytest.mark.parametrize("backend", ["ddp", "fsdp2-full"])
def test_ddp_goes_back_in_the_same_processes_and_fsdp2_ends_with_the_error(
    backend: str, tmp_path: Path
) -> None:
    options, recovery = {"on_nonfinite": "stop"}, {"on_failure": "rollback"}
    run = launch(backend, tmp_path, options=options, recovery=recovery, fault="nan")
    events = read_lines(tmp_path / "pss_events.jsonl", parse_record).rows
    if backend == "ddp":
        assert [rank["error"] for rank in run.ranks] == [None, None], run.errors[-3000:]
        first, second = run.ranks
        assert first["digest"] == second["digest"]
        back = [event for event in events if getattr(event, "kind", None) is EventKind.FAILURE]
        assert len(back) == 1
        assert "back to checkpoint-4, batches of steps 5 to 5 skipped" in back[0].reason
        assert examine(tmp_path / "checkpoint-8").is_whole
    else:
        assert all("NonFiniteError" in rank["error"] for rank in run.ranks)
        assert examine(tmp_path / "checkpoint-4").is_whole
