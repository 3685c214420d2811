"""Swapping one word never breaks a run that trains: each kind of model, under every preset."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ALL_DETECTORS,
    controller_of,
    differences,
    events_of,
    gpt2,
    make_trainer,
    token_rows,
    weights_of,
)
from kinds import ADAPTERS, KINDS, PLAIN, rows_for
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_pss import (
    PRESETS,
    PSSCallback,
    PSSConfig,
    PSSController,
    PSSTrainer,
    PSSTrainerMixin,
    PSSTrainingArguments,
    SelectionError,
)
from hf_pss.trainer.callback import StepReadings

# torch and peft warn of some of these kinds when they are made.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# Acts wherever it can, with everything that measures switched on.
EAGER = PSSConfig(
    detectors=ALL_DETECTORS,
    threshold_ratio=1.0001,
    spectral_norm_ratio=1.0001,
    floor_ratio=1.3,
    calibration_steps=1,
    cooldown_steps=0,
    check_every_steps=1,
    health="full",
    health_every_steps=1,
)
CONFIGS = {
    **{name: PSSConfig.preset(name) for name in PRESETS},
    "observing": replace(EAGER, health="off", observe_only=True),
    "eager": EAGER,
}
WITHOUT_MATRICES = ("mamba", "resnet", "regression", "linear", "mlp", "lstm", "empty")
WITHOUT_PRODUCTS = tuple(
    name for name, (class_name, _) in ADAPTERS.items() if not class_name.startswith(("Lo", "X"))
)


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Keep the collection at each run's beginning quick: it walks over all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def fit(
    kind: str, folder: Path, cls: type[Trainer] = PSSTrainer, num_steps: int = 2, **options: Any
) -> Any:
    """Train a kind of model from the same weights, on the same rows."""
    set_seed(0)
    model = KINDS[kind]()
    set_seed(1)
    trainer = cls(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=num_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows_for(kind),
        **options,
    )
    trainer.train()
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of PSS."""
    return [
        record.message
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("hf_pss")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_plain_trains_under_every_preset(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = weights_of(fit(kind, tmp_path, Trainer).model)
    for name, config in CONFIGS.items():
        caplog.clear()
        trainer = fit(kind, tmp_path / name, pss_config=config)
        assert trainer.state.global_step == 2, name
        lines = said(caplog)
        assert lines[0].startswith(f"PSS: {config.describe()}, "), name
        if name != "eager":
            assert list(differences(plain, weights_of(trainer.model))) == [], name
            assert len(lines) == 1, name
        assert not [line for line in lines if "health metric" in line]


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 25


# ---- what is said ----


@pytest.mark.parametrize("kind", [*WITHOUT_MATRICES, "frozen but its head"])
def test_the_example_is_of_this_model_and_works(kind: str) -> None:
    model = KINDS[kind]()
    controller = PSSController(model, PSSConfig(), speaks=False)
    caution = controller.caution() or ""
    assert "guard against steps that are not finite stays" in caution
    example = re.search(r"PSSConfig\(include=\[r'(.+)'\]\)", caution)
    if kind in ("regression", "linear"):
        assert example is None
        assert "a matrix with two or more rows and columns" in caution
        return
    assert example is not None
    included = PSSController(model, PSSConfig(include=(example[1],)), speaks=False)
    assert included.selection.matrices
    assert included.caution() is None


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT_PRODUCTS if kind in KINDS])
def test_adapters_that_are_no_products_are_named(kind: str) -> None:
    caution = PSSController(KINDS[kind](), PSSConfig(), speaks=False).caution() or ""
    assert re.search(r"does not watch adapters of this kind \([A-Z0-9_]+\)", caution)
    assert "include=" not in caution


def test_the_option_is_spelt_as_the_caller_spells_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = PSSTrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    set_seed(0)
    PSSTrainer(PLAIN["mlp"](), args, train_dataset=rows_for("mlp")).train()
    (line,) = said(caplog)
    assert r"name it: pss_include=[r'body\.\d+\.weight']. Options: PSSTrainingArguments" in line
    caplog.clear()
    fit("mlp", tmp_path, num_steps=1)
    (line,) = said(caplog)
    assert r"name it: PSSConfig(include=[r'body\.\d+\.weight']). Options: PSSConfig or" in line


