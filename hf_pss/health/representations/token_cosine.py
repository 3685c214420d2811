"""Mean pairwise cosine of tokens: 1 when all of them point one way."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_cosine", "unit_tokens"]


def token_cosine(tokens: Tensor) -> Tensor:
    """Return the mean of cos(x_i, x_j) over all pairs i ≠ j, exactly and without an n × n matrix.

    (‖Σ x̂‖² − Σ ‖x̂‖²) / n(n − 1), with x̂ = x/‖x‖. Representations collapse where it nears 0.9 in
    deep layers (arXiv 2602.01308). Its least value is −1/(n − 1); independent random directions of
    d dimensions give 0, with a standard deviation of about √(2/d)/n.

    Args:
        tokens: (..., n, d), any real floating dtype.

    Returns:
        (...), float32, or float64 for float64; NaN for fewer than two tokens, or where one holds
        NaN or inf. A token of zeros has cosine 0 with every other.

    >>> token_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])).item()
    0.3333333432674408
    """
    n = tokens.shape[-2]
    x = unit_tokens(tokens)
    if n < 2:
        return x.new_full(x.shape[:-2], torch.nan)
    total = x.sum(dim=-2).square().sum(dim=-1)
    own = x.square().sum(dim=(-2, -1))
    return ((total - own) / (n * (n - 1))).clamp(-1.0, 1.0)


def unit_tokens(tokens: Tensor) -> Tensor:
    """Return x/‖x‖ of each token (..., n, d): zero for zero, NaN for one that holds NaN or inf."""
    x = tokens.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[-1] == 0:
        return x
    largest = x.abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)
