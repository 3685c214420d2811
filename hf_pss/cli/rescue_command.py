"""`hf-pss rescue`: find out how a run failed, and how to continue it."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_pss.cli.terminal import AsJson, bytes_bar, check_output, reading, require_extra, writing
from hf_pss.errors import ConfigurationError, StateError

if TYPE_CHECKING:
    from hf_pss.rescue.candidates import CheckpointReport
    from hf_pss.rescue.command import ResumePlan
    from hf_pss.rescue.investigate import Investigation
    from hf_pss.rescue.repair import Written


_NONE_USABLE = 1

# FLOOR raises stable ranks to the noise floor, and NONE does not smooth. The others are values of
# `PSSConfig.smoothing`.
Smoothing = StrEnum(
    "Smoothing", "FLOOR CLIP LOG SOFTPLUS CONVOLUTION SOFTMAX HAMMER POLAR NONE", module=__name__
)
Moments = StrEnum("Moments", "KEEP RESET PROJECT", module=__name__)


def rescue(
    run_dir: Annotated[
        Path, typer.Argument(help="A run's folder, which holds checkpoint-…; with or without PSS.")
    ],
    smoothing: Annotated[
        Smoothing | None,
        typer.Option(
            help="How to smooth the weights on resume. Default: floor. The default for a copy is "
            "none, unless it is a last resort whose weights do not look trained.",
        ),
    ] = None,
    margin_steps: Annotated[
        int, typer.Option(min=0, help="Go back at least this many steps before the failure.")
    ] = 20,
    unigram_entropy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Unigram entropy of the training text, in nats. Default: the value that hf-pss "
            "train kept. Without it, no loss is compared with an entropy.",
        ),
    ] = None,
    failed_at: Annotated[
        int | None,
        typer.Option(min=0, help="The first bad step, if you know it better."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a repaired copy of the chosen checkpoint to this new folder."),
    ] = None,
    moments: Annotated[
        Moments, typer.Option(help="With --write: the optimizer's first moments in the copy.")
    ] = Moments.KEEP,
    lr_scale: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Multiply all learning rates by this factor. Default: 1. After slow damage with a "
            "rising rate: the largest factor that keeps the rate at the checkpoint's level, but at "
            "least 0.1.",
        ),
    ] = None,
    skip_batches: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --write: skip the data of this many updates after the checkpoint. After a "
            "spike or NaN the report names the number.",
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
        typer.Option(help="Write a PNG of loss and gradient norm. Needs matplotlib and jinja2."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write the post-mortem of a spike that PSS has seen. Needs matplotlib and jinja2."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out when and how a run failed, choose a checkpoint, and print the command to continue.

    Reads the log of the newest readable checkpoint, PSS's records, and every checkpoint's weights.

    Chooses the newest complete, finite checkpoint before the failure; the report gives the reasons.

    Reads .safetensors and JSON, one tensor at a time. Opens no pickle unless --write allows it.

    [bold]Examples[/bold]

    What happened:  [cyan]hf-pss rescue runs/notes[/cyan]

    With a picture:  [cyan]hf-pss rescue runs/notes --plot failure.png[/cyan]

    Which matrix, which batch:  [cyan]hf-pss rescue runs/notes --html spike.html[/cyan]

    Past a bad batch:  [cyan]hf-pss rescue runs/a --write runs/b --skip-batches 40[/cyan]

    In a script:  [cyan]hf-pss rescue runs/notes --json > rescue.json[/cyan]

    [bold]Exit codes[/bold]: 0 a checkpoint was chosen, 1 none can be used, 2 nothing to read.
    """
    _check_outputs(plot, html)
    if lr_scale is not None and (lr_scale == 0 or not math.isfinite(lr_scale)):
        raise ConfigurationError(f"--lr-scale is a number above 0; you gave {lr_scale}.")
    if write is None and (moments is not Moments.KEEP or skip_batches or allow_pickle):
        raise ConfigurationError(
            "--moments, --skip-batches and --allow-pickle change the copy that --write OUT "
            "writes: add it, or leave them out."
        )
    from hf_pss.rescue.command import plan_resume
    from hf_pss.rescue.investigate import investigate

    with reading(run_dir), bytes_bar() as bar:
        task = bar.add_task("", total=None, tensor="")
        found = investigate(
            run_dir,
            margin_steps=margin_steps,
            unigram_entropy=unigram_entropy,
            failed_at=failed_at,
            begin=lambda total: bar.update(task, total=total),
            progress=lambda done, tensor: bar.update(task, advance=done, tensor=tensor),
        )
    chosen = found.choice.chosen
    plan = written = None
    if chosen is not None:
        if write is not None:
            # The noise floor does not suit sound weights, so a copy of sound weights is not
            # smoothed. The run that continues gives them a floor from their own stable ranks.
            unasked = Smoothing.FLOOR if found.may_raise_to_noise else Smoothing.NONE
            written = _write(
                chosen,
                write,
                smoothing=(smoothing or unasked).value,
                moments=moments.value,
                lr_scale=1.0 if lr_scale is None else lr_scale,
                skip_batches=skip_batches,
                allow_pickle=allow_pickle,
            )
        with reading(chosen.path):
            plan = plan_resume(
                found,
                chosen,
                smoothing=(smoothing or Smoothing.FLOOR).value,
                lr_scale=lr_scale,
                repaired=None if written is None else written.path,
                skipped=skip_batches,
            )
    if as_json:
        _print_json(found, written, plan)
    else:
        _show(found, written, plan)
    _draw(found, plot, html)
    if not as_json:
        for path in filter(None, (plot, html)):
            typer.echo(path)
    if chosen is None:
        raise typer.Exit(_NONE_USABLE)


