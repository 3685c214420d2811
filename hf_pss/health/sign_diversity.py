"""Spectral alignment of the inputs of linear layers with v₁, and the diversity of its signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pss.models.distributed import Backend
from hf_pss.models.selection import MatrixView, canonical_name

__all__ = ["SignDiversityMeter", "sign_diversity", "spectral_alignment"]


def spectral_alignment(inputs: Tensor, v: Tensor) -> Tensor:
    """Return cos(x_t, v₁) of each token t.

    arXiv 2510.04202 calls it the alignment of a layer's input with its weight's principal singular
    vector. If the weight has outputs in rows, this is the right singular vector.

    Args:
        inputs: (..., n), any real floating dtype. These are the inputs of the layer.
        v: (n,) or (n, k). The unit vectors are in columns.

    Returns:
        The cosines, (...) or (..., k), float32. A token of zeros gives 0, and a token
        with NaN or inf gives NaN.

    >>> spectral_alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])).item()
    0.6000000238418579
    """
    x = inputs.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=v.ndim > 1)
    return (x @ v.float()) / torch.where(length > 0, length, 1.0)


def sign_diversity(alignment: Tensor) -> Tensor:
    """Return 1 − |mean of the signs| over the tokens. 1 means balanced signs, 0 means equal signs.

    A collapse of this number warns of an explosion (arXiv 2510.04202). The formula is ours. It is
    twice the share of the rarer sign. Zeros have no sign and do not count.

    Args:
        alignment: (tokens, ...), a result of `spectral_alignment`.

    Returns:
        The diversity, (...), float32. It is NaN if an alignment is NaN, or if
        no alignment has a sign.

    >>> sign_diversity(torch.tensor([0.9, 0.1, 0.2, -0.5])).item()
    0.5
    """
    return _diversity(_count_signs(alignment))


class SignDiversityMeter:
    """Counts the signs of the alignments during forward passes, between `arm` and `read`.

    Cost: full, for sampled steps. Each matrix needs one product of the inputs with a vector, and
    the end needs one device-to-host read. Before `arm` and after `read` there are no hooks. Stacks
    of experts are left out, because no module has their inputs separately. A padded token counts
    like any other token.

    Args:
        model: The model whose linear layers get hooks.
        views: The matrices to read.
        backend: How parameters are stored.
    """

    def __init__(self, model: nn.Module, views: Sequence[MatrixView], backend: Backend) -> None:
        self._backend = backend
        held: dict[str, list[str]] = {}
        for view in views:
            if len(view.shape) == 2:
                held.setdefault(view.parameter_name, []).append(view.name)
        self._modules = [
            (module, tuple(names))
            for name, module in model.named_modules()
            if (names := held.get(canonical_name(f"{name}.weight")))
        ]
        self._handles: list[RemovableHandle] = []
        self._counts: dict[tuple[str, ...], Tensor] = {}

    def arm(self, directions: Mapping[str, Tensor]) -> None:
        """Start counting.

        Args:
            directions: v₁ of each matrix by name, (n,). Matrices without a direction are left out.
        """
        self.disarm()
        for module, names in self._modules:
            known = tuple(name for name in names if name in directions)
            if known:
                v = torch.stack([directions[name] for name in known], dim=-1)
                self._handles.append(module.register_forward_pre_hook(self._listen(known, v)))

    def disarm(self) -> None:
        """Stop counting and drop the counts."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._counts = [], {}

    def read(self) -> dict[str, float]:
        """Stop counting, and return the sign diversity of each matrix whose layer was applied."""
        counts = self._counts
        self.disarm()
        if not counts:
            return {}
        device = next(iter(counts.values())).device
        all_counts = torch.cat([c.to(device) for c in counts.values()], dim=-1)
        names = [name for group in counts for name in group]
        return dict(zip(names, self._backend.agree(_diversity(all_counts)), strict=True))

    def _listen(self, names: tuple[str, ...], v: Tensor) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach()
            counts = _count_signs(spectral_alignment(x.reshape(-1, x.shape[-1]), v))
            self._counts[names] = self._counts[names] + counts if names in self._counts else counts

        return hook


def _count_signs(alignment: Tensor) -> Tensor:
    """Return the number of positive, negative and NaN alignments, (3, ...)."""
    kinds = (alignment > 0, alignment < 0, alignment.isnan())
    return torch.stack([kind.sum(dim=0, dtype=torch.float32) for kind in kinds])


def _diversity(counts: Tensor) -> Tensor:
    positive, negative, broken = counts
    signed = positive + negative
    diversity = 2 * torch.minimum(positive, negative) / torch.where(signed > 0, signed, 1.0)
    return torch.where((broken == 0) & (signed > 0), diversity, torch.nan)
