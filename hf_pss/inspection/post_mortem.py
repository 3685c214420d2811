"""The post-mortem of a spike: which matrix left its own median first, and on which batch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hf_pss.records.events import Event, EventKind, HealthReading, Intervention
from hf_pss.records.spikes import SpikeEvidence, parse_spike
from hf_pss.records.strict_json import finite_or_none, visible
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE, SPIKES_FILE
from hf_pss.runs.records_files import parse_reading, parse_record, read_lines
from hf_pss.view.numbers import plural, significant
from hf_pss.view.tables import lean_table

METRICS = ("grad_norm", "spectral_norm", "stable_rank")
# A matrix has left its median if its gradient norm is above twice the median. Not measured.
_FAR_RATIO = 2.0
# The median is over at most this many readings before the spike. Not measured.
_NUM_READINGS = 50
# Fewer readings date nothing. The detectors calibrate on as many values (calibration_steps).
_LEAST_READINGS = 20
# A matrix that left its median more readings before the spike did so for another reason, such as
# the growth of gradients at the start of a run. Not measured.
_NEAR_READINGS = 2
_CAUSES = (EventKind.SPIKE, EventKind.DROP, EventKind.NON_FINITE)
_NUM_LINES, _NUM_INDICES, _NUM_TEXTS = 8, 16, 4
# A mixture-of-experts model has tens of thousands of matrices.
_MOST_LINES = 1000


@dataclass(frozen=True, slots=True)
class Compared:
    """A number of a matrix at the spike, beside its own median before."""

    value: float
    median: float | None
    """The median over the readings before the spike. None without a reading."""

    @property
    def ratio(self) -> float | None:
        """The value divided by the median."""
        return self.value / self.median if self.median else None


@dataclass(frozen=True, slots=True)
class Suspect:
    """A matrix in a step that spiked."""

    name: str
    since_step: int | None
    """The first step from which its gradient norm stayed above twice its median until the spike.
    Only steps with a reading count. None if it is not above, if it has been above for more than
    2 readings before the spike, or if there are fewer than 20 readings."""
    numbers: Mapping[str, Compared]
    """The gradient norm, σ₁ and the stable rank, by the names in `METRICS`."""


@dataclass(frozen=True, slots=True)
class PostMortem:
    """What a run has recorded about one spike."""

    evidence: SpikeEvidence
    fired: tuple[str, ...]
    """The names that the events of this step give, such as the first gradients that are NaN."""
    num_readings: int
    """The number of readings that the medians come from. It is 0 if ``health`` was off."""
    suspects: tuple[Suspect, ...]
    """The matrices. Those that left their medians first come first, then by the ratio to it."""


def read_post_mortem(run_dir: Path, *, around_step: int | None) -> PostMortem | None:
    """Return the post-mortem of one spike of a run, or None if the run has recorded no spike.

    Args:
        run_dir: The folder of the run.
        around_step: The step at which the run began to fail. The first spike from this step on is
            taken. If there is none, or if it is None, the last spike is taken.

    Raises:
        OSError: A file cannot be read.
    """
    found: list[SpikeEvidence] = []  # one at most, because a spike of a large model takes megabytes

    def keep(line: bytes) -> None:
        evidence = parse_spike(line)
        is_taken = found and around_step is not None and found[0].step >= around_step
        if not is_taken:
            found[:] = [evidence]

    read_lines(run_dir / SPIKES_FILE, keep)
    if not found:
        return None
    evidence = found[0]
    fired: dict[str, None] = {}

    def note(line: bytes) -> None:
        record = parse_record(line)
        event: Event = record.event if isinstance(record, Intervention) else record
        if event.step == evidence.step and event.kind in _CAUSES:
            fired.update(dict.fromkeys(event.fired))

    read_lines(run_dir / EVENTS_FILE, note)
    readings: deque[HealthReading] = deque(maxlen=_NUM_READINGS)

    def collect(line: bytes) -> None:
        reading = parse_reading(line)
        if reading.step < evidence.step:
            kept = {name: by for name, by in reading.matrices.items() if name in METRICS}
            readings.append(HealthReading(reading.step, matrices=kept))

    read_lines(run_dir / HEALTH_FILE, collect)
    return compare_with_past(evidence, tuple(readings), fired=tuple(fired))


def compare_with_past(
    evidence: SpikeEvidence, readings: Sequence[HealthReading], *, fired: tuple[str, ...] = ()
) -> PostMortem:
    """Compare the numbers of a spike with those of earlier readings, sorted by step."""
    names = dict.fromkeys(name for by in evidence.matrices.values() for name in by)
    suspects = [_suspect(name, evidence, readings) for name in names]
    num_readings = sum("grad_norm" in reading.matrices for reading in readings)
    return PostMortem(evidence, fired, num_readings, tuple(sorted(suspects, key=_order)))


def _suspect(name: str, evidence: SpikeEvidence, readings: Sequence[HealthReading]) -> Suspect:
    numbers = {}
    for metric in METRICS:
        past = [by.get(name, math.nan) for r in readings if (by := r.matrices.get(metric))]
        finite = [value for value in past if math.isfinite(value)]
        median = statistics.median(finite) if finite else None
        if (value := evidence.matrices.get(metric, {}).get(name)) is not None:
            numbers[metric] = Compared(value, median)
    by_step = [(r.step, r.matrices.get("grad_norm", {})) for r in readings]
    norms = [(step, by[name]) for step, by in by_step if name in by]
    if "grad_norm" not in numbers or len(norms) < _LEAST_READINGS:
        return Suspect(name, None, numbers)
    limit = _FAR_RATIO * (numbers["grad_norm"].median or math.inf)
    norms.append((evidence.step, numbers["grad_norm"].value))
    above = list(takewhile(lambda one: one[1] > limit, reversed(norms)))
    is_near = 0 < len(above) <= 1 + _NEAR_READINGS
    return Suspect(name, above[-1][0] if is_near else None, numbers)


def _order(suspect: Suspect) -> tuple[float, float, float]:
    norm = suspect.numbers.get("grad_norm")
    ratio = None if norm is None else norm.ratio
    size = 0.0 if norm is None or math.isnan(norm.value) else norm.value
    return (math.inf if suspect.since_step is None else suspect.since_step, -(ratio or 0.0), -size)


def post_mortem_json(found: PostMortem) -> dict[str, Any]:
    """Return the post-mortem as data that JSON can hold. NaN and inf become None."""
    evidence = found.evidence
    return {
        "step": evidence.step,
        "fired": list(found.fired),
        "num_readings": found.num_readings,
        "matrices": [
            {
                "name": one.name,
                "since_step": one.since_step,
                **{
                    metric: {key: finite_or_none(x) for key, x in asdict(number).items()}
                    for metric, number in one.numbers.items()
                },
            }
            for one in found.suspects
        ],
        "indices": None if evidence.indices is None else list(evidence.indices),
        "why_unknown": evidence.why_unknown,
        "texts": list(evidence.texts),
    }


def describe(found: PostMortem) -> str:
    """Return one sentence about the matrices, as plain text."""
    step = f"{found.evidence.step:,}"
    if not found.suspects:
        names = ", ".join(map(visible, found.fired)) or "unknown"
        return f"Step {step} was not finite, so no matrix was measured. It began in: {names}."
    first = found.suspects[0]
    if not found.num_readings:
        return (
            f"Step {step} spiked. The largest gradient is that of {visible(first.name)}. The run "
            "recorded no medians to compare with: train with pss_health=light to have them."
        )
    medians = f"its median over {plural(found.num_readings, 'reading')}"
    norm = first.numbers.get("grad_norm")
    ratio = (norm.ratio if norm is not None else None) or 0.0
    if first.since_step is None and ratio <= _FAR_RATIO:
        return f"Step {step} spiked, but no gradient is above twice {medians}."
    largest = f"The gradient of {visible(first.name)} is {significant(ratio)} times {medians}"
    if found.num_readings < _LEAST_READINGS:
        return (
            f"Step {step} spiked. {largest}. Which matrix went first is unknown: that takes at "
            f"least {_LEAST_READINGS} readings."
        )
    if first.since_step is None:
        return (
            f"Step {step} spiked. {largest}. Which matrix went first is unknown: it has fewer than "
            f"{_LEAST_READINGS} readings, or was above twice its median more than {_NEAR_READINGS} "
            "readings before."
        )
    together = sum(one.since_step == first.since_step for one in found.suspects)
    if together > 1:
        return (
            f"Step {step} spiked. {together:,} matrices left their medians first, together at "
            f"step {first.since_step:,}. {largest}, the most of these."
        )
    return (
        f"Step {step} spiked. {visible(first.name)} went first: its gradient has been above twice "
        f"{medians} since step {first.since_step:,}."
    )


def render_post_mortem(found: PostMortem) -> Iterator[RenderableType]:
    """Show the post-mortem in a terminal."""
    yield Text(describe(found))
    if found.suspects:
        table = lean_table(["matrix"], ["since", "gradient norm", "σ₁", "stable rank"])
        for one in found.suspects[:_NUM_LINES]:
            since = "" if one.since_step is None else f"{one.since_step:,}"
            cells = (_cell(one.numbers.get(metric)) for metric in METRICS)
            table.add_row(Text(visible(one.name).replace(".weight", "")), since, *cells)
        yield table
        hidden = len(found.suspects) - _NUM_LINES
        if hidden > 0:
            yield Text(f"{hidden:,} more; --json has them all.", style="dim")
    yield from (Text(line, style="dim") for line in batch_lines(found.evidence))


def batch_lines(evidence: SpikeEvidence) -> Iterator[str]:
    """Yield the rows of the batch and the start of their text."""
    if evidence.indices is None:
        yield f"The rows of this step are unknown: {visible(evidence.why_unknown)}."
        return
    shown = ", ".join(map(str, evidence.indices[:_NUM_INDICES]))
    more = len(evidence.indices) - _NUM_INDICES
    yield f"Rows of the data set: {shown}{f' and {more:,} more' if more > 0 else ''}"
    for index, text in zip(evidence.indices, evidence.texts[:_NUM_TEXTS], strict=False):
        yield f"  {index}: {visible(text)}"


def _cell(number: Compared | None) -> str:
    if number is None:
        return ""
    ratio = number.ratio
    return significant(number.value) + ("" if ratio is None else f" ×{significant(ratio)}")


def render_spike_page(found: PostMortem, run_dir: Path) -> str:
    """Return the post-mortem as one HTML page."""
    from hf_pss.view import canvas  # needs an extra

    values = {
        "run_dir": run_dir,
        "summary": describe(found),
        "evidence": found.evidence,
        "suspects": found.suspects[:_MOST_LINES],
        "num_suspects": len(found.suspects),
        "num_readings": found.num_readings,
        "metrics": METRICS,
    }
    return canvas.render_template("hf_pss.inspection", "spike.html.j2", values)
