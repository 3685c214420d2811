"""Files that a command draws: looked at before minutes are spent on what could not be drawn."""

from __future__ import annotations

import importlib
from pathlib import Path

from hf_pss.errors import ConfigurationError

__all__ = ["check_output"]


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
