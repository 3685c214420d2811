"""The protections of a training run that a sweep compares with PSS, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.baselines import (
    OptimizerMaker,
    packaged_adam,
    reparametrized_adamw,
)
from hf_pss.evidence.guard_callbacks import (
    REPARAMETRIZED,
    Assr,
    FloorSchedule,
    LearningRateDrop,
    NormCap,
    OlmoSkipStep,
    Rescue,
    ScheduledSmoothing,
    SpectralCap,
    Treatment,
    ZClip,
    ZClipRule,
    sigma_reparam_,
)
from hf_pss.trainer.callback import PSSCallback


@dataclass(frozen=True, slots=True)
class Guard:
    """A protection of a training run, as the differences from the same run without it.

    The recipe sets everything else: initial weights, order of the data, schedule.
    """

    description: str
    """One line for tables and ``--help``."""
    source: str
    """The paper and its rule, or the package that implements it."""
    pss: PSSConfig = field(default_factory=lambda: PSSConfig(observe_only=True))
    """Options of PSS, which only observes unless the guard is PSS."""
    max_grad_norm: float | None = None
    """Clipping at this global norm. With 0 nothing is clipped; None leaves it to the recipe."""
    optimizer: OptimizerMaker | None = None
    """Builds the optimizer that replaces AdamW. With None the recipe's optimizer stays."""
    callback: Callable[[Trainer], TrainerCallback] | None = None
    """Acts during training, after PSS's callback."""
    needs_fault: bool = False
    """Whether the guard treats a run after the recipe's fault. Without a fault it does nothing."""
    prepare: Callable[[nn.Module], None] | None = None
    """Changes the model before training, when it has the recipe's initial weights."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the guard's factory that differ from their defaults."""


_PSS_PAPER = "Dispelling the Curse of Singularities, arXiv 2602.01308"


def _rescue(treatment: Treatment, description: str) -> Guard:
    return Guard(
        description=description,
        source="ours",
        callback=lambda trainer: Rescue(trainer.recipe.fault, treatment),
        needs_fault=True,
    )


def _scheduled_floor(
    description: str,
    schedule: Callable[[TrainingArguments], Callable[[int, float], float]],
    options: Mapping[str, Any],
) -> Guard:
    """Return the guard whose floors a `FloorSchedule` scales; PSS has the given options."""
    return Guard(
        description=description,
        source="ours",
        pss=PSSConfig.preset("floor", **options),
        callback=lambda trainer: FloorSchedule(PSSCallback.of(trainer), schedule(trainer.args)),
    )


