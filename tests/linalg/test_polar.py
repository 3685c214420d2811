from __future__ import annotations

import pytest
import torch
from spectra import check, decaying, noise, polar_factor
from spectra import with_spectrum as matrix_with

from hf_pss.errors import ConfigurationError
from hf_pss.linalg import POLYNOMIAL_SCHEDULES, newton_schulz

EXACT = 3e-6  # 1.1e-6
BFLOAT16 = 0.02  # 0.0069


def test_newton_schulz_approaches_the_polar_factor() -> None:
    weight = matrix_with(decaying(20), 30, 20).float()
    check((newton_schulz(weight) - polar_factor(weight)).abs(), EXACT)


def test_newton_schulz_in_bfloat16() -> None:
    weight = matrix_with(decaying(20), 30, 20).float()
    factor = newton_schulz(weight, dtype=torch.bfloat16)
    assert factor.dtype == torch.float32
    check((torch.linalg.svdvals(factor) - 1).abs(), BFLOAT16)


def test_num_steps_is_used() -> None:
    weight = matrix_with(decaying(20), 30, 20).float()
    errors = [(newton_schulz(weight, num_steps=n) - polar_factor(weight)).norm() for n in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("options", [{"schedule": "unknown"}, {"num_steps": 0}])
def test_meaningless_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="You gave"):
        newton_schulz(noise(3, 3), **options)  # type: ignore[arg-type]


def test_the_error_names_what_is_allowed() -> None:
    with pytest.raises(ConfigurationError, match=", ".join(POLYNOMIAL_SCHEDULES)):
        newton_schulz(noise(3, 3), schedule="muon")


def test_the_check_can_fail() -> None:
    weight = noise(30, 20)
    with pytest.raises(AssertionError, match="above the tolerance"):
        check((polar_factor(weight) - newton_schulz(weight, schedule="keller")).abs(), EXACT)
