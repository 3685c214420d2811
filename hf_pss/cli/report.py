"""`hf-pss report`: write the report of a demo run, again or elsewhere."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_pss.errors import ConfigurationError

__all__ = ["report", "require_report_extra", "show_report"]


def report(
    run_dir: Annotated[Path, typer.Argument(help="The folder that hf-pss demo wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page, or a folder for it.", show_default="RUN_DIR/report.html"),
    ] = None,
) -> None:
    """Write the report of a demo run, also of one that was interrupted or still goes on."""
    require_report_extra()
    if not run_dir.is_dir():
        raise ConfigurationError(
            f"There is no folder {run_dir}. Give the one that `hf-pss demo` wrote."
        )
    show_report(run_dir, output)


def require_report_extra() -> None:
    """Make sure that the report can be drawn, before time is spent on what it shows.

    Raises:
        ConfigurationError: The extra ``report`` is not installed.
    """
    try:
        import_module("hf_pss.report.html")
    except ImportError as error:
        raise ConfigurationError(str(error)) from error


def show_report(run_dir: Path, output: Path | None = None) -> None:
    """Write the page and print the table; the page's path is the last line."""
    from hf_pss.report.html import write_report
    from hf_pss.report.table import render_table

    page = write_report(run_dir, output)
    Console().print(render_table(run_dir))
    typer.echo(page)  # plain: rich would break a long path over two lines