def test_muon_without_a_matrix_is_an_error_with_an_example_that_works(tmp_path: Path) -> None:
    options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = PSSTrainingArguments(str(tmp_path), pss_optim="muon", **options)
    with pytest.raises(SelectionError, match="options in pss_optim_args: No weight") as caught:
        PSSTrainer(PLAIN["mamba"](), args, train_dataset=rows_for("mamba")).train()
    example = re.search(r"include=\[r'(.+)'\]", str(caught.value))
    assert example is not None
    args.pss_optim_args = {"include": [example[1]]}
    trainer = PSSTrainer(PLAIN["mamba"](), args, train_dataset=rows_for("mamba"))
    trainer.train()
    assert trainer.state.global_step == 1


def test_patterns_that_leave_nothing_are_not_in_the_example(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = PLAIN["mlp"]()
    pss = PSSController(model, PSSConfig(exclude=[r"body\.0"]), speaks=False)
    assert "2.weight" not in (pss.caution() or "")  # one row
    assert "your exclude patterns leave in" in (pss.caution() or "")


def test_no_embedding_and_no_norm_is_the_example() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(64, 8), "norm": nn.LayerNorm((16, 16)), "out": nn.Linear(8, 4)}
    )
    caution = PSSController(model, PSSConfig(), speaks=False).caution() or ""
    assert r"include=[r'out\.weight']" in caution


def test_a_pattern_that_matches_nothing_is_still_an_error() -> None:
    for options in ({"include": ["no_such"]}, {"exclude": ["no_such"]}):
        with pytest.raises(SelectionError, match="matches no parameter"):
            PSSController(PLAIN["mlp"](), PSSConfig(**options))


def test_one_loop_of_ones_own_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    PSSController(PLAIN["mlp"](), PSSConfig())
    assert len(said(caplog)) == 1
    caplog.clear()
    PSSController(PLAIN["mlp"](), PSSConfig(detectors=()))  # asks for no matrix
    PSSController(gpt2(), PSSConfig(), evaluate_loss=lambda: 1.0)
    assert said(caplog) == []


def test_the_floor_leaves_products_to_the_other_detectors() -> None:
    both = PSSController(KINDS["lora"](), PSSConfig.preset("anchored"), speaks=False)
    assert "does not watch the 6 LoRA products" in (both.caution() or "")
    assert (both.caution() or "").endswith("grad_norm_ratio does.")
    floor = PSSController(KINDS["lora"](), PSSConfig.preset("floor"), speaks=False)
    advice = re.search(r"choose (.+)\.$", floor.caution("pss_{}") or "")
    assert advice is not None
    assert advice[1] == "pss_detectors=['grad_norm_ratio']"
    assert floor.selection.adapters
    assert floor.smooth_now().matrices == ()


def test_a_drop_in_a_product_is_judged_beside_a_floor() -> None:
    detectors = ("stable_rank_floor", "stable_rank_drop")
    config = PSSConfig(detectors=detectors, check_every_steps=1)
    model = KINDS["lora"]()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a product of zero has no rank to judge
            nn.init.normal_(parameter)
    pss = PSSController(model, config, speaks=False)
    pss.before_update(1.0)
    pss.after_update()
    saved = pss.state_dict()
    assert list(saved["detectors"]["detectors"]) == ["stable_rank_drop"]
    baselines = saved["detectors"]["detectors"]["stable_rank_drop"]["baselines"]
    assert len(baselines) == 6
    assert all(name.endswith("[default]") for name in baselines)


def test_a_training_begins_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, PSSConfig.preset("floor", floor_ratio=0.8), max_steps=1)
    trainer.train()
    assert said(caplog) == [
        "PSS: preset floor with floor_ratio=0.8, 6 matrices watched (stable_rank_floor). Options: "
        "PSSConfig or PSSTrainingArguments."
    ]


def test_a_run_that_goes_back_does_not_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, PSSConfig(), max_steps=1)
    trainer.train()
    caplog.clear()
    callback = PSSCallback.of(trainer)
    callback.before_training(is_rollback=True, may_repair=True)
    monkeypatch.setattr(callback, "before_training", lambda **_: None)
    trainer.train()
    assert said(caplog) == []


