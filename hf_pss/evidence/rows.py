"""Keep each run of a sweep as one line of JSON: its settings, its result and its curves."""

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
    """One run. A number that was not finite is None, which keeps the file strict JSON."""

    id: str
    """Hash of everything that determines the run: recipe, optimizer, learning rate, guard, seed."""
    recipe: str
    optimizer: str
    learning_rate: float
    guard: str
    guard_id: str = ""
    """Hash of the guard's options. It distinguishes two guards with the same name."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The grid's changes of the recipe."""
    seed: int
    num_steps: int
    """Number of steps that the recipe sets."""
    status: str = "finished"
    """``finished``, ``stopped`` (the guard ended it) or ``failed`` (an error; see `error`)."""
    error: str | None = None
    final_eval_loss: float | None = None
    """Nats per token at the last step. None if it was not finite, or if the run ended earlier."""
    unigram_entropy: float = 0.0
    """Loss in nats of a model that predicts the token frequencies of the training text."""
    losses: tuple[float | None, ...] = ()
    """Training loss of every step, from step 1."""
    grad_norms: tuple[float | None, ...] = ()
    """Gradient norm before clipping of every step."""
    eval_steps: tuple[int, ...] = ()
    eval_losses: tuple[float | None, ...] = ()
    interventions: tuple[int, ...] = ()
    """Steps at which the guard acted. For PSS these are its interventions."""
    train_seconds: float = 0.0
    """Time of the training steps, without evaluation."""
    guard_seconds: float = 0.0
    """The part of `train_seconds` that PSS and the guard's callback took."""
    explosion_step: int | None = None
    """First step that meets the recipe's definition of an explosion; None if no step does."""
    explosion_kind: str | None = None
    """``non_finite``, ``rise`` or ``plateau``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers: steps of a fault, and series of health and probes."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_line(self) -> str:
        """Return one line of strict JSON."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Return the row of a line.

        Raises:
            ConfigurationError: The line does not hold a row of this version.
        """
        try:
            found = json.loads(line)
            known = {spec.name for spec in fields(cls)}
            if not isinstance(found, dict) or not set(found) <= known:
                raise ValueError("it has fields that a row lacks")
            lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
            return cls(**{**found, **lists})
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"This line holds no row of a sweep: {error}.") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, but skip the unfinished last line that a killed sweep leaves.

    Raises:
        ConfigurationError: The file cannot be read, or a complete line does not hold a row.
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
    """Add a row, and return when the disk holds it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.to_line())
        file.flush()
        os.fsync(file.fileno())


def drop_unfinished_line(path: Path) -> None:
    """Cut off the unfinished last line that a killed sweep leaves."""
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
