"""One finished run as a row: what it was, how it ended, and its whole curve."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from hf_pss.errors import ConfigurationError

__all__ = ["Row", "append_row", "drop_unfinished_line", "read_rows", "versions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run; numbers that were not finite are None, so that the file is strict JSON."""

    id: str
    """Hash of all that determines the run: recipe, optimizer, learning rate, guard, seed."""
    recipe: str
    optimizer: str
    learning_rate: float
    guard: str
    guard_id: str = ""
    """Hash of the guard's options: one name with two of them is two guards."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What the grid changed of the recipe."""
    seed: int
    num_steps: int
    """Steps that the recipe asked for."""
    status: str = "finished"
    """``finished``, ``stopped`` (the guard ended it) or ``failed`` (an error; see `error`)."""
    error: str | None = None
    final_eval_loss: float | None = None
    """Nats per token at the last step; None where it is not finite or the run did not get there."""
    unigram_entropy: float = 0.0
    """Nats; loss of a model that knows the training text's token frequencies only."""
    losses: tuple[float | None, ...] = ()
    """Training loss of each step, from step 1."""
    grad_norms: tuple[float | None, ...] = ()
    """Gradient norm before clipping of each step."""
    eval_steps: tuple[int, ...] = ()
    eval_losses: tuple[float | None, ...] = ()
    interventions: tuple[int, ...] = ()
    """Steps at which the guard acted (PSS: interventions)."""
    train_seconds: float = 0.0
    """Training steps, without evaluation."""
    guard_seconds: float = 0.0
    """Of these, inside the guard: PSS's own clock, or a guard's callback."""
    explosion_step: int | None = None
    """First step at which the recipe's definition of an explosion is met; None for never."""
    explosion_kind: str | None = None
    """``non_finite``, ``rise`` or ``plateau``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of a recipe's own, such as the step of an injected fault."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_line(self) -> str:
        """Return one line of strict JSON."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Return the row of a line.

        Raises:
            ConfigurationError: The line is no row of this version.
        """
        try:
            found = json.loads(line)
            known = {spec.name for spec in fields(cls)}
            if not isinstance(found, dict) or not set(found) <= known:
                raise ValueError("other fields than a row has")
            lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
            return cls(**{**found, **lists})
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"This is no row of a sweep: {error}.") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a last line without an end, of a killed sweep, is passed over.

    Raises:
        ConfigurationError: There is no such file, or a whole line is no row; says which.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The rows {path} cannot be read: {error}.") from error
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            yield Row.from_line(line)
        except ConfigurationError as error:
            raise ConfigurationError(f"Line {number} of {path}: {error}") from error


def append_row(path: Path, row: Row) -> None:
    """Add a row and have it on the disk before returning."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_line())
        file.flush()
        os.fsync(file.fileno())


def drop_unfinished_line(path: Path) -> None:
    """Cut what a killed sweep left behind the last whole line."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    required = ("hf-pss", "torch", "transformers", "accelerate", "tokenizers")
    found = {"python": platform.python_version(), **{name: version(name) for name in required}}
    for name in ("pytorch_optimizer", "scipy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
