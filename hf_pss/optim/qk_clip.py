"""QK-clip: after a step, scale down the projections of heads whose logits grew too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed import Backend, Part, backend_for
from hf_pss.models.selection.heads import AttentionHeads, HeadRows


def clip_factors(maxima: Tensor, *, threshold: float, num_key_heads: int) -> tuple[Tensor, Tensor]:
    """Return the factors on the query rows and the key rows of each head.

    Let γ_h = min(1, τ/S_h), and let the query heads of group g share one key head. The factors are

        c_g = √(max_{h ∈ g} γ_h) for the keys,   γ_h / c_g for the queries.

    q·k is linear in both factors, so the logits of head h are multiplied by c_g · γ_h/c_g = γ_h.
    The largest logit becomes γ_h S_h = min(S_h, τ). So no head exceeds τ afterwards, and no head is
    scaled more than necessary. If a head does not share its keys, it gets γ_h/√γ_h = √γ_h on both
    sides, which is the rule of Kimi K2 (arXiv 2507.20534, section 2.1). If one head of a group is
    not clipped, c_g = 1. The keys and that head then keep their bits, as the paper's shared rotary
    keys do. The paper has no formula for groups, so this one is ours.

    Args:
        maxima: (h,), float32: S_h, the largest scaled logit of each head. It is −inf for a head
            that was not used. Values up to the threshold give a factor of 1. NaN and inf also give
            1, because scaling cannot repair them.
        threshold: τ.
        num_key_heads: A divisor of h. Neighbouring query heads share a key head.

    Returns:
        The factors of the query heads, (h,), and of the key heads, (num_key_heads,), float32.

    Example:
        >>> clip_factors(torch.tensor([400.0, 50.0]), threshold=100.0, num_key_heads=2)
        (tensor([0.5000, 1.0000]), tensor([0.5000, 1.0000]))
        >>> clip_factors(torch.tensor([400.0, 50.0]), threshold=100.0, num_key_heads=1)
        (tensor([0.2500, 1.0000]), tensor([1.]))
    """
    is_clipped = _is_clipped(maxima, threshold)
    gamma = torch.where(is_clipped, threshold / maxima, torch.ones_like(maxima))
    groups = gamma.view(num_key_heads, -1)
    keys = groups.amax(dim=-1).sqrt()
    return (groups / keys[:, None]).flatten(), keys


def _is_clipped(maxima: Tensor, threshold: float) -> Tensor:
    return (maxima > threshold) & maxima.isfinite()


class QKClip:
    """Clips a model's heads after each step of an optimizer. Biases are scaled like their weights.

    The logits come from the forward pass before the step, as in the paper. The update itself may
    raise the logits of the next step above the threshold again. The momentum does not change. If no
    parameter had a gradient in a step, nothing is clipped.

    Cost: one multiplication of the query and key weights per step. The factor is 1 where nothing is
    clipped, so only `scalars` reads from the device. In your own training loop::

        from hf_pss.trainer.attention_maxima import AttentionMaxima

        maxima = AttentionMaxima(model)
        QKClip(maxima.attentions, maxima.take, threshold=100.0).attach(optimizer)
        maxima.start()

    Args:
        attentions: The result of `find_heads`.
        take: Returns the largest logits since its previous call, (attentions, heads), float32. They
            are the same on every rank. Rows are padded after their last head.
        threshold: τ, above 0. The paper uses 100.

    Raises:
        ConfigurationError: The threshold is not above 0, there is nothing to clip, or a projection
            is frozen, adapted or quantised.
    """

    def __init__(
        self,
        attentions: Sequence[AttentionHeads],
        take: Callable[[], Tensor],
        *,
        threshold: float = 100.0,
    ) -> None:
        if not threshold > 0:
            raise ConfigurationError(
                f"qk_clip must be above 0, or 0 to turn it off; you gave {threshold!r}."
            )
        if not attentions:
            raise ConfigurationError("qk_clip found no attention to clip: leave it out.")
        for attention in attentions:
            for projection in (attention.query, attention.key):
                _check_trained(attention.name, projection.linear)
        self._attentions = tuple(attentions)
        self._take = take
        self._threshold = threshold
        # The values since the last call of `scalars`: (attentions, heads), on the device.
        self._largest: Tensor | None = None
        self._is_clipped: Tensor | None = None

    def attach(self, optimizer: Optimizer) -> None:
        """Clip after each step of this optimizer, which may be of any class."""

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            held = (p.grad is not None for group in optimizer.param_groups for p in group["params"])
            maxima = self._take()  # also drops the maxima of a step that was held back
            if any(held):
                self.clip_(maxima)

        optimizer.register_step_post_hook(after_step)

    def scalars(self) -> dict[str, float]:
        """Return the clipping since the previous call and reset it. Return {} without a step.

        This makes one device-to-host read. Every rank gets the same numbers.

        Returns:
            ``max_attention_logit`` is the largest logit before clipping, or NaN if one was NaN.
            ``clipped_heads`` is the number of heads that were scaled at least once.
        """
        if self._largest is None or self._is_clipped is None:
            return {}
        pair = torch.stack((self._largest.amax(), self._is_clipped.sum().to(self._largest)))
        self._largest = self._is_clipped = None
        return dict(zip(("max_attention_logit", "clipped_heads"), pair.tolist(), strict=True))

    @torch.no_grad()
    def clip_(self, maxima: Tensor) -> None:
        """Scale the projections of each head whose largest logit is above the threshold.

        Args:
            maxima: The result of ``take``.
        """
        is_clipped = _is_clipped(maxima, self._threshold)
        if self._largest is None or self._is_clipped is None:
            self._largest, self._is_clipped = maxima, is_clipped
        else:
            self._largest = torch.maximum(self._largest, maxima)
            self._is_clipped = self._is_clipped | is_clipped
        linears = [p.linear for a in self._attentions for p in (a.query, a.key)]
        backend = backend_for({str(i): _weight(linear) for i, linear in enumerate(linears)})
        for attention, largest in zip(self._attentions, maxima, strict=True):
            heads = attention.heads
            largest = largest[: heads.num_heads]
            factors = clip_factors(
                largest, threshold=self._threshold, num_key_heads=heads.num_key_heads
            )
            pairs = zip((attention.query, attention.key), factors, strict=True)
            for projection, factor in pairs:
                _scale_rows_(projection, factor.repeat_interleave(heads.head_dim), backend)


def _scale_rows_(projection: HeadRows, factors: Tensor, backend: Backend) -> None:
    """Multiply each output row of the projection that is on this rank by its factor."""
    weight = _weight(projection.linear)
    num_rows = weight.shape[1 if projection.view.transposed else 0]
    stored = factors.new_ones(num_rows)
    stored[projection.stored_rows(factors.device)] = factors
    with backend.part(weight) as part:
        if projection.view.transposed:
            part.tensor.mul_(stored.to(part.tensor.device))
        else:
            part.tensor.mul_(_own_rows(stored, part)[:, None])
    bias = projection.linear.bias
    if isinstance(bias, Tensor):
        with backend.part(bias) as part:
            part.tensor.mul_(_own_rows(stored, part))


def _own_rows(stored: Tensor, part: Part) -> Tensor:
    """Return the factors of a part's rows on its device. Layers may be on several devices."""
    return stored[part.start : part.start + len(part.tensor)].to(part.tensor.device)


def _weight(linear: nn.Module) -> Tensor:
    return linear.get_parameter("weight")


def _check_trained(name: str, linear: nn.Module) -> None:
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ConfigurationError(
            f"qk_clip scales the weights of {name}, which are not a floating-point parameter: "
            "leave qk_clip out under quantisation."
        )
    if not weight.requires_grad:
        raise ConfigurationError(
            f"qk_clip scales the weights of {name}, which are frozen or under an adapter. Other "
            "models may share them: leave qk_clip out."
        )
