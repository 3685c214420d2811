"""σReparam: weights that are trained as a gain and a matrix of spectral norm one.

Guards that act on the weights at every step or on a schedule, whatever the gradient does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.guards.base import ActingCallback
from hf_pss.linalg import SMOOTHING_FUNCTIONS
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
"""Matches the names that the matrices have afterwards."""


class _Gain(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = self.gain * weight
        return scaled


@torch.no_grad()
def sigma_reparam_(model: nn.Module) -> None:
    """Write every selected weight as Ŵ = γ W/σ₁(W), γ learned (arXiv 2303.06296).

    A fused projection is one matrix, with one γ, as in code that fuses. σ₁ is that of torch's
    `spectral_norm`, one round of power iteration a forward pass. γ starts at σ₁, where the paper
    starts it at 1, so that the model starts as the same function as without the guard.
    """
    names = dict.fromkeys(view.parameter_name for view in select_matrices(model).matrices)
    for name in names:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        u, sigma, vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        # Its start takes torch's global generator, on which the data's order would depend.
        with torch.random.fork_rng(devices=[]):
            parametrizations.spectral_norm(module, "weight")
        norm = module.parametrizations.weight[0]
        norm._u.copy_(u[:, 0])
        norm._v.copy_(vh[0])
        parametrize.register_parametrization(module, "weight", _Gain(sigma[0].clone()))


# Rounds of power iteration at a step, and at the first.
_ROUNDS, _FIRST_ROUNDS = 2, 30


class MatrixCallback(ActingCallback):
    """Holds the selection of the model being trained."""

    def __init__(self) -> None:
        super().__init__()
        self._model: nn.Module | None = None
        self.views: tuple[MatrixView, ...] = ()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Select the matrices, as PSS does."""
        if model is None:
            raise ConfigurationError("This guard needs the model in on_train_begin; got none.")
        self._model = model
        self.views = select_matrices(model).matrices

    def stored(self) -> tuple[dict[str, nn.Parameter], Backend]:
        """Return the parameters as they are now, and how they are kept."""
        parameters = named_parameters_canonical(self._model) if self._model is not None else {}
        return parameters, backend_for(parameters)


class ScheduledSmoothing(MatrixCallback):
    """Smooths all selected matrices every P steps, or at random with the same mean rhythm.

    Args:
        smoothing: Name of a smoothing function; ``polar`` is MSign's reset.
        every_steps: P.
        random_seed: Not None: smooth each step with probability 1/P, drawn from a generator of
            this seed, which no other part of the run shares.
        max_rank: At most so many singular values of a matrix move; `polar` moves all.
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

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Smooth if this step's turn has come."""
        with self.clock():
            if not self._is_due(state.global_step):
                return
            parameters, backend = self.stored()
            smooth_matrices_(
                self.views,
                parameters,
                backend,
                lambda names: self._smoothing(),
                max_rank=self._max_rank,
            )
            self.intervention_steps.append(state.global_step)

    def _is_due(self, step: int) -> bool:
        if self._dice is None:
            return step % self._every_steps == 0
        return torch.rand((), generator=self._dice).item() < 1 / self._every_steps


class SpectralCap(MatrixCallback):
    """After every update W ← W·min(1, β/σ₁) with β = `factor`·(1 + √(m/n)).

    [ours] 1 + √(m/n) is the spectral edge of i.i.d. noise of variance 1/n (n inputs), the map that
    keeps the size of its input: no scale of the initial weights enters. σ₁ comes from power
    iteration that goes on from the last step's vectors, two rounds a step (Miyato et al. 2018,
    arXiv 1802.05957), and so from
    below: 1.3 % over the cap measured, on width 16 at a learning rate of 1e-2.
    """

    def __init__(self, *, factor: float = 1.0) -> None:
        super().__init__()
        self._factor = factor
        self._vectors: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Scale down what has grown beyond its cap."""
        with self.clock():
            parameters, backend = self.stored()
            has_acted = False
            for stack in stacks(self.views, parameters, backend):
                sigma = self._spectral_norms(stack.names, stack.matrices)
                m, n = stack.matrices.shape[-2:]
                scale = self._factor * (1 + math.sqrt(m / n)) / sigma
                # One read to the host a shape; NaN compares false and is left alone.
                changed = (scale < 1).tolist()
                scaled = stack.matrices * scale[:, None, None]
                write_stack_(stack, scaled, changed, parameters, backend)
                has_acted |= any(changed)
            if has_acted:
                self.intervention_steps.append(state.global_step)

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
