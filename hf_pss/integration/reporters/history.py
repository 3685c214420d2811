"""What was read so far, thinned as it grows: bounded memory for runs of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_pss.health.reading import HealthReading
from hf_pss.integration.reporters.worst import worst_first

__all__ = ["History"]

# Columns of the heat map: more are narrower than its pixels.
MAX_READINGS = 512
# Of all readings together: some 25 MB as Python floats in dictionaries.
MAX_NUMBERS = 2**18


@dataclass(frozen=True, slots=True)
class _Kept:
    step: int
    matrices: Mapping[str, Mapping[str, float]]


class History:
    """Readings of matrices, evenly thinned: when there is no room, every second one is dropped.

    The first and the newest are always there.
    """

    def __init__(self, *, max_readings: int = MAX_READINGS) -> None:
        self._max = max_readings
        self._kept: list[_Kept] = []
        self._newest: _Kept | None = None
        self._stride = 1
        self.num_seen = 0

    def add(self, reading: HealthReading) -> None:
        """Remember what the reading says of matrices; one that says nothing is passed over."""
        if not reading.matrices:
            return
        self._newest = _Kept(reading.step, reading.matrices)
        if self.num_seen % self._stride == 0:
            self._kept.append(self._newest)
        self.num_seen += 1
        if len(self._kept) > self._max or self._is_too_large():
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def readings(self) -> Sequence[_Kept]:
        """What is kept, in order."""
        if self._newest is None or self._kept[-1] is self._newest:
            return list(self._kept)
        return [*self._kept, self._newest]

    def metrics(self) -> tuple[str, ...]:
        """All metrics of matrices, in the order in which they came."""
        return tuple(dict.fromkeys(name for kept in self.readings for name in kept.matrices))

    def rows(self, *, max_rows: int) -> tuple[tuple[int | str | float | None, ...], ...]:
        """Return (step, matrix, metrics …), of as many readings, evenly spread, as there is room.

        The newest reading is there in any case; where it alone is too long, its worst matrices.
        """
        readings, metrics = self.readings, self.metrics()
        sizes = [
            len({name for found in kept.matrices.values() for name in found}) for kept in readings
        ]
        stride = 1
        # From the end backwards: the newest stays.
        while stride < len(readings) and sum(sizes[::-1][::stride]) > max_rows:
            stride += 1
        chosen = readings[::-1][::stride][::-1]
        return tuple(
            (
                kept.step,
                name,
                *(kept.matrices.get(metric, {}).get(name) for metric in metrics),
            )
            for kept in chosen
            for name in _names(kept, max_rows)
        )

    def _is_too_large(self) -> bool:
        return len(self._kept) > 2 and sum(map(_size, self._kept)) > MAX_NUMBERS


def _size(kept: _Kept) -> int:
    return sum(map(len, kept.matrices.values()))


def _names(kept: _Kept, most: int) -> Sequence[str]:
    names = tuple(dict.fromkeys(name for found in kept.matrices.values() for name in found))
    return names if len(names) <= most else worst_first(kept.matrices)[:most]
