"""The trainings of demos and sweeps: small models, some of them harmed on purpose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_pss.detection.explosion import ExplosionRule
from hf_pss.errors import ConfigurationError, how_to_install
from hf_pss.evidence.architectures import ARCHITECTURES, ModelSizes
from hf_pss.evidence.corpus import CORPORA
from hf_pss.models.selection import named_parameters_canonical, select_matrices

Schedule = Literal["warmup_stable_decay", "constant", "ramp", "cosine"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Deliberate harm to a run, over the steps ``start`` … ``start + num_steps − 1``."""

    kind: Literal[
        "random_batch", "repeated_token", "sequence_jump", "nan_gradient", "high_learning_rate"
    ]
    """The harm: uniformly drawn tokens, rows that repeat one drawn token, rows that are from now on
    twice as long as before, one NaN in every gradient, or the learning rate times `factor`."""
    start: int
    num_steps: int = 1
    factor: float = 1.0

    def covers(self, step: int) -> bool:
        """Return whether this fault harms the step; steps are counted from 1."""
        return self.start <= step < self.start + self.num_steps

    @property
    def last_step(self) -> int:
        """The last harmed step."""
        return self.start + self.num_steps - 1


TOKEN_FAULTS = ("random_batch", "repeated_token", "sequence_jump")
"""The kinds of faults that change the tokens of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model, its training, and the definition of an explosion in that training.

    The defaults train a GPT-2 of 8 layers at a learning rate above its best one.
    """

    num_layers: int = 8
    width: int = 64
    num_heads: int = 4
    context_length: int = 64
    vocab_size: int = 2048
    batch_size: int = 16
    learning_rate: float = 1e-2
    num_steps: int = 800
    warmup_steps: int = 20
    weight_decay: float = 0.1
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_every_steps: int = 100
    num_eval_blocks: int = 256
    health_every_steps: int = 20
    """Interval of the health readings in the demo. In a sweep the guards set the interval."""
    architecture: str = "gpt2"
    """A name from `ARCHITECTURES`."""
    corpus: str = "python"
    """A name from `CORPORA`. ``vit`` takes ``digits``, and no other architecture does."""
    init_gain: float = 1.0
    """Factor on the initial values of the block matrices."""
    zero_query: bool = False
    """W_Q starts at zero, so that every token attends equally to all (GPT-2 only)."""
    matrix_lr_ratio: float = 1.0
    """Ratio of the learning rate of the block matrices to that of the other parameters."""
    adam_beta1: float = 0.9
    schedule: Schedule = "warmup_stable_decay"
    """All but ``ramp`` begin with a linear warm-up. ``warmup_stable_decay`` and ``constant`` then
    stay constant. The first decays linearly to zero over the last 40 % of the steps. ``cosine``
    falls to zero along half a cosine. ``ramp`` rises linearly from zero over the whole run."""
    dtype: str = "float32"
    """With ``bfloat16`` the weights and the optimizer's moments have this dtype, and there is no
    copy in float32."""
    pretrain_steps: int = 0
    """The run starts from weights that this number of steps at `pretrain_learning_rate` has
    trained, with the clip guard and the default schedule. With 0 it starts from scratch."""
    pretrain_learning_rate: float = 2e-3
    lora_rank: int = 0
    """After pre-training, only LoRA adapters of this rank train, one for each block matrix. With 0
    there are none."""
    on_gpu: bool = False
    """Train in bfloat16 on a CUDA device, compiled. Without such a device the run is an error."""
    fault: Fault | None = None
    explosion: ExplosionRule = field(default_factory=ExplosionRule)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not (value := getattr(self, name)) > 0:
                raise ConfigurationError(f"{name} must be above 0; you gave {value!r}.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"{name} must be 0 or more; you gave {getattr(self, name)!r}."
                )
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                raise ConfigurationError(f"{name} is {' or '.join(words)}; you gave {value!r}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        name = self.architecture
        if (name == "vit") != (self.corpus == "digits"):
            raise ConfigurationError(
                f"{name} cannot learn from {self.corpus}: vit takes the images of the corpus "
                "digits only, and the others take text only."
            )
        if name == "vit" and self.fault and self.fault.kind in TOKEN_FAULTS:
            raise ConfigurationError(
                f"vit has no tokens for {self.fault.kind}; choose another fault or architecture."
            )
        if self.lora_rank and not self.pretrain_steps:
            raise ConfigurationError(
                "LoRA adapters need a trained model: give pretrain_steps beside lora_rank."
            )
        if self.zero_query and name not in ("gpt2", "post_ln"):
            raise ConfigurationError(f"zero_query is for gpt2 and post_ln, not {name}.")
        if self.width % self.num_heads:
            raise ConfigurationError(
                f"{self.num_heads} heads do not divide a width of {self.width}; choose a multiple."
            )

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """Return the recipe with some fields replaced by those of a grid file.

        Raises:
            ConfigurationError: A field is unknown, or a value has the wrong type or range.
        """
        known = {f.name for f in fields(self)} - {"fault", "explosion"}
        if unknown := sorted(set(changes) - known):
            raise ConfigurationError(
                f"A recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        for name, value in changes.items():
            _check_like(name, value, getattr(self, name))
        return replace(self, **changes)

    def model(self) -> PreTrainedModel:
        """Return the untrained model, with weights from torch's global generator."""
        sizes = ModelSizes(*(getattr(self, f.name) for f in fields(ModelSizes)))
        model = ARCHITECTURES[self.architecture](sizes)
        parameters = named_parameters_canonical(model)
        matrices = {view.parameter_name for view in select_matrices(model).matrices}
        with torch.no_grad():
            for name in matrices:
                parameters[name].mul_(self.init_gain)
                if self.zero_query and name.endswith("attn.c_attn.weight"):
                    # GPT stores its linear maps as (inputs, outputs), with the query first.
                    parameters[name][:, : self.width] = 0.0
        return model.to(getattr(torch, self.dtype))

    def with_adapters(self, model: nn.Module) -> nn.Module:
        """Return the model, with LoRA adapters from torch's global generator if the recipe has any.

        Raises:
            ConfigurationError: The recipe has adapters, and peft is not installed.
        """
        if not self.lora_rank:
            return model
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigurationError(f"lora_rank needs peft. {how_to_install('peft')}") from error
        # peft's scale is alpha / rank. Twice the rank is a usual alpha.
        adapters = LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )
        adapted: nn.Module = get_peft_model(model, adapters)
        return adapted

    @property
    def pretraining(self) -> Recipe:
        """The recipe of the run before this one: no fault, and the default schedule."""
        return replace(
            self,
            num_steps=self.pretrain_steps,
            learning_rate=self.pretrain_learning_rate,
            pretrain_steps=0,
            lora_rank=0,
            fault=None,
            schedule="warmup_stable_decay",
            warmup_steps=20,
        )

    def arguments(self, output_dir: Path, seed: int) -> TrainingArguments:
        """Return the training arguments of one run; they are the same for every guard."""
        schedule: dict[str, Any] = {
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": min(self.warmup_steps, self.num_steps // 2),
        }
        if self.schedule == "ramp":
            schedule["warmup_steps"] = self.num_steps
        elif self.schedule == "cosine":
            schedule["lr_scheduler_type"] = "cosine"
        elif self.schedule == "warmup_stable_decay":
            decay = {"num_decay_steps": round(0.4 * self.num_steps), "decay_type": "linear"}
            schedule |= {"lr_scheduler_type": self.schedule, "lr_scheduler_kwargs": decay}
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            use_cpu=not self.on_gpu,
            bf16=self.on_gpu,
            torch_compile=self.on_gpu,
            max_steps=self.num_steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            max_grad_norm=self.max_grad_norm,
            eval_strategy="steps",
            eval_steps=min(self.eval_every_steps, self.num_steps),
            logging_steps=self.num_steps,  # the run keeps its own record of every step
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            dataloader_num_workers=0,
            **schedule,
        )


