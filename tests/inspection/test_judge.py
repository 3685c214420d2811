from __future__ import annotations

import io
import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from trained import trained_gpt2

from hf_pss.errors import SelectionError
from hf_pss.health.verdicts import is_ill
from hf_pss.inspection.health_output import (
    render_changes,
    render_inspection,
    render_series,
    write_json,
)
from hf_pss.inspection.health_page import noise_quantiles, render_page, series_figure
from hf_pss.inspection.matrix_survey import (
    Inspection,
    JudgedMatrix,
    compare,
    inspect_checkpoint,
    judge,
    series,
)
from hf_pss.models.selection.by_name import Place, place_of
from hf_pss.records.strict_json import visible
from hf_pss.runs.folder import write_whole
from hf_pss.runs.safetensors_files import open_checkpoint

EVIL = "h.0.\x1b[2J\u202e<script>.weight"


def inspected(folder: Path, tensors: dict[str, torch.Tensor], *, exact: bool = False) -> Inspection:
    folder.mkdir(exist_ok=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "m.safetensors")
    return inspect_checkpoint(open_checkpoint(folder), exact=exact)


def healthy() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kinds = {"attn.q": (80, 80), "mlp.up": (200, 80)}
    tensors = {
        f"h.{i}.{k}.weight": torch.randn(shape) for i in range(6) for k, shape in kinds.items()
    }
    return tensors | {"h.0.ln.weight": torch.ones(80), "wte.weight": torch.randn(90, 80)}


def ill() -> dict[str, torch.Tensor]:
    tensors = healthy()
    tensors["h.0.attn.q.weight"][1, 2] = math.nan
    tensors["h.1.attn.q.weight"].zero_()
    tensors["h.2.mlp.up.weight"] *= 9
    tensors["h.3.mlp.up.weight"] = torch.outer(torch.randn(200), torch.randn(80)) / 10
    tensors["h.4.mlp.up.weight"][:, :4] *= 4
    tensors["h.0.ln.weight"][3] = math.inf
    return tensors


@pytest.fixture
def sick(tmp_path: Path) -> Inspection:
    return inspected(tmp_path / "sick", ill())


def shown(renderable: object, *, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def named(inspection: Inspection) -> dict[str, JudgedMatrix]:
    return {one.health.name: one for one in inspection.matrices}


def test_noise_is_healthy(tmp_path: Path) -> None:
    inspection = inspected(tmp_path / "x", healthy())
    assert inspection.is_finite
    assert inspection.num_findings == 0
    assert len(inspection.matrices) == 13
    assert len(inspection.others) == 1
    ratios = [one.health.stable_rank / one.health.noise for one in inspection.matrices]
    assert ratios == sorted(ratios)


def test_the_worst_come_first(sick: Inspection) -> None:
    kinds = [one.findings[0].kind for one in sick.matrices if one.findings]
    assert kinds[:2] == ["non_finite", "zero"]
    found = {name: {f.kind for f in one.findings} for name, one in named(sick).items()}
    assert found["h.2.mlp.up.weight"] == {"large"}
    assert found["h.3.mlp.up.weight"] == {"low_rank", "below_siblings"}
    assert found["h.4.mlp.up.weight"] >= {"below_siblings"}
    assert sum(map(bool, found.values())) == sick.num_findings + sick.num_remarks == 5
    assert sick.num_findings == 3
    assert [is_ill(one.findings) for one in sick.matrices] == [True] * 3 + [False] * 10
    assert not sick.is_finite
    assert [(entry.name, bad) for entry, bad in sick.bad_others] == [("h.0.ln.weight", 1)]


@pytest.mark.parametrize(
    ("name", "quantised", "scales"),
    [
        ("qweight", torch.zeros(8, 4, dtype=torch.int32), {"scales": torch.ones(1, 4).half()}),
        ("weight", torch.ones(4, 4).to(torch.float8_e4m3fn), {"weight_scale_inv": torch.ones(1)}),
        ("weight", torch.zeros(8, 1, dtype=torch.uint8), {"weight.absmax": torch.ones(4)}),
        ("weight", torch.zeros(8, dtype=torch.uint8), {"s": torch.ones(4, 4)}),
    ],
    ids=["GPTQ", "FP8", "bitsandbytes", "MX"],
)
def test_nan_in_the_scales_of_quantised_weights(
    tmp_path: Path, name: str, quantised: torch.Tensor, scales: dict[str, torch.Tensor]
) -> None:
    ((scale, values),) = scales.items()
    values.view(-1)[-1] = math.nan
    values = values.to(torch.float8_e8m0fnu) if scale == "s" else values
    inspection = inspected(tmp_path / "x", {f"h.0.q.{name}": quantised, f"h.0.q.{scale}": values})
    assert [(one.name, bad) for one, bad in inspection.bad_others] == [(f"h.0.q.{scale}", 1)]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2fnuz])
