"""`hf-pss rescue`: what became of a run, where to go on from, and how."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hf_pss.cli.terminal import check_output
from hf_pss.errors import ConfigurationError, StateError

if TYPE_CHECKING:
    from hf_pss.rescue.candidates import CheckpointReport
    from hf_pss.rescue.investigate import Investigation
    from hf_pss.rescue.repair import Written

__all__ = ["rescue"]

_NONE_USABLE = 1


class Smoothing(StrEnum):
    """How weights are smoothed: up to a floor, by a function of `PSSConfig.smoothing`, or not."""

    FLOOR = "floor"
    CLIP = "clip"
    LOG = "log"
    SOFTPLUS = "softplus"
    CONVOLUTION = "convolution"
    SOFTMAX = "softmax"
    HAMMER = "hammer"
    POLAR = "polar"
    NONE = "none"


class Moments(StrEnum):
    """What becomes of the optimizer's state."""

    KEEP = "keep"
    RESET = "reset"
    PROJECT = "project"


def rescue(
    run_dir: Annotated[
        Path, typer.Argument(help="The folder of a run, with checkpoint-… in it; with PSS or not.")
    ],
    smoothing: Annotated[
        Smoothing | None,
        typer.Option(
            help="What is done to the weights on the way. Default: floor; none in a copy, but for "
            "the last resort.",
        ),
    ] = None,
    margin_steps: Annotated[
        int, typer.Option(min=0, help="Go back at least so many steps before the failure.")
    ] = 20,
    unigram_entropy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of the training text, in nats. Default: what hf-pss train kept, or "
            "ln(vocab_size).",
        ),
    ] = None,
    failed_at: Annotated[
        int | None,
        typer.Option(min=0, help="The step from which on it was bad, if you know better."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a repaired copy of the chosen checkpoint to this new folder."),
    ] = None,
    moments: Annotated[
        Moments, typer.Option(help="With --write: the optimizer's state in the copy.")
    ] = Moments.KEEP,
    lr_scale: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="A factor on every learning rate. Default: after slow damage, so that the rate "
            "rises no higher than at the checkpoint, 0.1 at least; else 1.",
        ),
    ] = None,
    skip_batches: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --write: pass over the data of so many updates after the checkpoint; after "
            "a spike or NaN the report says how many.",
        ),
    ] = 0,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="With --write: open optimizer.pt and scheduler.pt, restricted to plain values.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a PNG of loss and gradient norm. Needs hf-pss\\[report]."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write everything to stdout as JSON, and no table.")
    ] = False,
) -> None:
    """Say when and how a run failed, choose a checkpoint, and print the command to go on.

    Reads the log of the newest readable checkpoint, what PSS wrote, and every checkpoint's weights.

    Chooses the newest complete and finite checkpoint before the failure, and says why no newer one.

    Reads .safetensors and JSON, a tensor at a time; no pickle unless you allow it with --write.

    [bold]Examples[/bold]

    What happened:  [cyan]hf-pss rescue runs/notes[/cyan]

    With a picture:  [cyan]hf-pss rescue runs/notes --plot failure.png[/cyan]

    Past a bad batch:  [cyan]hf-pss rescue runs/notes --write runs/repaired --skip-batches 40[/cyan]

    In a script:  [cyan]hf-pss rescue runs/notes --json > rescue.json[/cyan]

    [bold]Exit codes[/bold]: 0 a checkpoint was chosen, 1 none can be used, 2 nothing to read.
    """
    if plot is not None:
        check_output(plot, "--plot", example="failure.png", drawn_by="hf_pss.rescue.course_figure")
    _refuse_useless(write, moments, lr_scale, skip_batches, allow_pickle)
    from hf_pss.rescue.command import plan_resume
    from hf_pss.rescue.repair import as_json as written_as_json
    from hf_pss.rescue.rescue_report import as_json as exported
    from hf_pss.rescue.rescue_report import render_investigation, render_plan, render_written

    found = _investigate(run_dir, margin_steps, unigram_entropy, failed_at)
    chosen = found.choice.chosen
    plan = written = None
    if chosen is not None:
        if write is not None:
            # Noise is no measure of sound weights; the run that goes on holds them by their own.
            unasked = "floor" if found.choice.is_last_resort else "none"
            written = _write(
                chosen,
                write,
                smoothing=unasked if smoothing is None else smoothing.value,
                moments=moments.value,
                lr_scale=1.0 if lr_scale is None else lr_scale,
                skip_batches=skip_batches,
                allow_pickle=allow_pickle,
            )
        plan = plan_resume(
            run_dir,
            found.log,
            chosen,
            smoothing=(smoothing or Smoothing.FLOOR).value,
            is_last_resort=found.choice.is_last_resort,
            failure=None if found.diagnosis is None else found.diagnosis.failure,
            lr_scale=lr_scale,
            repaired=None if written is None else written.path,
            skipped=skip_batches,
        )
    if plot is not None:
        _draw(found, plot)
    if as_json:
        done = None if written is None else written_as_json(written)
        typer.echo(json.dumps(exported(found, plan, done), allow_nan=False))
    else:
        console = Console(soft_wrap=False)
        console.print(render_investigation(found))
        if written is not None:
            console.print()
            console.print(render_written(written))
        if plan is not None:
            console.print()
            Console(soft_wrap=True).print(render_plan(plan))
        if plot is not None:
            typer.echo(plot)
    if chosen is None:
        raise typer.Exit(_NONE_USABLE)