_POSITIVE = (
    *("num_layers", "width", "num_heads", "context_length", "vocab_size", "batch_size"),
    *("learning_rate", "pretrain_learning_rate", "num_steps", "adam_beta2"),
    *("eval_every_steps", "num_eval_blocks", "health_every_steps"),
)
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "pretrain_steps", "lora_rank")
_WORDS: Mapping[str, Collection[str]] = {
    "architecture": ARCHITECTURES,
    "corpus": CORPORA,
    "dtype": ("float32", "bfloat16"),
    "schedule": get_args(Schedule),
}


def _check_like(name: str, value: Any, now: Any) -> None:
    """Refuse a value of the wrong type, such as 1e-1, which YAML reads as text."""
    kinds = (int, float) if isinstance(now, float) else (type(now),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(now, bool)):
        hint = " (in YAML a number needs its dot: 1.0e-1)" if isinstance(value, str) else ""
        raise ConfigurationError(f"{name} of a recipe is like {now!r}; you gave {value!r}{hint}.")


# With half the depth and batch size of the default, a step takes a third of the time.
_TINY: dict[str, Any] = {"num_layers": 4, "batch_size": 8, "num_steps": 600}

RECIPES: Mapping[str, Recipe] = {
    # At 1e-2 stable ranks collapse early and the loss stays high.
    "slow_damage": Recipe(),
    # A run takes 15 s.
    "slow_damage_tiny": Recipe(**_TINY),
    "wide": Recipe(num_layers=6, width=128),
    # Damaged from 2e-2 on.
    "deep": Recipe(num_layers=24, width=48, num_heads=6, batch_size=8),
    # The learning rate rises from zero through the whole run: descent, then explosion where the
    # rate becomes too high.
    "ramp": Recipe(**{**_TINY, "num_steps": 1000}, schedule="ramp"),
    "deep48": Recipe(num_layers=48, width=48, num_heads=6, batch_size=8),
    # GPT-1 (post-LN): at 1e-2 it falls to unigram entropy within 100 steps.
    "collapse": Recipe(num_layers=12, batch_size=8, num_steps=400, architecture="post_ln"),
    # The tokens of steps 300 to 302 are drawn at random.
    "random_batch": Recipe(
        **_TINY, learning_rate=3e-3, fault=Fault("random_batch", start=300, num_steps=3)
    ),
    # The rows of steps 300 to 302 repeat one token each.
    "repeated_token": Recipe(
        **_TINY, learning_rate=3e-3, fault=Fault("repeated_token", start=300, num_steps=3)
    ),
    # The rows have 64 tokens up to step 299, and 128 from step 300 on.
    "sequence_jump": Recipe(
        **_TINY, context_length=128, learning_rate=3e-3, fault=Fault("sequence_jump", start=300)
    ),
    # The gradients of step 300 hold a NaN.
    "nan_gradient": Recipe(**_TINY, learning_rate=3e-3, fault=Fault("nan_gradient", start=300)),
    # At a sound rate; from step 200 on, 20 steps at 30 times that rate.
    "damaged": Recipe(
        **_TINY,
        learning_rate=2e-3,
        fault=Fault("high_learning_rate", start=200, num_steps=20, factor=30.0),
    ),
    # The same with 5 steps at 10 times that rate.
    "damaged_mildly": Recipe(
        **_TINY,
        learning_rate=2e-3,
        fault=Fault("high_learning_rate", start=200, num_steps=5, factor=10.0),
    ),
    # The twin of `damaged` without the damage.
    "undamaged": Recipe(**_TINY, learning_rate=2e-3),
    "bfloat16": Recipe(**_TINY, dtype="bfloat16"),
    # The learning rate rises again after 600 steps at a sound rate that ends at zero.
    "continued": Recipe(**_TINY, pretrain_steps=600),
    # Only LoRA adapters train after these 600 steps.
    "lora": Recipe(**_TINY, pretrain_steps=600, lora_rank=8),
    "no_warmup": Recipe(**_TINY, warmup_steps=0),
    "bert_mlm": Recipe(**_TINY, architecture="bert"),
    "llama": Recipe(**_TINY, architecture="llama"),
    "llama_untied": Recipe(**_TINY, architecture="llama_untied"),
    # Llama's usual schedule, with a warm-up of a tenth of 2,400 steps.
    "llama_english": Recipe(
        **{**_TINY, "num_steps": 2400},
        architecture="llama",
        corpus="english",
        warmup_steps=240,
        adam_beta2=0.95,
        schedule="cosine",
    ),
    "llama_no_warmup": Recipe(
        **{**_TINY, "num_steps": 2400},
        architecture="llama",
        corpus="english",
        warmup_steps=0,
        adam_beta2=0.95,
    ),
    "qwen3": Recipe(**_TINY, architecture="qwen3"),
    "moe": Recipe(**_TINY, architecture="moe"),
    "vit": Recipe(**_TINY, architecture="vit", corpus="digits"),
    # GPT-2 124M, context 1024, on one GPU: bfloat16, compiled.
    "gpt2_124m": Recipe(
        num_layers=12,
        width=768,
        num_heads=12,
        context_length=1024,
        vocab_size=8192,
        num_steps=1000,
        warmup_steps=100,
        on_gpu=True,
    ),
}
"""Every recipe, by the name that a grid gives. The grid sets the learning rate."""
