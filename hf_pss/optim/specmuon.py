"""SpecMuon: Muon that damps the leading modes while the loss is above its recent level."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import leading_triplets
from hf_pss.linalg.scaling import unit_scaled
from hf_pss.optim.muon import MUON, check_polar, polar_direction
from hf_pss.optim.rules import UPDATE_SCALES, Options, Rule, State

# κ, which keeps √loss and the quotients with it finite if the loss is zero.
_OFFSET = 1e-8


def _specmuon(momenta: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    loss = options.get("loss")
    if loss is None and options["lr"] == 0:
        loss = 1.0  # torch's distributed checkpoints make such a step to create the state
    if loss is None:
        raise ConfigurationError(
            "SpecMuon needs the loss to damp modes, but was given no loss. Call step(closure) with "
            "a closure that returns it, or set the optimizer's `loss` before the step."
        )
    m, n = momenta.shape[-2:]
    scaled = unit_scaled(momenta)
    finite, momenta = scaled.finite[:, None, None], scaled.matrix
    loss = torch.as_tensor(loss, dtype=momenta.dtype, device=momenta.device).detach()
    energy = (loss.clamp_min(0) + _OFFSET).sqrt()
    triplets = leading_triplets(momenta, options["num_modes"], check_finite=False)
    norm = torch.linalg.matrix_norm(momenta).unsqueeze(-1)
    sigma = triplets.sigma / torch.where(norm > 0, norm, 1.0)

    if state:
        before = _relaxed(state["energy"], state["dissipation"], energy, options["relaxation"])
    else:
        before = energy.expand_as(sigma)
    # This is h g² with h = η/σ and g = σ/E.
    rate = options["lr"] * sigma / energy.square()
    after = before / (1 + rate / 2)
    dissipation = rate * after.square()

    polar = polar_direction(momenta, options)
    held = 1 - after / energy
    direction = polar - (triplets.u * held.unsqueeze(-2)) @ (triplets.u.mT @ polar)
    direction = direction * UPDATE_SCALES[options["scale"]](m, n)
    usable = loss.isfinite()
    kept = {
        "energy": torch.where(usable, after, state.get("energy", torch.inf)),
        "dissipation": torch.where(usable, dissipation, state.get("dissipation", 0.0)),
    }
    return torch.where(finite & usable, direction, torch.nan), kept


def _relaxed(scalar: Tensor, dissipation: Tensor, energy: Tensor, share: float) -> Tensor:
    """Move r̃ as close to E as r² <= r̃² + ψD allows.

    The result is ξ r̃ + (1 − ξ)E with the smallest ξ in [0, 1] that satisfies this, in closed form.
    """
    return torch.minimum(energy, (scalar.square() + share * dissipation).sqrt())


def _check(options: Options) -> None:
    check_polar(options)
    modes, share = options["num_modes"], options["relaxation"]
    if not isinstance(modes, int) or modes < 1 or not 0 <= share <= 1:
        raise ConfigurationError(
            f"You gave num_modes={modes}, relaxation={share}; the first must be 1 or more, "
            "and the second in [0, 1]."
        )


SPECMUON = Rule(
    defaults={**MUON.defaults, "num_modes": 8, "relaxation": 0.95},
    check=_check,
    direction=_specmuon,
)
"""Lu, Zhang & Lin 2026, arXiv 2602.16167. Each of the k leading modes has a scalar r that follows
E = √(loss + κ) like an energy. Let O = UVᵀ be the polar factor of the momentum M, and let σ_j be
the singular values of M/‖M‖_F. Then:

    r̃_j = r_j / (1 + ½ η σ_j / E²),   D = s(m, n) · (O − Σ_j (1 − r̃_j/E) u_j u_jᵀ O).

At the first step r_j = E. Before every later step r_j is set to
min(E, √(r̃_j² + ψ η σ_j r̃_j² / E²)), where the root uses the values of the previous step. This is
the relaxation of Jiang, Zhang & Zhao 2022, J. Comput. Phys. 456, in closed form. It follows that r
never rises. While the loss falls, r equals E, and the rule is Muon times r̃_j/r_j. While the loss
is above its lowest level, the rule scales the leading modes by about √(lowest/loss).

**Ours**, where the text is ambiguous:

- Momentum is applied before the modes are computed, not after.
- The modes beyond k are those of Muon.
- g² is (σ/E)², not its root.
- η is the learning rate.
- The loss after a step is the loss of the next step, on a different batch. So no
  loss is computed twice.
- κ = 1e-8.
- A negative loss counts as 0.

``num_modes`` is k, and ``relaxation`` is ψ. The other options are those of Muon.
"""
