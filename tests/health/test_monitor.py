"""The monitor in a real loop: its readings and their steps, its harmlessness and its state."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import differences, gpt2, history, llama, train, weights_of
from rich.console import Console
from torch import nn

from hf_pss import PSSCallback, PSSConfig, PSSController
from hf_pss.cli.progress import render_summary
from hf_pss.errors import ConfigurationError, StateError
from hf_pss.health.metrics import METRICS, Cost
from hf_pss.health.monitor import HealthMonitor, describe
from hf_pss.linalg import effective_rank, stable_rank
from hf_pss.models.distributed import Backend, Zero
from hf_pss.models.selection import Selection, named_parameters_canonical, select_matrices
from hf_pss.records.events import HealthReading

EXACT_TOLERANCE = 1e-5
FOLLOWED_TOLERANCE = 1.5e-3  # 5.6e-4, after four steps of 1e-3 a weight
LIGHT = {"spectral_norm", "stable_rank", "frobenius_norm", "spectral_norm_residual", "grad_norm"}
STANDARD = LIGHT | {"relative_update", "sqrt_condition", "trimmed_sqrt_condition"}
FULL = STANDARD | {"effective_rank", "low_rank_distance", "neighbour_alignment"}
FULL |= {"gram_log_det", "gram_log_det_lower", "gram_log_det_upper", "token_cosine"}
FULL |= {"token_mean_share", "token_top_share", "token_centred_top_share", "token_effective_rank"}
FULL |= {"sign_diversity", "attention_logit_bound"}
RATES = {"spectral_norm_change_rate", "frobenius_norm_change_rate"}
# Names in a reading that a metric has besides its own.
METRIC_OF = {
    "spectral_norm_residual": "spectral_norm",
    "trimmed_sqrt_condition": "sqrt_condition",
    "spectral_edge_position": "spectral_edge",
    "gram_log_det_lower": "gram_log_det",
    "gram_log_det_upper": "gram_log_det",
    **dict.fromkeys(("spike_score_loss", "spike_score_grad_norm"), "spike_score"),
    **dict.fromkeys((*RATES, "effective_rank_change_rate"), "change_rate"),
}
NEEDS_A_TRAINER = {"attention_logit_max"}


def run(num_steps: int = 4, **options: Any) -> tuple[nn.Module, list[HealthReading | None]]:
    torch.manual_seed(0)
    model = gpt2(num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pss = PSSController(model, PSSConfig.preset("paper", **options), optimizer=optimizer)
    tokens = torch.randint(0, 48, (2, 8))
    readings = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        readings.append(pss.step(norm, update=optimizer.step, loss=loss).health)
    return model, readings


@pytest.mark.parametrize(
    ("preset", "metrics"), [("light", LIGHT), ("standard", STANDARD), ("full", FULL)]
)
def test_a_preset_is_read_at_its_steps(preset: str, metrics: set[str]) -> None:
    model, readings = run(health=preset, health_every_steps=2)
    assert [reading is not None for reading in readings] == [False, True, False, True]
    first, last = (reading for reading in readings if reading is not None)
    assert set(first.matrices) == metrics
    ranks = {"effective_rank_change_rate"} if preset == "full" else set()
    assert set(last.matrices) == metrics | RATES | ranks
    assert last.step == 4
    parameters = named_parameters_canonical(model)
    name = "transformer.h.1.mlp.c_fc.weight"
    weight = parameters[name].detach().double()
    assert last.matrices["stable_rank"][name] == pytest.approx(
        float(stable_rank(weight)), rel=FOLLOWED_TOLERANCE
    )
    assert last.scalars["stable_rank/min"] == min(last.matrices["stable_rank"].values())
    assert last.scalars["spike_score_loss"] == 0
    assert (name in last.spectra) == (preset == "full")
    if preset == "full":
        assert last.matrices["effective_rank"][name] == pytest.approx(
            float(effective_rank(weight)), rel=EXACT_TOLERANCE
        )


@pytest.mark.parametrize("preset", ["light", "standard", "full"])
def test_a_run_measures_the_metrics_of_its_preset(preset: Cost) -> None:
    _, readings = run(num_steps=11, health=preset, health_every_steps=1)  # the edge's window
    last = readings[-1]
    assert last is not None
    names = {*last.matrices, *(scalar.partition("/")[0] for scalar in last.scalars)}
    metrics = {METRIC_OF.get(name, name) for name in names}
    costs = ("light", "standard", "full")
    allowed = costs[: costs.index(preset) + 1]
    expected = {name for name, row in METRICS.items() if row.in_runs and row.cost in allowed}
    assert metrics == expected - NEEDS_A_TRAINER


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_metrics_of_an_update_that_is_over_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The real DeepSpeed is in tests/distributed. Here a reading must not write anything."""
    model = gpt2()
    parameters = named_parameters_canonical(model)
    monitor = HealthMonitor(select_matrices(model), Zero(), "standard", every_steps=1)
    versions = {name: p._version for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    monitor.before_update(1, parameters, 1.0)
    reading = monitor.after_update(1, parameters, loss=1.0, grad_norm_preclip=1.0)
    assert reading is not None
    assert "spectral_norm" in reading.matrices
    assert not {"grad_norm", "relative_update"} & reading.matrices.keys()
    assert {name: p._version for name, p in parameters.items()} == versions
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "grad_norm and relative_update are left out" in warnings[0]


def test_a_reading_says_how_many_estimates_are_stale() -> None:
    torch.manual_seed(0)
    model = gpt2()
    parameters = named_parameters_canonical(model)
    monitor = HealthMonitor(select_matrices(model), Backend(), "light", every_steps=1)
    found = []
    for step in (1, 2):
        reading = monitor.after_update(step, parameters)
        assert reading is not None
        found.append(reading.scalars["spectral_norm/num_stale"])
        with torch.no_grad():  # noise, whose values lie close, and one that is broken, not stale
            parameters["transformer.h.0.mlp.c_fc.weight"].normal_()
            parameters["transformer.h.0.mlp.c_proj.weight"][0, 0] = math.nan
    assert found == [0, 1]


def test_the_reference_of_the_preconditioner_restarts_after_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = HealthMonitor(Selection((), ()), Backend(), "standard")

    def warned(*conditions: float) -> list[str]:
        caplog.clear()
        for condition in conditions:
            monitor._compare(condition)
        return [r.getMessage().partition(". ")[0] for r in caplog.records]

    assert warned(*[1.0] * 10) == []
    broken = "Adam's preconditioner has no condition number: √κ(M), trimmed, is nan"
    assert warned(math.nan, math.inf) == [broken]
    moved = "The trimmed condition number √κ(M) of Adam's preconditioner changed by an order of"
    assert warned(100.0, *[100.0] * 9) == [f"{moved} magnitude, from 1 to 100"]
    assert warned(math.nan, 150.0) == []
    assert warned(1.0, 1.0) == [f"{moved} magnitude, from 105 to 1"]


def test_health_changes_no_weight_and_no_random_number() -> None:
    plain, nothing = run(health="off")
    looked_at, _ = run(health="full", health_every_steps=1)
    assert nothing == [None] * 4
    assert not list(differences(weights_of(plain), weights_of(looked_at)))


def test_a_metric_that_raises_is_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr("hf_pss.health.monitor.measure_low_rank_distances", fail)
    _, readings = run(health="full", health_every_steps=1)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([x for x in warned if "low_rank_distance failed: _LinAlgError" in x]) == 1
    last = readings[-1]
    assert last is not None
    assert "low_rank_distance" not in last.matrices
    assert "neighbour_alignment" in last.matrices


def test_a_trainer_writes_lines_that_old_readers_accept(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", health="standard", health_every_steps=4)
    trainer = train(tmp_path, config, save_strategy="no")
    rows = [json.loads(x) for x in (tmp_path / "pss_health.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    assert {"stable_rank", "relative_update", "grad_norm", "scalars"} <= set(rows[0])
    assert all(math.isfinite(x) for x in rows[0]["stable_rank"].values())
    assert PSSCallback.of(trainer).report.scalars["health_seconds"] > 0
    plain = train(tmp_path / "plain", PSSConfig.preset("paper"), save_strategy="no")
    assert [line["loss"] for line in history(plain) if "loss" in line] == [
        line["loss"] for line in history(trainer) if "loss" in line
    ]


def test_spike_scores_survive_a_resume(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", health="light", health_every_steps=1)
    train(tmp_path, config, save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["PSSCallback"]["attributes"]["health_state"]
    assert saved["spikes"]["loss"]["num_steps"] == 4
    trainer = train(tmp_path, config, resume=str(tmp_path / "checkpoint-4"))
    monitor = PSSCallback.of(trainer).controller.health
    assert monitor.state()["spikes"]["loss"]["num_steps"] == 8


def test_a_state_is_refused_whole_or_taken_whole() -> None:
    monitor = HealthMonitor(Selection((), ()), Backend(), "light")
    monitor.restore(json.loads(json.dumps(monitor.state())))
    with pytest.raises(StateError):
        monitor.restore({"version": 1})
    assert monitor.after_update(10, {}) == HealthReading(10)


def test_the_worst_matrix_is_named() -> None:
    reading = HealthReading(
        5, matrices={"spectral_norm": {"a": 1.0, "b": 7.0}, "stable_rank": {"a": math.nan, "b": 1}}
    )
    assert describe(reading) == "Health, step 5: spectral_norm 7 (b), stable_rank nan (a)."


def test_a_negative_number_of_steps_and_an_unknown_preset_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="health_every_steps"):
        PSSConfig.preset("paper", health="light", health_every_steps=-1)
    with pytest.raises(ConfigurationError, match="health"):
        PSSConfig.preset("paper", health="heavy")  # type: ignore[arg-type]
    assert PSSConfig.preset("paper", health=False).health == "off"  # type: ignore[arg-type]


def test_adapters_are_measured_as_their_products_and_their_blocks_tokens() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_alpha=6, **options)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = PSSConfig.preset("paper", health="full", health_every_steps=1, detectors=())
    pss = PSSController(model, config, optimizer=optimizer)
    tokens = torch.randint(0, 48, (2, 8))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    reading = pss.step(1.0, update=optimizer.step, loss=loss).health
    assert reading is not None
    name = next(name for name in reading.matrices["spectral_norm"] if "q_proj" in name)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    product = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    sigma = torch.linalg.svdvals(product.detach().double())
    for metric, exact in (("spectral_norm", sigma[0]), ("frobenius_norm", sigma.norm())):
        assert reading.matrices[metric][name] == pytest.approx(float(exact), rel=EXACT_TOLERANCE)
    assert len(reading.matrices["token_cosine"]) == 2
    assert "attention_logit_bound" not in reading.matrices
    assert math.isfinite(reading.matrices["stable_rank"][name])


def test_the_run_ends_with_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_pss")
    config = PSSConfig.preset("paper", health="light", health_every_steps=4)
    trainer = train(tmp_path, config, save_strategy="no")
    tables = [r.getMessage() for r in caplog.records if "the worst of" in r.getMessage()]
    assert tables == [PSSCallback.of(trainer).health_summary]
    assert "from step 4 to step 8" in tables[0]
    assert re.search(r"steps, \d+\.\d\d s, and \d+\.\d\d s for health\.", caplog.text)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(render_summary(trainer, train_seconds=1.0))
    assert "transformer.h.0.attn.c_attn[q]" in console.export_text()
    assert (
        PSSCallback.of(
            train(tmp_path, PSSConfig.preset("paper"), save_strategy="no")
        ).health_summary
        is None
    )
