"""`hf-pss exec`: run a training command with PSS attached to every Trainer that trains in it."""

from __future__ import annotations

import argparse
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from hf_pss.config import PRESETS, PSSConfig, spelt_as_arguments
from hf_pss.errors import ConfigurationError, did_you_mean

_NO_COMMAND = (
    "Write the training command after two dashes, and options of PSS before them: "
    "hf-pss exec --pss_preset floor -- python train.py."
)
_NOTHING = (
    "PSS watched nothing, because no transformers Trainer has trained. Either the command ended "
    "before, or its training loop is not transformers' Trainer, or it starts Python with -E, -I "
    "or -S."
)
# Schedulers send these to one process. Ctrl-C goes to every process in the terminal by itself.
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class ExecCommand(TyperCommand):
    """A command that reads the words before ``--`` as options of PSS, and keeps the others."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the options before anything runs."""
        place = args.index("--") if "--" in args else len(args)
        words, command = args[:place], args[place + 1 :]
        if {*words} & {*ctx.help_option_names}:
            return super().parse_args(ctx, words)
        if not command:
            raise ConfigurationError(_NO_COMMAND)
        ctx.obj = read_options(words), command
        return super().parse_args(ctx, [])


def execute(ctx: typer.Context) -> None:
    """Run a training command with PSS attached to every transformers Trainer that trains in it.

    Works for scripts and for launchers: torchrun, accelerate launch, llamafactory-cli, swift.

    A Trainer that has a PSSCallback already, such as a PSSTrainer, is left alone.

    Options: --pss_preset and every --pss_… option of PSSConfig, before the two dashes.

    [bold]Examples[/bold]

    A script:  [cyan]hf-pss exec -- python train.py --learning_rate 1e-3[/cyan]

    With options:  [cyan]hf-pss exec --pss_threshold_ratio 3 -- python train.py[/cyan]

    Two processes:  [cyan]hf-pss exec -- torchrun --nproc-per-node 2 train.py[/cyan]

    [bold]Exit codes[/bold]: the command's own; 2 if it cannot be run.
    """
    from hf_pss.integrations.every_trainer import environment, joined_trainers

    config, command = ctx.obj
    settings = PSSConfig().describe() if config is None else config.describe()
    _say(f"PSS ({settings}) joins every transformers Trainer of: {' '.join(command)}")
    with tempfile.TemporaryDirectory(prefix="hf-pss-exec-") as folder:
        joined_file = Path(folder, "joined")
        code = run_command(command, environment(config, joined_file))
        watched = joined_trainers(joined_file, had_own=False)
        left_alone = joined_trainers(joined_file, had_own=True)
    if watched:
        _say(f"PSS watched {len(watched)} Trainer(s): {', '.join(watched)}.")
    if left_alone:
        _say(f"{len(left_alone)} Trainer(s) had PSS already: {', '.join(left_alone)}.")
    if not watched and not left_alone:
        _say(_NOTHING)
    raise typer.Exit(code)


def read_options(words: Sequence[str]) -> PSSConfig | None:
    """Return the options that the command line gives, or None if it gives none.

    Raises:
        ConfigurationError: An option is unknown, or its value is not allowed.
    """
    parser = _ExecParser(prog="hf-pss exec", add_help=False, allow_abbrev=False)
    parser.add_argument("--pss_preset", choices=tuple(PRESETS))
    for option in fields(PSSConfig):
        default = 0 if option.default is None else option.default
        rest: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            rest = {"type": _bool_of, "nargs": "?", "const": True}
        elif isinstance(default, tuple):
            rest = {"nargs": "*"}
        parser.add_argument(f"--pss_{option.name}", default=argparse.SUPPRESS, **rest)
    known, unknown = parser.parse_known_args(list(words))
    if unknown:
        _refuse_unknown(unknown[0].partition("=")[0], parser)
    given = vars(known)
    preset = given.pop("pss_preset")
    if preset is None and not given:
        return None
    overrides = {name.removeprefix("pss_"): value for name, value in given.items()}
    with spelt_as_arguments(PSSConfig):
        return PSSConfig.preset(preset or "anchored", **overrides)


def _refuse_unknown(word: str, parser: argparse.ArgumentParser) -> NoReturn:
    from hf_pss.trainer.arguments import PSSTrainingArguments  # takes seconds

    name = word.removeprefix("--")
    if name.startswith("pss_") and name in {spec.name for spec in fields(PSSTrainingArguments)}:
        raise ConfigurationError(
            f"{word} needs PSSTrainer, and hf-pss exec only adds a callback to the Trainer of your "
            "script. Use PSSTrainer with PSSTrainingArguments in the script, or leave the option "
            "out."
        )
    names = (one for action in parser._actions for one in action.option_strings)
    raise ConfigurationError(
        f"hf-pss exec has no option {word}.{did_you_mean(word, names)} It takes the options of "
        "PSSConfig, each with --pss_ in front."
    )


class _ExecParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            f"{message}. hf-pss exec takes the options of PSSConfig, each with --pss_ in front."
        )


def _bool_of(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"write true or false, not {word!r}")
    return word.lower() == "true"


def run_command(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit code, 128 + n after signal n.

    Raises:
        ConfigurationError: There is no such program, or it cannot be run.
    """
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        if process is not None:
            process.send_signal(number)

    handlers: dict[int, Any] = {number: forward for number in _FORWARDED}
    handlers[signal.SIGINT] = lambda *_: None
    # nohup ignores SIGHUP, and the command inherits that.
    handlers = {n: h for n, h in handlers.items() if signal.getsignal(n) is not signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        process = subprocess.Popen(command, env=env)
        code = process.wait()
    except OSError as error:
        raise ConfigurationError(f"{command[0]} cannot be run: {error.strerror}.") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _say(message: str) -> None:
    typer.echo(f"hf-pss exec: {message}", err=True)