def test_nan_in_quantised_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = math.nan
    tensors = {"h.0.q.weight": weight.to(dtype), "h.0.q.weight_scale_inv": torch.ones(1)}
    assert not inspected(tmp_path / "x", tensors).is_finite


def test_levels_of_sound_models_are_remarks(tmp_path: Path) -> None:
    """SmolLM2 and others hold embeddings of stable rank 2, and a first block far from the rest."""
    tensors = healthy()
    tensors["wte.weight"] += 3.0
    tensors["h.0.attn.q.weight"][:, 0] *= 50
    tensors["h.1.mlp.up.weight"] *= 30
    inspection = inspected(tmp_path / "x", tensors)
    assert (inspection.num_findings, inspection.num_remarks) == (0, 3)
    assert "Findings: 0. Remarks: 3." in shown(render_inspection(inspection, num_lines=1))
    assert {one.findings[0].kind for one in inspection.matrices[:3]} == {"low_rank", "large"}


def test_a_trained_network_is_sound(tmp_path: Path) -> None:
    trained_gpt2().save_pretrained(tmp_path)
    assert inspect_checkpoint(open_checkpoint(tmp_path)).num_findings == 0


@pytest.mark.parametrize(
    "vanished",
    [["h.3.attn.q"], [f"h.{i}.attn.q" for i in range(4)], [f"h.{i}.attn.q" for i in range(6)]],
    ids=["one", "most of a kind", "all of a kind"],
)
@pytest.mark.parametrize("factor", [1e-3, 1e-9, 1e-38])
def test_vanished_matrices(tmp_path: Path, vanished: list[str], factor: float) -> None:
    tensors = healthy()
    for i in range(6):
        tensors |= {f"h.{i}.attn.{k}.weight": torch.randn(80, 80) for k in ("k", "v", "o")}
    for name in vanished:
        tensors[f"{name}.weight"] *= factor
    judged = inspected(tmp_path / "x", tensors).matrices
    ill = {one.health.name: one.findings[0].kind for one in judged if is_ill(one.findings)}
    assert ill == {f"{name}.weight": "vanished" for name in vanished}


def test_vanished_experts(tmp_path: Path) -> None:
    experts = torch.randn(8, 40, 30)
    experts[5] *= 1e-4
    judged = inspected(tmp_path / "x", {"h.0.mlp.experts.w": experts}).matrices
    ill = [one.health.name for one in judged if is_ill(one.findings)]
    assert ill == ["h.0.mlp.experts.w[5]"]


def test_one_matrix_that_drowns_its_siblings_is_ill(tmp_path: Path) -> None:
    tensors = healthy()
    tensors["h.1.mlp.up.weight"] *= 300
    assert inspected(tmp_path / "x", tensors).matrices[0].findings[0].kind == "large"
    assert inspected(tmp_path / "x", tensors).num_findings == 1


def test_few_siblings_give_no_finding(tmp_path: Path) -> None:
    tensors = {f"h.{i}.w.weight": torch.randn(80, 80) for i in range(3)}
    tensors["h.0.w.weight"] *= 100
    assert inspected(tmp_path / "x", tensors).num_findings == 0


# Of 20,000 experts; 0.05 measured, where medians for each took 0.7 of 2,000 and grow as the square.
MOST_CPU_SECONDS = 1


