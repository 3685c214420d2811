"""Add PSS to a training loop of your own, without a Trainer."""

import torch
from torch import nn

from hf_pss import PSSController

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, nhead=2, dim_feedforward=64, batch_first=True)
model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
kept_batch = torch.randn(8, 16, 32)


def loss_on(batch: torch.Tensor) -> torch.Tensor:
    """Return the error of reading each position from the one before it."""
    return nn.functional.mse_loss(model(batch)[:, :-1], batch[:, 1:])


@torch.no_grad()
def loss_of_a_batch() -> torch.Tensor:
    """Return the loss of a fixed batch. PSS undoes an intervention that raises it."""
    model.eval()
    loss = loss_on(kept_batch)
    model.train()
    return loss


pss = PSSController(model, evaluate_loss=loss_of_a_batch)
for _ in range(40):
    loss = loss_on(torch.randn(8, 16, 32).cumsum(dim=1))
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    report = pss.step(grad_norm, update=optimizer.step, loss=loss)
    for record in report.records:
        print(record)
state = {"model": model.state_dict(), "pss": pss.state_dict()}  # goes into your checkpoint
