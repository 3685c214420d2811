"""A record of each matrix's leading singular values from when it was last healthy [ours]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from hf_pss.detection.state import (
    JSON,
    read_integer,
    read_list,
    read_mapping,
    read_number,
    read_object,
)
from hf_pss.errors import StateError
from hf_pss.linalg import leading_triplets

NUM_RECORDED = 8
"""K, the number of leading values that are recorded for each matrix."""
# The record is 50 to 100 steps old. So it is older than the onset of a spike, and recent enough for
# a network that still learns.
_EVERY_STEPS = 50
# Eight rounds take twice the time.
_ROUNDS = 4
_KEYS = ("healthy", "candidate", "candidate_step", "trouble_step")

Values: TypeAlias = Mapping[str, Sequence[float]]
"""The leading singular values of each matrix by name, descending, in the units of the matrix."""


def leading_values(matrices: Tensor) -> Tensor:
    """Return the K leading singular values of each matrix, (b, K), padded with zeros.

    Above min(m, n) = 128, the Krylov space is half as large as in smoothing. At 768×768 the values
    are too low by at most 1.6 % on noise, and by at most 0.2 % on σ_i ∝ i^-0.15. The tolerance of
    `Anchored` covers this.

    Args:
        matrices: (b, m, n).
    """
    found = leading_triplets(matrices, NUM_RECORDED, num_rounds=_ROUNDS, check_finite=False)
    sigma = found.sigma
    return functional.pad(sigma, (0, NUM_RECORDED - sigma.shape[-1]))


class Anchors:
    """A record that follows a healthy run and stops at the first sign of trouble.

    The leading values are measured every 50 steps. They become the record 50 steps later, unless a
    spike or a non-finite step has occurred in the meantime. So at least 50 steps without trouble
    followed the recorded weights.

    >>> anchors = Anchors({"w": [4.0]})
    >>> for step in range(50, 151, 50):
    ...     anchors.update(step, {"w": [float(step)]})
    >>> anchors.healthy
    {'w': [100.0]}

    Args:
        start: The leading values at the start of a run.
    """

    def __init__(self, start: Values) -> None:
        self.healthy = start
        """The record. No leading value is lowered below these values."""
        self._candidate = start
        self._candidate_step = 0
        self._trouble_step = -1

    @staticmethod
    def is_due(step: int) -> bool:
        """Return whether to measure the leading values after this step."""
        return step % _EVERY_STEPS == 0

    def note_trouble(self, step: int) -> None:
        """Store that this step spiked or was not finite."""
        self._trouble_step = step

    def update(self, step: int, values: Values) -> None:
        """Add the values of all matrices after a step."""
        if self._trouble_step < self._candidate_step:
            self.healthy = self._candidate
        self._candidate, self._candidate_step = values, step

    def levels(self, names: Sequence[str]) -> Tensor:
        """Return the record of these matrices, (len(names), K). Matrices without one get zeros."""
        rows = [[v for v in self.healthy.get(name, ()) if v > 0] for name in names]
        # The last value of a small matrix fills the rest of its row.
        return torch.tensor(
            [row + [row[-1] if row else 0.0] * (NUM_RECORDED - len(row)) for row in rows]
        )

    def state_dict(self) -> dict[str, JSON]:
        """Return the record as plain JSON. The row of a matrix that was not finite is empty."""
        return {
            "healthy": _encoded(self.healthy),
            "candidate": _encoded(self._candidate),
            "candidate_step": self._candidate_step,
            "trouble_step": self._trouble_step,
        }

    @classmethod
    def from_state_dict(cls, state: object, names: Sequence[str]) -> Anchors:
        """Return the record that was saved.

        Args:
            state: Parsed JSON, which is not trusted.
            names: The matrices that the record must name.

        Raises:
            StateError: The record is damaged, or names different matrices.
        """
        what = "the record of leading singular values"
        found = read_object(state, _KEYS, what)
        anchors = cls(_decoded(found["healthy"], names, what))
        anchors._candidate = _decoded(found["candidate"], names, what)
        anchors._candidate_step = read_integer(found["candidate_step"], what=what)
        anchors._trouble_step = read_integer(found["trouble_step"], what=what, minimum=-1)
        return anchors


def _encoded(values: Values) -> dict[str, JSON]:
    return {name: [v for v in row if math.isfinite(v)] for name, row in values.items()}


def _decoded(value: object, names: Sequence[str], what: str) -> dict[str, list[float]]:
    found = read_mapping(value, what)
    if set(found) != set(names):
        raise StateError(
            f"{what.capitalize()} belongs to a model with different weight matrices. Load the "
            "state that was saved with this model."
        )
    return {
        name: [read_number(v, minimum=0.0, what=what) for v in read_list(found[name], what)]
        for name in names
    }
