"""Files that a command draws: looked at before minutes are spent on what could not be drawn.

Two warnings of transformers that say nothing about a run of ours, held back one by one.

What the training scripts under `recipes/` share: their help, their errors, their exit codes.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from hf_pss.errors import ConfigurationError, PSSError

__all__ = ["check_output", "run_script", "without_noise"]


def check_output(path: Path, option: str, *, example: str, drawn_by: str) -> None:
    """Refuse what could not be drawn, or would destroy a file of another kind.

    Args:
        path: Where it is to go. A shell that expands ``--html *.safetensors`` names a shard here;
            so no input can be the output: it ends as `example` does.
        option: Its name, for the message.
        example: A good file name.
        drawn_by: The module that draws it, which may need an extra.

    Raises:
        ConfigurationError: The message says which, and what to give.
    """
    try:
        importlib.import_module(drawn_by)
    except ImportError as error:
        raise ConfigurationError(str(error)) from error
    suffix = Path(example).suffix
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder. Give a file for {option}: {path}/{example}")
    if path.suffix.lower() != suffix:
        raise ConfigurationError(
            f"{path} does not end in {suffix} and is left alone. Give a file for {option}: "
            f"{example}"
        )
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is no regular file. Give another {option}.")


_MTIME = "mtime may not be reliable on this filesystem, falling back to numerical ordering"
_MISSING = "There were missing keys in the checkpoint model loaded: "


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Hold back two warnings that healthy runs meet.

    Checkpoints that were saved within a second are ordered by their number: as it should be. And
    a checkpoint leaves out keys that are tied to others; any other missing key is still told.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = named.keys() - dict(model.named_parameters()).keys()
    filters = {
        "transformers.trainer_utils": lambda record: record.getMessage() != _MTIME,
        "transformers.trainer": lambda record: not _is_about(record, tied),
    }
    for name, keep in filters.items():
        logging.getLogger(name).addFilter(keep)
    try:
        yield
    finally:
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)


def _is_about(record: logging.LogRecord, tied: Set[str]) -> bool:
    message = record.getMessage()
    keys = set(re.findall(r"'([^']+)'", message.removeprefix(_MISSING)))
    return message.startswith(_MISSING) and keys <= tied


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
