"""The runs of a sweep as lines of JSON, and their statistics.

The statistics are paired differences by seed with their intervals, and usable learning rates.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from hf_pss.errors import ConfigurationError, StateError, how_to_install
from hf_pss.records.strict_json import parse_object
from hf_pss.runs.folder import write_whole

USABLE_WITHIN_NATS = 0.05
"""A rate is usable if its median loss is at most this much above that of the best rate."""
_MIN_SEEDS = 3
_BLOCK_SIZE = 10**7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run. A number that was not finite is None, which keeps the file strict JSON."""

    id: str
    """Hash of everything that determines the run: recipe, optimizer, learning rate, guard, seed."""
    recipe: str
    optimizer: str
    learning_rate: float
    guard: str
    guard_id: str = ""
    """Hash of the guard's options. It distinguishes two guards with the same name."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The grid's changes of the recipe."""
    seed: int
    num_steps: int
    """Number of steps that the recipe sets."""
    status: str = "finished"
    """``finished``, ``stopped`` (the guard ended it) or ``failed`` (an error; see `error`)."""
    error: str | None = None
    final_eval_loss: float | None = None
    """Nats per token at the last step. None if it was not finite, or if the run ended earlier."""
    unigram_entropy: float = 0.0
    """Loss in nats of a model that predicts the token frequencies of the training text."""
    losses: tuple[float | None, ...] = ()
    """Training loss of every step, from step 1."""
    grad_norms: tuple[float | None, ...] = ()
    """Gradient norm before clipping of every step."""
    eval_steps: tuple[int, ...] = ()
    eval_losses: tuple[float | None, ...] = ()
    interventions: tuple[int, ...] = ()
    """Steps at which the guard acted. For PSS these are its interventions."""
    num_interventions: int = 0
    """Number of these steps, in a summary, which does not hold the steps themselves."""
    train_seconds: float = 0.0
    """Time of the training steps, without evaluation."""
    guard_seconds: float = 0.0
    """The part of `train_seconds` that PSS and the guard's callback took."""
    explosion_step: int | None = None
    """First step that meets the recipe's definition of an explosion; None if no step does."""
    explosion_kind: str | None = None
    """``non_finite``, ``rise`` or ``plateau``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers: steps of a fault, and series of health and probes."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def times_acted(self) -> int:
        """How often the guard acted."""
        return max(self.num_interventions, len(self.interventions))

    def summary(self) -> Self:
        """Return the row without its series per step, except for the validation losses.

        The summary of a run of 2,400 steps, evaluated every 100, takes less than 2 kB.
        """
        scalars = {k: v for k, v in self.extra.items() if not isinstance(v, (Mapping, Sequence))}
        return replace(
            self,
            losses=(),
            grad_norms=(),
            interventions=(),
            num_interventions=self.times_acted,
            extra=scalars,
        )

    def to_line(self) -> str:
        """Return one line of strict JSON."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Return the row of a line.

        Raises:
            ConfigurationError: The line does not hold a row of this version.
        """
        try:
            found = parse_object(line.encode(), what="it")
            known = {spec.name for spec in fields(cls)}
            if not set(found) <= known:
                raise ValueError("it has fields that a row lacks")
            lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
            return cls(**{**found, **lists})
        except (StateError, TypeError, ValueError) as error:
            raise ConfigurationError(f"This line holds no row of a sweep: {error}.") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, but skip the unfinished last line that a killed sweep leaves.

    Raises:
        ConfigurationError: The file cannot be read, or a complete line does not hold a row.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ConfigurationError(f"{path} is not a regular file: it is not opened.")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The rows {path} cannot be read: {error}.") from error
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            yield Row.from_line(line)
        except ConfigurationError as error:
            raise ConfigurationError(f"Line {number} of {path}: {error}") from error


def append_row(path: Path, row: Row) -> None:
    """Add a row, and return when the disk holds it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_line())
        file.flush()
        os.fsync(file.fileno())


def drop_unfinished_line(path: Path) -> None:
    """Cut off the unfinished last line that a killed sweep leaves."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def merge_summaries(path: Path, rows: Iterable[Row]) -> int:
    """Merge the summaries of rows into a file, and return how many rows it then holds.

    The file is created if it is missing. Of two rows of the same run, the newer one stays. A row
    of a failed run does not enter the file.

    Raises:
        ConfigurationError: The file exists and does not hold rows.
        OSError: The file cannot be written.
    """
    old = list(read_rows(path)) if path.exists() else []
    new = [row.summary() for row in rows if row.status != "failed"]
    newest = {row.id: row for row in sorted([*old, *new], key=lambda row: row.created)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(row.to_line() for row in newest.values()))
    return len(newest)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    required = ("hf-pss", "torch", "transformers", "accelerate", "tokenizers")
    found = {"python": platform.python_version(), **{name: version(name) for name in required}}
    for name in ("pytorch_optimizer", "scipy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Return the rows of each setting, with the settings sorted by name."""
    found: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        found[Setting.of(row)].append(row)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


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