def test_many_siblings_are_compared_at_once(tmp_path: Path) -> None:
    (matrix,) = inspected(tmp_path / "x", {"h.0.w": torch.randn(2, 2)}).matrices
    start = time.process_time()
    judged = judge([matrix.health] * 20_000)
    assert len(judged) == 20_000
    assert time.process_time() - start < MOST_CPU_SECONDS


def test_table(sick: Inspection) -> None:
    text = shown(render_inspection(sick, num_lines=5))
    assert "NOT FINITE: NaN or inf in 1 matrix and 1 other tensor" in text
    assert "h.0.ln.weight: 1 of 80 numbers" in text
    lines = text.splitlines()
    first = lines.index("Why, the worst first:")
    assert "1 of 6,400 numbers are NaN or inf" in lines[first + 1]
    assert "every number is 0" in lines[first + 2]
    assert "8 more; --lines shows them" in text


def test_each_reason_fits_one_line_of_80_characters(sick: Inspection) -> None:
    lines = shown(render_inspection(sick, num_lines=5), width=80).splitlines()
    ill = [one for one in sick.matrices[:5] if one.findings]
    assert len(ill) > 2
    first = lines.index("Why, the worst first:") + 1
    for one, line in zip(ill, lines[first:], strict=False):
        assert one.findings[0].text in line


def written(inspection: Inspection, **compared: Any) -> dict[str, Any]:
    stream = io.StringIO()
    write_json(stream, inspection, **compared)
    return json.loads(stream.getvalue(), parse_constant=pytest.fail)


def test_json_is_strict(sick: Inspection) -> None:
    data = written(sick)
    assert data["finite"] is False
    first = data["matrices"][0]
    assert (first["name"], first["sigma1"], first["num_nonfinite"]) == (
        "h.0.attn.q.weight",
        None,
        1,
    )
    assert first["findings"][0]["kind"] == "non_finite"
    assert data["non_finite_tensors"] == [{"name": "h.0.ln.weight", "num_nonfinite": 1}]


def test_json_of_an_exact_inspection_has_spectra(tmp_path: Path) -> None:
    row = written(inspected(tmp_path / "x", {"w.weight": torch.eye(5)}, exact=True))["matrices"][0]
    assert row["singular_values"] == [1.0] * 5
    assert row["effective_rank"] == pytest.approx(5)


def test_compare(tmp_path: Path, sick: Inspection) -> None:
    before = inspected(tmp_path / "before", healthy())
    changes = compare(before, sick)
    first = ["h.0.attn.q.weight", "h.1.attn.q.weight", "h.3.mlp.up.weight"]
    assert [change.name for change in changes[:3]] == first  # newly NaN, newly zero, collapsed
    found = {change.name: change for change in changes}
    larger = found["h.2.mlp.up.weight"]
    assert larger.sigma1_ratio == pytest.approx(9)
    assert larger.relative_change == pytest.approx(8)
    assert found["h.5.mlp.up.weight"].relative_change == 0
    assert math.isnan(found["h.0.attn.q.weight"].relative_change)
    assert "→" in shown(render_changes(changes, num_lines=3))
    assert "10 more" in shown(render_changes(changes, num_lines=3))
    data = written(before, other=sick, changes=changes)
    assert data["changes"][0]["after"]["sigma1"] is None


def test_compare_sees_through_wrappers(tmp_path: Path) -> None:
    one = inspected(tmp_path / "a", {"h.0.w.weight": torch.eye(4), "x.weight": torch.eye(4)})
    two = inspected(tmp_path / "b", {"transformer.h.0.w.weight": 2 * torch.eye(4)})
    changes = {change.name: change for change in compare(one, two)}
    assert changes["h.0.w.weight"].sigma1_ratio == pytest.approx(2)
    assert changes["x.weight"].after is None
    assert "missing" in shown(render_changes(list(changes.values()), num_lines=9))
    with pytest.raises(SelectionError, match="in common"):
        compare(one, inspected(tmp_path / "c", {"other.weight": torch.eye(4)}))


