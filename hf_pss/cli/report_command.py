"""`hf-pss report`: write the report of a demo run again, or to a different place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_pss.cli.terminal import require_extra
from hf_pss.errors import ConfigurationError

__all__ = ["REPORT_MODULE", "report", "show_report"]

REPORT_MODULE = "hf_pss.evidence.report_page"


def report(
    run_dir: Annotated[Path, typer.Argument(help="The folder that hf-pss demo wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page, or a folder for it.", show_default="RUN_DIR/report.html"),
    ] = None,
) -> None:
    """Write the report of a demo run, also of one that was interrupted or is still running."""
    require_extra(REPORT_MODULE)
    if not run_dir.is_dir():
        raise ConfigurationError(
            f"There is no folder {run_dir}. Give the one that `hf-pss demo` wrote."
        )
    show_report(run_dir, output)


def show_report(run_dir: Path, output: Path | None = None) -> None:
    """Write the page, print the table, and print the page's path as the last line."""
    from hf_pss.evidence.report_page import write_report
    from hf_pss.evidence.report_results import render_table

    page = write_report(run_dir, output)
    Console().print(render_table(run_dir))
    typer.echo(page)  # plain: rich would break a long path over two lines
