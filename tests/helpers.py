"""Tiny models, tiny data and the Trainer runs that several tests compare with each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pss import PSSCallback, PSSConfig, PSSTrainer, PSSTrainingArguments, RecoveryConfig
from hf_pss.config import DetectorName

VOCABULARY = 48
LENGTH = 12
MAX_STEPS = 8

# The paper's detector with a threshold and a calibration so low that eight steps see it fire.
EAGER = PSSConfig.preset("paper", threshold_ratio=1.0001, calibration_steps=1, cooldown_steps=0)

ALL_DETECTORS = get_args(DetectorName)
# Every preset, its thresholds out of reach: the run must be the plain Trainer's.
OUT_OF_REACH = {
    "paper": PSSConfig.preset("paper", threshold_ratio=1e9, calibration_steps=1),
    "floor": PSSConfig.preset("floor", floor_ratio=1e-6, check_every_steps=2),
    "anchored": PSSConfig.preset(
        "anchored", threshold_ratio=1e9, calibration_steps=1, floor_ratio=1e-6, check_every_steps=1
    ),
    "all detectors": PSSConfig.preset(
        "paper",
        detectors=ALL_DETECTORS,
        threshold_ratio=1e9,
        floor_ratio=1e-6,
        stable_rank_drop=0.99,
        spectral_norm_ratio=1e9,
        check_every_steps=2,
        calibration_steps=1,
        health_every_steps=3,
    ),
    # Fires at nearly every step, and must change nothing all the same.
    "observe only": PSSConfig.preset(
        "anchored",
        observe_only=True,
        threshold_ratio=1.0001,
        calibration_steps=1,
        floor_ratio=1.3,
        check_every_steps=1,
    ),
}


def gpt2(num_layers: int = 1, width: int = 16, **options: Any) -> PreTrainedModel:
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return GPT2LMHeadModel(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
        )
    )


def mixtral(num_experts: int = 3, **options: Any) -> PreTrainedModel:
    """Give one layer whose experts are stacked in one parameter."""
    config = MixtralConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 48,
            **options,
        },
        num_local_experts=num_experts,
    )
    return MixtralForCausalLM(config)


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=1,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def token_rows(num_rows: int = 64, *, masked: bool = False) -> list[dict[str, Tensor]]:
    """Return rows that can be learned: each counts upwards from a random token."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(VOCABULARY, (num_rows, 1), generator=generator)
    tokens = (starts + torch.arange(LENGTH)) % VOCABULARY
    labels = tokens.clone()
    if masked:
        labels[torch.rand(labels.shape, generator=generator) < 0.7] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


opens_pickles = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="pickles are opened from torch 2.10 on"
)


def arguments(
    folder: Path, cls: type[TrainingArguments] | None = None, **options: Any
) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": MAX_STEPS,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    has_own = any(name.startswith("pss_") for name in options)
    cls = cls or (PSSTrainingArguments if has_own else TrainingArguments)
    return cls(**{**defaults, **options})


def make_trainer(
    folder: Path,
    pss: PSSConfig | None = None,
    *,
    trainer_class: type[Trainer] | None = None,
    model: PreTrainedModel | None = None,
    model_name: str = "gpt2",
    rows: list[dict[str, Tensor]] | None = None,
    eval_rows: list[dict[str, Tensor]] | None = None,
    recovery: RecoveryConfig | None = None,
    **options: Any,
) -> Trainer:
    """Return a plain Trainer without ``pss``, a PSSTrainer with it; same seed, same data."""
    set_seed(7)
    cls = trainer_class or (Trainer if pss is None else PSSTrainer)
    extra: dict[str, Any] = {} if pss is None else {"pss_config": pss}
    extra |= {} if recovery is None else {"recovery": recovery}
    return cls(
        model=model if model is not None else MODELS[model_name](),
        args=arguments(folder, **options),
        train_dataset=rows or token_rows(masked=model_name == "bert"),
        eval_dataset=eval_rows,
        **extra,
    )


def train(folder: Path, pss: PSSConfig | None = None, *, resume: Any = None, **options: Any) -> Any:
    """Train and return the trainer; see `make_trainer`."""
    trainer = make_trainer(folder, pss, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def controller_of(trainer: Trainer) -> Any:
    return PSSCallback.of(trainer).controller


def history(trainer: Trainer) -> list[dict[str, float]]:
    """Return the log without what PSS adds and without what a clock measured."""
    clocks = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [
        {k: v for k, v in line.items() if not k.startswith("pss/") and k not in clocks}
        for line in trainer.state.log_history
    ]


def events_of(folder: Path, name: str = "pss_events.jsonl") -> list[dict[str, Any]]:
    """Read an events file with a parser that refuses what is not strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    path = folder / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_of(events: list[dict[str, Any]], kind: str = "intervention") -> list[int]:
    return [event["step"] for event in events if event["kind"] == kind]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield the places where two nested objects are not equal to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{path}: keys {list(a)} != {list(b)}"
        for key in [key for key in a if key in b]:
            yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(a, (Tensor, np.ndarray)):
        if type(a) is not type(b) or _bits(a) != _bits(b):
            yield f"{path}: tensors differ"
    elif a != b:
        yield f"{path}: {a!r} != {b!r}"


def _bits(array: Tensor | np.ndarray[Any, Any]) -> tuple[Any, ...]:
    if isinstance(array, Tensor):
        raw = array.detach().contiguous().flatten().view(torch.uint8).numpy()
    else:
        raw = array
    return array.dtype, tuple(array.shape), raw.tobytes()


def checkpoint_differences(one: Path, other: Path) -> list[str]:
    """Compare two checkpoints: weights by the file's bytes, all else by value, to the bit."""
    found = []
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        a, b = (torch.load(folder / name, weights_only=False) for folder in (one, other))
        found += differences(a, b, name)
    return found


def run_differences(one: Trainer, other: Trainer) -> list[str]:
    """Compare two runs: their logs, their weights and their last checkpoints, to the bit."""
    last = f"checkpoint-{one.state.global_step}"
    folders = [Path(trainer.args.output_dir) / last for trainer in (one, other)]
    return [
        *differences(history(one), history(other), "log"),
        *differences(weights_of(one.model), weights_of(other.model), "model"),
        *checkpoint_differences(*folders),
    ]
