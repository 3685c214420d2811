"""`hf-pss demo` trains twins on the built-in corpus; `hf-pss report` writes their report again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_pss.cli.terminal import (
    EXIT_CODES,
    REPORT_MODULE,
    Processes,
    check_output,
    require_extra,
    writing,
)
from hf_pss.errors import ConfigurationError


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … for every guard.")] = 1,
    guards: Annotated[
        str, typer.Option(help="Any of plain, anchored, floor, paper, separated by commas.")
    ] = "plain,paper,anchored",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the recipe's 800")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the recipe's 1e-2")
    ] = None,
    processes: Processes = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Write into a folder that holds other files."),
    ] = False,
) -> None:
    """Train twins of a small GPT-2: same seed, same data, without PSS and with it.

    The text is the Python library that your interpreter ships: nothing is downloaded.

    PSS only observes the plain twin, so its weights are bit for bit those of the plain Trainer.

    Its overhead is the cost of observing.

    At the end it prints a table and the path of report.html. Ctrl-C reports the runs so far.

    [bold]Examples[/bold]

    Three guards side by side, in a few minutes:  [cyan]hf-pss demo[/cyan]

    Means over three seeds:  [cyan]hf-pss demo --seeds 3[/cyan]

    A milder learning rate:  [cyan]hf-pss demo --learning-rate 3e-3[/cyan]
    """
    require_extra(REPORT_MODULE)
    if output_dir.is_file():
        raise ConfigurationError(f"{output_dir} is a file; give a folder as --output-dir.")
    is_foreign = output_dir.is_dir() and not (output_dir / "run.json").is_file()
    if is_foreign and any(output_dir.iterdir()) and not overwrite:
        raise ConfigurationError(
            f"{output_dir} holds files, but no earlier demo. Choose another --output-dir, or add "
            "--overwrite to write there all the same."
        )
    from hf_pss.evidence.demo import DEMO_RECIPE, run_demo

    given: dict[str, Any] = {"num_steps": steps, "learning_rate": learning_rate}
    recipe = replace(DEMO_RECIPE, **{k: v for k, v in given.items() if v is not None})
    status = run_demo(
        recipe,
        output_dir,
        guards=tuple(dict.fromkeys(name.strip() for name in guards.split(",") if name.strip())),
        num_seeds=seeds,
        num_processes=processes,
        console=Console(stderr=True),
    )
    try:
        _show_report(output_dir, output_dir / "report.html")
    except ConfigurationError:
        # A demo that was interrupted before its first log line has nothing to report.
        if status == "finished":
            raise
    raise typer.Exit(EXIT_CODES[status])


def report(
    run_dir: Annotated[Path, typer.Argument(help="The folder that hf-pss demo wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page, or a folder for it.", show_default="RUN_DIR/report.html"),
    ] = None,
) -> None:
    """Write the report of a demo run, also of one that was interrupted or is still running."""
    require_extra(REPORT_MODULE)
    if output is None or output.is_dir():
        output = (output or run_dir) / "report.html"
    _show_report(run_dir, output)


def _show_report(run_dir: Path, page: Path) -> None:
    from hf_pss.evidence.report_page import write_report
    from hf_pss.evidence.report_results import render_table
    from hf_pss.records.strict_json import printable

    check_output(page, "--output", example="report.html")
    with writing(page, "--output"):
        write_report(run_dir, page)
    Console().print(render_table(run_dir))
    typer.echo(printable(str(page)))  # plain: rich would break a long path over two lines
