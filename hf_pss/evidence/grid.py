"""Read the grid of a sweep from a YAML file into cells, each of which determines one run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.baselines import OPTIMIZERS
from hf_pss.evidence.guards import GUARDS, Guard, make_guard
from hf_pss.evidence.recipes import RECIPES, Recipe
from hf_pss.evidence.rows import Row, versions

_T = TypeVar("_T")

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
    """Everything that determines one run."""

    recipe_name: str
    recipe: Recipe
    optimizer: str
    """A name from `OPTIMIZERS`, or `TRAINERS_OWN`."""
    guard_name: str
    pss: PSSConfig | None = None
    """PSS options that the grid gives. None means a guard of the table."""
    guard_row: str = ""
    """The guard's name in `GUARDS`, if ``guard_name`` is a name that the grid gives."""
    guard_options: Mapping[str, Any] = field(default_factory=dict)
    """The options of a guard of the table."""
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The grid's changes to the recipe; `recipe` already has them."""
    probes_every_steps: int = 0
    """Steps between two early-warning readings; with 0 there are none."""
    search_seed: int | None = None
    """Marks a search around the recipe's rate, and is its first seed; see `next_cells`."""

    @property
    def learning_rate(self) -> float:
        """The recipe's peak learning rate."""
        return self.recipe.learning_rate

    @property
    def guard(self) -> Guard:
        """The guard: one from the table, or PSS with the grid's options."""
        if self.pss is None:
            return make_guard(self.guard_row or self.guard_name, self.guard_options)
        return Guard(description="PSS with options of the grid", source="hf_pss", pss=self.pss)

    @property
    def guard_id(self) -> str:
        """A hash of the guard's options."""
        guard = self.guard
        return _hash([_differences(guard.pss, PSSConfig()), guard.max_grad_norm, *self._row()])

    @property
    def id(self) -> str:
        """A hash of everything that determines the run, including the guard's name and options.

        Only options that differ from the defaults enter it. So a new option whose default changes
        nothing keeps the rows of earlier sweeps.
        """
        recipe = _differences(self.recipe, Recipe())
        recipe.pop("explosion", None)  # it changes how a run is reported, not the run
        parts = [
            *(self.recipe_name, recipe, self.optimizer, self.guard_name, self.guard.max_grad_norm),
            *(_differences(self.guard.pss, PSSConfig()), self.seed, self.probes_every_steps),
        ]
        return _hash([*parts, *self._row()])

    def _row(self) -> list[Any]:
        """Return the guard's row and its options if the grid gives them, for a hash."""
        return [self.guard_row, self.guard.options] if self.guard_row else []

    def new_row(self, **measured: Any) -> Row:
        """Return the row of this run with the measured numbers."""
        return Row(
            id=self.id,
            recipe=self.recipe_name,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            guard=self.guard_name,
            guard_id=self.guard_id,
            changes=dict(self.changes),
            seed=self.seed,
            num_steps=self.recipe.num_steps,
            versions=versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **measured,
        )

    def check(self) -> None:
        """Check that the run is possible.

        Raises:
            ConfigurationError: Guard, optimizer and recipe do not fit together, or the machine has
                no CUDA device that the recipe needs.
        """
        guard, recipe = self.guard, self.recipe
        is_plain = self.optimizer == "adamw" and recipe.matrix_lr_ratio == 1.0
        if guard.optimizer is not None and not is_plain:
            raise ConfigurationError(
                f"The guard {self.guard_name} is an optimizer in AdamW's place and sets its own "
                f"learning rates; the cell {self} asks for others."
            )
        if guard.needs_fault and recipe.fault is None:
            raise ConfigurationError(
                f"{self.guard_name} treats a run after its fault; {self.recipe_name} has none."
            )
        if recipe.on_gpu and not torch.cuda.is_available():
            raise ConfigurationError(
                f"The recipe {self.recipe_name} needs a CUDA device; there is none here."
            )

    def __str__(self) -> str:
        parts = (self.recipe_name, self.optimizer, f"{self.learning_rate:g}", self.guard_name)
        return f"{' · '.join(parts)} · seed {self.seed}"


