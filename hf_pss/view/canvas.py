"""The look of all figures, without pyplot's global state, and pages that hold them.

A page needs no other file, no network and no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from hf_pss.errors import how_to_install
from hf_pss.records.strict_json import printable, visible
from hf_pss.view import numbers

try:
    import jinja2
    import markupsafe
    import matplotlib as mpl
    from matplotlib.axes import Axes as Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.ticker import LogFormatter, StrMethodFormatter
except ImportError as error:
    raise ImportError(
        "The report draws with matplotlib and jinja2, which are not installed. "
        f"{how_to_install('matplotlib', 'jinja2')}"
    ) from error

# Okabe and Ito's palette, which is clear with every common kind of colour vision, with brown
# instead of yellow.
REFERENCE_COLOUR = "#555555"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B4513", "#000000")

_STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "savefig.dpi": 160,
    "svg.hashsalt": "hf_pss",
    "text.parse_math": False,
    "xtick.color": "#666666",
    "xtick.labelsize": 8,
    "ytick.color": "#666666",
    "ytick.labelsize": 8,
}


def style() -> AbstractContextManager[None]:
    """Apply the settings of our figures inside the context, and restore those of the caller."""
    return mpl.rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure outside pyplot. Sizes are in inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.12)
    return figure


def use_log_scale(axes: Axes) -> None:
    """Make the y-axis logarithmic, with plain numbers because the style parses no math."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(_PlainFormatter())


def mark_level(axes: Axes, level: float, text: str, *, at_left: bool = False) -> None:
    """Draw a dotted horizontal line with a label at one end."""
    axes.axhline(level, color="#999999", lw=0.8, ls=":")
    axes.annotate(
        text,
        (0.01 if at_left else 1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="left" if at_left else "right",
        color="#777777",
        fontsize=7.5,
    )


class _PlainFormatter(LogFormatter):
    """Labels the same ticks as the base class, but with plain numbers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def colour(name: str, names: Sequence[str], reference: str) -> str:
    """Return grey for the reference, and one colour for each of the other names."""
    others = [other for other in names if other != reference]
    return REFERENCE_COLOUR if name == reference else COLOURS[others.index(name) % len(COLOURS)]


def to_png(figure: Figure, *, description: str | None = None) -> bytes:
    """Render a figure as PNG, with a description among the metadata of the file."""
    stream = io.BytesIO()
    metadata = {"Software": None, "Description": description}
    figure.savefig(stream, format="png", metadata=metadata)
    return stream.getvalue()


def to_svg(figure: Figure) -> bytes:
    """Render a figure as SVG with text as outlines, which look the same everywhere."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def draw_cells(
    axes: Axes,
    edges: npt.ArrayLike,
    values: npt.NDArray[np.float64],
    scale: LogNorm,
    *,
    rasterized: bool = False,
) -> QuadMesh:
    """Draw numbers, (num_rows, num_columns), as coloured cells with the first row on top.

    Cells that are not finite show the background.
    """
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(values) + 1),
        np.ma.masked_invalid(values),
        norm=scale,
        cmap="viridis",
        rasterized=rasterized,
    )
    axes.set_facecolor("#eeeeee")
    axes.grid(visible=False)
    axes.set_ylim(len(values), 0)
    return mesh


def render_template(package: str, name: str, values: Mapping[str, object]) -> str:
    """Fill in a template from a package.

    The template can use `visible` and the functions of `hf_pss.view.numbers` as filters. Every
    value is escaped, and characters that do not print are shown as escapes.

    Args:
        package: Dotted name of the package.
        name: File name of the template.
        values: The variables of the template. A variable that is not here is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {name: getattr(numbers, name) for name in numbers.__all__ if name != "NOTHING"}
    environment.filters |= {**filters, "visible": visible}
    return environment.get_template(name).render(values)


def _printable(value: object) -> object:
    # The output of a macro is finished HTML, with line breaks.
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return printable(value)
    return value


def inline_svg(figures: Mapping[str, Figure | None]) -> dict[str, str]:
    """Return figures as data URIs for ``<img src>``, without those that are None."""
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure)).decode("ascii")
        for name, figure in figures.items()
        if figure is not None
    }
