"""Guards that act on the weights at every step or on a schedule, without the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hf_pss.evidence.guards.base import TimedCallback
from hf_pss.linalg import SMOOTHING_FUNCTIONS, SmoothingFunction
from hf_pss.models.batching import stacks, write_stack_
from hf_pss.models.distributed import Backend, backend_for
from hf_pss.models.selection import MatrixView, named_parameters_canonical, select_matrices
from hf_pss.models.smoother import smooth_matrices_

__all__ = [
    "REPARAMETRIZED",
    "MatrixCallback",
    "ScheduledSmoothing",
    "SpectralCap",
    "sigma_reparam_",
]

REPARAMETRIZED = r"parametrizations\.weight\.original$"
"""Matches the names of the matrices after `sigma_reparam_`."""


class _Gain(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = self.gain * weight
        return scaled


@torch.no_grad()
def sigma_reparam_(model: nn.Module) -> None:
    """Write every selected weight as Ŵ = γ W/σ₁(W) with a learned γ (σReparam, arXiv 2303.06296).

    A fused projection counts as one matrix with one γ. torch's `spectral_norm` estimates σ₁ with
    one round of power iteration per forward pass. γ starts at σ₁, so the model is at first the same
    function as without the guard. In the paper γ starts at 1.
    """
    names = dict.fromkeys(view.parameter_name for view in select_matrices(model).matrices)
    for name in names:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        u, sigma, vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        # spectral_norm draws from torch's global generator, which must not change the data's order.
        with torch.random.fork_rng(devices=[]):
            parametrizations.spectral_norm(module, "weight")
        norm = module.parametrizations.weight[0]
        norm._u.copy_(u[:, 0])
        norm._v.copy_(vh[0])
        parametrize.register_parametrization(module, "weight", _Gain(sigma[0].clone()))


# Rounds of power iteration per step, and in the first step.
_ROUNDS, _FIRST_ROUNDS = 2, 30


class MatrixCallback(TimedCallback):
    """A callback with the selected matrices of the model that it trains."""

    views: tuple[MatrixView, ...] = ()

    def prepare(self) -> None:
        """Select the matrices that PSS would select."""
        self.views = select_matrices(self.model).matrices

    def stored(self) -> tuple[dict[str, nn.Parameter], Backend]:
        """Return the parameters as they are now, and the backend that reads them."""
        parameters = named_parameters_canonical(self.model)
        return parameters, backend_for(parameters)

    def smooth(
        self, smoothing: Callable[[Sequence[str]], SmoothingFunction], *, max_rank: int
    ) -> None:
        """Smooth every selected matrix, at most `max_rank` singular values of each."""
        smooth_matrices_(self.views, *self.stored(), smoothing, max_rank=max_rank)


class ScheduledSmoothing(MatrixCallback):
    """Smooths all selected matrices every P steps, or at random steps with the same mean interval.

    Args:
        smoothing: Name of a smoothing function; ``polar`` is MSign's reset.
        every_steps: The interval P.
        random_seed: Seed of the guard's own generator, with which it smooths at each step with
            probability 1/P. With None it smooths every P steps.
        max_rank: Largest number of singular values that move in a matrix; `polar` moves all.
    """

    def __init__(
        self,
        smoothing: str,
        *,
        every_steps: int = 100,
        random_seed: int | None = None,
        max_rank: int = 32,
    ) -> None:
        super().__init__()
        self._smoothing = SMOOTHING_FUNCTIONS[smoothing]
        self._every_steps = every_steps
        self._max_rank = max_rank
        self._dice = None
        if random_seed is not None:
            self._dice = torch.Generator().manual_seed(random_seed)

    def after_step(self, step: int) -> bool:
        """Smooth if the step is due."""
        if not self._is_due(step):
            return False
        self.smooth(lambda names: self._smoothing(), max_rank=self._max_rank)
        return True

    def _is_due(self, step: int) -> bool:
        if self._dice is None:
            return step % self._every_steps == 0
        return torch.rand((), generator=self._dice).item() < 1 / self._every_steps


class SpectralCap(MatrixCallback):
    """After every update it sets W ← W·min(1, β/σ₁) with β = `factor`·(1 + √(m/n)).

    The level is [ours]. 1 + √(m/n) is the spectral edge of i.i.d. noise of variance 1/n with n
    inputs. Such noise keeps the size of its input, so the scale of the initial weights does not
    matter. Power iteration estimates σ₁ from below, with two rounds per step that start from the
    vectors of the last step (Miyato et al. 2018, arXiv 1802.05957). At width 16 and a learning rate
    of 1e-2 we measured σ₁ at most 1.3 % over the cap.
    """

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self._factor = factor
        self._vectors: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Scale down every matrix that has grown beyond its cap."""
        parameters, backend = self.stored()
        has_acted = False
        for stack in stacks(self.views, parameters, backend):
            sigma = self._spectral_norms(stack.names, stack.matrices)
            m, n = stack.matrices.shape[-2:]
            scale = self._factor * (1 + math.sqrt(m / n)) / sigma
            # There is one device-to-host read per shape. NaN compares false, so a matrix with NaN
            # stays as it is.
            changed = (scale < 1).tolist()
            scaled = stack.matrices * scale[:, None, None]
            write_stack_(stack, scaled, changed, parameters, backend)
            has_acted |= any(changed)
        return has_acted

    def _spectral_norms(self, names: tuple[str, ...], weight: Tensor) -> Tensor:
        v, num_rounds = self._vectors.get(names), _ROUNDS
        if v is None or not bool(v.isfinite().all()):
            generator = torch.Generator().manual_seed(0)
            v = torch.randn(weight.shape[-1], 1, generator=generator).to(weight)
            v, num_rounds = v.expand(len(names), -1, -1), _FIRST_ROUNDS
        for _ in range(num_rounds):
            v = nn.functional.normalize(weight.mT @ (weight @ v), dim=-2)
        self._vectors[names] = v
        sigma: Tensor = torch.linalg.vector_norm(weight @ v, dim=(-2, -1))
        return sigma