def test_what_is_not_watched_is_said_also_where_the_rest_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`hf-pss train` says the rest itself."""
    for rows, make, lines in ((rows_for("mlp"), PLAIN["mlp"], 1), (token_rows(4), gpt2, 0)):
        caplog.clear()
        trainer = make_trainer(
            tmp_path, PSSConfig(), model=make(), rows=rows, max_steps=1, save_strategy="no"
        )
        PSSCallback.of(trainer).announces = False
        trainer.train()
        assert len(said(caplog)) == lines
        assert "PSS: preset" not in caplog.text


# ---- nothing to smooth ----


class Spiking(PSSTrainer):
    """Some losses are a thousand times too large, and one is NaN."""

    factors: dict[int, float] = {5: 1e3, 8: 1e3, 10: float("nan")}  # noqa: RUF012

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * self.factors.get(self.state.global_step + 1, 1.0)


@pytest.mark.parametrize("policy", ["apply", "skip"])
def test_without_a_matrix_spikes_are_noticed_and_nan_is_skipped(
    policy: str, tmp_path: Path
) -> None:
    config = PSSConfig(
        threshold_ratio=10.0, calibration_steps=2, cooldown_steps=0, spike_update=policy
    )
    trainer = fit("mlp", tmp_path, Spiking, num_steps=12, pss_config=config)
    spikes = [e for e in events_of(tmp_path) if e["detector"] == "grad_norm_ratio"]
    assert [event["step"] for event in spikes] == [5, 8]
    if policy == "apply":
        assert {event["reason"] for event in spikes} == {"there is nothing to smooth"}
        assert controller_of(trainer)._history.num_interventions == 0
    else:  # the update itself can be left out all the same
        assert [event["kind"] for event in spikes] == ["intervention"] * 2
    (broken,) = [e for e in events_of(tmp_path) if e["kind"] == "non_finite"]
    assert (broken["step"], broken["decision"]) == (10, "skip_update")
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_state_without_a_matrix_is_resumed() -> None:
    config = PSSConfig.preset("anchored")
    pss, other = (PSSController(PLAIN["mlp"](), config, speaks=False) for _ in range(2))
    pss.before_update(1.0)
    pss.after_update()
    other.load_state_dict(pss.state_dict())
    assert other.state_dict() == pss.state_dict()


def test_an_empty_matrix_is_left_alone() -> None:
    model = PLAIN["empty"]()
    pss = PSSController(model, PSSConfig(include=["weight"]), speaks=False)
    assert [view.name for view in pss.selection.matrices] == ["body.linear.weight"]
    with pytest.raises(SelectionError, match=r"nothing\.weight is out \(empty\)"):
        PSSController(model, PSSConfig(include=[r"nothing\.weight"]))


# ---- losses and overrides of other shapes ----


class NamedOtherwise(PSSTrainer):
    """As people write it; a loss of shape (1,) comes from models that reduce by hand."""

    def training_step(s, model: Any, batch: Any, *rest: Any) -> Tensor:
        return super().training_step(model, batch, *rest).reshape(())


class Mean(PSSTrainerMixin):
    """Takes the mean of what the classes behind it return."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs).mean()


class Inside(Trainer):
    """Its training_step leaves a vector to the one outside of it."""

    def training_step(s, m: Any, batch: Any, n: Any = None) -> Tensor:
        return super().training_step(m, batch, n).expand(2)

    def train(self) -> Any:
        return super().train()

    def log(self, numbers: dict[str, float], *rest: Any) -> None:
        super().log(numbers, *rest)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_a_loss_of_any_shape_is_its_mean(shape: tuple[int, ...]) -> None:
    readings = StepReadings()
    for _ in range(2):
        readings.add_loss(torch.full(shape, 3.0))
    assert readings.device_loss.shape == ()
    assert float(readings.device_loss) == 6.0


def test_overrides_may_name_their_arguments_otherwise(tmp_path: Path) -> None:
    class Outside(NamedOtherwise):
        pass

    assert fit("gpt2", tmp_path, Outside).state.global_step == 2

    class Both(Mean, Inside):
        pass

    assert fit("gpt2", tmp_path, Both).state.global_step == 2
    attached = make_trainer(tmp_path, trainer_class=Inside)
    PSSCallback().attach(attached)


def test_an_override_that_takes_no_model_is_called_as_the_trainer_calls_it(
    tmp_path: Path,
) -> None:
    """sentence-transformers' trainer has this one."""

    class Loads(Trainer):
        def _load_from_checkpoint(self, checkpoint_path: str) -> None:
            super()._load_from_checkpoint(checkpoint_path)

    trainer = make_trainer(tmp_path, trainer_class=Loads, save_steps=2, max_steps=2)
    PSSCallback().attach(trainer)
    trainer.train()
    again = make_trainer(tmp_path, trainer_class=Loads, save_steps=4, max_steps=4)
    PSSCallback().attach(again)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
