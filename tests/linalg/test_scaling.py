from __future__ import annotations

import pytest
import torch
from spectra import noise

from hf_pss.linalg.scaling import unit_scaled


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e37])
def test_scaling_is_exact_and_reversible(scale: float) -> None:
    weight = noise(4, 6, 5).clamp(-3, 3) * scale
    scaled = unit_scaled(weight)
    assert torch.equal(scaled.matrix * scaled.scale[..., None, None], weight)
    if 1e-37 < scale < 1e37:
        assert scaled.matrix.abs().max() < 1
        assert scaled.matrix.abs().amax(dim=(-2, -1)).min() >= 0.5


def test_the_largest_finite_number_does_not_overflow() -> None:
    weight = torch.full((2, 2), torch.finfo(torch.float32).max)
    scaled = unit_scaled(weight)
    assert scaled.finite.all()
    assert torch.equal(scaled.matrix * scaled.scale, weight)
