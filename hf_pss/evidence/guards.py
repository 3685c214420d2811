"""The protections of a training run that a sweep compares with PSS, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import Trainer, TrainerCallback

from hf_pss.config import PSSConfig
from hf_pss.evidence.baselines import OptimizerMaker, packaged_adam, reparametrized_adamw
from hf_pss.evidence.guard_callbacks import (
    REPARAMETRIZED,
    LearningRateDrop,
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


_PSS_PAPER = "Dispelling the Curse of Singularities, arXiv 2602.01308"


def _rescue(treatment: Treatment, description: str) -> Guard:
    return Guard(
        description=description,
        source="ours",
        callback=lambda trainer: Rescue(trainer.recipe.fault, treatment),
        needs_fault=True,
    )


GUARDS: Mapping[str, Guard] = {
    "none": Guard(
        description="no protection, not even clipping",
        source="control",
        max_grad_norm=0.0,
    ),
    "clip": Guard(
        description="global gradient norm clipped at 1",
        source="Pascanu et al. 2013, arXiv 1211.5063; torch's clip_grad_norm_",
        max_grad_norm=1.0,
    ),
    "zclip": Guard(
        description="gradient norm clipped where its z-score passes 2.5",
        source="ZClip, arXiv 2504.02507, reciprocal rule of the authors' code; without that code's "
        "second limit, a fixed norm of 1; non-finite norms are not averaged",
        max_grad_norm=0.0,
        callback=lambda trainer: ZClip(ZClipRule()),
    ),
    # β = 0.98 and λ_rel = 1.05. For the first 100 steps it clips globally at λ_abs = 1, and the
    # smallest norm so far serves as the average. These numbers are the package's defaults.
    "adagc": Guard(
        description="each tensor's gradient clipped at 1.05 times its own average",
        source="AdaGC, arXiv 2502.11034; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=packaged_adam("AdaGC"),
    ),
    # A cosine warm-up of 150 steps after a reset (the package's default is 50) and full density,
    # which means no sparse momentum. The package does not restart Adam's bias correction at a
    # reset. After a reset it limits entries only from the 20th step on.
    "spam": Guard(
        description="Adam with entries clipped at g² = 5000 v, moments reset every 500 steps",
        source="SPAM, arXiv 2501.06842; pytorch_optimizer with the paper's warm-up of 150 steps",
        max_grad_norm=0.0,
        optimizer=packaged_adam("SPAM", warmup_epoch=150),
    ),
    # γ₁ = 0.7, γ₂ = 0.9 and θ = 0.999, which are the package's defaults.
    "stable_spam": Guard(
        description="Adam on clipped and normalised gradients, moments reset every 1000 steps",
        source="Stable-SPAM, arXiv 2502.17055; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=packaged_adam("StableSPAM"),
    ),
    # Algorithm 2 of the paper, whose average corrects v for its bias.
    "stable_adamw": Guard(
        description="AdamW, learning rate over max(1, RMS(g/√v)) of each tensor",
        source="StableAdamW, arXiv 2304.13013; pytorch_optimizer, which also scales weight decay",
        max_grad_norm=0.0,
        optimizer=packaged_adam("StableAdamW"),
    ),
    "olmo_skip": Guard(
        description="update skipped where loss or norm passes mean + 6σ of 128 steps",
        source="OLMo-core's SkipStepOptimizer; non-finite values are skipped and not remembered, "
        "and a skipped step leaves the moments as they are",
        callback=lambda trainer: OlmoSkipStep(PSSCallback.of(trainer)),
    ),
    "spectral_cap": Guard(
        description="σ₁ of each matrix held to the edge of noise of variance 1/n, 1 + √(m/n)",
        source="Spectral norm by power iteration, arXiv 1802.05957, as a cap; its level is ours",
        callback=lambda trainer: SpectralCap(),
    ),
    "sigma_reparam": Guard(
        description="W = γ W/σ₁(W) with γ learned",
        source="σReparam, arXiv 2303.06296; torch's spectral_norm; γ starts at σ₁ instead of 1",
        pss=PSSConfig(observe_only=True, include=(REPARAMETRIZED,)),
        optimizer=reparametrized_adamw,
        prepare=sigma_reparam_,
    ),
    "msign": Guard(
        description="polar reset of all matrices every 100 steps",
        source="MSign, arXiv 2602.01734; on attention and MLP matrices alike",
        callback=lambda trainer: ScheduledSmoothing("polar"),
    ),
    "lr_drop": Guard(
        description="learning rate halved for good where PSS would have smoothed",
        source=f"control for {_PSS_PAPER}",
        pss=PSSConfig.preset("paper", observe_only=True),
        callback=lambda trainer: LearningRateDrop(PSSCallback.of(trainer)),
    ),
    "scheduled_clip": Guard(
        description="PSS's smoothing every 100 steps, without a detector",
        source=f"control for {_PSS_PAPER}",
        callback=lambda trainer: ScheduledSmoothing("clip"),
    ),
    "random_clip": Guard(
        description="PSS's smoothing at random steps, one in 100",
        source=f"control for {_PSS_PAPER}",
        callback=lambda t: ScheduledSmoothing("clip", random_seed=t.args.seed),
    ),
    "hammer_every_step": Guard(
        description="σ₁ lowered to σ₂ after every step",
        source="control: the cheapest smoothing, rank one, all the time",
        callback=lambda trainer: ScheduledSmoothing("hammer", every_steps=1, max_rank=1),
    ),
    "paper": Guard(
        description="PSS as published: gradient norm over 2.5 times its average, then clip",
        source=_PSS_PAPER,
        pss=PSSConfig.preset("paper"),
    ),
    "floor": Guard(
        description="PSS with the stable-rank floor",
        source="ours",
        pss=PSSConfig.preset("floor"),
    ),
    "anchored": Guard(
        description="PSS's default: anchored smoothing, tried before it is kept, and the floor",
        source=f"{_PSS_PAPER}; anchor, trial and floor are ours",
        pss=PSSConfig.preset("anchored"),
    ),
    "rescue_smooth": _rescue(
        "smooth", "matrices capped at the stable-rank floor 0.8 x noise, once, after the fault"
    ),
    "rescue_smooth_and_reset": _rescue(
        "smooth_and_reset", "the same, and all first moments set to zero"
    ),
    "rescue_reset": _rescue("reset", "only the first moments set to zero"),
    "rescue_roll_back": _rescue(
        "roll_back", "weights and optimizer as before the fault; then the next data"
    ),
}
"""Guard by name. If ``max_grad_norm`` is None, the recipe's clipping stays on."""
