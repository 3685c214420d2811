"""A hand-written training loop with a PSSController, which the controller's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_pss import PSSConfig, PSSController

WIDTH = 8


def make_model() -> nn.Module:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Loop:
    """A training loop on a fixed task; `spike_at` multiplies that step's loss."""

    def __init__(self, config: PSSConfig, *, lr: float = 1e-2) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.pss = PSSController(self.model, config)
        self.inputs = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))

    def backward(self, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) - self.inputs.roll(1, 0)).square().mean() * factor
        loss.backward()
        return loss, nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self, factor: float = 1.0) -> Any:
        loss, norm = self.backward(factor)
        return self.pss.step(norm, update=self.optimizer.step, loss=loss)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def stable_rank64(matrix: Tensor) -> float:
    sigma = torch.linalg.svdvals(matrix.detach().double())
    return float(sigma.square().sum() / sigma[0] ** 2)


def collapse_(weight: Tensor, factor: float) -> None:
    u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    with torch.no_grad():
        weight.copy_(u @ torch.diag(torch.cat([s[:1] * factor, s[1:]])) @ vh)
