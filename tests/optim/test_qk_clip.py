"""The factors of QK-clip: what the docstring claims of them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import llama

from hf_pss.errors import ConfigurationError
from hf_pss.models.selection.heads import find_heads
from hf_pss.optim import build_optimizer
from hf_pss.optim.qk_clip import QKClip, clip_factors

THRESHOLD = 100.0
FACTOR_TOLERANCE = 3e-7  # 1.6e-7: relative, float32


def maxima(num_heads: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 10 ** (4 * torch.rand(num_heads, generator=generator))  # 1 to 10,000


@pytest.mark.parametrize("sharing", [1, 2, 8, 4096])
def test_every_head_ends_at_the_threshold_or_where_it_was(sharing: int) -> None:
    before = maxima()
    q, k = clip_factors(before, threshold=THRESHOLD, num_key_heads=len(before) // sharing)
    after = before * q * k.repeat_interleave(sharing)
    wanted = before.clamp(max=THRESHOLD)
    assert float(((after - wanted) / wanted).abs().max()) <= FACTOR_TOLERANCE
    assert float(torch.cat((q, k)).max()) <= 1 + FACTOR_TOLERANCE


def test_heads_below_have_a_factor_of_one() -> None:
    before = maxima()
    q, k = clip_factors(before, threshold=THRESHOLD, num_key_heads=len(before) // 4)
    is_below = before <= THRESHOLD
    assert (q[is_below] == 1).all()
    assert (k[is_below.view(-1, 4).any(dim=1)] == 1).all()
    assert (q[~is_below] < 1).all()


def test_alone_with_its_keys_a_head_follows_the_paper() -> None:
    before = maxima()
    q, k = clip_factors(before, threshold=THRESHOLD, num_key_heads=len(before))
    wanted = (THRESHOLD / before).clamp(max=1).sqrt()
    assert float((q - wanted).abs().max()) <= FACTOR_TOLERANCE
    assert float((k - wanted).abs().max()) <= FACTOR_TOLERANCE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e9, THRESHOLD])
def test_logits_that_scaling_cannot_repair_are_left_alone(value: float) -> None:
    q, k = clip_factors(torch.tensor([value, 400.0]), threshold=THRESHOLD, num_key_heads=2)
    assert q.tolist() == k.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_thresholds_are_positive(threshold: float) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        QKClip([], maxima, threshold=threshold)


def test_nothing_to_clip_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no attention"):
        QKClip([], maxima)


def test_the_log_is_of_all_steps_since_the_last() -> None:
    largest = torch.full((2, 2), -math.inf)  # (attentions, heads)
    clip = QKClip(find_heads(llama())[0], lambda: largest, threshold=THRESHOLD)
    assert clip.scalars() == {}
    clip.clip_(torch.tensor([[50.0, 400.0], [-math.inf, 20.0]]))
    clip.clip_(torch.tensor([[200.0, 150.0], [30.0, 20.0]]))
    assert clip.scalars() == {"max_attention_logit": 400.0, "clipped_heads": 2.0}
    clip.clip_(torch.tensor([[50.0, math.inf], [30.0, 20.0]]))
    assert clip.scalars() == {"max_attention_logit": math.inf, "clipped_heads": 0.0}
    clip.clip_(torch.tensor([[50.0, math.nan], [300.0, 20.0]]))
    found = clip.scalars()
    assert math.isnan(found["max_attention_logit"])
    assert found["clipped_heads"] == 1.0
    assert clip.scalars() == {}


def test_an_optimizer_names_the_class_that_clips() -> None:
    with pytest.raises(ConfigurationError, match=r"attach hf_pss\.optim\.qk_clip\.QKClip"):
        build_optimizer(llama(), qk_clip=100.0)
