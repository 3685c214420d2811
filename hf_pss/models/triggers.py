"""Judge one model: pass its measurements to the detectors, and keep the stable-rank floors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

from hf_pss.config import PSSConfig
from hf_pss.detection.detectors import (
    DETECTORS,
    GLOBAL,
    AnyOf,
    Judgement,
    Quantity,
    Readings,
    Verdict,
)
from hf_pss.detection.state import (
    JSON,
    read_list,
    read_mapping,
    read_number,
    read_object,
    read_text,
)
from hf_pss.errors import StateError
from hf_pss.linalg.smoothing import floors_at, starting_ranks
from hf_pss.models.measurements import Measurements

logger = logging.getLogger(__name__)

_FLOOR = "stable_rank_floor"


class Triggers:
    """Judges one model's gradients and weights. It makes no decisions and changes nothing.

    Args:
        measurements: The measurements of the model. They are made only if a detector needs them.
        config: The detectors and their settings.
    """

    def __init__(self, measurements: Measurements, config: PSSConfig) -> None:
        self._measurements = measurements
        self._config = config
        # LoRA products have no floor, so a model without other matrices has no floors either.
        self._names = tuple(
            name for name in config.detectors if name != _FLOOR or measurements.selection.matrices
        )
        self._starting_ranks = self._measure_starting_ranks()
        self.floors = self._floors_from(self._starting_ranks)
        self.reset()

    @property
    def has_floors(self) -> bool:
        """Whether at least one matrix has a floor."""
        return _FLOOR in self._names

    def reads(self, quantity: Quantity) -> bool:
        """Return whether at least one detector reads this quantity."""
        return quantity in self._detectors.quantities

    @property
    def reads_weights(self) -> bool:
        """Whether at least one detector reads the weights."""
        return self.reads(Quantity.STABLE_RANK) or self.reads(Quantity.SPECTRAL_NORM)

    def judge_gradient(self, norm: float | None, loss: float | None) -> Iterator[Judgement]:
        """Judge a step before its update. If it is not finite, nothing else is judged."""
        if norm is not None and not math.isfinite(norm):
            where = self._measurements.first_nonfinite_gradients()
            yield Judgement(Verdict.NON_FINITE, "grad_norm", where, value=norm)
        elif loss is not None and not math.isfinite(loss):
            yield Judgement(Verdict.NON_FINITE, "loss", (GLOBAL,), value=loss)
        elif norm is not None:
            if self.reads(Quantity.GRAD_NORM):
                yield from self._judge(Quantity.GRAD_NORM, {GLOBAL: norm})
            if self.reads(Quantity.MATRIX_GRAD_NORM):
                norms = self._measurements.matrix_grad_norms(norm)
                yield from self._judge(Quantity.MATRIX_GRAD_NORM, norms)

    def judge_update(self) -> Iterator[Judgement]:
        """Judge an update that began with `Measurements.start_update`."""
        if self.reads(Quantity.UPDATE_NORM):
            yield from self._judge_finite(Quantity.UPDATE_NORM, self._measurements.update_norm())

    def judge_weights(self, quantity: Quantity, readings: Readings) -> Iterator[Judgement]:
        """Judge the weights by the stable rank or σ₁ of each matrix."""
        # A zero matrix has no leading direction to judge.
        judged = {name: value for name, value in readings.items() if value != 0}
        yield from self._judge_finite(quantity, judged)

    def state_dict(self) -> dict[str, JSON]:
        """Return everything that later judgements depend on, as plain strict JSON."""
        return {
            "matrices": self._measurements.fingerprint(),
            "watched": list(self._names),
            "starting_ranks": dict(self._starting_ranks),
            "detectors": self._detectors.state_dict(),
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state (parsed JSON, not trusted), or stay unchanged.

        Detectors that both runs have continue. Detectors that only this run has start fresh.

        Raises:
            StateError: The state is damaged, or belongs to a different model.
        """
        what = "the PSS state"
        found = read_object(state, tuple(self.state_dict()), what=what)
        fingerprint = read_text(found["matrices"], what=f"'matrices' of {what}")
        if fingerprint != self._measurements.fingerprint():
            raise StateError(
                "The PSS state belongs to a model with different weight matrices (or to another "
                "selection of them); load it into the model that it was saved with."
            )
        starts = self._read_starting_ranks(found["starting_ranks"])
        floors = self._floors_from(starts)
        names = [read_text(n, what="a detector") for n in read_list(found["watched"], what=what)]
        # A floor detector needs floors, even if only the saved run had one.
        shapes = self._measurements.shapes
        levels = floors or floors_at(self._config.floor_ratio, shapes, starts)
        possible = {name for name in DETECTORS if name != _FLOOR or levels}
        if not set(names) <= possible or len(set(names)) < len(names):
            raise StateError(f"The PSS state is damaged: no run has the detectors {names}.")
        saved = AnyOf([DETECTORS[name](self._config, levels) for name in names])
        saved.load_state_dict(found["detectors"])
        self._starting_ranks, self.floors = starts, floors
        if tuple(names) == self._names:
            self._detectors = saved
            return
        logger.warning(
            "The checkpoint's detectors are %s, those of this run %s: the new ones start fresh.",
            ", ".join(names) or "none",
            ", ".join(self._names) or "none",
        )
        self.reset()
        self._detectors.continue_from(saved)

    def reset(self) -> None:
        """Reset everything except the floors."""
        self._detectors = AnyOf(
            [DETECTORS[name](self._config, self.floors) for name in self._names]
        )

    def scale_floors(self, factor: float) -> None:
        """Set every floor to a multiple of the one that the options give; see `PSSController`."""
        floors = self._floors_from(self._starting_ranks)
        old, self.floors = self._detectors, {name: factor * floors[name] for name in floors}
        self.reset()
        self._detectors.continue_from(old)

    def _read_starting_ranks(self, saved: object) -> dict[str, float]:
        """Return the saved ranks, or the current ones if the saved run had no floor."""
        what = "'starting_ranks' of the PSS state"
        if not read_mapping(saved, what=what):
            return dict(self._starting_ranks)
        ranks = read_object(saved, tuple(self._measurements.shapes), what=what)
        return {
            name: read_number(rank, minimum=0.0, what=f"starting rank of {name!r}")
            for name, rank in ranks.items()
        }

    def _judge_finite(self, quantity: Quantity, readings: Readings) -> Iterator[Judgement]:
        # This step can no longer be skipped. So the broken matrices get a separate judgement, and
        # the detectors still judge all other matrices.
        finite = {name: value for name, value in readings.items() if math.isfinite(value)}
        if broken := sorted(readings.keys() - finite.keys()):
            yield Judgement(
                Verdict.NON_FINITE, quantity.value, tuple(broken), value=readings[broken[0]]
            )
        yield from self._judge(quantity, finite)

    def _judge(self, quantity: Quantity, readings: Readings) -> list[Judgement]:
        # There may be no reading, because all matrices can be frozen, zero or broken.
        return self._detectors.judge(quantity, readings) if readings else []

    def _measure_starting_ranks(self) -> dict[str, float]:
        """Return the stable ranks that floors refer to. It is empty if noise is the reference."""
        if not self.has_floors or self._config.floor_reference == "noise":
            return {}
        # Later checks follow the same vectors.
        self._measurements.follow()
        shapes, ranks = self._measurements.shapes, self._measurements.followed_stable_ranks({})
        return starting_ranks(shapes, {name: ranks[name] for name in shapes})

    def _floors_from(self, starts: Mapping[str, float]) -> dict[str, float]:
        if not self.has_floors:
            return {}
        starts = starts if self._config.floor_reference == "start" else {}
        floors = floors_at(self._config.floor_ratio, self._measurements.shapes, starts)
        # An adapter starts at zero, so it has no healthy stable rank to refer to and no floor.
        return floors | {view.name: 0.0 for view in self._measurements.selection.adapters}
