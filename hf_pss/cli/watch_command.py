"""`hf-pss watch`: follow a live run by means of the files that it writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from hf_pss.errors import StateError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hf_pss.runs.follow import Follower, RunState


_NUM_EVENTS = 6


def watch(
    run_dir: Annotated[
        Path, typer.Argument(help="The run's output_dir; or one run of a demo: plain/seed-0.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Show the current state and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings.")] = 1.0,
    lines: Annotated[int, typer.Option(min=1, help="Show at most this many matrices.")] = 8,
) -> None:
    """Follow a live run in the terminal: its newest log, its events, its worst matrices.

    Reads pss_events.jsonl, pss_health.jsonl, and trainer_state.json of the newest checkpoint.

    Changes nothing: call it in another terminal, or on another machine that sees the folder.

    Waits for files that do not exist yet, follows a run that resumes, and exits when the run ends.

    Loss and gradient norm are as old as the newest checkpoint; trackers show them live.

    Where the output is not a terminal, it writes a plain line for each thing that happens.

    [bold]Examples[/bold]

    Beside a training run:  [cyan]hf-pss watch runs/notes[/cyan]

    Its current state:  [cyan]hf-pss watch runs/notes --once[/cyan]

    Into a file:  [cyan]hf-pss watch runs/notes --every 30 > notes.log &[/cyan]

    [bold]Exit codes[/bold]: 0 the run has ended, 2 nothing to read, 130 Ctrl-C.
    """
    from hf_pss.runs.follow import Follower

    follower = Follower(run_dir)
    console = Console(soft_wrap=False)
    if once:
        state = follower.poll()
        if state.is_empty:
            raise StateError(
                f"{run_dir} holds no files of a run yet. Without --once, watch waits for them."
            )
        console.print(_screen(state, lines))
    elif console.is_terminal:
        _follow_on_screen(follower, console, every, lines)
    else:
        _follow_in_lines(follower, every)


def _follow_on_screen(follower: Follower, console: Console, every: float, lines: int) -> None:
    state = follower.poll()
    with Live(_screen(state, lines), console=console, auto_refresh=False) as live:
        while not state.has_ended:
            time.sleep(every)
            state = follower.poll()
            live.update(_screen(state, lines), refresh=True)


def _follow_in_lines(follower: Follower, every: float) -> None:
    from hf_pss.inspection.live_view import plain_lines

    before: RunState | None = None
    while True:
        state = follower.poll()
        for line in plain_lines(before, state):
            typer.echo(line)
        if state.has_ended:
            typer.echo("The run has ended.")
            return
        before = state
        time.sleep(every)


def _screen(state: RunState, lines: int) -> RenderableType:
    from hf_pss.inspection.live_view import render

    return render(state, now=time.time(), num_events=_NUM_EVENTS, num_matrices=lines)
