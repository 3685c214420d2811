"""The largest attention logit that a head's weights allow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import spectral_norm

__all__ = ["attention_logit_bound"]


def attention_logit_bound(
    query: Tensor,
    key: Tensor,
    max_norm: Tensor | float,
    *,
    num_heads: int,
    num_key_heads: int | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Bound |q·k|/√d_h of each head by ‖W_q‖₂ ‖W_k‖₂ max‖x‖² / √d_h.

    Cauchy–Schwarz, with ‖Wx + b‖ ≤ ‖W‖₂‖x‖ + ‖b‖ for either side. Rotary embeddings are rotations
    and change no norm, so it holds with them; it does not where queries and keys are normalised
    after the projection, or a position bias is added. It grows before the logits do: a logit above
    100 is what QK-Clip answers (arXiv 2507.20534), a bound above it only allows one.

    Cost: exact spectral norms of num_heads + num_key_heads matrices d_h × n, 40 ms for twelve and
    twelve of 64×768 on one CPU thread.

    Args:
        query: (num_heads · d_h, n), outputs in rows, heads one after the other; any real floating
            dtype.
        key: (num_key_heads · d_h, n).
        max_norm: The largest ‖x‖₂ of what the projections are applied to; () or a number.
        num_heads: Of the queries.
        num_key_heads: Of the keys, where heads share them, in groups of neighbours. None: as many.
        query_bias: (num_heads · d_h,).
        key_bias: (num_key_heads · d_h,).
        scale: What multiplies q·k. None: 1/√d_h.

    Returns:
        (num_heads,), float32, or float64 for float64; NaN for a head that holds NaN or inf.

    Raises:
        ConfigurationError: rows that heads do not divide, or heads that key heads do not.

    >>> eye = torch.eye(4)
    >>> attention_logit_bound(2 * eye, eye, 3.0, num_heads=1).item()  # 2 · 1 · 9 / √4
    9.0
    """
    num_key_heads = num_heads if num_key_heads is None else num_key_heads
    rows = query.shape[0]
    if (
        num_heads < 1
        or num_key_heads < 1
        or rows % num_heads
        or num_heads % num_key_heads
        or key.shape[0] != rows // num_heads * num_key_heads
    ):
        raise ConfigurationError(
            f"You gave {rows} rows of queries in {num_heads} heads and {key.shape[0]} rows of keys "
            f"in {num_key_heads}; all heads must have as many rows, and key heads divide heads."
        )
    width = rows // num_heads
    scale = 1 / math.sqrt(width) if scale is None else abs(scale)
    q = _largest_output(query, query_bias, max_norm, width)
    k = _largest_output(key, key_bias, max_norm, width)
    bound: Tensor = scale * q * k.repeat_interleave(num_heads // num_key_heads)
    return bound


def _largest_output(
    weight: Tensor, bias: Tensor | None, max_norm: Tensor | float, width: int
) -> Tensor:
    heads = weight.detach().reshape(-1, width, weight.shape[-1])
    norm: Tensor = spectral_norm(heads) * max_norm
    if bias is not None:
        shift = bias.detach().to(norm.dtype).reshape(-1, width)
        norm = norm + torch.linalg.vector_norm(shift, dim=-1)
    return norm
