"""An inspection as one page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hf_pss.inspection.compare import MatrixChange
from hf_pss.inspection.figures import map_figure, spectra_figure
from hf_pss.inspection.judge import JudgedMatrix
from hf_pss.inspection.measure import MatrixHealth, spectrum_of
from hf_pss.inspection.names import visible
from hf_pss.inspection.survey import Inspection
from hf_pss.report import MISSING_EXTRA, canvas, text

try:
    import jinja2
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

__all__ = ["write_page"]

_MOST_SPECTRA = 6
# Decomposed for the page alone: 4096 × 4096, half a minute.
_MOST_DECOMPOSED = 2**24
# A model of experts has tens of thousands of matrices; --json has them all.
_MOST_LINES = 1000


def write_page(
    out: Path,
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[MatrixChange] = (),
) -> None:
    """Write a map of the stable ranks, the spectra of the worst matrices, and all numbers.

    Cost: beyond drawing, one exact decomposition for each of the six worst finite matrices of at
    most 2^24 numbers, unless the inspection was exact.

    Args:
        out: The page to write.
        inspection: What was found.
        other: What it was compared with, on the same page.
        changes: From `inspection` to `other`.

    Raises:
        OSError: It cannot be written.
    """
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
    html = environment.get_template("page.html.j2").render(
        sections=sections,
        changes=changes[:_MOST_LINES],
        num_changes=len(changes),
        most_lines=_MOST_LINES,
        nan=math.nan,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Replaced whole: a page that is open in a browser is never read half-written.
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.write_text(html, encoding="utf-8")
    scratch.replace(out)


def _section(inspection: Inspection) -> Mapping[str, object]:
    shown = list(_spectra(inspection.matrices))
    with canvas.style():
        figures = {"map": map_figure(inspection.matrices), "spectra": spectra_figure(shown)}
        drawn = {
            name: "data:image/svg+xml;base64,"
            + base64.b64encode(canvas.to_svg(figure)).decode("ascii")
            for name, figure in figures.items()
            if figure is not None
        }
    return {
        "inspection": inspection,
        "lines": inspection.matrices[:_MOST_LINES],
        "figures": drawn,
        "num_too_large": sum(_is_too_large(one) for one in inspection.matrices[:_MOST_SPECTRA]),
    }


def _spectra(
    matrices: Sequence[JudgedMatrix],
) -> Iterator[tuple[MatrixHealth, tuple[float, ...]]]:
    sound = [one for one in matrices if one.health.frobenius > 0 and not _is_too_large(one)]
    for one in sound[:_MOST_SPECTRA]:
        health = one.health
        sigma = health.spectrum or spectrum_of(health.source, health.expert)
        if sigma is not None:
            yield health, sigma


def _is_too_large(one: JudgedMatrix) -> bool:
    m, n = one.health.shape
    return one.health.spectrum is None and m * n > _MOST_DECOMPOSED
