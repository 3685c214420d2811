"""Two ranks under every backend train as one process does, and suffer together."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import steps_of
from launching import Run, launch, launch_ranks
from shards_worker import MOMENTS

# Those between whose path another covers are left to `make test-all`.
BACKENDS = [
    "ddp",
    "fsdp2-full",
    pytest.param("fsdp2-sharded", marks=pytest.mark.slow),
    pytest.param("zero2", marks=pytest.mark.slow),
    "zero3",
]
KINDS = {"ddp": "Replicated", "fsdp2": "Sharded", "zero2": "Zero", "zero3": "Zero"}

# Against one process that accumulates both ranks' batches; absolute, over 8 steps in float32.
LOSS_DRIFT = 1e-6  # 0
WEIGHT_DRIFT = 1e-6  # 2.1e-7, weights are of the order 0.05
NORM_DRIFT = 1e-5  # 1.9e-7 without a spike; of each parameter's gradient norm, relative
# After a loss that was 1,000 times too large, clipped: the sums' order shows.
SPIKED_WEIGHT_DRIFT = 1e-5

FLOORED = {
    "name": "anchored",
    "threshold_ratio": 2.0,
    "calibration_steps": 2,
    "check_every_steps": 2,
    "floor_ratio": 2.0,
    "floor_reference": "noise",
    "moments": "project",
    # Those of steps 2, 4 and 6 raise the loss, by 1.5e-4 of it at least, and are taken back.
    "trial": "all",
    "trial_margin_ratio": 1e-4,
}
SPIKY = {"name": "paper", "threshold_ratio": 2.0, "calibration_steps": 2}

# Split against whole, one step: absolute.
SHARD_DRIFT = {
    "weights": 1e-8,  # 3.8e-9
    "moments": 9e-8,  # 3.0e-8
    "ranks": 2.5e-6,  # 9.6e-7
    "after": 1e-7,  # 0
}

Twin = Callable[..., Run]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    needs_deepspeed(name)
    return name


def needs_deepspeed(name: str) -> None:
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test` installs it")


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """The same run in one process."""
    runs: dict[str, Run] = {}

    def run(**options: Any) -> Run:
        key = repr(options)
        if key not in runs:
            runs[key] = launch("one", tmp_path_factory.mktemp("one"), **options)
            assert runs[key].returncode == 0, runs[key].errors[-3000:]
        return runs[key]

    return run


def assert_like_one_process(run: Run, one: Run, *, weight_drift: float) -> None:
    assert run.returncode == 0, run.errors[-3000:]
    (alone,) = one.ranks
    for rank in run.ranks:
        assert rank["error"] is None
        assert rank["history"] == alone["history"]
    first, second = run.ranks
    assert first["digest"] == second["digest"]
    assert first["detectors"] == second["detectors"]
    drifts = [abs(a - b) for a, b in zip(first["losses"], alone["losses"], strict=True)]
    assert max(drifts) <= LOSS_DRIFT
    if run.ranks[0]["backend"] != "Zero":
        for line, whole in zip(first["parameter_norms"], alone["parameter_norms"], strict=True):
            assert line
            assert line == pytest.approx(whole, rel=NORM_DRIFT)
    weights, expected = run.weights, one.weights
    assert weights.keys() == expected.keys()
    drift = max(float((weights[k] - expected[k]).abs().max()) for k in weights)
    assert drift <= weight_drift, f"weights differ by {drift:.3g}"
    assert steps_of(run.events) == steps_of(one.events)


def test_as_one_process_and_resumed(backend: str, twin: Twin, tmp_path: Path) -> None:
    """Same losses and interventions, moments edited, evaluations between; then from step 4 on.

    And once more from step 4, smoothed right after loading.
    """
    one = twin(options=FLOORED)
    run = launch(backend, tmp_path / "run", options=FLOORED)
    assert {rank["backend"] for rank in run.ranks} == {KINDS[backend.split("-")[0]]}
    assert_like_one_process(run, one, weight_drift=WEIGHT_DRIFT)
    assert [(e["step"], e["decision"]) for e in run.events] == [
        (2, "undo"),
        (4, "undo"),
        (6, "undo"),
        (8, "act"),
    ]
    resumed = launch(backend, tmp_path / "resumed", options=FLOORED, resume=run.checkpoint)
    assert resumed.returncode == 0, resumed.errors[-3000:]
    first = resumed.ranks[0]
    assert first["error"] is None
    assert first["digest"] == run.ranks[0]["digest"], "a resumed run is the run, bit for bit"
    assert first["history"] == run.ranks[0]["history"]
    rescue = {**FLOORED, "smooth_on_resume": True, "moments": "reset"}
    rescued = launch(backend, tmp_path / "rescued", options=rescue, resume=run.checkpoint)
    alone = twin(options=rescue, resume=one.checkpoint)
    assert_like_one_process(rescued, alone, weight_drift=WEIGHT_DRIFT)
    assert steps_of(rescued.events) == [4, 6, 8], "4: right after loading"


def test_a_spike_on_one_rank_is_everybodys(backend: str, twin: Twin, tmp_path: Path) -> None:
    one = twin(options=SPIKY, fault="spike")
    run = launch(backend, tmp_path, options=SPIKY, fault="spike")
    assert_like_one_process(run, one, weight_drift=SPIKED_WEIGHT_DRIFT)
    assert steps_of(run.events) == [5]


def test_a_nan_on_one_rank_is_everybodys(backend: str, twin: Twin, tmp_path: Path) -> None:
    """The update is skipped by all; DeepSpeed discards it by itself.

    At a constant rate, for with a discarded update the schedule does not advance either.
    """
    options = {"options": SPIKY, "fault": "nan", "trainer": {"lr_scheduler_type": "constant"}}
    run, one = launch(backend, tmp_path, **options), twin(**options)
    assert run.returncode == 0, run.errors[-3000:]
    alone = {**one.ranks[0], "losses": []}
    assert alone["history"]["num_nonfinite_steps"] == 1
    for rank in run.ranks:
        assert rank["error"] is None
        assert rank["history"] == alone["history"]
    drift = max(float((run.weights[k] - w).abs().max()) for k, w in one.weights.items())
    assert drift <= SPIKED_WEIGHT_DRIFT
    said = "its update was discarded by DeepSpeed, no weight was touched"
    assert (said in run.errors) == backend.startswith("zero")


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_nan_that_stops_a_run_under_deepspeed_has_touched_no_weight(
    name: str, twin: Twin, tmp_path: Path
) -> None:
    """The weights are those that one process had before that step."""
    needs_deepspeed(name)
    options = {**SPIKY, "on_nonfinite": "stop"}
    one, run = (
        twin(options=options, fault="nan"),
        launch(name, tmp_path, options=options, fault="nan"),
    )
    for rank in (*one.ranks, *run.ranks):
        assert rank["error"].startswith("NonFiniteError: Stopped before the update of step 5")
        assert "No weight was touched" in rank["error"]
    drift = max(float((run.weights[k] - w).abs().max()) for k, w in one.weights.items())
    assert drift <= WEIGHT_DRIFT


def test_a_rank_that_dies_leaves_nobody_hanging(backend: str, tmp_path: Path) -> None:
    """Rank 0 ends, with an error or by the launcher, long before the test gives up."""
    run = launch(backend, tmp_path, options=SPIKY, fault="kill", torchrun=backend == "ddp")
    assert run.returncode != 0
    assert "SIGKILL" in run.errors or "-9" in run.errors
    finished = [rank for rank in run.ranks if rank["error"] is None]
    assert not finished, "no rank has trained on alone"


# PEFT's own forward of adapted experts does not run under ZeRO-3 (0.21, deepspeed 0.19.8).
@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param("zero2", "lora experts", marks=pytest.mark.slow),
        ("zero3", "experts"),
        pytest.param("zero3", "lora", marks=pytest.mark.slow),
    ],
)
def test_experts_and_lora_under_zero(name: str, model: str, twin: Twin, tmp_path: Path) -> None:
    """A turn reads and writes some rows of experts' copy, master and moment; factors are small."""
    needs_deepspeed(name)
    options = {**SPIKY, "moments": MOMENTS[model]}
    one = twin(options=options, fault="spike", model=model)
    run = launch(name, tmp_path, options=options, fault="spike", model=model)
    assert_like_one_process(run, one, weight_drift=SPIKED_WEIGHT_DRIFT)
    assert 5 in steps_of(run.events)


@pytest.mark.parametrize(
    ("num_ranks", "replicas"), [pytest.param(3, 1, marks=pytest.mark.slow), (4, 2)]
)
def test_shards_of_other_architectures(num_ranks: int, replicas: int, tmp_path: Path) -> None:
    """GPT-2, experts and LoRA under FSDP2 (3 ranks, uneven) and HSDP (2 × 2), against one process.

    The ranks of all replicas share the work out, so that replicas cannot drift apart.
    """
    run = launch_ranks("shards_worker.py", tmp_path, str(replicas), num_ranks=num_ranks)
    assert run.returncode == 0, run.errors[-3000:]
    assert len(run.ranks) == num_ranks
    for rank in run.ranks:
        assert rank == run.ranks[0]
        for found in rank.values():
            assert {key for key, drift in found.items() if drift > SHARD_DRIFT[key]} == set()
