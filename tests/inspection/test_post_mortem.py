"""Which matrix left its own averages first, from the records of a run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console, Group

from hf_pss.detection.policy import Action
from hf_pss.inspection.post_mortem import (
    PostMortem,
    compare_with_past,
    describe,
    post_mortem_json,
    read_post_mortem,
    render_post_mortem,
    render_spike_page,
)
from hf_pss.records.events import Event, EventKind, HealthReading, to_json_line
from hf_pss.records.spikes import SpikeEvidence, spike_line
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE, SPIKES_FILE
from hf_pss.runs.records_files import reading_line


def reading(step: int, **norms: float) -> HealthReading:
    return HealthReading(step, matrices={"grad_norm": norms, "stable_rank": dict(a=4.0, b=4.0)})


PAST = [
    *(reading(step, a=1.0, b=1.0) for step in range(5)),
    reading(5, a=9.0, b=1.0),  # a jumps and comes back
    reading(6, a=1.0, b=2.5),
    reading(7, a=1.0, b=3.0),
]
SPIKE = SpikeEvidence(
    8,
    {
        "grad_norm": {"a": 50.0, "b": 4.0, "c": 7.0},
        "spectral_norm": {"a": 2.0, "b": 2.0},
        "stable_rank": {"a": 4.0, "b": 1.0},
    },
    indices=(3, 1),
    texts=("<b>three</b>", "one"),
)


def shown(found: PostMortem, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(Group(*render_post_mortem(found)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_to_stay_above_its_average_comes_first() -> None:
    found = compare_with_past(SPIKE, PAST)
    assert [(one.name, one.since_step) for one in found.suspects] == [
        ("b", 6),
        ("a", 8),
        ("c", None),
    ]
    first = found.suspects[0].numbers
    assert first["grad_norm"].ratio == 4.0
    assert first["stable_rank"].ratio == 0.25
    assert first["spectral_norm"].ratio is None  # the readings do not have it
    assert "b went first" in describe(found)
    assert "since step 6" in describe(found)


def test_without_averages_the_largest_gradient_comes_first() -> None:
    found = compare_with_past(SPIKE, [HealthReading(0, matrices={"stable_rank": {"a": 4.0}})])
    assert [one.name for one in found.suspects] == ["a", "c", "b"]
    assert "the option health" in describe(found)


def test_a_spike_within_the_averages_accuses_no_matrix() -> None:
    calm = SpikeEvidence(8, {"grad_norm": {"a": 1.5}})
    assert "no gradient is above twice" in describe(compare_with_past(calm, PAST))


def test_a_step_that_is_not_finite_names_where_it_began() -> None:
    found = compare_with_past(SpikeEvidence(8), PAST, fired=("h.0.bad",))
    assert "was not finite" in describe(found)
    assert "h.0.bad" in describe(found)


def test_the_terminal_and_json_and_the_page_have_matrices_rows_and_text(tmp_path: Path) -> None:
    found = compare_with_past(SPIKE, PAST)
    text = shown(found)
    assert "50.0 ×50.0" in text
    assert "Rows of the data set: 3, 1" in text
    assert "3: <b>three</b>" in text
    assert max(map(len, text.splitlines())) <= 80
    plain = json.loads(json.dumps(post_mortem_json(found), allow_nan=False))
    assert plain["matrices"][0]["grad_norm"] == {"value": 4.0, "average": 1.0}
    assert plain["indices"] == [3, 1]
    page = render_spike_page(found, tmp_path)
    assert "50.0 (×50.0)" in page
    assert "&lt;b&gt;three&lt;/b&gt;" in page
    assert "3, 1" in page


def test_rows_that_are_unknown_are_said_to_be_unknown(tmp_path: Path) -> None:
    found = compare_with_past(SpikeEvidence(8, {}, why_unknown="a <stream>"), [])
    assert "unknown: a <stream>" in shown(found)
    assert "unknown: a &lt;stream&gt;" in render_spike_page(found, tmp_path)


def write_run(folder: Path, steps: list[int]) -> None:
    event = Event(
        step=steps[0],
        kind=EventKind.NON_FINITE,
        detector="grad_norm",
        value=math.nan,
        fired=("h.0.bad",),
        decision=Action.OBSERVE,
        reason="",
    )
    spikes = [spike_line(SpikeEvidence(step, SPIKE.matrices)) for step in steps]
    (folder / SPIKES_FILE).write_text("\n".join([*spikes, "damaged", ""]))
    (folder / EVENTS_FILE).write_text(to_json_line(event) + "\n")
    (folder / HEALTH_FILE).write_text("\n".join(map(reading_line, [*PAST, reading(99, a=1e9)])))


@pytest.mark.parametrize(("around", "taken"), [(None, 40), (8, 8), (9, 20), (21, 40), (41, 40)])
def test_the_first_spike_of_the_failure_is_taken(
    tmp_path: Path, around: int | None, taken: int
) -> None:
    write_run(tmp_path, [8, 20, 40])
    found = read_post_mortem(tmp_path, around_step=around)
    assert found is not None
    assert found.evidence.step == taken
    assert found.num_readings == len(PAST)  # not those after it
    assert found.fired == (("h.0.bad",) if taken == 8 else ())


def test_a_run_without_a_spike_has_none(tmp_path: Path) -> None:
    assert read_post_mortem(tmp_path, around_step=None) is None
