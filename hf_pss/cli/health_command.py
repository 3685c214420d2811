"""`hf-pss health`: inspect checkpoints on disk and show the worst matrices first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_pss.cli.terminal import AsJson, bytes_bar, check_output, reading, require_extra, writing
from hf_pss.errors import StateError

if TYPE_CHECKING:
    from hf_pss.inspection.matrix_survey import Inspection


_NOT_FINITE = 1


def health(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint's folder, a run's folder (its newest complete checkpoint), a "
            ".safetensors file, an index of shards, or a folder of the hub's cache."
        ),
    ],
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="A later checkpoint of the same model, to compare with PATH. Several make a "
            "series."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Compute all singular values, not σ₁ alone in five rounds."),
    ] = False,
    as_json: AsJson = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with maps and spectra. Needs matplotlib and jinja2."),
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Show at most this many matrices.")] = 20,
) -> None:
    """Show which weight matrices of a checkpoint look unhealthy, the worst first, and why.

    Searches every number for NaN and inf, and finds matrices of zeros.

    Compares stable ranks (‖W‖²/σ₁²) with those of noise and of the same matrix in other blocks.

    Training lowers stable ranks: a low one shows where to look, not that something is broken.

    Reads .safetensors and JSON, one tensor at a time. Opens no pickle and builds no model.

    [bold]Examples[/bold]

    A checkpoint:  [cyan]hf-pss health runs/notes/checkpoint-500[/cyan]

    What has changed since:  [cyan]hf-pss health step-500 --compare step-1000[/cyan]

    Over steps:  [cyan]hf-pss health step-5 --compare step-10 --compare step-15[/cyan]

    A page to keep:  [cyan]hf-pss health model.safetensors --html health.html[/cyan]

    In a script:  [cyan]hf-pss health step-500 --json > health.json[/cyan]

    [bold]Exit codes[/bold]: 0 all numbers are finite, 1 some are not, 2 none is, or an error.
    """
    if html is not None:
        check_output(html, "--html", example="health.html")
    from hf_pss.inspection.health_output import (
        render_changes,
        render_inspection,
        render_series,
        write_json,
    )
    from hf_pss.inspection.matrix_survey import compare as compare_inspections
    from hf_pss.inspection.matrix_survey import series

    seen = []
    for one in (path, *(compare or ())):
        with reading(one):
            seen.append(_inspect(one, exact))
    first, other = seen[0], seen[-1] if len(seen) > 1 else None
    with reading(path):
        changes = () if other is None else compare_inspections(first, other)
    rows = series(seen) if len(seen) > 2 else ()
    if as_json:
        write_json(sys.stdout, first, other=other, changes=changes, rows=rows)
    else:
        parts = [render_series(rows)] if rows else []
        parts.append(render_inspection(first, num_lines=lines))
        if other is not None:
            parts.append(render_inspection(other, num_lines=lines))
            parts.append(render_changes(changes, num_lines=lines))
        console = Console(soft_wrap=False)
        for number, part in enumerate(parts):
            console.print(*([""] if number else []), part, sep="\n")
    if html is not None:
        require_extra("hf_pss.view.canvas")
        from hf_pss.inspection.health_page import render_page
        from hf_pss.runs.folder import write_whole

        with reading(path):
            page = render_page(first, other=other, changes=changes, rows=rows)
        with writing(html, "--html"):
            html.parent.mkdir(parents=True, exist_ok=True)
            write_whole(html, page)
        if not as_json:
            typer.echo(html)
    _exit_by_finiteness(seen)


def _exit_by_finiteness(seen: list[Inspection]) -> None:
    from hf_pss.records.strict_json import visible

    for one in seen:
        if one.is_lost:
            raise StateError(
                f"No number of {visible(one.checkpoint.path)} is finite: nothing of it can be "
                "used. hf-pss rescue, given the run's folder, finds the newest checkpoint that can."
            )
    if not all(one.is_finite for one in seen):
        raise typer.Exit(_NOT_FINITE)


def _weights_of(path: Path) -> Path:
    """Return the newest complete checkpoint if the path is a run's folder without own weights."""
    from hf_pss.runs.checkpoint import examine_newest_first, layout_of

    found = examine_newest_first(path, reads_weights=False)
    newest = next((one.path for one in found if one.problem is None), None)
    if newest is None:
        return path
    if layout_of(path) != "none":
        typer.echo(f"The weights in {path} itself. Its checkpoints are not read.", err=True)
        return path
    typer.echo(f"The newest complete checkpoint of this run: {newest}", err=True)
    return newest


def _inspect(path: Path, exact: bool) -> Inspection:
    from hf_pss.inspection.matrix_survey import inspect_checkpoint
    from hf_pss.runs.safetensors_files import open_checkpoint

    checkpoint = open_checkpoint(_weights_of(path))
    with bytes_bar() as bar:
        task = bar.add_task("", total=checkpoint.num_bytes, tensor="")
        return inspect_checkpoint(
            checkpoint,
            exact=exact,
            progress=lambda done, tensor: bar.update(task, advance=done, tensor=tensor),
        )
