from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.report_records import answer_of, changed_by, event_of, load_run_directory
from hf_pss.evidence.report_results import headline, result
from hf_pss.records.events import EventKind


def test_a_finished_run_is_read_whole(twins: Path) -> None:
    directory = load_run_directory(twins)
    assert directory.guards == ("plain", "paper", "floor")
    assert directory.missing == ()
    assert directory.status == "finished"
    run = directory.of("paper")[0]
    assert (len(run.loss), len(run.eval_loss), len(run.baseline)) == (40, 2, 40)
    assert run.stable_ranks.values.shape == (3, 9)
    found = run.interventions[0]
    assert (found.event.step, found.smoothing, found.matrices[0].shape) == (12, "clip", (64, 64))
    assert changed_by(found) == list(found.matrices)


def test_null_and_non_finite_numbers_are_nan(files: Any) -> None:
    files.run("plain", losses=[7.0, None, 6.0])
    path = files.info() / "plain" / "seed-0" / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "loss": NaN}\n{"step": 1, "loss": -Infinity}\n{"step": 2, "loss": 1e999}\n'
        '{"step": 3, "loss": "high"}\n{"step": 4, "loss": true}\n{"step": 5, "loss": 6.5}\n'
        f'{{"step": 6, "loss": 1{"0" * 400}}}\n',
        encoding="utf-8",
    )
    loss = load_run_directory(files.root).runs[0].loss
    assert loss.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert loss.finite.tolist() == [6.5]


def test_a_step_written_twice_counts_as_it_was_written_last(files: Any) -> None:
    folder = files.run("plain", losses=[7.0, 6.0])
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 1, "loss": 5.0}\n')
    assert load_run_directory(files.info()).runs[0].loss.values.tolist() == [7.0, 5.0]


def test_a_cut_line_is_listed_and_the_rest_is_read(files: Any) -> None:
    path = files.run("plain") / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    directory = load_run_directory(files.info())
    assert len(directory.runs[0].loss) == 40
    assert directory.missing == (
        "plain/seed-0/metrics.jsonl has 1 of 42 lines that cannot be read.",
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "pss_health.jsonl", "summary.json"])
def test_a_missing_file_is_listed(name: str, files: Any) -> None:
    folder = files.run("plain")
    (folder / name).unlink()
    directory = load_run_directory(files.info())
    assert directory.missing == (f"plain/seed-0/{name} is not there.",)


def test_a_missing_file_of_events_is_not_listed(files: Any) -> None:
    (files.run("plain") / "pss_events.jsonl").unlink()
    assert load_run_directory(files.info()).missing == ()


OWN_FILES = ["run.json", *(f"plain/seed-0/{n}.jsonl" for n in ("metrics", "pss_health"))]
OWN_FILES += ["plain/seed-0/pss_events.jsonl", "plain/seed-0/summary.json"]


@pytest.mark.parametrize("name", OWN_FILES)
def test_links_pipes_devices_and_folders_are_not_opened(name: str, files: Any) -> None:
    files.run("plain")
    path, outside = files.info() / name, files.root.parent / "outside"
    outside.write_bytes(path.read_bytes())
    for target in (outside, Path("/dev/zero")):
        path.unlink()
        path.symlink_to(target)
        assert load_run_directory(files.root).missing == (
            f"{name} is a link that leads out of its folder.",
        )
    for make in (os.mkfifo, os.mkdir):
        path.unlink()
        make(path)
        assert load_run_directory(files.root).missing == (f"{name} is not a regular file.",)


def test_a_folder_that_is_a_link_out_of_the_run_is_left_out(files: Any) -> None:
    files.run("plain")
    folder = files.run("paper")
    folder.rename(files.root.parent / "outside")
    folder.symlink_to(files.root.parent / "outside")
    directory = load_run_directory(files.info())
    assert directory.guards == ("plain",)
    assert directory.missing == ("paper has left nothing.",)


@pytest.mark.parametrize(
    "many", [{"guards": [str(i) for i in range(100)]}, {"seeds": list(range(3000))}]
)
def test_a_folder_of_more_runs_than_can_be_drawn_is_refused(many: Any, files: Any) -> None:
    files.run("plain")
    with pytest.raises(ConfigurationError, match="No demo has so many"):
        load_run_directory(files.info(**many))


def test_stable_ranks_beyond_any_run_are_not_drawn(files: Any) -> None:
    """Each line names another matrix: a table of all of them would need 7 GB."""
    folder = files.run("plain")
    rows = (f'{{"step": {i}, "stable_rank": {{"{i}": 2.0}}}}\n' for i in range(30_000))
    (folder / "pss_health.jsonl").write_text("".join(rows), encoding="utf-8")
    directory = load_run_directory(files.info())
    assert len(directory.runs[0].stable_ranks.steps) == 0
    assert directory.missing == (
        "plain/seed-0/pss_health.jsonl holds more stable ranks than can be drawn.",
    )


def test_a_step_beyond_any_run_is_unreadable(files: Any, make_intervention: Any) -> None:
    folder = files.run("plain", events=[make_intervention(10**400)])
    row = json.dumps({"step": 10**400, "stable_rank": {"a": 1.0}, "loss": 3.0})
    for name in ("pss_health.jsonl", "metrics.jsonl"):
        (folder / name).write_text(f"{row}\n", encoding="utf-8")
    directory = load_run_directory(files.info())
    run = directory.runs[0]
    assert (len(run.loss), len(run.stable_ranks.steps), run.events) == (0, 0, ())


def test_guards_are_found_without_run_json(files: Any) -> None:
    files.run("plain")
    files.run("floor", seed=3)
    directory = load_run_directory(files.root)
    assert directory.guards == ("floor", "plain")
    assert directory.status == "unknown"
    assert directory.missing == ("run.json is not there.",)
    assert directory.seeds == (0, 3)