def _investigate(
    run_dir: Path, margin_steps: int, unigram_entropy: float | None, failed_at: int | None
) -> Investigation:
    from hf_pss.records.strict_json import visible
    from hf_pss.rescue.investigate import investigate

    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    name = TextColumn("{task.fields[tensor]}", markup=False)
    console = Console(stderr=True)
    bar = Progress(*columns, name, console=console, transient=True, disable=not console.is_terminal)
    try:
        with bar:
            task = bar.add_task("", total=None, tensor="")
            return investigate(
                run_dir,
                margin_steps=margin_steps,
                unigram_entropy=unigram_entropy,
                failed_at=failed_at,
                begin=lambda total: bar.update(task, total=total),
                progress=lambda done, tensor: bar.update(task, advance=done, tensor=tensor),
            )
    except OSError as error:
        raise StateError(
            f"{visible(run_dir)} cannot be read: {visible(error.strerror)}."
        ) from error


def _refuse_useless(
    write: Path | None,
    moments: Moments,
    lr_scale: float | None,
    skip_batches: int,
    allow_pickle: bool,
) -> None:
    if lr_scale is not None and (lr_scale == 0 or not math.isfinite(lr_scale)):
        raise ConfigurationError(f"--lr-scale is a number above 0; you gave {lr_scale}.")
    given = moments is not Moments.KEEP or skip_batches or allow_pickle
    if write is None and given:
        raise ConfigurationError(
            "--moments, --skip-batches and --allow-pickle are about the copy that --write OUT "
            "writes: add it, or leave them out."
        )


def _write(chosen: CheckpointReport, target: Path, **options: Any) -> Written:
    from hf_pss.records.strict_json import visible
    from hf_pss.rescue.repair import Repairs, write_repaired

    try:
        return write_repaired(chosen, target, Repairs(**options))
    except OSError as error:
        # Of either side: the file says which, where the system names one.
        where = "" if error.filename is None else f" ({visible(error.filename)})"
        raise StateError(
            f"{visible(chosen.path)} could not be copied to {visible(target)}: "
            f"{visible(error.strerror or error)}{where}. Nothing of the copy is left."
        ) from error


def _draw(found: Investigation, plot: Path) -> None:
    from hf_pss.rescue.course_figure import draw_course

    try:
        draw_course(found, plot)
    except OSError as error:
        raise ConfigurationError(
            f"{plot} cannot be written: {error.strerror}. Give another --plot."
        ) from error
