"""Real pretrained models: one false alarm does no harm. `make test-pretrained` gets them first."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained.fetch import MINILM, SMOLLM2, folder
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_pss import PRESETS, PSSConfig, PSSController, PSSTrainer
from hf_pss.inspection.matrix_survey import inspect_checkpoint
from hf_pss.runs.safetensors_files import open_checkpoint

pytestmark = pytest.mark.slow

SPIKES = ("grad_norm_ratio",)
FUNCTIONS = ("clip", "log", "softplus", "convolution", "softmax", "hammer", "polar")


def path_of(name: str) -> Path:
    path = folder() / name
    if not (path / "config.json").is_file():
        pytest.skip(f"{name} is not there: `make test-pretrained` gets it from the registry")
    return path


def english() -> str:
    """Return the language reference that every Python has, in English, about 700 kB."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[key] for key in sorted(topics))


@cache
def smollm2() -> tuple[dict[str, Tensor], PreTrainedModel, Tensor]:
    """Return the sound weights, the model, and tokens (96, 96)."""
    path = path_of(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(english()[:60_000]).input_ids
    tokens = torch.tensor(ids[: 96 * 96]).view(96, 96)
    return {k: v.clone() for k, v in model.state_dict().items()}, model, tokens


@torch.no_grad()
def loss_of(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    parts = [float(model(input_ids=x, labels=x).loss) for x in rows.split(4)]
    return sum(parts) / len(parts)


def after_one_firing(config: PSSConfig) -> float:
    """Return by how much the loss on English changes."""
    sound, model, tokens = smollm2()
    model.load_state_dict(sound)
    held = tokens[:16]
    before = loss_of(model, held)
    pss = PSSController(model, config, evaluate_loss=lambda: loss_of(model, tokens[16:18]))
    pss.smooth_now()
    return loss_of(model, held) - before


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PRESETS)
def test_one_false_alarm_of_each_preset(name: str) -> None:
    change = after_one_firing(PSSConfig.preset(name))
    if name == "paper":
        assert change > 1.0, "as published it destroys what a model knows"
        change = after_one_firing(PSSConfig.preset(name, trial="spikes"))
    assert abs(change) <= 0.02


@pytest.mark.timeout(900)
@pytest.mark.parametrize("smoothing", FUNCTIONS)
def test_one_false_alarm_of_each_function(smoothing: str) -> None:
    config = PSSConfig.preset("anchored", detectors=SPIKES, smoothing=smoothing)
    assert abs(after_one_firing(config)) <= 0.02


class InOrder:
    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def fine_tuned(folder: Path, config: PSSConfig | None) -> float:
    """Return the loss after 30 steps, the 25th of which is on random tokens."""
    sound, model, tokens = smollm2()
    model.load_state_dict(sound)
    train = tokens[16:76].clone()
    generator = torch.Generator().manual_seed(0)
    train[48:50] = torch.randint(model.config.vocab_size, (2, 96), generator=generator)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=30,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    base: Any = Trainer if config is None else PSSTrainer
    options = {} if config is None else {"pss_config": config}
    rows = [{"input_ids": row, "labels": row} for row in train]
    run = type("Run", (InOrder, base), {})(model=model, args=args, train_dataset=rows, **options)
    run.train()
    return loss_of(model, tokens[:16])


@cache
def plainly_tuned(folder: Path) -> float:
    return fine_tuned(folder, None)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], float]:
    folder = tmp_path_factory.mktemp("plain")
    return lambda: plainly_tuned(folder)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({"name": "anchored"}, 0.02),
        ({"name": "floor"}, 0.02),
        ({"name": "paper", "trial": "spikes"}, 0.05),
    ],
    ids=["anchored", "floor", "paper, tried"],
)
def test_one_odd_batch_in_a_fine_tuning(
    options: dict[str, Any], margin: float, plain: Callable[[], float], tmp_path: Path
) -> None:
    expected = plain()
    assert fine_tuned(tmp_path, PSSConfig.preset(**options)) <= expected + margin


@torch.no_grad()
def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_sentence_embeddings_stay_where_they_are() -> None:
    path = path_of(MINILM)
    sentences = english().split(". ")[100:164]
    inputs = AutoTokenizer.from_pretrained(path)(
        sentences, return_tensors="pt", padding=True, truncation=True, max_length=64
    )
    cosines = {}
    for name in PRESETS:
        model = AutoModel.from_pretrained(path, dtype=torch.float32)
        before = embeddings(model, inputs)
        detectors = SPIKES if name != "floor" else ("stable_rank_floor",)
        PSSController(model, PSSConfig.preset(name, detectors=detectors)).smooth_now()
        cosines[name] = float((before * embeddings(model, inputs)).sum(-1).mean())
    assert cosines["anchored"] > 0.9999
    assert cosines["floor"] > 0.9999
    assert cosines["paper"] < 0.99


@pytest.mark.parametrize("name", [SMOLLM2, MINILM])
def test_untouched_weights_have_remarks_at_most(name: str) -> None:
    assert inspect_checkpoint(open_checkpoint(path_of(name))).num_findings == 0
