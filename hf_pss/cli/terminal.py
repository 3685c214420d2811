"""Parts that several commands share: output files, progress over files, and log filters."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hf_pss.errors import ConfigurationError, PSSError, StateError

if TYPE_CHECKING:
    from torch import nn


# Exit codes, by the status that a demo or a sweep returns.
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}

Processes = Annotated[
    int | None, typer.Option(min=1, help="Runs at the same time.", show_default="one per core")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write everything to stdout as JSON, and no table.")
]

REPORT_MODULE = "hf_pss.evidence.report_page"
"""It can be imported only if the extra ``report`` is installed."""


def require_extra(module: str) -> None:
    """Check that a module which needs an optional dependency can be imported.

    Raises:
        ConfigurationError: The import fails. The message names the extra to install.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(str(error)) from error


def check_output(path: Path, option: str, *, example: str) -> None:
    """Refuse a file that cannot be drawn, or that would replace a file of a different kind.

    A shell that expands ``--html *.safetensors`` passes a shard here. So the path must have the
    suffix of `example`.

    Args:
        path: The file to write.
        option: The option that names the file. The message quotes it.
        example: A good file name.

    Raises:
        ConfigurationError: The message gives the reason and a better path.
    """
    suffix = Path(example).suffix
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder. Give a file for {option}: {path}/{example}")
    if path.suffix.lower() != suffix:
        raise ConfigurationError(
            f"{path} does not end in {suffix} and is left alone. Give a file for {option}: "
            f"{example}"
        )
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is not a regular file. Give another {option}.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a missing file, a lack of memory or a failure of LAPACK into a message and exit code 2.

    Otherwise Python would exit with 1, which has another meaning for `health` and `rescue`.
    """
    from hf_pss.records.strict_json import visible

    try:
        yield
    except PSSError:
        raise
    except OSError as error:
        what = visible(error.filename or path)
        raise StateError(f"{what} cannot be read: {visible(error.strerror)}.") from error
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError for both
        why = visible(error) or "the memory is used up"
        raise StateError(f"{visible(path)} could not be measured: {why}.") from error


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Turn a failure to write the file that an option names into a message and exit code 2."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}. Give another {option}."
        ) from error


def bytes_bar() -> Progress:
    """Return a bar that counts bytes and names the current tensor; it shows only in a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    name = TextColumn("{task.fields[tensor]}", markup=False)
    return Progress(
        *columns, name, console=console, transient=True, disable=not console.is_terminal
    )


_MTIME = "mtime may not be reliable on this filesystem, falling back to numerical ordering"
_MISSING = "There were missing keys in the checkpoint model loaded: "


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Drop log records of transformers that a sound run produces.

    - Checkpoints that are saved within a second are ordered by their number, which is right.
    - A checkpoint omits keys that are tied to others; a record of any other missing key is kept.
    - A model warns of padding at its first forward pass, although packed blocks have none.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = named.keys() - dict(model.named_parameters()).keys()
    filters = {
        "transformers.trainer_utils": lambda record: record.getMessage() != _MTIME,
        "transformers.trainer": lambda record: not _is_about(record, tied),
        "transformers.modeling_utils": lambda record: record.levelno >= logging.ERROR,
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