@pytest.mark.parametrize("guard", ["later", "../..", "/etc", "", "."])
def test_a_named_guard_without_a_folder_is_listed(guard: str, files: Any) -> None:
    files.run("plain")
    directory = load_run_directory(files.info(guards=["plain", guard]))
    assert directory.guards == ("plain",)
    assert directory.missing == (f"{guard} has left nothing.",)


def test_folders_of_an_earlier_demo_are_left_out(files: Any) -> None:
    """What run.json does not name is older than it: other guards, other seeds."""
    for guard, seed in (("plain", 0), ("plain", 1), ("paper", 0), ("floor", 1)):
        files.run(guard, seed=seed)
    directory = load_run_directory(files.info(guards=["plain", "paper", "floor"], seeds=[0]))
    assert [(run.guard, run.seed) for run in directory.runs] == [("plain", 0), ("paper", 0)]
    assert directory.guards == ("plain", "paper")
    assert directory.missing == ("floor has left nothing.",)


def test_a_named_seed_without_a_folder_is_listed(files: Any) -> None:
    files.run("plain")
    directory = load_run_directory(files.info(seeds=[0, 1, None, "two"]))
    assert directory.missing == ("plain/seed-1 has left nothing.",)


@pytest.mark.parametrize("value", [None, [], "all", 3])
def test_a_run_json_without_names_leaves_nothing_out(value: object, files: Any) -> None:
    files.run("plain", seed=2)
    directory = load_run_directory(files.info(guards=value, seeds=value))
    assert [(run.guard, run.seed) for run in directory.runs] == [("plain", 2)]


def test_only_changed_matrices_count_most_singular_first(
    files: Any, make_intervention: Any, make_change: Any
) -> None:
    matrices = [
        make_change("a", stable_rank_before=3.0),
        make_change("b", status="skipped", sigma_after=4.0),
        make_change("c", stable_rank_before=1.2),
        make_change("d", status="non_finite", sigma_before=None, sigma_after=None),
    ]
    files.run("paper", events=[make_intervention(3, matrices=matrices)])
    found = load_run_directory(files.info()).runs[0].interventions[0]
    assert [matrix.name for matrix in changed_by(found)] == ["c", "a"]
    assert len(found.matrices) == 4


def test_events_without_smoothing_do_not_count_as_interventions(
    files: Any, make_intervention: Any
) -> None:
    events = [
        make_intervention(3, kind="spike", decision="observe", reason="cooldown"),
        make_intervention(5, kind="non_finite", decision="skip_update", value=None),
        make_intervention(9, trigger="spike"),
    ]
    files.run("paper", events=events)
    run = load_run_directory(files.info()).runs[0]
    assert [found.event.step for found in run.interventions] == [9]
    assert [(event_of(r).step, event_of(r).kind, answer_of(r)) for r in run.events] == [
        (3, "spike", "none (cooldown)"),
        (5, "non_finite", "skip update"),
        (9, "spike", "clip"),
    ]


@pytest.mark.parametrize("kind", EventKind)
def test_every_kind_of_event_is_read(kind: EventKind, files: Any, make_intervention: Any) -> None:
    files.run("paper", events=[make_intervention(3, kind=kind, decision="stop")])
    directory = load_run_directory(files.info())
    assert [(event_of(r).step, event_of(r).kind) for r in directory.runs[0].events] == [(3, kind)]
    assert directory.missing == ()


def test_an_event_of_an_unknown_kind_is_listed_as_unreadable(
    files: Any, make_intervention: Any
) -> None:
    events = [make_intervention(3), {"version": 1, "kind": "remark", "step": 11}]
    files.run("paper", events=events)
    directory = load_run_directory(files.info())
    assert len(directory.runs[0].events) == 1
    assert directory.missing == (
        "paper/seed-0/pss_events.jsonl has 1 of 2 lines that cannot be read.",
    )


def test_two_interventions_in_one_step_are_two(files: Any, make_intervention: Any) -> None:
    events = [
        make_intervention(4, detector="stable_rank_floor"),
        make_intervention(3, detector="grad_norm_ratio"),
        make_intervention(3, detector="stable_rank_floor"),
    ]
    files.run("both", events=events, finished=False)
    run = load_run_directory(files.info()).runs[0]
    assert [(found.event.step, found.event.detector) for found in run.interventions] == [
        (3, "grad_norm_ratio"),
        (3, "stable_rank_floor"),
        (4, "stable_rank_floor"),
    ]
    assert result(run).num_interventions == 3


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        load_run_directory(tmp_path)
    with pytest.raises(ConfigurationError, match="There is no folder"):
        load_run_directory(tmp_path / "missing")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = ["step", "loss", "eval_loss", "stable_rank", "matrices", "kind", "shape", "threshold"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES), max_size=4))
def test_no_json_of_any_shape_breaks_the_reader(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    folder = root / "plain" / "seed-0"
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps({"kind": "intervention", **row}) for row in rows)
    for name in ("metrics.jsonl", "pss_health.jsonl", "pss_events.jsonl", "summary.json"):
        (folder / name).write_text(text, encoding="utf-8")
    (root / "run.json").write_text(text, encoding="utf-8")
    directory = load_run_directory(root)
    assert headline(directory)
    assert result(directory.runs[0]).status


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=40))
def test_no_bytes_break_the_reader(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("bytes")
    folder = root / "plain" / "seed-0"
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "pss_health.jsonl", "pss_events.jsonl", "summary.json"):
        (folder / name).write_bytes(content)
    assert np.all(np.isnan(load_run_directory(root).runs[0].loss.values))