def read_grid(path: Path) -> list[Cell]:
    """Return the cells of a YAML file, which holds one mapping or a list of mappings.

    Each mapping stands for the full product of its lists. If it gives ``learning_rates: {around:
    4e-3}``, its cells stand for searches around this rate. Cells that two mappings share are run
    once. The seeds are the outer loop, so a sweep that ends early has compared
    everything on fewer seeds.

    Raises:
        ConfigurationError: The file cannot be read, a key or a name is unknown, or a value is
            missing or out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"The grid {path} cannot be read: {error}.") from error
    blocks = content if isinstance(content, list) else [content]
    cells: dict[tuple[str, int | None], Cell] = {}
    for block in blocks:
        cells.update(((cell.id, cell.search_seed), cell) for cell in _cells(block))
    if not cells:
        raise ConfigurationError(f"The grid {path} holds no run.")
    meant: dict[str, str] = {}
    for cell in cells.values():
        if meant.setdefault(cell.guard_name, cell.guard_id) != cell.guard_id:
            raise ConfigurationError(
                f"The grid {path} gives the name {cell.guard_name!r} to two sets of options, which "
                "a table would mix."
            )
    return sorted(cells.values(), key=lambda cell: cell.seed)


def _cells(block: Any) -> Iterator[Cell]:
    found = _checked(block)
    seeds, around = _seeds(found["seeds"]), found["learning_rates"]
    is_search = isinstance(around, dict) and list(around) == ["around"]
    rates = list(around.values()) if is_search else _list(found, "learning_rates")
    axes = (
        seeds,
        [(name, _choice("recipe", name, RECIPES)) for name in _list(found, "recipes")],
        _list(found, "optimizers"),
        [_learning_rate(value) for value in rates],
        [_guard(entry) for entry in _list(found, "guards")],
    )
    for seed, (name, recipe), optimizer, rate, guard in product(*axes):
        _choice("optimizer", optimizer, OPTIMIZERS)
        yield Cell(
            recipe_name=name,
            recipe=recipe.with_changes({**found["changes"], "learning_rate": rate}),
            changes=found["changes"],
            optimizer=optimizer,
            seed=seed,
            probes_every_steps=found["probes_every_steps"],
            search_seed=seeds[0] if is_search else None,
            **guard,
        )


def _checked(block: Any) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigurationError(f"A block of a grid is a mapping; this one is {block!r}.")
    if unknown := sorted(map(str, set(block) - set(_BLOCK))):
        raise ConfigurationError(
            f"A grid has no key {', '.join(unknown)}; it has {', '.join(_BLOCK)}."
        )
    found = {**_BLOCK, **block}
    if missing := [key for key, value in found.items() if value is None]:
        raise ConfigurationError(f"The grid lacks {', '.join(missing)}.")
    changes = found["changes"]
    if not isinstance(changes, dict) or not all(isinstance(key, str) for key in changes):
        raise ConfigurationError("`changes` of a grid is a mapping from fields to values.")
    if "learning_rate" in changes:
        raise ConfigurationError("Learning rates are an axis: write them as `learning_rates`.")
    if not _is_count(found["probes_every_steps"]):
        raise ConfigurationError(
            f"`probes_every_steps` of a grid is a count; you gave {found['probes_every_steps']!r}."
        )
    return found


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found[key]
    if isinstance(value, (list, tuple)) and value:
        return list(value)
    raise ConfigurationError(f"`{key}` of a grid is a list; you gave {value!r}.")


def _seeds(value: Any) -> list[int]:
    """Return the seeds 0 … n−1 for a number n, or the listed seeds."""
    seeds = list(range(value)) if _is_count(value) else value
    if not isinstance(seeds, (list, tuple)) or not seeds or not all(map(_is_count, seeds)):
        raise ConfigurationError(
            f"`seeds` of a grid is how many, or a list of whole numbers; you gave {value!r}."
        )
    return list(seeds)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _learning_rate(value: Any) -> float:
    try:
        rate = float(value)  # YAML reads 1e-3, without a dot, as text
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"A learning rate is a number; you gave {value!r}.") from error
    if not 0 < rate < math.inf:
        raise ConfigurationError(f"A learning rate is above 0 and finite; you gave {rate!r}.")
    return rate


def _differences(options: Recipe | PSSConfig, defaults: Recipe | PSSConfig) -> dict[str, Any]:
    known = asdict(defaults)
    return {name: value for name, value in asdict(options).items() if value != known[name]}


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _choice(what: str, name: Any, table: Mapping[str, _T], hint: str = "") -> _T:
    if not isinstance(name, str) or name not in table:
        raise ConfigurationError(
            f"The grid asks for the {what} {name!r}; choose one of {', '.join(table)}{hint}."
        )
    return table[name]


def _guard(entry: Any) -> dict[str, Any]:
    """Return the fields of a `Cell` that an entry of the grid's guards determines.

    An entry is a name of the table, or a mapping with a name of your own. It holds options of a
    guard of the table, ``{name: ..., guard: zclip, z_thresh: 3.0}``, or options of PSS,
    ``{name: ..., preset: paper, threshold_ratio: 2}``.
    """
    if isinstance(entry, str):
        hint = ", or give options: {name: ..., guard: zclip, z_thresh: 3.0} for a guard of this "
        hint += "table, {name: ..., preset: floor, floor_ratio: 0.5} for PSS"
        _choice("guard", entry, GUARDS, hint)
        return {"guard_name": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigurationError(f"A guard is a name or a mapping with a name, not {entry!r}.")
    if entry["name"] in GUARDS:
        raise ConfigurationError(
            f"{entry['name']!r} is a guard of the table; give yours another name."
        )
    options = {k: v for k, v in entry.items() if k not in ("name", "guard", "preset")}
    if "guard" in entry:
        _choice("guard", entry["guard"], GUARDS)
        return {"guard_name": entry["name"], "guard_row": entry["guard"], "guard_options": options}
    pss = PSSConfig.preset(entry.get("preset", "paper"), **options)
    return {"guard_name": entry["name"], "pss": pss}