def test_series(tmp_path: Path, sick: Inspection) -> None:
    zeros = inspected(tmp_path / "step-7", {"h.0.w": torch.zeros(4, 4)})
    lost = inspected(tmp_path / "9", {"h.0.w": torch.full((4, 4), math.nan)})
    rows = series([sick, zeros, lost])
    assert [row.step for row in rows] == [None, 7, 9]
    assert [row.num_nonfinite for row in rows] == [2, 0, 1]
    healths = [one.health for one in sick.matrices if one.health.frobenius > 0]
    assert rows[0].lowest_stable_rank == min(one.stable_rank for one in healths)
    assert rows[0].largest_sigma1 == max(one.sigma1 for one in healths)
    assert rows[1].largest_sigma1 == 0
    assert math.isnan(rows[2].largest_sigma1)
    assert series_figure(rows) is not None
    assert series_figure(rows[1:]) is None
    assert "step-7" in shown(render_series(rows))


# 4.6 MB measured. Without the limit, a page with 300 blocks and 300 kinds has 23 MB.
MOST_PAGE_BYTES = 8_000_000


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_no_other_file(tmp_path: Path, sick: Inspection) -> None:
    before = inspected(tmp_path / "before", healthy() | {EVIL: torch.randn(80, 80)})
    out = tmp_path / "deep" / "page.html"
    out.parent.mkdir()
    write_whole(out, render_page(before, other=sick, changes=compare(before, sick)))
    page = Page(out)
    assert len(page.fetched) == 4
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.fetched)
    assert "script" not in page.tags
    text = out.read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "From the first to the second" in text
    assert list(out.parent.iterdir()) == [out]


def test_each_tensor_in_a_block_and_of_a_kind_of_its_own(tmp_path: Path) -> None:
    """The map would have a million cells, and only the worst blocks and kinds are drawn."""
    tensors = {f"h.{i}.k{i}.weight": torch.randn(4, 4) for i in range(1000)}
    tensors["h.999.k999.weight"][0, 0] = math.nan
    page = render_page(inspected(tmp_path / "x", tensors))
    assert len(page) < MOST_PAGE_BYTES


def test_a_page_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "page.html", "a lone surrogate \ud800")
    assert list(tmp_path.iterdir()) == []


def test_spectra_beyond_any_scale(tmp_path: Path) -> None:
    """The norm of entries of 1e308 overflows in float64, and that of 1e-320 vanishes."""
    extremes = {f"h.0.{x}": torch.full((4, 4), x, dtype=torch.float64) for x in (1e308, 1e-320)}
    for exact in (True, False):
        inspection = inspected(tmp_path / "x", extremes, exact=exact)
        assert render_page(inspection)
        write_json(io.StringIO(), inspection)
        assert shown(render_inspection(inspection, num_lines=5))


def test_a_page_without_drawable_numbers(tmp_path: Path) -> None:
    inspection = inspected(tmp_path / "x", {"h.0.w": torch.zeros(4, 4), "b": torch.ones(3)})
    write_whole(tmp_path / "page.html", render_page(inspection))
    assert Page(tmp_path / "page.html").fetched == []


def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    inspection = inspected(tmp_path / "x", {EVIL: torch.eye(4)})
    text = shown(render_inspection(inspection, num_lines=5))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J\u202e<script>" in text


def test_visible_cuts_long_text() -> None:
    assert len(visible("x" * 10_000)) == 301
    assert visible("\ud800\n\U000e0001") == r"\ud800\n\U000e0001"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.3.attn.c_attn.weight", Place("transformer.h", 3, "attn.c_attn")),
        ("h.3.mlp.c_fc.weight", Place("h", 3, "mlp.c_fc")),
        ("0.weight", Place("", None, "0")),
        ("0.linear.weight", Place("", 0, "linear")),
        ("encoder.block.2.layer.1.wo.weight", Place("encoder.block", 2, "layer.*.wo")),
        ("wte.weight", Place("", None, "wte")),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert place_of(name) == place


# Relative to the largest value; 0.025 measured with these shapes.
QUANTILES = 0.05


@pytest.mark.parametrize("shape", [(512, 512), (512, 128), (100, 400)])
def test_expected_spectrum_of_noise(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    sigma = torch.linalg.svdvals(torch.randn(shape).double()).numpy()
    expected = noise_quantiles(*shape, (np.arange(len(sigma)) + 0.5) / len(sigma))
    assert np.abs(sigma - expected).max() < QUANTILES * sigma[0]
