"""Which matrix left its own median first, from the records of a run."""

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
    *(reading(step, a=1.0, b=1.0) for step in range(25)),
    reading(25, a=9.0, b=1.0),  # a jumps and comes back
    reading(26, a=1.0, b=2.5),
    reading(27, a=1.0, b=3.0),
]
SPIKE = SpikeEvidence(
    28,
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
        ("b", 26),
        ("a", 28),
        ("c", None),
    ]
    first = found.suspects[0].numbers
    assert first["grad_norm"].ratio == 4.0
    assert first["stable_rank"].ratio == 0.25
    assert first["spectral_norm"].ratio is None  # the readings do not have it
    assert "b went first" in describe(found)
    assert "since step 26" in describe(found)


def test_a_matrix_that_grew_long_before_the_spike_did_not_go_first() -> None:
    past = [reading(step, a=1.0 + (step >= 16) * 1.5, b=1.0) for step in range(21)]
    one = compare_with_past(SpikeEvidence(21, {"grad_norm": {"a": 90.0, "b": 1.0}}), past)
    assert one.suspects[0].since_step is None
    assert "a is 90.0 times its median over 21 readings. Which matrix went first is unknown" in (
        describe(one)
    )
    both = compare_with_past(SpikeEvidence(21, {"grad_norm": {"a": 90.0, "b": 5.0}}), past)
    assert "b went first" in describe(both)


def test_a_fresh_run_has_too_few_readings_to_date_a_spike() -> None:
    spike = SpikeEvidence(19, {"grad_norm": {"a": 90.0, "b": 1.0}})
    found = compare_with_past(spike, [reading(step, a=1.0, b=1.0) for step in range(19)])
    assert found.suspects[0].since_step is None
    assert "unknown: that takes at least 20 readings." in describe(found)


def test_matrices_that_leave_their_medians_together_share_the_first_place() -> None:
    spike = SpikeEvidence(28, {"grad_norm": {"a": 90.0, "b": 7.0}})
    text = describe(compare_with_past(spike, PAST[:25]))
    assert "2 matrices left their medians first, together at step 28. The gradient of a" in text
    assert "went first" not in text


def test_without_averages_the_largest_gradient_comes_first() -> None:
    found = compare_with_past(SPIKE, [HealthReading(0, matrices={"stable_rank": {"a": 4.0}})])
    assert [one.name for one in found.suspects] == ["a", "c", "b"]
    assert "train with pss_health=light" in describe(found)


def test_a_spike_within_the_averages_accuses_no_matrix() -> None:
    calm = SpikeEvidence(28, {"grad_norm": {"a": 1.5}})
    assert "no gradient is above twice" in describe(compare_with_past(calm, PAST))


def test_a_step_that_is_not_finite_names_where_it_began() -> None:
    found = compare_with_past(SpikeEvidence(28), PAST, fired=("h.0.bad",))
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
    assert plain["matrices"][0]["grad_norm"] == {"value": 4.0, "median": 1.0}
    assert plain["indices"] == [3, 1]
    page = render_spike_page(found, tmp_path)
    assert "50.0 (×50.0)" in page
    assert "&lt;b&gt;three&lt;/b&gt;" in page
    assert "3, 1" in page


def test_rows_that_are_unknown_are_said_to_be_unknown(tmp_path: Path) -> None:
    found = compare_with_past(SpikeEvidence(28, {}, why_unknown="a <stream>"), [])
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


@pytest.mark.parametrize(("around", "taken"), [(None, 60), (28, 28), (29, 40), (41, 60), (61, 60)])
def test_the_first_spike_of_the_failure_is_taken(
    tmp_path: Path, around: int | None, taken: int
) -> None:
    write_run(tmp_path, [28, 40, 60])
    found = read_post_mortem(tmp_path, around_step=around)
    assert found is not None
    assert found.evidence.step == taken
    assert found.num_readings == len(PAST)  # not those after it
    assert found.fired == (("h.0.bad",) if taken == 28 else ())


def test_a_run_without_a_spike_has_none(tmp_path: Path) -> None:
    assert read_post_mortem(tmp_path, around_step=None) is None
