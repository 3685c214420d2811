"""The program `hf-pss`: its commands, and the message and exit code of an error."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from hf_pss.cli.demo_command import demo, report
from hf_pss.cli.exec_command import ExecCommand, execute
from hf_pss.cli.health_command import health
from hf_pss.cli.rescue_command import rescue
from hf_pss.cli.sweep_command import sweep
from hf_pss.cli.train_command import TrainCommand, train
from hf_pss.cli.watch_command import watch
from hf_pss.errors import NonFiniteError, PSSError

USER_MISTAKE, NON_FINITE, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141


class _Commands(TyperGroup):
    """Turn errors that a user can correct into one message and an exit code.

    Any other exception is a bug of this package and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PSSError as error:
            if ctx.params["debug"]:
                raise
            _complain(str(error))
            code = NON_FINITE if isinstance(error, NonFiniteError) else USER_MISTAKE
            raise typer.Exit(code) from error
        except KeyboardInterrupt as error:
            _complain("Interrupted.")
            raise typer.Exit(INTERRUPTED) from error


def _complain(message: str) -> None:
    # `Text`, because a message may quote names in square brackets, which rich takes for markup.
    Console(stderr=True, soft_wrap=True).print(Text(message, style="red"))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-pss {version('hf-pss')}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HF_PSS_DEBUG", help="Show tracebacks of all errors.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Parametric Singularity Smoothing for Hugging Face Transformers.

    Detects an imminent loss explosion, smooths the weights' leading singular values and continues.

    Exit codes: 0 done, 1 failed, 2 a mistake that you can correct, 3 not finite, 130 interrupted.
    """


app.command()(demo)
app.command(
    cls=TrainCommand,
    # transformers' parser knows its options; importing it takes seconds.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train)
app.command(name="exec", cls=ExecCommand, options_metavar="[--pss_…] -- COMMAND")(execute)
app.command(epilog="For demo runs only: hf-pss train prints its table when a run ends.")(report)
for command in (health, watch, rescue):
    app.command()(command)
app.add_typer(sweep, name="sweep")


def main() -> None:
    """Run the program.

    If stdout cannot be written, Python, rich and typer exit with 1, which has another meaning for
    `health`. The code is then 141 if the reader of a pipe has ended, and 2 otherwise. Characters
    that the encoding of stdout lacks, such as σ, are written as "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            end.code = BROKEN_PIPE
        raise
    except OSError as error:
        if not _is_stdout_lost():
            raise
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from error
        _complain(f"The output cannot be written: {error.strerror}.")
        raise SystemExit(USER_MISTAKE) from error


def _is_stdout_lost() -> bool:
    """Return whether stdout cannot be written. If so, send the rest of it to nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
