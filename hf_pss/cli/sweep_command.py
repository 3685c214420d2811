"""`hf-pss sweep`: paired runs over a grid, their tables and their plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_pss.cli.terminal import EXIT_CODES, REPORT_MODULE, Processes, require_extra
from hf_pss.errors import ConfigurationError
from hf_pss.view.numbers import plural

if TYPE_CHECKING:
    from hf_pss.evidence.rows import Row


sweep = typer.Typer(
    no_args_is_help=True,
    help="Compare guards in paired runs: same initial weights, same data, for every guard.",
)

Folder = Annotated[
    Path, typer.Option("--output-dir", help="The sweep's folder, which holds rows.jsonl.")
]
Reference = Annotated[str, typer.Option(help="The guard that the others are compared with.")]


@sweep.command()
def run(
    grid: Annotated[Path, typer.Argument(help="A YAML file; see recipes/lr_sweep.")],
    output_dir: Folder = Path("runs/sweep"),
    processes: Processes = None,
) -> None:
    """Run a grid: recipe × optimizer × learning rate × guard × seed.

    Every run adds a line to rows.jsonl. Ctrl-C or a kill loses only the runs under way.

    The same command continues where the sweep stopped.

    [bold]Example[/bold]  [cyan]hf-pss sweep run recipes/lr_sweep/small.yaml[/cyan]
    """
    from hf_pss.evidence.grid import read_grid
    from hf_pss.evidence.runner import run_sweep

    cells = read_grid(grid)
    console = Console(stderr=True)
    status = run_sweep(cells, output_dir, num_processes=processes, console=console)
    raise typer.Exit(EXIT_CODES[status])


@sweep.command()
def table(
    output_dir: Folder = Path("runs/sweep"),
    reference: Reference = "clip",
    target: Annotated[
        float | None,
        typer.Option(help="Add a table of the steps to this loss.", show_default="none"),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a document.")
    ] = False,
) -> None:
    """Print losses by rate, paired differences, explosions and cost.

    Intervals are bootstrapped over seeds, and the number of seeds is beside every figure.

    You can call this command while the sweep runs.
    """
    from hf_pss.evidence.sweep_table import edge_warnings, render_markdown, render_tables

    rows = _compared(output_dir, reference)
    if markdown:
        typer.echo(render_markdown(rows, reference=reference, target=target))
    else:
        Console().print(render_tables(rows, reference=reference, target=target))
    for warning in edge_warnings(rows):
        Console(stderr=True).print(warning, highlight=False, soft_wrap=True)


@sweep.command()
def plot(
    output_dir: Folder = Path("runs/sweep"),
    reference: Reference = "clip",
) -> None:
    """Draw loss against learning rate, curves, explosions and paired differences.

    At the end it prints the paths of the pictures, which are PNG and SVG files.
    """
    require_extra(REPORT_MODULE)
    from hf_pss.evidence.sweep_plots import plot_all

    for path in plot_all(_compared(output_dir, reference), output_dir, reference=reference):
        typer.echo(path)


@sweep.command()
def export(
    file: Annotated[Path, typer.Argument(help="The file of summaries, such as rows/length.jsonl.")],
    output_dir: Folder = Path("runs/sweep"),
) -> None:
    """Merge the rows of a sweep into a file, without their series per step.

    Of two rows of the same run, the newer one stays.

    [cyan]hf-pss sweep page[/cyan] makes a document from such files.
    """
    from hf_pss.evidence.rows import merge_summaries

    num_rows = merge_summaries(file, _read(output_dir))
    typer.echo(f"{file} holds {plural(num_rows, 'row')}.")


@sweep.command()
def page(
    template: Annotated[Path, typer.Argument(help="A template, such as README.md.j2.")],
) -> None:
    """Render a Markdown template with the rows in the folder rows beside it.

    At the end it prints the paths of the page and of its figures. docs/evidence is such a page.
    """
    require_extra(REPORT_MODULE)
    from hf_pss.evidence.pages import write_page

    for path in write_page(template):
        typer.echo(path)


@sweep.command()
def warnings(
    output_dir: Folder = Path("runs/sweep"),
    max_false_alarms: Annotated[
        float, typer.Option(help="Compare rules at this many per 1,000 healthy readings.")
    ] = 1.0,
    guard: Annotated[
        str, typer.Option(help="Read the runs of this guard. One that acts hides the explosions.")
    ] = "clip",
) -> None:
    """Print how early each warning rule fired before an explosion, and how often falsely.

    This needs a sweep with [cyan]probes_every_steps[/cyan] in its grid.
    """
    from hf_pss.evidence.early_warnings import at_equal_rate, render_table

    rows = [r for r in _read(output_dir) if "probes" in r.extra and r.guard == guard]
    if not rows:
        raise ConfigurationError(
            f"No run in {output_dir} under {guard} kept probes; set probes_every_steps in the grid."
        )
    if not any(row.explosion_kind is None for row in rows):
        raise ConfigurationError(
            f"Every run under {guard} in {output_dir} exploded: false warnings can be counted only "
            "in a healthy one. Add a recipe that trains well to the grid."
        )
    Console().print(render_table(at_equal_rate(rows, max_false_alarms=max_false_alarms)))


@sweep.command()
def metrics(
    output_dir: Folder = Path("runs/sweep"),
    max_false_alarms: Annotated[
        float, typer.Option(help="Compare metrics at this many per 1,000 readings of twins.")
    ] = 1.0,
    with_survivors: Annotated[
        bool,
        typer.Option(
            "--with-survivors",
            help="Count runs at a higher rate, or with a fault, that did not explode as healthy.",
        ),
    ] = False,
    guard: Annotated[
        str | None,
        typer.Option(help="Read the runs of this guard.", show_default="all, each guard by itself"),
    ] = None,
) -> None:
    """Print when each live health metric left its healthy twins' range, and draw all of them.

    This needs a sweep whose guard measures health, such as recipes/lr_sweep/health.yaml.

    It compares runs that have the same recipe, optimizer, changes and guard.

    If fewer than three of these are healthy, it draws them and does not judge them.

    At the end it prints the paths of the pictures.
    """
    require_extra(REPORT_MODULE)
    from hf_pss.evidence.sweep_plots import plot_metrics
    from hf_pss.evidence.twin_band import families_of, render_scores, score_metrics

    families = families_of(r for r in _read(output_dir) if guard in (None, r.guard))
    if not families:
        under = "" if guard is None else f" under {guard}"
        raise ConfigurationError(
            f"No run in {output_dir}{under} that exploded, or could have, kept health metrics; see "
            "recipes/lr_sweep/health.yaml."
        )
    scores = score_metrics(
        families, max_false_alarms=max_false_alarms, with_survivors=with_survivors
    )
    Console().print(render_scores(scores))
    for path in plot_metrics(families, output_dir):
        typer.echo(path)


@sweep.command()
def guards() -> None:
    """List the guards that a grid may name, with their sources and options.

    A grid changes options under a name of its own: {name: msign_20, guard: msign, every_steps: 20}.
    """
    from rich.table import Column, Table

    from hf_pss.evidence.guards import GUARDS, default_options, make_guard

    shown = Table("guard", "what it does", "source", Column("options", overflow="fold"))
    for name in GUARDS:
        guard = make_guard(name)
        options = ", ".join(f"{key}={value}" for key, value in default_options(name).items())
        shown.add_row(name, guard.description, guard.source, options)
    Console().print(shown)


def _compared(output_dir: Path, reference: str) -> list[Row]:
    rows = _read(output_dir)
    known = {row.guard for row in rows}
    if reference not in known:
        raise ConfigurationError(
            f"No run in {output_dir} has the guard {reference!r}; --reference may be "
            f"{' or '.join(sorted(known))}."
        )
    return rows


def _read(output_dir: Path) -> list[Row]:
    from hf_pss.evidence.rows import comparable, read_rows
    from hf_pss.evidence.runner import ROWS_FILE

    found = list(read_rows(output_dir / ROWS_FILE))
    rows = comparable(found)
    if not rows:
        raise ConfigurationError(f"{output_dir} holds no finished run yet.")
    if num_failed := len({row.id for row in found} - {row.id for row in rows}):
        Console(stderr=True).print(
            f"This leaves out {plural(num_failed, 'failed run')}. The sweep tries again."
        )
    return rows
