"""The bound on attention logits against computed logits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gpt2, token_rows
from torch import Tensor

from hf_pss.health.representations import attention_logit_bound

# Of the bound: float32 spectral norms.
TOLERANCE = 1.5e-6  # 0; 5.2e-7, four units in the last place, with another CPU's LAPACK


def logits(x: Tensor, q: Tensor, k: Tensor, num_heads: int, num_key_heads: int) -> Tensor:
    width = len(q) // num_heads
    queries = (x @ q.mT).view(-1, num_heads, width).transpose(0, 1)
    keys = (x @ k.mT).view(-1, num_key_heads, width).transpose(0, 1)
    keys = keys.repeat_interleave(num_heads // num_key_heads, dim=0)
    return queries @ keys.mT / math.sqrt(width)


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_no_logit_is_above_it(num_heads: int, num_key_heads: int) -> None:
    torch.manual_seed(num_heads + num_key_heads)
    q, k = torch.randn(8 * num_heads, 12), torch.randn(8 * num_key_heads, 12)
    x = torch.randn(500, 12)
    largest = x.norm(dim=-1).max()
    bound = attention_logit_bound(q, k, largest, num_heads=num_heads)
    found = logits(x, q, k, num_heads, num_key_heads).abs().amax(dim=(1, 2))
    assert bound.shape == (num_heads,)
    assert bool((found <= bound).all())
    # Nor is it far off: the worst of these heads reaches 0.23 of it.
    assert bool((found >= bound / 10).all())


def test_it_is_attained_by_the_leading_direction() -> None:
    torch.manual_seed(0)
    q = torch.randn(6, 9)
    x = 3 * torch.linalg.svd(q).Vh[:1]
    bound = attention_logit_bound(q, -2 * q, 3.0, num_heads=1)
    assert float(logits(x, q, -2 * q, 1, 1).abs()) == pytest.approx(float(bound), rel=TOLERANCE)


def test_biases_of_a_model_are_within() -> None:
    torch.manual_seed(0)
    model = gpt2(attn_implementation="eager").eval()
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        attention.c_attn.bias.normal_(std=3.0)
        attention.c_attn.weight.mul_(20)
    inputs = []
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(torch.stack([row["input_ids"] for row in token_rows(4)]))
    handle.remove()
    x = inputs[0].reshape(-1, 16)
    q, k, _ = attention.c_attn(x).detach().split(16, dim=-1)
    heads = [part.view(-1, 2, 8).transpose(0, 1) for part in (q, k)]
    found = (heads[0] @ heads[1].mT / math.sqrt(8)).abs().amax(dim=(1, 2))
    weights = attention.c_attn.weight.detach().mT.split(16)
    biases = attention.c_attn.bias.detach().split(16)
    options = {"max_norm": x.norm(dim=-1).max(), "num_heads": 2}
    bound = attention_logit_bound(
        weights[0], weights[1], query_bias=biases[0], key_bias=biases[1], **options
    )
    assert bool((found <= bound).all())
    assert bool((attention_logit_bound(weights[0], weights[1], **options) < bound).all())


def test_broken_zero_and_bfloat16_weights() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(6, 5, dtype=torch.bfloat16)
    whole = attention_logit_bound(q, k, 2.0, num_heads=3)
    assert whole.dtype == torch.float32
    q[0, 0], k[2:4] = math.nan, 0
    found = attention_logit_bound(q, k, 2.0, num_heads=3).tolist()
    assert math.isnan(found[0])
    assert found[1] == 0
    assert found[2] == float(whole[2])
    assert bool(attention_logit_bound(q[2:], k[2:], math.nan, num_heads=2).isnan().all())
