"""Two warnings of transformers that say nothing about a run of ours, held back one by one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager

from torch import nn

__all__ = ["without_noise"]

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