GUARDS: Mapping[str, Callable[..., Guard]] = {
    "none": lambda: Guard(
        description="no protection, not even clipping",
        source="control",
        max_grad_norm=0.0,
    ),
    "clip": lambda max_grad_norm=1.0: Guard(
        description=f"global gradient norm clipped at {max_grad_norm:g}",
        source="Pascanu et al. 2013, arXiv 1211.5063; torch's clip_grad_norm_",
        max_grad_norm=max_grad_norm,
    ),
    "zclip": lambda z_thresh=2.5, alpha=0.97, calibration_steps=25: Guard(
        description=f"gradient norm clipped where its z-score passes {z_thresh:g}",
        source="ZClip, arXiv 2504.02507, reciprocal rule of the authors' code; without that code's "
        "second limit, a fixed norm of 1; non-finite norms are not averaged",
        max_grad_norm=0.0,
        callback=lambda trainer: ZClip(
            ZClipRule(z_thresh=z_thresh, alpha=alpha, calibration_steps=calibration_steps)
        ),
    ),
    # β = 0.98 and λ_rel = 1.05. For the first 100 steps it clips globally at λ_abs = 1, and the
    # smallest norm so far serves as the average. These numbers are the package's defaults.
    "adagc": lambda: Guard(
        description="each tensor's gradient clipped at 1.05 times its own average",
        source="AdaGC, arXiv 2502.11034; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=packaged_adam("AdaGC"),
    ),
    # A cosine warm-up of 150 steps after a reset (the package's default is 50) and full density,
    # which means no sparse momentum. As in the authors' code, a reset does not restart Adam's bias
    # correction, and entries are limited only from the 20th step after it.
    "spam": lambda: Guard(
        description="Adam with entries clipped at g² = 5000 v, moments reset every 500 steps",
        source="SPAM, arXiv 2501.06842; pytorch_optimizer with the authors' warm-up of 150 steps",
        max_grad_norm=0.0,
        optimizer=packaged_adam("SPAM", warmup_epoch=150),
    ),
    # γ₁ = 0.7, γ₂ = 0.9 and θ = 0.999, which are the package's defaults.
    "stable_spam": lambda: Guard(
        description="Adam on clipped and normalised gradients, moments reset every 1000 steps",
        source="Stable-SPAM, arXiv 2502.17055v2; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=packaged_adam("StableSPAM"),
    ),
    # Algorithm 2 of the paper, whose average corrects v for its bias.
    "stable_adamw": lambda: Guard(
        description="AdamW, learning rate over max(1, RMS(g/√v)) of each tensor",
        source="StableAdamW, arXiv 2304.13013; pytorch_optimizer, which also scales weight decay",
        max_grad_norm=0.0,
        optimizer=packaged_adam("StableAdamW"),
    ),
    "olmo_skip": lambda: Guard(
        description="update skipped where loss or norm passes mean + 6σ of 128 steps",
        source="OLMo-core's SkipStepOptimizer; non-finite values are skipped and not remembered",
        callback=lambda trainer: OlmoSkipStep(PSSCallback.of(trainer)),
    ),
    "spectral_cap": lambda factor=1.0: Guard(
        description=f"σ₁ of each matrix at most {factor:g} times the edge of noise of variance "
        "1/n, 1 + √(m/n)",
        source="Spectral norm by power iteration, arXiv 1802.05957, as a cap; its level is ours",
        callback=lambda trainer: SpectralCap(factor=factor),
    ),
    # With gain=0, γ starts at σ₁, so the model is the same at first.
    "sigma_reparam": lambda gain=0.0: Guard(
        description="W = γ W/σ₁(W) with γ learned",
        source="σReparam, arXiv 2303.06296; torch's spectral_norm; γ starts at "
        + (f"{gain:g}" if gain else "σ₁"),
        pss=PSSConfig(observe_only=True, include=(REPARAMETRIZED,)),
        optimizer=reparametrized_adamw,
        prepare=lambda model: sigma_reparam_(model, gain=gain),
    ),
    "msign": lambda every_steps=100: Guard(
        description=f"polar reset of all matrices every {every_steps} steps",
        source="MSign, arXiv 2602.01734; on attention and MLP matrices alike",
        callback=lambda trainer: ScheduledSmoothing("polar", every_steps=every_steps),
    ),
    "assr": lambda base_lambda=1e-4, floor=0.25, ceiling=500.0: Guard(
        description="L2 penalty on matrices of low stable rank or high condition number",
        source="ASSR, github.com/xfdbv99pqh-jpg/ASSR, version 1.5.0; on the matrices of PSS",
        callback=lambda trainer: Assr(
            base_lambda=base_lambda, floor=floor, ceiling=ceiling, seed=trainer.args.seed
        ),
    ),
    "lr_drop": lambda: Guard(
        description="learning rate halved for good where PSS would have smoothed",
        source=f"control for {_PSS_PAPER}",
        pss=PSSConfig.preset("paper", observe_only=True),
        callback=lambda trainer: LearningRateDrop(PSSCallback.of(trainer)),
    ),
    "scheduled_clip": lambda: Guard(
        description="PSS's smoothing every 100 steps, without a detector",
        source=f"control for {_PSS_PAPER}",
        callback=lambda trainer: ScheduledSmoothing("clip"),
    ),
    "random_clip": lambda: Guard(
        description="PSS's smoothing at random steps, one in 100",
        source=f"control for {_PSS_PAPER}",
        callback=lambda t: ScheduledSmoothing("clip", random_seed=t.args.seed),
    ),
    "hammer_every_step": lambda: Guard(
        description="σ₁ lowered to σ₂ after every step",
        source="control: the cheapest smoothing, rank one, all the time",
        callback=lambda trainer: ScheduledSmoothing("hammer", every_steps=1, max_rank=1),
    ),
    "paper": lambda: Guard(
        description="PSS as published: gradient norm over 2.5 times its average, then clip",
        source=_PSS_PAPER,
        pss=PSSConfig.preset("paper"),
    ),
    "floor": lambda: Guard(
        description="PSS with the stable-rank floor",
        source="ours",
        pss=PSSConfig.preset("floor"),
    ),
    "anchored": lambda: Guard(
        description="PSS's default: anchored smoothing, tried before it is kept, and the floor",
        source=f"{_PSS_PAPER}; anchor, trial and floor are ours",
        pss=PSSConfig.preset("anchored"),
    ),
    "floor_first": lambda steps=300, **pss: _scheduled_floor(
        f"the floor in the first {steps} steps only",
        lambda _: lambda step, rate: step <= steps,
        pss,
    ),
    "floor_with_lr": lambda **pss: _scheduled_floor(
        "the floor times the learning rate over its peak", lambda _: lambda step, rate: rate, pss
    ),
    "floor_with_progress": lambda **pss: _scheduled_floor(
        "the floor times the share of the steps that is left",
        lambda args: lambda step, rate: 1 - step / args.max_steps,
        pss,
    ),
    "norm_cap": lambda factor=2.0: Guard(
        description=f"‖W‖_F of each matrix at most {factor:g} times its value at the start",
        source="ours",
        callback=lambda trainer: NormCap(factor=factor),
    ),
    "rescue_smooth": lambda: _rescue(
        "smooth", "matrices capped at the stable-rank floor 0.8 x noise, once, after the fault"
    ),
    "rescue_smooth_and_reset": lambda: _rescue(
        "smooth_and_reset", "the same, and all first moments set to zero"
    ),
    "rescue_reset": lambda: _rescue("reset", "only the first moments set to zero"),
    "rescue_roll_back": lambda: _rescue(
        "roll_back", "weights and optimizer as before the fault; then the next data"
    ),
}
"""The factory of each guard by name; its keyword arguments are the options that a grid may give.
If ``max_grad_norm`` of a guard is None, the recipe's clipping stays on."""


