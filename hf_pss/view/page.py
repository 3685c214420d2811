"""Pages that need no other file, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from hf_pss.records.strict_json import visible
from hf_pss.view import MISSING_EXTRA, numbers
from hf_pss.view.canvas import Figure, to_svg

try:
    import jinja2
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error

__all__ = ["inline_svg", "render_template"]

_FILTERS = {name: getattr(numbers, name) for name in numbers.__all__ if name != "NOTHING"}


def render_template(package: str, name: str, values: Mapping[str, object]) -> str:
    """Fill in a template from a package.

    The template can use `visible` and the functions of `hf_pss.view.numbers` as filters. Every
    value is escaped.

    Args:
        package: Dotted name of the package.
        name: File name of the template.
        values: The variables of the template. A variable that is not here is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**_FILTERS, "visible": visible}
    return environment.get_template(name).render(values)


def inline_svg(figures: Mapping[str, Figure | None]) -> dict[str, str]:
    """Return figures as data URIs for ``<img src>``, without those that are None."""
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure)).decode("ascii")
        for name, figure in figures.items()
        if figure is not None
    }
