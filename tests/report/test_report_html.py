from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hf_pss.errors import ConfigurationError
from hf_pss.evidence import report_page
from hf_pss.evidence.report_page import moving_average, write_report
from hf_pss.evidence.report_results import render_table
from hf_pss.view import canvas as view_canvas
from hf_pss.view import numbers as text

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture
def no_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are rendered once, as SVG: what no renderer can draw is found all the same."""
    monkeypatch.setattr(report_page, "to_png", lambda figure: b"")


@pytest.fixture
def words_only(no_png: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not rendered."""
    monkeypatch.setattr(view_canvas, "to_svg", lambda figure: b"<svg/>")


def show(run_dir: Path) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render_table(run_dir))
    return capture.get()


def test_the_page_needs_no_other_file(twins: Path) -> None:
    page = write_report(twins)
    assert page == twins / "report.html"
    parsed = Page(page)
    assert len(parsed.fetched) == 3
    assert all(uri.startswith("data:image/svg+xml;base64,") for uri in parsed.fetched)
    assert {"script", "link"}.isdisjoint(parsed.tags)
    figures = {path.name for path in (twins / "figures").iterdir()}
    assert figures == {"loss.png", "gradient_norm.png", "stable_rank.png"}


@pytest.mark.usefixtures("words_only")
def test_the_page_shows_the_measured_numbers(twins: Path) -> None:
    words = Page(write_report(twins)).text
    assert "The stable-rank floor ended at a validation loss of 4.300, 0.500 below" in words
    assert "This is one seed" in words
    assert "0.20 %" in words
    assert "4.00 → 1.00" in words
    assert "1.50 → 6.00" in words
    assert "hf-pss demo" in words
    assert "torch 2.13.0" in words
    assert "learning rate 0.003" in words
    assert "What is missing" not in words


@pytest.mark.usefixtures("words_only")
def test_an_intervention_that_changed_nothing_is_listed(
    files: Any, make_intervention: Any, make_change: Any
) -> None:
    skipped = [make_change(status="skipped", sigma_after=4.0)]
    files.run("paper", events=[make_intervention(5, matrices=skipped)])
    assert "0 of 1" in Page(write_report(files.info())).text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_the_message_says_what_to_install(package: str) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import hf_pss.evidence.report_results\n"
        "try:\n    import hf_pss.evidence.report_page\n"
        "except ImportError as error:\n    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert "pip install matplotlib jinja2" in done.stderr


@pytest.mark.usefixtures("words_only")
def test_several_seeds_get_a_mean(files: Any) -> None:
    for seed in (0, 1):
        files.run("plain", 4.8, seed=seed)
        files.run("floor", 4.3 + seed, seed=seed)
    assert "mean4.800" in Page(write_report(files.info())).text.replace(" ", "")


@pytest.mark.usefixtures("no_png")
@pytest.mark.parametrize(
    "cut", ["run.json", "metrics.jsonl", "pss_health.jsonl", "pss_events.jsonl", "summary.json"]
)
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_cut_file_still_gives_a_page(cut: str, keep: float, twins: Path) -> None:
    for path in twins.rglob(cut):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
    words = Page(write_report(twins)).text
    assert "plain" in words
    if cut != "pss_events.jsonl" or keep:
        assert "What is missing" in words


@pytest.mark.usefixtures("words_only")
def test_an_interrupted_run_says_so(files: Any) -> None:
    files.run("plain", finished=False)
    root = files.info(status="interrupted", guards=["plain", "floor"])
    words = Page(write_report(root)).text
    assert "This run is interrupted." in words
    assert "floor has left nothing." in words
    assert "unfinished" in words


@pytest.mark.usefixtures("no_png")
def test_a_run_that_has_just_begun_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "plain" / "seed-0").mkdir(parents=True)
    words = Page(write_report(tmp_path)).text
    assert "No stable rank was recorded." in words
    assert "No guard changed a weight." in words
    assert "not recorded" in words


@pytest.mark.usefixtures("words_only")
def test_what_comes_from_files_is_escaped(
    files: Any, make_intervention: Any, make_change: Any
) -> None:
    evil = "<script>alert('x')</script>&$\\frac{"
    guard = "<b>$x_&"
    events = [make_intervention(1, detector=evil, matrices=[make_change(evil, status=evil)])]
    folder = files.run(guard, events=events, summary={"status": evil})
    ranks = {"step": 0, "stable_rank": {evil: 2.0, f"h.0.{evil}": 3.0}}
    (folder / "pss_health.jsonl").write_text(json.dumps(ranks), encoding="utf-8")
    info = {key: evil for key in ("command", "data", "machine", "created", "status")}
    root = files.info(**info, model={evil: evil}, versions={evil: [evil]})
    page = Page(write_report(root))
    assert {"script", "b"}.isdisjoint(page.tags)
    assert evil in page.text
    assert guard in page.text


@pytest.mark.usefixtures("no_png")
def test_unexpected_types_in_run_json_are_harmless(files: Any) -> None:
    files.run("plain")
    root = files.info(
        model="small", training=[1], versions=None, elapsed_seconds="long", created=5, extra={}
    )
    Page(write_report(root))


