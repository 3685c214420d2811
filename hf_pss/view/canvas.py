"""The look of all figures: one palette and one style sheet, without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from hf_pss.view import MISSING_EXTRA

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter, StrMethodFormatter
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

__all__ = [
    "COLOURS",
    "REFERENCE_COLOUR",
    "Axes",
    "Figure",
    "Line2D",
    "colour",
    "mark_level",
    "new_figure",
    "save_png",
    "style",
    "to_svg",
    "use_log_scale",
]

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


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def to_svg(figure: Figure) -> bytes:
    """Render a figure as SVG with text as outlines, which look the same everywhere."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
