"""The rows of the data set that a step was trained on, found again from the seed alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from helpers import EAGER, LENGTH, VOCABULARY, events_of, make_trainer, run_differences
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback

from hf_pss import NonFiniteError, PSSConfig, PSSTrainer
from hf_pss.records.spikes import SpikeEvidence, parse_spike, spike_line
from hf_pss.runs.folder import SPIKES_FILE
from hf_pss.trainer.spike_batches import indices_of_step

SPIKY = PSSConfig.preset("paper", threshold_ratio=3.0, calibration_steps=2, cooldown_steps=0)


def numbered_rows(num_rows: int) -> list[dict[str, Any]]:
    """Return rows that begin with their own number."""
    rows = (torch.arange(i, i + LENGTH) % VOCABULARY for i in range(num_rows))
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        yield from numbered_rows(40)


class Compares(TrainerCallback):
    """Compares, at each step, the rows that were found with those that the model saw."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seen, self.steps = trainer, [], []
        compute_loss = trainer.compute_loss

        def watched(model: Any, inputs: Any, **kwargs: Any) -> Any:
            self.seen += inputs["input_ids"][:, 0].tolist()
            return compute_loss(model, inputs, **kwargs)

        trainer.compute_loss = watched  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert indices_of_step(self.trainer) == tuple(self.seen)
        self.steps.append(self.trainer.state.global_step + 1)
        self.seen = []


@pytest.mark.parametrize(
    ("num_rows", "options"),
    [
        (40, {}),
        (38, {"gradient_accumulation_steps": 3}),
        (38, {"dataloader_drop_last": True, "data_seed": 3}),
        (38, {"train_sampling_strategy": "sequential"}),
    ],
)
def test_rows_are_those_that_the_model_saw_also_after_a_resume(
    tmp_path: Path, num_rows: int, options: dict[str, Any]
) -> None:
    options = {"rows": numbered_rows(num_rows), "max_steps": 24, "save_steps": 13, **options}
    trainer = make_trainer(tmp_path, **options)
    seen = Compares(trainer)
    trainer.train()
    assert seen.steps == list(range(1, 25))
    resumed = make_trainer(tmp_path, **options)
    seen = Compares(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert seen.steps == list(range(14, 25))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_rows", [38, 40, 5])
def test_rows_are_those_of_all_ranks(tmp_path: Path, num_rows: int, drop_last: bool) -> None:
    rows = torch.arange(num_rows)
    loaders = [
        prepare_data_loader(
            DataLoader(rows, batch_size=4, shuffle=True, drop_last=drop_last),  # type: ignore[arg-type]
            num_processes=2,
            process_index=rank,
            put_on_device=False,
            use_seedable_sampler=True,
            data_seed=11,
        )
        for rank in range(2)
    ]
    trainer = make_trainer(tmp_path)
    trainer.callback_handler.train_dataloader = loaders[0]
    trainer.current_gradient_accumulation_steps = 1
    for step, batches in enumerate(zip(*loaders, strict=True)):
        trainer.state.epoch = step / len(loaders[0])
        assert indices_of_step(trainer) == tuple(torch.cat(batches).tolist())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rows": Stream()}, "a stream"),
        ({"train_sampling_strategy": "group_by_length"}, "LengthGroupedSampler"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "RandomSampler"),
    ],
)
def test_an_order_that_cannot_be_known_is_not_guessed(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    trainer = spiky_trainer(tmp_path, **options)
    trainer.train()
    evidence = evidence_in(tmp_path)[0]
    assert evidence.indices is None
    assert why in evidence.why_unknown


# ---- in a run ----


def spiky_trainer(folder: Path, **options: Any) -> Any:
    """Return a trainer whose gradients are 100 times too large in step 5."""
    defaults = {"rows": numbered_rows(40), "max_steps": 6, "trainer_class": PSSTrainer}
    trainer = make_trainer(folder, SPIKY, **{**defaults, **options})
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda g: g * 100 if trainer.state.global_step == 4 else g)
    return trainer


def evidence_in(folder: Path) -> list[SpikeEvidence]:
    return [parse_spike(line) for line in (folder / SPIKES_FILE).read_bytes().splitlines()]


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_spike_leaves_its_matrices_its_rows_and_their_text(tmp_path: Path) -> None:
    trainer = spiky_trainer(tmp_path)
    trainer.processing_class = words()
    seen = Compares(trainer)
    trainer.train()
    assert len(seen.steps) == 6
    (evidence,) = evidence_in(tmp_path)
    assert evidence.step == 5
    assert evidence.indices is not None
    assert [text.split()[0] for text in evidence.texts] == [f"w{i}" for i in evidence.indices]
    (event, *_) = events_of(tmp_path)
    assert event["step"] == 5
    norms = evidence.matrices["grad_norm"]
    assert set(norms) == set(evidence.matrices["spectral_norm"])
    assert set(norms) == set(evidence.matrices["stable_rank"])
    assert 0 < max(norms.values()) < event["value"]


def test_a_healthy_run_writes_nothing_and_evidence_changes_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tmp_path / "healthy", SPIKY).train()
    assert not (tmp_path / "healthy" / SPIKES_FILE).exists()
    with_evidence = spiky_trainer(tmp_path / "a")
    with_evidence.train()
    monkeypatch.setattr("hf_pss.trainer.callback._EVIDENCE_EVERY_STEPS", 1000)
    without = spiky_trainer(tmp_path / "b")
    without.add_callback(NoEvidence())
    without.train()
    assert evidence_in(tmp_path / "a")
    assert not (tmp_path / "b" / SPIKES_FILE).exists()
    assert run_differences(with_evidence, without) == []


class NoEvidence(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        from hf_pss.trainer.seams import trainer_of

        trainer: Any = trainer_of(self)
        trainer.pss_callback._evidence_step = trainer.state.global_step


def test_a_run_that_spikes_at_every_step_is_not_measured_at_every_step(tmp_path: Path) -> None:
    make_trainer(tmp_path, EAGER, max_steps=24).train()
    steps = [evidence.step for evidence in evidence_in(tmp_path)]
    assert len(steps) > 1
    assert all(later - step >= 10 for step, later in itertools.pairwise(steps))


def test_the_step_that_stops_a_run_leaves_its_rows(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", on_nonfinite="stop")
    trainer = make_trainer(tmp_path, config, rows=numbered_rows(40))
    trainer.model.lm_head.weight.register_hook(
        lambda g: g * float("nan") if trainer.state.global_step == 2 else g
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    (evidence,) = evidence_in(tmp_path)
    assert (evidence.step, evidence.matrices) == (3, {})
    assert len(evidence.indices or ()) == 4


def test_a_data_set_that_cannot_be_read_again_does_not_end_the_run(tmp_path: Path) -> None:
    trainer = spiky_trainer(tmp_path)
    trainer.processing_class = words()
    trainer.processing_class.decode = None
    trainer.train()
    assert "TypeError" in evidence_in(tmp_path)[0].why_unknown
    assert trainer.state.global_step == 6


def test_evidence_survives_its_file() -> None:
    evidence = SpikeEvidence(3, {"grad_norm": {"a": 1.5}}, (4, 0), "", ("é\n",))
    assert parse_spike(spike_line(evidence).encode()) == evidence
