"""What a sweep trains: small models, and the ways in which a learning rate can ruin them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import (
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    TrainingArguments,
)

from hf_pss.detection.explosion import ExplosionRule
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.demo_recipe import DemoRecipe

__all__ = ["RECIPES", "Fault", "Recipe"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Harm done to a run on purpose, over the steps ``start`` … ``start + num_steps − 1``."""

    kind: Literal["random_batch", "nan_gradient", "high_learning_rate"]
    """Tokens drawn uniformly; one NaN in every gradient; the learning rate times `factor`."""
    start: int
    num_steps: int = 1
    factor: float = 1.0

    def covers(self, step: int) -> bool:
        """Tell whether the step, counted from 1, is harmed."""
        return self.start <= step < self.start + self.num_steps

    @property
    def last_step(self) -> int:
        """The last step that is harmed."""
        return self.start + self.num_steps - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model, its training, and what counts as an explosion of it."""

    description: str
    training: DemoRecipe = field(default_factory=DemoRecipe)
    architecture: Literal["gpt2", "post_ln"] = "gpt2"
    """GPT-2, whose blocks normalise their input, or GPT-1, whose blocks normalise their output."""
    init_gain: float = 1.0
    """Factor on the initial block matrices."""
    zero_query: bool = False
    """W_Q starts at zero: every token attends to all alike (GPT-2 only)."""
    matrix_lr_ratio: float = 1.0
    """Learning rate of block matrices over that of everything else."""
    adam_beta1: float = 0.9
    schedule: Literal["warmup_stable_decay", "constant", "ramp"] = "warmup_stable_decay"
    """`ramp` rises linearly from zero to the learning rate, over the whole run."""
    on_gpu: bool = False
    """bfloat16 on a CUDA device, compiled; refused where there is none."""
    fault: Fault | None = None
    explosion: ExplosionRule = field(default_factory=ExplosionRule)

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """Return the recipe with fields of its own, or of its training, replaced.

        Raises:
            ConfigurationError: There is no such field, or a value is out of range.
        """
        own = {f.name for f in fields(self)} - {"training", "fault", "explosion"}
        trained = {f.name for f in fields(self.training)}
        if unknown := sorted(set(changes) - own - trained):
            raise ConfigurationError(
                f"A recipe has no {', '.join(unknown)}; it has {', '.join(sorted(own | trained))}."
            )
        for name, value in changes.items():
            now = getattr(self, name) if name in own else getattr(self.training, name)
            _check_like(name, value, now)
        training = replace(self.training, **{k: v for k, v in changes.items() if k in trained})
        return replace(self, training=training, **{k: v for k, v in changes.items() if k in own})

    def model(self) -> PreTrainedModel:
        """Return the untrained model; its weights come from torch's global seed."""
        model = self.training.model() if self.architecture == "gpt2" else self._post_ln()
        with torch.no_grad():
            for name, module in model.named_modules():
                # transformers writes linear maps of both models as Conv1D: (inputs, outputs).
                if type(module).__name__ == "Conv1D":
                    module.weight.mul_(self.init_gain)
                    if self.zero_query and name.endswith("attn.c_attn"):
                        module.weight[:, : self.training.width] = 0.0
        return model

    def arguments(self, output_dir: Path, seed: int) -> TrainingArguments:
        """Return the training arguments of one run, the same for every guard."""
        if self.on_gpu and not torch.cuda.is_available():
            raise ConfigurationError(
                f"This recipe ({self.description}) needs a CUDA device; there is none here."
            )
        args = self.training.arguments(
            output_dir, seed, use_cpu=not self.on_gpu, bf16=self.on_gpu, torch_compile=self.on_gpu
        )
        args.adam_beta1 = self.adam_beta1
        args.logging_steps = args.max_steps  # the sweep keeps its own record of every step
        if self.schedule != "warmup_stable_decay":
            args.lr_scheduler_kwargs = {}
            args.lr_scheduler_type = "constant_with_warmup"
            if self.schedule == "ramp":
                args.warmup_steps = args.max_steps
        return args

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON."""
        return asdict(self)

    def _post_ln(self) -> OpenAIGPTLMHeadModel:
        numbers = self.training
        return OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(
                n_layer=numbers.num_layers,
                n_embd=numbers.width,
                n_head=numbers.num_heads,
                n_positions=numbers.context_length,
                vocab_size=numbers.vocab_size,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )


_WORDS = {
    "architecture": ("gpt2", "post_ln"),
    "schedule": ("warmup_stable_decay", "constant", "ramp"),
}


def _check_like(name: str, value: Any, now: Any) -> None:
    """Refuse a value of another kind than the field has; YAML takes 1e-1, undotted, for a word."""
    if name in _WORDS and value not in _WORDS[name]:
        raise ConfigurationError(f"{name} is {' or '.join(_WORDS[name])}; you gave {value!r}.")
    kinds = (int, float) if isinstance(now, float) else (type(now),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(now, bool)):
        hint = " (in YAML a number needs its dot: 1.0e-1)" if isinstance(value, str) else ""
        raise ConfigurationError(f"{name} of a recipe is like {now!r}; you gave {value!r}{hint}.")


def _recipe(
    description: str, training: Mapping[str, Any] = MappingProxyType({}), **own: Any
) -> Recipe:
    return Recipe(description=description, training=DemoRecipe(**training), **own)


# Half the depth and half the batch of the demo's: a third of its time a step.
_TINY = {"num_layers": 4, "batch_size": 8, "num_steps": 600}

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "slow_damage": _recipe(
            "GPT-2, 8 layers x 64: at 1e-2 stable ranks collapse early and the loss stays high"
        ),
        "slow_damage_tiny": _recipe("The same with 4 layers and batch 8: a run takes 15 s", _TINY),
        "wide": _recipe("GPT-2, 6 layers x 128", {"num_layers": 6, "width": 128}),
        "deep": _recipe(
            "GPT-2, 24 layers x 48: damaged from 2e-2 on",
            {"num_layers": 24, "width": 48, "num_heads": 6, "batch_size": 8},
        ),
        "ramp": _recipe(
            "The tiny GPT-2; the learning rate rises from zero through the whole run: descent, "
            "then explosion where the rate becomes too high",
            {**_TINY, "num_steps": 1000},
            schedule="ramp",
        ),
        "collapse": _recipe(
            "GPT-1 (post-LN), 12 layers: at 1e-2 it falls to unigram entropy within 100 steps",
            {"num_layers": 12, "batch_size": 8, "num_steps": 400},
            architecture="post_ln",
        ),
        "random_batch": _recipe(
            "The tiny GPT-2; the tokens of steps 300 to 302 are drawn at random",
            {**_TINY, "learning_rate": 3e-3},
            fault=Fault("random_batch", start=300, num_steps=3),
        ),
        "nan_gradient": _recipe(
            "The tiny GPT-2; the gradients of step 300 hold a NaN",
            {**_TINY, "learning_rate": 3e-3},
            fault=Fault("nan_gradient", start=300),
        ),
        "damaged": _recipe(
            "The tiny GPT-2 at a sound rate; from step 200 on, 20 steps at 30 times that rate",
            {**_TINY, "learning_rate": 2e-3},
            fault=Fault("high_learning_rate", start=200, num_steps=20, factor=30.0),
        ),
        "damaged_mildly": _recipe(
            "The same with 5 steps at 10 times that rate",
            {**_TINY, "learning_rate": 2e-3},
            fault=Fault("high_learning_rate", start=200, num_steps=5, factor=10.0),
        ),
        "undamaged": _recipe(
            "The twin of `damaged` without the damage", {**_TINY, "learning_rate": 2e-3}
        ),
        "gpt2_124m": _recipe(
            "GPT-2 124M, context 1024, on one GPU: bfloat16, compiled",
            {
                "num_layers": 12,
                "width": 768,
                "num_heads": 12,
                "context_length": 1024,
                "vocab_size": 8192,
                "batch_size": 16,
                "num_steps": 1000,
                "warmup_steps": 100,
            },
            on_gpu=True,
        ),
    }
)
"""Every recipe, by the name that a grid gives. Learning rates are the grid's."""
