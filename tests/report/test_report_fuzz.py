"""Demo runs whose files were changed at random: a report or a message, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from fuzzing import NUM_PARTS, Acts, contents, put_back, remove
from hypothesis import strategies as st

from hf_pss.evidence import report_page
from hf_pss.view import canvas

NUM_QUICK, NUM_SLOW = 20, 5_000
# A figure of a million points takes 150 MiB.
MOST_MIB = 512


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with fuzzing.workplace(tmp_path_factory.mktemp("fuzzed")) as folder:
        yield folder


@pytest.fixture(scope="module")
def original(in_memory: Path, files_at: Any, make_intervention: Any) -> Path:
    files = files_at(in_memory / "run")
    files.run("plain", 4.8)
    files.run("paper", 4.6, events=[make_intervention(12)], finished=False)
    return files.info()


FIGURES = ("figures/loss.png", "figures/gradient_norm.png", "figures/stable_rank.png")
# What the command writes beside the page, which may be there already.
PAGES = {"report.html", "page.html", "figures", *FIGURES}
EXTRA = (
    *("report.html", "figures/loss.png", "paper/seed-1/metrics.jsonl", "\x1b[2J/seed-0/x"),
    *("plain/seed-99999999999999999999/metrics.jsonl", "figures", "[red]\u202e/seed-1/run.json"),
)
ACTS = fuzzing.acts_with(EXTRA)
OUTPUTS = [(), (), ("--output", "OUT/page.html"), ("--output", "OUT"), ("--output", "RUN/run.json")]
DRAWN = "drawn"
# To render the figures takes ten times as long as all the rest.
WORDS = st.builds(
    lambda output, drawn: (*output, *drawn),
    st.sampled_from(OUTPUTS),
    st.sampled_from([(DRAWN,), *[()] * 9]),
)


def check(run: Path, acts: Acts, words: tuple[str, ...]) -> None:
    """Change files, write the report, put them back. With "drawn", also render the figures."""
    out, kept = run.parent / "out", contents(run)
    out.mkdir()
    patch = pytest.MonkeyPatch()
    if DRAWN not in words:
        patch.setattr(canvas, "to_svg", lambda figure: b"<svg/>")
    words = tuple(word for word in words if word != DRAWN)
    try:
        fuzzing.apply(acts, run)
        before = contents(run.parent)
        given = [word.replace("OUT", str(out)).replace("RUN", str(run)) for word in words]
        result = fuzzing.invoke("report", run, *given)
        after = contents(run.parent)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        place = "out/" if "OUT" in "".join(words) else "run/"
        assert {name.removeprefix(place) for name in changed} <= PAGES
        if result.exit_code == 0:
            page = run.parent / place / ("page.html" if "page" in "".join(words) else "report.html")
            assert page.is_file()
            assert not page.is_symlink()
            fuzzing.judge(page.read_text(encoding="utf-8"))
    finally:
        patch.undo()
        remove(out)
        put_back(run, kept)


def names_in(run: Path) -> list[str]:
    found = [str(path.relative_to(run)) for path in run.rglob("*")]
    return sorted([*found, "figures", "figures/loss.png", "report.html"])


def fuzz(run: Path, num_examples: int, part: int = 0) -> None:
    def checked(acts: Acts, words: tuple[str, ...]) -> None:
        check(run, acts, words)

    fuzzing.fuzz(
        checked,
        names_in(run),
        ACTS,
        WORDS,
        num_examples=num_examples,
        part=part,
        most_mib=MOST_MIB,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are rendered once, as SVG: what no renderer can draw is found all the same."""
    monkeypatch.setattr(report_page, "to_png", lambda figure: b"")


@pytest.mark.usefixtures("quick")
def test_unchanged_it_goes_through(original: Path) -> None:
    for words in ((), ("--output", "OUT/page.html"), ("--output", "OUT", DRAWN)):
        check(original, [], words)


def test_changes_elsewhere_are_noticed(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = original.parent / "outside" / "state.json"
    text = elsewhere.read_bytes()
    monkeypatch.setattr(report_page, "to_png", lambda figure: elsewhere.write_bytes(b"") and b"")
    with pytest.raises(AssertionError):
        check(original, [], ())
    elsewhere.write_bytes(text)


@pytest.mark.usefixtures("quick")
def test_changed_files(original: Path) -> None:
    fuzz(original, NUM_QUICK)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("part", range(1, NUM_PARTS + 1))
def test_many_changed_files(original: Path, part: int) -> None:
    fuzz(original, NUM_SLOW // NUM_PARTS, part)
