"""Polynomial schedules that drive singular values to 1: numbers, source, measured band."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["POLYNOMIAL_SCHEDULES", "PolynomialSchedule", "Triple"]

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PolynomialSchedule:
    """Odd quintics p(x) = ax + bx³ + cx⁵, applied one after another to every singular value."""

    coefficients: tuple[Triple, ...]
    """(a, b, c) a step; a longer iteration repeats the last."""
    source: str
    """Where the numbers come from."""
    interval: tuple[float, float]
    """Singular values, relative to ‖W‖_F, for which the band holds."""
    band: tuple[float, float]
    """Where the full schedule sends them in exact arithmetic; a test measures it."""

    def steps(self, num_steps: int | None) -> tuple[Triple, ...]:
        """Return the triples of an iteration of num_steps (None: the whole schedule)."""
        count = len(self.coefficients) if num_steps is None else num_steps
        missing = max(0, count - len(self.coefficients))
        return self.coefficients[:count] + self.coefficients[-1:] * missing


def _with_safety(coefficients: tuple[Triple, ...], factor: float) -> tuple[Triple, ...]:
    # p(x / factor): rounding may push a value above 1, where a tight polynomial would diverge. The
    # last step needs none.
    *first, last = coefficients
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in first), last)


_KELLER = PolynomialSchedule(
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/",
    interval=(3e-3, 1.0),
    band=(0.6818, 1.2024),
)

_POLAR_EXPRESS = PolynomialSchedule(
    coefficients=_with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        factor=1.01,
    ),
    source="Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932, algorithm 1 (safety 1.01)",
    interval=(1e-3, 1.0),
    band=(1 - 1e-14, 1 + 1e-14),
)

_POLAR_EXPRESS_4 = PolynomialSchedule(
    coefficients=_with_safety(
        (
            (8.219101105846395, -23.40195672053618, 17.15819894322091),
            (4.004876059148972, -2.922346774508395, 0.549118526726345),
            (3.5235614361928365, -2.6398035290594555, 0.5272128341911068),
            (2.5115271663527294, -1.8524483560830054, 0.43883263558021046),
        ),
        factor=1.01,
    ),
    source="Ours: the same algorithm, for four steps and singular values from 3e-3 on, where the "
    "band is narrower than that of Keller's five steps",
    interval=(3e-3, 1.0),
    band=(0.7740, 1.2070),
)

_CLASSIC = PolynomialSchedule(
    coefficients=((15 / 8, -10 / 8, 3 / 8),) * 12,
    source="Björck & Bowie 1971, SIAM J. Numer. Anal. 8(2), the iteration of order 3",
    interval=(3e-3, 1.0),
    band=(1 - 5e-11, 1 + 1e-14),
)

POLYNOMIAL_SCHEDULES: dict[str, PolynomialSchedule] = {
    "keller": _KELLER,
    "polar_express": _POLAR_EXPRESS,
    "polar_express_4": _POLAR_EXPRESS_4,
    "classic": _CLASSIC,
}
