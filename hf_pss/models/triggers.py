"""What is noticed in a step: the gauges' numbers, put before the detectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

from hf_pss.config import PSSConfig
from hf_pss.detection import (
    DETECTORS,
    GLOBAL,
    AnyOf,
    Judgement,
    Quantity,
    Readings,
    Verdict,
    make_detector,
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
from hf_pss.models.measurements import Gauges

__all__ = ["Watch"]

logger = logging.getLogger(__name__)


class Watch:
    """Judges one model's gradients and weights; decides nothing and changes nothing.

    Args:
        gauges: Read when a detector needs what they show, and not before.
        config: Which detectors, and how they are set.
    """

    def __init__(self, gauges: Gauges, config: PSSConfig) -> None:
        self._gauges = gauges
        self._config = config
        # Of LoRA products, and where there is no matrix at all, there is no floor.
        self._names = tuple(
            name
            for name in config.detectors
            if name != "stable_rank_floor" or gauges.selection.matrices
        )
        self._starting_ranks = self._measure_starting_ranks()
        self.floors = self._floors_from(self._starting_ranks)
        self._detectors = self._new_detectors(self.floors)

    def reads(self, quantity: Quantity) -> bool:
        """Tell whether some detector reads this."""
        return quantity in self._detectors.quantities

    def judge_gradient(self, norm: float | None, loss: float | None) -> Iterator[Judgement]:
        """Judge a step before its update; where it is not finite, nothing else is looked at."""
        if norm is not None and not math.isfinite(norm):
            where = self._gauges.first_nonfinite_gradients()
            yield Judgement(Verdict.NON_FINITE, "grad_norm", where, value=norm)
        elif loss is not None and not math.isfinite(loss):
            yield Judgement(Verdict.NON_FINITE, "loss", (GLOBAL,), value=loss)
        elif norm is not None:
            if self.reads(Quantity.GRAD_NORM):
                yield from self._judge(Quantity.GRAD_NORM, {GLOBAL: norm})
            if self.reads(Quantity.MATRIX_GRAD_NORM):
                yield from self._judge(
                    Quantity.MATRIX_GRAD_NORM, self._gauges.matrix_grad_norms(norm)
                )

    def judge_update(self) -> Iterator[Judgement]:
        """Judge an update that `Gauges.start_update` saw begin."""
        if self.reads(Quantity.UPDATE_NORM):
            yield from self._judge_after_update(Quantity.UPDATE_NORM, self._gauges.update_norm())

    def judge_stable_ranks(self, ranks: Mapping[str, float]) -> Iterator[Judgement]:
        """Judge the weights by the stable rank of each matrix."""
        # A zero matrix has no direction to be concentrated in: there is nothing to judge.
        judged = {name: rank for name, rank in ranks.items() if rank != 0}
        yield from self._judge_after_update(Quantity.STABLE_RANK, judged)

    def judge_spectral_norms(self, norms: Mapping[str, float]) -> Iterator[Judgement]:
        """Judge the weights by σ₁ of each matrix."""
        judged = {name: norm for name, norm in norms.items() if norm != 0}
        yield from self._judge_after_update(Quantity.SPECTRAL_NORM, judged)

    def state_dict(self) -> dict[str, JSON]:
        """Return all that later judgements depend on, as plain strict JSON."""
        return {
            "matrices": self._gauges.fingerprint(),
            "watched": list(self._names),
            "starting_ranks": dict(self._starting_ranks),
            "detectors": self._detectors.state_dict(),
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from a saved state (parsed JSON, not trusted), or stay as it is.

        Detectors that the saved run had and this one has continue; others start afresh.

        Raises:
            StateError: Damaged, or of another model.
        """
        what = "the PSS state"
        found = read_object(state, tuple(self.state_dict()), what=what)
        if read_text(found["matrices"], what=f"'matrices' of {what}") != self._gauges.fingerprint():
            raise StateError(
                "The PSS state belongs to a model with other weight matrices (or to another "
                "selection of them); load it into the model that it was saved with."
            )
        starts = self._read_starting_ranks(found["starting_ranks"])
        floors = self._floors_from(starts)
        names = [read_text(n, what="a detector") for n in read_list(found["watched"], what=what)]
        # A floor detector needs floors to be built, also where only the saved run had one.
        levels = floors or floors_at(self._config.floor_ratio, self._gauges.shapes, starts)
        possible = {name for name in DETECTORS if name != "stable_rank_floor" or levels}
        if not set(names) <= possible or len(set(names)) < len(names):
            raise StateError(f"The PSS state is damaged: no run is watched by {names}.")
        saved = AnyOf([make_detector(name, self._config, levels) for name in names])
        saved.load_state_dict(found["detectors"])
        if tuple(names) == self._names:
            self._detectors = saved
        else:
            logger.warning(
                "The checkpoint was watched by %s, this run is by %s: what is new starts afresh.",
                ", ".join(names) or "nothing",
                ", ".join(self._names) or "nothing",
            )
            self._detectors = self._new_detectors(floors)
            self._detectors.continue_from(saved)
        self._starting_ranks, self.floors = starts, floors

    def _read_starting_ranks(self, saved: object) -> dict[str, float]:
        """Return the saved ranks; those of now where the saved run had no floor."""
        what = "'starting_ranks' of the PSS state"
        if not read_mapping(saved, what=what):
            return dict(self._starting_ranks)
        ranks = read_object(saved, tuple(self._gauges.shapes), what=what)
        return {
            name: read_number(rank, minimum=0.0, what=f"starting rank of {name!r}")
            for name, rank in ranks.items()
        }

    def reset(self) -> None:
        """Forget everything but the floors."""
        self._detectors = self._new_detectors(self.floors)

    def _judge_after_update(self, quantity: Quantity, readings: Readings) -> Iterator[Judgement]:
        # Apart, for this step cannot be skipped any more: one broken matrix must not keep the
        # detectors from seeing all others.
        finite = {name: value for name, value in readings.items() if math.isfinite(value)}
        if broken := sorted(readings.keys() - finite.keys()):
            yield Judgement(
                Verdict.NON_FINITE, quantity.value, tuple(broken), value=readings[broken[0]]
            )
        yield from self._judge(quantity, finite)

    def _judge(self, quantity: Quantity, readings: Readings) -> list[Judgement]:
        # Without readings (all matrices frozen, zero or broken) there is nothing to ask.
        return self._detectors.judge(quantity, readings) if readings else []

    def _measure_starting_ranks(self) -> dict[str, float]:
        """Return what the floors refer to where that is the matrices' own stable rank now."""
        if not self.has_floors or self._config.floor_reference == "noise":
            return {}
        # By the same look as later: a reading that is high on noise is high on both sides.
        shapes, ranks = self._gauges.shapes, self._gauges.stable_ranks()
        return starting_ranks(shapes, {name: ranks[name] for name in shapes})

    def _floors_from(self, starts: Mapping[str, float]) -> dict[str, float]:
        if not self.has_floors:
            return {}
        refers_to_start = self._config.floor_reference == "start"
        floors = floors_at(
            self._config.floor_ratio, self._gauges.shapes, starts if refers_to_start else {}
        )
        # An adapter starts at zero and has no healthy stable rank to refer to: no floor.
        return floors | {view.name: 0.0 for view in self._gauges.selection.adapters}

    def _new_detectors(self, floors: Mapping[str, float]) -> AnyOf:
        return AnyOf([make_detector(name, self._config, floors) for name in self._names])

    @property
    def has_floors(self) -> bool:
        """Whether some matrix has a floor."""
        return "stable_rank_floor" in self._names
