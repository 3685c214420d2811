"""An inspection as one page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hf_pss.inspection.compare import MatrixChange
from hf_pss.inspection.figures import map_figure, series_figure, spectra_figure
from hf_pss.inspection.judge import JudgedMatrix
from hf_pss.inspection.measure import MatrixHealth, spectrum_of
from hf_pss.inspection.names import visible
from hf_pss.inspection.series import SeriesRow
from hf_pss.inspection.survey import Inspection
from hf_pss.report import MISSING_EXTRA, canvas, text

try:
    import jinja2
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

__all__ = ["render_page", "write_page"]

_MOST_SPECTRA = 6
# Decomposed for the page alone: 4096 × 4096, half a minute.
_MOST_DECOMPOSED = 2**24
# A model of experts has tens of thousands of matrices; --json has them all.
_MOST_LINES = 1000


def render_page(
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[MatrixChange] = (),
    rows: Sequence[SeriesRow] = (),
) -> str:
    """Return HTML: a map of the stable ranks, the spectra of the worst matrices, and all numbers.

    Cost: beyond drawing, one exact decomposition for each of the six worst finite matrices of at
    most 2^24 numbers, unless the inspection was exact.

    Args:
        inspection: What was found.
        other: What it was compared with, on the same page.
        changes: From `inspection` to `other`.
        rows: Of a series that `inspection` begins and `other` ends.

    Raises:
        StateError: A file has become shorter since it was inspected.
        OSError: A file can no longer be read.
    """
    with canvas.style():
        series = _drawn({"series": series_figure(rows)}) if rows else {}
    sections = [_section(one) for one in (inspection, other) if one is not None]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_pss.inspection", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "significant": text.significant,
        "count": text.count,
        "percent": text.percent,
        "visible": visible,
    }
    return environment.get_template("page.html.j2").render(
        sections=sections,
        rows=rows,
        series=series,
        changes=changes[:_MOST_LINES],
        num_changes=len(changes),
        most_lines=_MOST_LINES,
        nan=math.nan,
    )


def write_page(out: Path, html: str) -> None:
    """Write a page whole or not at all: one that is open in a browser is never half-written.

    Raises:
        OSError: It cannot be written. Nothing is left of it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".hf-pss-{secrets.token_hex(8)}.html")
    stream = scratch.open("x", encoding="utf-8")  # "x": never over, or through a link to, anything
    try:
        with stream:
            stream.write(html)
        scratch.replace(out)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _section(inspection: Inspection) -> Mapping[str, object]:
    shown = list(_spectra(inspection.matrices))
    with canvas.style():
        drawn = _drawn({"map": map_figure(inspection.matrices), "spectra": spectra_figure(shown)})
    return {
        "inspection": inspection,
        "lines": inspection.matrices[:_MOST_LINES],
        "figures": drawn,
        "num_too_large": sum(_is_too_large(one) for one in inspection.matrices[:_MOST_SPECTRA]),
    }


def _drawn(figures: Mapping[str, Figure | None]) -> Mapping[str, str]:
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(canvas.to_svg(figure)).decode("ascii")
        for name, figure in figures.items()
        if figure is not None
    }


def _spectra(
    matrices: Sequence[JudgedMatrix],
) -> Iterator[tuple[MatrixHealth, Sequence[float]]]:
    sound = [one for one in matrices if one.health.frobenius > 0 and not _is_too_large(one)]
    for one in sound[:_MOST_SPECTRA]:
        health = one.health
        sigma = health.spectrum or spectrum_of(health.source, health.expert)
        if sigma is not None:
            yield health, sigma


def _is_too_large(one: JudgedMatrix) -> bool:
    m, n = one.health.shape
    return one.health.spectrum is None and m * n > _MOST_DECOMPOSED