def losses_by_rate(rows: Iterable[Row], guard: str) -> dict[float, dict[int, float]]:
    """Return the final losses by ascending learning rate, then by seed.

    Args:
        rows: Runs in one setting.
        guard: The guard whose runs count.
    """
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.guard == guard:
            found[row.learning_rate][row.seed] = final_loss(row)
    return dict(sorted(found.items()))


def best_learning_rate(rows: Iterable[Row], guard: str) -> float:
    """Return the rate with the lowest median loss over seeds."""
    losses = losses_by_rate(rows, guard)
    return min(losses, key=lambda rate: median(losses[rate].values()))


def is_at_edge(rows: Sequence[Row], guard: str) -> bool:
    """Return whether the best rate is the lowest or the highest that the guard was tried at.

    A better rate may then lie outside the grid.
    """
    rates = list(losses_by_rate(rows, guard))
    return best_learning_rate(rows, guard) in (rates[0], rates[-1])


def usable_range(
    rows: Sequence[Row], guard: str, *, within_nats: float = USABLE_WITHIN_NATS
) -> tuple[float, float]:
    """Return the lowest and the highest rate around the best whose median loss is nearly as good.

    All rates between them are nearly as good as the best. The grid limits the range on both sides,
    so the range is only as precise as the steps of the grid.
    """
    medians = {rate: median(by.values()) for rate, by in losses_by_rate(rows, guard).items()}
    rates = list(medians)
    best = min(rates, key=medians.__getitem__)
    limit = medians[best] + within_nats
    low = high = rates.index(best)
    while low > 0 and medians[rates[low - 1]] <= limit:
        low -= 1
    while high < len(rates) - 1 and medians[rates[high + 1]] <= limit:
        high += 1
    return rates[low], rates[high]


def compare_at(
    rows: Sequence[Row], guard: str, reference: str, rates: tuple[float, float]
) -> PairedDifferences | None:
    """Return the paired differences at these two rates; None if no seed has both runs."""
    ours = losses_by_rate(rows, guard).get(rates[0], {})
    theirs = losses_by_rate(rows, reference).get(rates[1], {})
    differences = tuple(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
    if not differences:
        return None
    return PairedDifferences(guard, reference, rates, differences, bootstrap_interval(differences))


def compare_at_best(rows: Sequence[Row], guard: str, reference: str) -> PairedDifferences | None:
    """Return the paired differences between guard and reference, each at its own best rate.

    The rates are chosen on the same runs that are compared. If there are few seeds, this favours
    the guard that was tried at more rates.
    """
    rates = best_learning_rate(rows, guard), best_learning_rate(rows, reference)
    return compare_at(rows, guard, reference, rates)


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean: scipy's BCa of 9,999 samples, seeded.

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
            f"Bootstrap intervals need scipy. {how_to_install('scipy')}"
        ) from error
    # 95 % and 9,999 samples are scipy's defaults.
    result = bootstrap((differences,), np.mean, rng=np.random.default_rng(0))
    low, high = map(float, result.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def steps_to_loss(row: Row, target: float) -> int | None:
    """Return the first evaluated step with a validation loss at or below the target."""
    pairs = zip(row.eval_steps, row.eval_losses, strict=True)
    return next((step for step, loss in pairs if loss is not None and loss <= target), None)


Floats = npt.NDArray[np.float64]


def over_finite(values: Floats, take: Callable[..., Floats]) -> Floats:
    """Reduce the first axis over the finite values; NaN where there are none.

    Args:
        values: (n, ...).
        take: ``np.nanmean``, ``np.nanmedian`` or the like.
    """
    is_finite = np.isfinite(values)
    reduced = np.full(values.shape[1:], np.nan)
    known = is_finite.any(axis=0)
    reduced[known] = take(np.where(is_finite, values, np.nan)[:, known], axis=0)
    return reduced


def rolling(values: Floats, take: Callable[..., Floats], *, before: int, after: int) -> Floats:
    """Reduce the finite values in a window around each value; NaN where there are none."""
    if not len(values):
        return values
    padded = np.pad(values, (before, after), constant_values=np.nan)
    windows = sliding_window_view(padded, before + after + 1)
    # Each block is copied, so its size bounds the memory.
    blocks = np.array_split(windows, 1 + windows.size // _BLOCK_SIZE)
    return np.concatenate([over_finite(block.T, take) for block in blocks])
