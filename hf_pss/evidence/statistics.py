"""Statistics of paired runs: differences by seed, their intervals, and usable learning rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import numpy as np

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.rows import Row

__all__ = [
    "PairedDifferences",
    "Setting",
    "best_learning_rate",
    "bootstrap_interval",
    "comparable",
    "compare",
    "compare_at_best",
    "final_loss",
    "losses_by_rate",
    "settings_of",
    "steps_to_loss",
    "usable_range",
]

_NUM_RESAMPLES = 9999
_CONFIDENCE = 0.95
_MIN_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """The parts of a run that are equal for all guards in a comparison."""

    recipe: str
    optimizer: str
    changes: tuple[tuple[str, Any], ...] = ()
    """The grid's changes to the recipe, sorted by name."""

    @classmethod
    def of(cls, row: Row) -> Self:
        """Return the setting that a row was run in."""
        return cls(row.recipe, row.optimizer, tuple(sorted(row.changes.items())))

    def __str__(self) -> str:
        changed = (f"{name} {value}" for name, value in self.changes)
        return " · ".join((self.recipe, self.optimizer, *changed))


@dataclass(frozen=True, slots=True)
class PairedDifferences:
    """A guard compared with a reference, seed by seed. Negative differences favour the guard."""

    guard: str
    reference: str
    learning_rates: tuple[float, float]
    """The learning rate of the guard, then that of the reference."""
    differences: tuple[float, ...]
    """Final validation loss of the guard minus that of the reference, in nats, for each seed that
    both have. A run without a finite loss counts as the unigram entropy, because it has learned no
    more than the token frequencies."""
    interval: tuple[float, float] | None
    """The 95 % bootstrap interval of the mean; None with fewer than 3 seeds."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(np.mean(self.differences))

    @property
    def num_wins(self) -> int:
        """Number of seeds at which the guard has the lower loss."""
        return sum(difference < 0 for difference in self.differences)


def settings_of(rows: Iterable[Row]) -> list[Setting]:
    """Return the settings of the rows, sorted."""
    return sorted({Setting.of(row) for row in rows}, key=str)


def comparable(rows: Iterable[Row]) -> list[Row]:
    """Return the newest row of each run that did not fail.

    Raises:
        ConfigurationError: In one setting, two sets of options have the same guard name.
    """
    newest = {row.id: row for row in rows}
    found = [row for row in newest.values() if row.status != "failed"]
    meant: dict[tuple[Setting, str], str] = {}
    for row in found:
        key = (Setting.of(row), row.guard)
        if meant.setdefault(key, row.guard_id) != row.guard_id:
            raise ConfigurationError(
                f"The guard {row.guard!r} has two sets of options in {key[0]}: runs of two grids, "
                "or of two versions, are mixed. Give each its own --output-dir."
            )
    return found


def final_loss(row: Row) -> float:
    """Return the validation loss at the end, but at most the unigram entropy.

    An exploded run counts as a model that knows only the token frequencies. The distance of its
    loss above that level is meaningless, and a mean cannot hold infinity.
    """
    loss = row.final_eval_loss
    return min(loss, row.unigram_entropy) if loss is not None else row.unigram_entropy


def losses_by_rate(
    rows: Iterable[Row], setting: Setting, guard: str
) -> dict[float, dict[int, float]]:
    """Return the final losses by ascending learning rate, then by seed."""
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.guard == guard and Setting.of(row) == setting:
            found[row.learning_rate][row.seed] = final_loss(row)
    return dict(sorted(found.items()))


def best_learning_rate(rows: Iterable[Row], setting: Setting, guard: str) -> float:
    """Return the rate with the lowest median loss over seeds.

    Raises:
        ConfigurationError: The rows hold no run of this setting and guard.
    """
    losses = losses_by_rate(rows, setting, guard)
    if not losses:
        raise ConfigurationError(f"No run of {setting} has the guard {guard!r}.")
    return min(losses, key=lambda rate: median(losses[rate].values()))


def usable_range(
    rows: Sequence[Row], setting: Setting, guard: str, *, within_nats: float = 0.05
) -> tuple[float, float]:
    """Return the lowest and the highest rate around the best whose median loss is nearly as good.

    All rates between them are nearly as good as the best. The grid limits the range on both sides,
    so the range is only as precise as the steps of the grid.
    """
    losses = losses_by_rate(rows, setting, guard)
    best = best_learning_rate(rows, setting, guard)
    limit = median(losses[best].values()) + within_nats
    rates = list(losses)
    is_good = [median(by_seed.values()) <= limit for by_seed in losses.values()]
    low = high = rates.index(best)
    while low > 0 and is_good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and is_good[high + 1]:
        high += 1
    return rates[low], rates[high]


def compare(
    rows: Sequence[Row], setting: Setting, guard: str, reference: str, rates: tuple[float, float]
) -> PairedDifferences | None:
    """Return the paired differences at these two rates; None if no seed has both runs."""
    ours = losses_by_rate(rows, setting, guard).get(rates[0], {})
    theirs = losses_by_rate(rows, setting, reference).get(rates[1], {})
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = tuple(ours[seed] - theirs[seed] for seed in seeds)
    return PairedDifferences(guard, reference, rates, differences, bootstrap_interval(differences))


def compare_at_best(
    rows: Sequence[Row], setting: Setting, guard: str, reference: str
) -> PairedDifferences | None:
    """Return the paired differences of two guards, each at its own best rate.

    The rates are chosen on the same runs that are compared. If there are few seeds, this favours
    the guard that was tried at more rates.
    """
    rates = tuple(best_learning_rate(rows, setting, name) for name in (guard, reference))
    return compare(rows, setting, guard, reference, (rates[0], rates[1]))


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean: scipy's BCa, with a fixed seed.

    If all differences are equal, the interval has zero width. The interval of 3 to 5 seeds is too
    narrow, so read it together with the number of wins. A simulation in the tests measures how much
    too narrow it is.
    """
    if len(differences) < _MIN_SEEDS:
        return None
    if max(differences) - min(differences) <= 1e-12:
        return differences[0], differences[0]
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ConfigurationError(
            "Bootstrap intervals need scipy: pip install 'hf-pss[evidence]'."
        ) from error
    result = bootstrap(
        (np.asarray(differences),),
        np.mean,
        n_resamples=_NUM_RESAMPLES,
        confidence_level=_CONFIDENCE,
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def steps_to_loss(row: Row, target: float) -> int | None:
    """Return the first evaluated step with a validation loss at or below the target."""
    pairs = zip(row.eval_steps, row.eval_losses, strict=True)
    return next((step for step, loss in pairs if loss is not None and loss <= target), None)
