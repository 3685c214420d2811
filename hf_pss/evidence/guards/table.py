"""The guards that a sweep can compare, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from transformers import Trainer, TrainerCallback

from hf_pss.config import PSSConfig
from hf_pss.evidence.baselines import (
    adagc,
    reparametrized_adamw,
    spam,
    stable_adamw,
    stable_spam,
)
from hf_pss.evidence.guards.base import Guard
from hf_pss.evidence.guards.gradients import LearningRateDrop, OlmoSkipStep, ZClip
from hf_pss.evidence.guards.repairs import Rescue, Treatment
from hf_pss.evidence.guards.weights import (
    REPARAMETRIZED,
    ScheduledSmoothing,
    SpectralCap,
    sigma_reparam_,
)
from hf_pss.trainer.callback import PSSCallback

__all__ = ["GUARDS"]

_PSS_PAPER = "Dispelling the Curse of Singularities, arXiv 2602.01308"


def _olmo_skip(trainer: Trainer) -> TrainerCallback:
    pss = PSSCallback.of(trainer)
    return OlmoSkipStep(lambda: pss.readings)


def _rescue(treatment: Treatment) -> Guard:
    def callback(trainer: Trainer) -> TrainerCallback:
        return Rescue(trainer.recipe.fault, treatment)

    descriptions = {
        "smooth": "matrices capped at the stable-rank floor 0.8 x noise, once, after the fault",
        "smooth_and_reset": "the same, and all first moments set to zero",
        "reset": "only the first moments set to zero",
        "roll_back": "weights and optimizer as before the fault; then the next data",
    }
    return Guard(
        description=descriptions[treatment], source="ours", callback=callback, needs_fault=True
    )


_ROWS = {
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
        callback=lambda trainer: ZClip(),
    ),
    "adagc": Guard(
        description="each tensor's gradient clipped at 1.05 times its own average",
        source="AdaGC, arXiv 2502.11034; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=adagc,
    ),
    "spam": Guard(
        description="Adam with entries clipped at g² = 5000 v, moments reset every 500 steps",
        source="SPAM, arXiv 2501.06842; pytorch_optimizer with the paper's warm-up of 150 steps",
        max_grad_norm=0.0,
        optimizer=spam,
    ),
    "stable_spam": Guard(
        description="Adam on clipped and normalised gradients, moments reset every 1000 steps",
        source="Stable-SPAM, arXiv 2502.17055; pytorch_optimizer",
        max_grad_norm=0.0,
        optimizer=stable_spam,
    ),
    "stable_adamw": Guard(
        description="AdamW, learning rate over max(1, RMS(g/√v)) of each tensor",
        source="StableAdamW, arXiv 2304.13013; pytorch_optimizer, which also scales weight decay",
        max_grad_norm=0.0,
        optimizer=stable_adamw,
    ),
    "olmo_skip": Guard(
        description="update skipped where loss or norm passes mean + 6σ of 128 steps",
        source="OLMo-core's SkipStepOptimizer; non-finite values are skipped and not remembered, "
        "and a skipped step leaves the moments as they are",
        callback=_olmo_skip,
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
    "rescue_smooth": _rescue("smooth"),
    "rescue_smooth_and_reset": _rescue("smooth_and_reset"),
    "rescue_reset": _rescue("reset"),
    "rescue_roll_back": _rescue("roll_back"),
}

GUARDS: Mapping[str, Guard] = MappingProxyType(_ROWS)
"""Guard by name. If ``max_grad_norm`` is None, the recipe's clipping stays on."""