@pytest.mark.usefixtures("words_only")
def test_long_lists_of_interventions_are_shortened(files: Any, make_intervention: Any) -> None:
    files.run("floor", events=[make_intervention(step) for step in range(60)])
    words = Page(write_report(files.info())).text
    assert "60 interventions" in words
    assert "The first 40 of 60" in words
    assert "Every matrix of the first 10 interventions" in words


@pytest.mark.usefixtures("words_only")
def test_events_without_an_answer_are_listed_and_neighbours_share_a_line(
    files: Any, make_intervention: Any
) -> None:
    def event(step: int, kind: str, **fields: Any) -> dict[str, Any]:
        return make_intervention(step, kind=kind, matrices=[], **fields)

    watched = [event(s, "spike", decision="observe", reason="observe only") for s in (3, 4, 7)]
    broken = [event(s, "non_finite", decision="skip_update", value=None) for s in range(8, 38)]
    cooling = event(14, "spike", decision="observe", reason="cooldown")
    files.run("plain", events=watched + broken)
    files.run("paper", events=[make_intervention(12, trigger="spike"), cooling])
    words = Page(write_report(files.info())).text
    assert "plain Trainer, seed 0: 0 interventions, 33 other events" in words
    assert "3–7 (3) spike" in words
    assert "none (observe only)" in words
    assert "8–37 (30) non-finite" in words
    assert "skip update" in words
    assert "PSS as published, seed 0: 1 intervention, 1 other event " in words
    assert "none (cooldown)" in words
    assert "No guard changed a weight." not in words


@pytest.mark.usefixtures("words_only")
def test_the_page_explains_the_plain_twin(twins: Path) -> None:
    assert "its overhead is the cost of observing" in Page(write_report(twins)).text


@pytest.mark.usefixtures("words_only")
def test_without_a_plain_twin_the_page_does_not_mention_it(files: Any) -> None:
    files.run("floor")
    assert "cost of observing" not in Page(write_report(files.info())).text


@pytest.mark.usefixtures("words_only")
def test_the_page_is_written_to_the_given_place(twins: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    page = write_report(twins, tmp_path / "site" / "page.html")
    named = write_report(twins, tmp_path / "new" / "page.html")
    assert named.read_bytes() == page.read_bytes()
    assert sorted(path.name for path in named.parent.iterdir()) == ["figures", "page.html"]


@pytest.mark.usefixtures("words_only")
def test_links_to_other_files_are_replaced_and_their_targets_stay(
    twins: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (twins / "figures").mkdir()
    for name in ("report.html", "figures/loss.png"):
        (twins / name).symlink_to(outside)
    write_report(twins)
    assert outside.read_text() == "mine"
    assert not any((twins / name).is_symlink() for name in ("report.html", "figures/loss.png"))


def test_no_page_is_written_through_a_link_out_of_the_run(twins: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (twins / "pages").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigurationError, match="pages is a link that leads out of the run"):
        write_report(twins, twins / "pages" / "report.html")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("target", ["outside", "."])
def test_figures_are_not_written_through_a_folder_that_is_a_link(
    twins: Path, tmp_path: Path, target: str
) -> None:
    led_to = tmp_path / "outside" if target == "outside" else twins
    led_to.mkdir(exist_ok=True)
    (twins / "figures").symlink_to(led_to)
    before = sorted(led_to.iterdir())
    with pytest.raises(ConfigurationError, match="figures is a link"):
        write_report(twins)
    assert sorted(led_to.iterdir()) == before


def test_characters_that_do_not_print_are_shown_as_escapes(
    files: Any, make_intervention: Any, make_change: Any
) -> None:
    odd = "\ud800\x1b\u202e"
    records = [make_intervention(3, matrices=[make_change(odd)], detector=odd, smoothing=odd)]
    files.run(f"odd{os.fsdecode(bytes([255]))}", events=records, summary={"status": odd})
    root = files.info(machine=odd, created=odd, model={odd: odd}, status=odd)
    words = Page(write_report(root)).text
    assert words.count("\\ud800\\x1b\\u202e") >= 8
    assert r"odd\udcff" in words
    assert r"odd\udcff" in show(root)


def test_the_moving_average_of_a_long_run_takes_little_memory() -> None:
    tracemalloc.start()
    averaged = moving_average(np.ones(200_000), 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.all(averaged == 1)
    assert peak < 300 * 2**20


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_terminal_shows_both_losses_events_and_overhead(twins: Path) -> None:
    shown = show(twins)
    row = next(line for line in shown.splitlines() if line.strip().startswith("floor"))
    cells = re.split(r"\s{2,}", row.strip())
    assert cells == ["floor", "4.300", "5.050", "2", "0", "0.20 %", "50 s"]


def test_the_terminal_shows_what_an_interrupted_run_left(files: Any) -> None:
    files.run("[red]odd", finished=False)
    shown = show(files.info(status="interrupted"))
    assert "[red]odd" in shown
    assert "not finished" in shown
    assert "–" in shown


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.fixed(4.2704), "4.270"),
        (text.significant(256.0), "256"),
        (text.significant(3.0), "3.00"),
        (text.count(float("nan")), "–"),
        (text.count(12345.0), "12,345"),
        (text.percent(float("inf")), "–"),
        (text.duration(59.99), "60 s"),
        (text.duration(3600.0), "1 h 0 min"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected
