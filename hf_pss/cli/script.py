"""What the training scripts under `recipes/` share: their help, their errors, their exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import typer

from hf_pss.errors import PSSError

__all__ = ["run_script"]

_ANY_FILE = "runs/<name of the YAML file>"


def run_script(
    words: Sequence[str],
    *,
    train: Callable[[], object],
    parser_of: Callable[[str], argparse.ArgumentParser],
    page: str,
    groups: Mapping[str, Any],
) -> int:
    """Run a training script with these words and return its exit code: 2 for a user's mistake.

    Args:
        words: Of the command line.
        train: Reads the words and trains.
        parser_of: Returns the parser of all options, for an output folder.
        page: What the script is for, shown above its own options by ``--help``.
        groups: Dataclasses of these options by their heading; ``--help-all`` shows all others, too.
    """
    if {"-h", "--help"} & set(words):
        _show_help(page, groups, parser_of(_ANY_FILE))
        return 0
    if {"--help-all", "--help_all"} & set(words):
        parser_of(_ANY_FILE).print_help()
        return 0
    try:
        train()
    except PSSError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        return 2
    # Only here: after an error, other ranks may wait in a collective that this would wait for.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _show_help(page: str, groups: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    typer.echo(page)
    for heading, group in groups.items():
        typer.echo(f"{heading}:")
        for one in fields(group):
            value = parser.get_default(one.name)
            default = "" if value in (None, False) else f" Default: {value}."
            typer.echo(f"  --{one.name:<24}{one.metadata['help']}{default}")
        typer.echo()