def _check_outputs(plot: Path | None, html: Path | None) -> None:
    for path, option, example in ((plot, "--plot", "failure.png"), (html, "--html", "spike.html")):
        if path is not None:
            check_output(path, option, example=example)


def _draw(found: Investigation, plot: Path | None, html: Path | None) -> None:
    if plot is not None or html is not None:
        require_extra("hf_pss.view.canvas")
    if plot is not None:
        from hf_pss.rescue.rescue_report import draw_course

        with writing(plot, "--plot"):
            draw_course(found, plot)
    if html is not None:
        from hf_pss.inspection.post_mortem import render_spike_page
        from hf_pss.runs.folder import SPIKES_FILE, write_whole

        if found.post_mortem is None:
            raise StateError(
                f"{found.run_dir} holds no {SPIKES_FILE}, which PSS writes when a step spikes. "
                "Leave --html out. The report shows what the log and the checkpoints hold."
            )
        page = render_spike_page(found.post_mortem, found.run_dir)
        with writing(html, "--html"):
            html.parent.mkdir(parents=True, exist_ok=True)
            write_whole(html, page)


def _print_json(found: Investigation, written: Written | None, plan: ResumePlan | None) -> None:
    from hf_pss.rescue import repair, rescue_report

    done = None if written is None else repair.as_json(written)
    typer.echo(json.dumps(rescue_report.as_json(found, plan, done), allow_nan=False))


def _show(found: Investigation, written: Written | None, plan: ResumePlan | None) -> None:
    from hf_pss.rescue.rescue_report import render_investigation, render_plan, render_written

    console = Console(soft_wrap=False)
    console.print(render_investigation(found))
    if written is not None:
        console.print("", render_written(written), sep="\n")
    if plan is not None:
        console.print()
        Console(soft_wrap=True).print(render_plan(plan))


def _write(chosen: CheckpointReport, target: Path, **options: Any) -> Written:
    from hf_pss.records.strict_json import visible
    from hf_pss.rescue.repair import Repairs, write_repaired

    try:
        return write_repaired(chosen, target, Repairs(**options))
    except OSError as error:
        # The file may be in the source or in the copy, and the system does not always name it.
        where = "" if error.filename is None else f" ({visible(error.filename)})"
        raise StateError(
            f"{visible(chosen.path)} could not be copied to {visible(target)}: "
            f"{visible(error.strerror or error)}{where}. Nothing of the copy is left."
        ) from error
