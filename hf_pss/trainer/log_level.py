"""Follow the Trainer's ``log_level``, and show the log of hf_pss if nothing else shows it."""

from __future__ import annotations

import logging
import sys

from transformers import TrainingArguments


class _LastResort(logging.Handler):
    """Writes a record to stderr if no other handler receives it, so that no line comes twice."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message alone, as Python writes warnings of a program without handlers."""
        one: logging.Logger | None = logging.getLogger(record.name)
        while one is not None:
            if any(handler is not self for handler in one.handlers):
                return
            one = one.parent if one.propagate else None
        if sys.stderr is not None:  # as under pythonw
            try:
                sys.stderr.write(f"{self.format(record)}\n")
            except Exception:
                self.handleError(record)


def follow_log_level(args: TrainingArguments) -> None:
    """Give hf_pss the log level of a Trainer, as the Trainer gives it to transformers.

    Without handlers Python shows warnings only, so this also adds a handler for all levels.

    Args:
        args: The Trainer's arguments. With ``log_level="passive"`` the level stays as it is.
    """
    ours = logging.getLogger("hf_pss")
    if not any(isinstance(handler, _LastResort) for handler in ours.handlers):
        ours.addHandler(_LastResort())
    if args.log_level != "passive":
        ours.setLevel(args.get_process_log_level())