def make_guard(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Guard:
    """Return the guard of a name in `GUARDS`, with some of its options changed.

    Raises:
        ConfigurationError: An option is unknown, or its value is out of range.
    """
    defaults = default_options(name)
    takes_pss = len(defaults) < len(signature(GUARDS[name]).parameters)
    if not takes_pss and (unknown := sorted(options.keys() - defaults.keys())):
        raise ConfigurationError(
            f"The guard {name} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(defaults) or 'none'}."
        )
    given = {
        key: _number(key, value, defaults[key]) if key in defaults else value
        for key, value in options.items()
    }
    own = {
        key: given[key] for key, default in defaults.items() if given.get(key, default) != default
    }
    return replace(GUARDS[name](**given), options=own)


def default_options(name: str) -> dict[str, Any]:
    """Return the options of a guard's own with their defaults. Some take options of PSS as well."""
    parameters = signature(GUARDS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def _number(key: str, value: Any, default: float) -> float:
    """Return a number of a grid file in the type of the option's default."""
    try:
        number = float(value)  # YAML reads 1e-3, without a dot, as text
    except (TypeError, ValueError):
        number = math.nan
    is_whole = isinstance(default, int)
    if (
        isinstance(value, bool)
        or not (number > 0 or number == default)
        or (is_whole and number % 1)
    ):
        raise ConfigurationError(
            f"The option {key} of a guard is a {'whole ' * is_whole}number above 0, and by default "
            f"{default!r}; you gave {value!r}."
        )
    return int(number) if is_whole else number
