"""The grid of a sweep: from a YAML file to cells, each of which determines one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.sweep.guards.base import Guard
from hf_pss.sweep.guards.table import GUARDS
from hf_pss.sweep.optimizers import OPTIMIZERS
from hf_pss.sweep.recipes import RECIPES, Recipe

__all__ = ["Cell", "read_grid"]

_BLOCK: dict[str, Any] = {
    "recipes": None,
    "optimizers": ("adamw",),
    "learning_rates": None,
    "guards": None,
    "seeds": (0,),
    "changes": {},
    "probes_every_steps": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: all that determines it, and nothing else."""

    recipe_name: str
    recipe: Recipe
    optimizer: str
    learning_rate: float
    guard_name: str
    pss: PSSConfig | None = None
    """PSS with options of the grid's own; None is the table's guard of that name."""
    seed: int
    probes_every_steps: int = 0
    """Rhythm at which early-warning readings are kept; 0 keeps none."""

    @property
    def guard(self) -> Guard:
        """The guard: of the table, or PSS as the grid wants it."""
        if self.pss is None:
            return _of_the_table(self.guard_name)
        return Guard(description="PSS with options of the grid", source="hf_pss", pss=self.pss)

    @property
    def id(self) -> str:
        """A hash of what determines the run; a guard counts with its name and PSS options."""
        told = ("description", "explosion")  # what is said of a run does not change it
        parts = [
            {k: v for k, v in self.recipe.to_dict().items() if k not in told},
            self.optimizer,
            self.learning_rate,
            [self.guard_name, self.guard.pss.to_dict(), self.guard.max_grad_norm],
            self.seed,
            self.probes_every_steps,
        ]
        text = json.dumps([self.recipe_name, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        parts = (self.recipe_name, self.optimizer, f"{self.learning_rate:g}", self.guard_name)
        return f"{' · '.join(parts)} · seed {self.seed}"


def read_grid(path: Path) -> list[Cell]:
    """Return the cells of a YAML file: one mapping, or a list of mappings, each a full product.

    Cells that two blocks share are run once. Seeds are the outer loop, so that a sweep that was
    ended early has compared everything on fewer seeds.

    Raises:
        ConfigurationError: The file cannot be read, a key or a name is unknown, or a value is
            missing or out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"The grid {path} cannot be read: {error}.") from error
    blocks = content if isinstance(content, list) else [content]
    cells: dict[str, Cell] = {}
    for block in blocks:
        cells.update((cell.id, cell) for cell in _cells(block))
    if not cells:
        raise ConfigurationError(f"The grid {path} holds no run.")
    return sorted(cells.values(), key=lambda cell: cell.seed)


def _cells(block: Any) -> Iterator[Cell]:
    found = _checked(block)
    guards = [_named(entry) for entry in _list(found, "guards")]
    recipes = [(name, _recipe(name)) for name in _list(found, "recipes")]
    axes = (
        _seeds(found["seeds"]),
        recipes,
        _list(found, "optimizers"),
        [_number(rate) for rate in _list(found, "learning_rates")],
        guards,
    )
    for seed, (name, recipe), optimizer, rate, (guard_name, pss) in product(*axes):
        if optimizer not in OPTIMIZERS:
            raise ConfigurationError(
                f"The grid asks for the optimizer {optimizer!r}; choose of {', '.join(OPTIMIZERS)}."
            )
        yield Cell(
            recipe_name=name,
            recipe=recipe.with_changes({**found["changes"], "learning_rate": rate}),
            optimizer=optimizer,
            learning_rate=rate,
            guard_name=guard_name,
            pss=pss,
            seed=seed,
            probes_every_steps=int(_number(found["probes_every_steps"])),
        )


def _checked(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigurationError(f"A block of a grid is a mapping; this one is {block!r}.")
    if unknown := sorted(set(block) - set(_BLOCK)):
        raise ConfigurationError(
            f"A grid has no key {', '.join(unknown)}; it has {', '.join(_BLOCK)}."
        )
    found = {**_BLOCK, **block}
    if missing := [key for key, value in found.items() if value is None]:
        raise ConfigurationError(f"The grid lacks {', '.join(missing)}.")
    if not isinstance(found["changes"], dict):
        raise ConfigurationError("`changes` of a grid is a mapping from fields to values.")
    return found


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found[key]
    if isinstance(value, (list, tuple)) and value:
        return list(value)
    raise ConfigurationError(f"`{key}` of a grid is a list; you gave {value!r}.")


def _seeds(value: Any) -> list[int]:
    """Return seeds 0 … n−1 for a number n, or those listed."""
    seeds = list(range(value)) if isinstance(value, int) else value
    if not isinstance(seeds, (list, tuple)) or not seeds or not all(type(s) is int for s in seeds):
        raise ConfigurationError(
            f"`seeds` of a grid is how many, or a list of whole numbers; you gave {value!r}."
        )
    return list(seeds)


def _number(value: Any) -> float:
    # YAML takes 1e-3, without a dot, for a word.
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"A number is wanted in the grid, not {value!r}.") from error


def _recipe(name: Any) -> Recipe:
    if name not in RECIPES:
        raise ConfigurationError(
            f"The grid asks for the recipe {name!r}; choose one of {', '.join(RECIPES)}."
        )
    return RECIPES[name]


def _named(entry: Any) -> tuple[str, PSSConfig | None]:
    """Return a guard of the table, or PSS with options of the grid's own.

    The latter is a mapping: ``{name: ..., preset: paper, threshold_ratio: 2, ...}``.
    """
    if isinstance(entry, str):
        _of_the_table(entry)
        return entry, None
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigurationError(f"A guard is a name or a mapping with a name, not {entry!r}.")
    if entry["name"] in GUARDS:
        raise ConfigurationError(
            f"{entry['name']!r} is a guard of the table; give yours another name."
        )
    options = {k: v for k, v in entry.items() if k not in ("name", "preset")}
    return entry["name"], PSSConfig.preset(entry.get("preset", "paper"), **options)


def _of_the_table(name: str) -> Guard:
    if name not in GUARDS:
        raise ConfigurationError(
            f"The grid asks for the guard {name!r}; choose one of {', '.join(GUARDS)}, or give "
            "PSS options of your own: {name: ..., preset: floor, floor_ratio: 0.5}."
        )
    return GUARDS[name]
