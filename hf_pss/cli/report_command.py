"""`hf-pss report`: write the report of a demo run, again or elsewhere.

`hf-pss demo`: train the twins on the built-in corpus and write their report.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_pss.errors import ConfigurationError

__all__ = ["demo", "report", "require_report_extra", "show_report"]


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
        import_module("hf_pss.evidence.report_page")
    except ImportError as error:
        raise ConfigurationError(str(error)) from error


def show_report(run_dir: Path, output: Path | None = None) -> None:
    """Write the page and print the table; the page's path is the last line."""
    from hf_pss.evidence.report_page import write_report
    from hf_pss.evidence.report_results import render_table

    page = write_report(run_dir, output)
    Console().print(render_table(run_dir))
    typer.echo(page)  # plain: rich would break a long path over two lines


_EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … for every guard.")] = 1,
    guards: Annotated[
        str, typer.Option(help="Any of plain, anchored, floor, paper; with commas between.")
    ] = "plain,paper,anchored",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the recipe's 800")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the recipe's 1e-2")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time.", show_default="one a core"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Write into a folder that holds something else."),
    ] = False,
) -> None:
    """Train twins of a small GPT-2: same seed, same data, without PSS and with it.

    The text is the Python library that your interpreter ships: nothing is downloaded.

    plain is watched and never touched: bit for bit the plain Trainer. Its overhead is the watching.

    Ends with a table and the path of report.html. Ctrl-C reports what there is.

    [bold]Examples[/bold]

    Three guards side by side, in a few minutes:  [cyan]hf-pss demo[/cyan]

    Means over three seeds:  [cyan]hf-pss demo --seeds 3[/cyan]

    A milder learning rate:  [cyan]hf-pss demo --learning-rate 3e-3 --output-dir runs/mild[/cyan]
    """
    require_report_extra()
    if not overwrite:
        _refuse_foreign_folder(output_dir)
    from hf_pss.evidence.demo import DEMO_RECIPE, run_demo

    given: dict[str, Any] = {"num_steps": steps, "learning_rate": learning_rate}
    recipe = replace(DEMO_RECIPE, **{k: v for k, v in given.items() if v is not None})
    status = run_demo(
        recipe,
        output_dir,
        guards=_split(guards),
        num_seeds=seeds,
        num_processes=processes,
        console=Console(stderr=True),
    )
    try:
        show_report(output_dir)
    except ConfigurationError:
        # Interrupted before the first run wrote a line: there is nothing to report.
        if status == "finished":
            raise
    raise typer.Exit(_EXIT_CODES[status])


def _split(guards: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in guards.split(",") if name.strip()))


def _refuse_foreign_folder(folder: Path) -> None:
    """An earlier demo is replaced without asking; anything else is not ours to mix with."""
    if folder.is_file():
        raise ConfigurationError(f"{folder} is a file; give a folder as --output-dir.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.json").is_file():
        raise ConfigurationError(
            f"{folder} holds files, but no earlier demo. Choose another --output-dir, or add "
            "--overwrite to write there all the same."
        )
