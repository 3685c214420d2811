"""`hf-pss health`: look into a checkpoint on disk, the worst matrices first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hf_pss.errors import ConfigurationError, StateError

if TYPE_CHECKING:
    from hf_pss.inspection.compare import MatrixChange
    from hf_pss.inspection.survey import Inspection

__all__ = ["health"]

_NOT_FINITE = 1


def health(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint's folder, a .safetensors file, an index of shards, or a folder of "
            "the hub's cache."
        ),
    ],
    compare: Annotated[
        Path | None,
        typer.Option(help="Another checkpoint of this model: PATH is before, it after."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="All singular values, instead of σ₁ in five rounds.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write everything to stdout as JSON, and no table.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with maps and spectra. Needs hf-pss\\[report]."),
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="The most matrices in the table.")] = 20,
) -> None:
    """Show which weight matrices of a checkpoint are ill, the worst first, and why.

    Searches every number for NaN and inf, and finds matrices of zeros.

    Compares stable ranks (‖W‖²/σ₁²) with noise, and with the same matrix in other blocks.

    Training lowers them: a low one says where to look, not that something is broken.

    Reads .safetensors and JSON, a tensor at a time; no pickle, and builds no model.

    [bold]Examples[/bold]

    A checkpoint:  [cyan]hf-pss health runs/notes/checkpoint-500[/cyan]

    What has changed since:  [cyan]hf-pss health step-500 --compare step-1000[/cyan]

    A page to keep:  [cyan]hf-pss health model.safetensors --html health.html[/cyan]

    In a script:  [cyan]hf-pss health step-500 --json > health.json[/cyan]

    [bold]Exit codes[/bold]: 0 all finite, 1 something is not, 2 damaged, nothing to read, or no
    matrix with a finite number.
    """
    if html is not None:
        _require_report_extra(html)
    from hf_pss.inspection.compare import compare as compare_inspections
    from hf_pss.inspection.export import as_json as exported
    from hf_pss.inspection.names import visible
    from hf_pss.inspection.table import render_changes, render_inspection

    first = _inspect(path, exact)
    other = None if compare is None else _inspect(compare, exact)
    changes = () if other is None else compare_inspections(first, other)
    if html is not None:
        _write_page(html, first, other, changes)
    if as_json:
        typer.echo(json.dumps(exported(first, other=other, changes=changes), allow_nan=False))
    else:
        console = Console(soft_wrap=False)
        console.print(render_inspection(first, num_lines=lines))
        if other is not None:
            console.print()
            console.print(render_inspection(other, num_lines=lines))
            console.print()
            console.print(render_changes(changes, num_lines=lines))
        if html is not None:
            typer.echo(html)
    seen = [one for one in (first, other) if one is not None]
    for one in seen:
        if one.is_lost:
            raise StateError(
                f"No matrix of {visible(one.checkpoint.path)} holds a finite number: nothing of "
                "it can be used. hf-pss rescue, given the run's folder, finds the newest "
                "checkpoint that can."
            )
    if not all(one.is_finite for one in seen):
        raise typer.Exit(_NOT_FINITE)


def _inspect(path: Path, exact: bool) -> Inspection:
    from hf_pss.inspection.checkpoint import open_checkpoint
    from hf_pss.inspection.names import visible
    from hf_pss.inspection.survey import inspect_checkpoint

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    name = TextColumn("{task.fields[tensor]}", markup=False)
    console = Console(stderr=True)
    bar = Progress(*columns, name, console=console, transient=True, disable=not console.is_terminal)
    try:
        checkpoint = open_checkpoint(path)
        with bar:
            task = bar.add_task("", total=checkpoint.num_bytes, tensor="")
            return inspect_checkpoint(
                checkpoint,
                exact=exact,
                progress=lambda done, tensor: bar.update(task, advance=done, tensor=tensor),
            )
    except OSError as error:
        raise StateError(f"{visible(path)} cannot be read: {visible(error.strerror)}.") from error


def _write_page(
    out: Path, first: Inspection, other: Inspection | None, changes: tuple[MatrixChange, ...]
) -> None:
    from hf_pss.inspection.page import write_page

    try:
        write_page(out, first, other=other, changes=changes)
    except OSError as error:
        raise ConfigurationError(
            f"{out} cannot be written: {error.strerror}. Give another --html."
        ) from error


def _require_report_extra(page: Path) -> None:
    """Before minutes are spent on what could not be drawn or written."""
    try:
        import hf_pss.inspection.page  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(str(error)) from error
    if page.is_dir():
        raise ConfigurationError(f"{page} is a folder. Give a file for --html: {page}/health.html")
