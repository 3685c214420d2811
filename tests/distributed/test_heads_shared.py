"""Heads one by one, and QK-clip, on two ranks: as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import Run, launch

BACKENDS = ["ddp", "fsdp2-full", pytest.param("fsdp2-sharded", marks=pytest.mark.slow)]

# Against one process that accumulates both ranks' batches, in float32 over 8 steps; absolute,
# weights are of the order 0.05.
WEIGHT_DRIFT = 4e-8  # 0.0; 1.5e-8 where a norm is summed in another order, as with other optimizers
# Means over three ranks round otherwise than sums of three micro-batches.
THIRDS_DRIFT = 6e-6  # 2.0e-6; 4.6e-6 without the clip
CLIP_EFFECT = 0.016  # 0.047 between clipped and not, which the drift is measured against

HEADS = "dtype=float32,per_head=true"
CLIPPED = f"{HEADS},qk_clip=0.001"


def trained(backend: str, folder: Path, words: str, *, num_ranks: int = 2, **more: Any) -> Run:
    """Train; ``trainer``, ``model`` and ``resume`` are the worker's."""
    chosen = {"pss_optim": "normuon", "pss_optim_args": words, **more.pop("trainer", {})}
    options: dict[str, Any] = {"options": {"detectors": []}, "trainer": chosen, **more}
    run = launch(backend, folder, num_ranks=num_ranks, **options)
    assert run.returncode == 0, run.errors[-3000:]
    assert [rank["error"] for rank in run.ranks] == [None] * len(run.ranks)
    return run


def drift(one: Run, other: Run) -> float:
    pairs = zip(one.weights.values(), other.weights.values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("heads")
    return {words: trained("one", folder / words, words) for words in (HEADS, CLIPPED)}


def test_the_clip_has_an_effect(alone: dict[str, Run]) -> None:
    assert drift(alone[HEADS], alone[CLIPPED]) > CLIP_EFFECT


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_heads_are_those_of_one_process(
    backend: str, alone: dict[str, Run], tmp_path: Path
) -> None:
    run = trained(backend, tmp_path / "run", CLIPPED)
    first, second = run.ranks
    assert first["digest"] == second["digest"], "replicas are equal bit for bit"
    assert drift(run, alone[CLIPPED]) <= WEIGHT_DRIFT
    resumed = trained(backend, tmp_path / "resumed", CLIPPED, resume=run.checkpoint)
    assert resumed.ranks[0]["digest"] == first["digest"], "a resumed run is the run, bit for bit"


def test_the_other_setting_takes_weights_alone(tmp_path: Path) -> None:
    run = trained("fsdp2-sharded", tmp_path / "run", HEADS)
    other = trained("fsdp2-sharded", tmp_path / "other", "dtype=float32", resume=run.checkpoint)
    assert "starts fresh" in other.errors


@pytest.mark.slow
def test_inputs_first_biases_and_uneven_rows(tmp_path: Path) -> None:
    """GPT-2's Conv1D, a fused projection with a bias, over three ranks: 7, 7 and 6 of 20 rows."""
    small = {"per_device_train_batch_size": 2, "save_strategy": "no"}
    alone = {**small, "gradient_accumulation_steps": 3}
    one = trained("one", tmp_path / "one", CLIPPED, model="gpt2", trainer=alone)
    run = trained(
        "fsdp2-full", tmp_path / "three", CLIPPED, model="gpt2", num_ranks=3, trainer=small
    )
    assert len({rank["digest"] for rank in run.ranks}) == 1
    assert drift(run, one) <= THIRDS_DRIFT
