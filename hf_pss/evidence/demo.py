"""The demo: a small sweep that keeps the files of its runs, so that a page can show them."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn

from hf_pss.config import PRESETS, PSSConfig
from hf_pss.errors import ConfigurationError, PSSError
from hf_pss.evidence.baselines import TRAINERS_OWN
from hf_pss.evidence.corpus import Corpus
from hf_pss.evidence.grid import Cell
from hf_pss.evidence.recipes import RECIPES, Recipe
from hf_pss.evidence.rows import Row, versions
from hf_pss.evidence.runner import LOG_FILE, num_cores, prepare_corpora, run_cells
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE, METRICS_FILE, SUMMARY_FILE, write_whole

_RECIPE_NAME = "slow_damage"
DEMO_RECIPE = RECIPES[_RECIPE_NAME]
"""A small GPT-2 at a learning rate above its best one."""

TWINS: Mapping[str, PSSConfig] = {
    # PSS observes and records but changes nothing, so this trains bit for bit as the plain Trainer.
    "plain": PSSConfig(observe_only=True),
    **{name: PSSConfig.preset(name) for name in PRESETS},
}
"""The guards of the demo. All train from the same seed on the same data."""

_VERSION = 1
# The numbers of a recipe that the report shows.
_TRAINING_NUMBERS = ("learning_rate", "num_steps", "batch_size", "weight_decay", "max_grad_norm")
_RUN_FILES = (METRICS_FILE, SUMMARY_FILE, EVENTS_FILE, HEALTH_FILE, LOG_FILE)


def run_demo(
    recipe: Recipe,
    output_dir: Path,
    *,
    guards: Sequence[str] = ("plain", "paper", "anchored"),
    num_seeds: int = 1,
    num_processes: int | None = None,
    console: Console | None = None,
) -> str:
    """Train every guard with every seed, and write the run directory that the report reads.

    Args:
        recipe: What to train.
        output_dir: The run directory. It is created if it is missing, and results of an earlier
            demo in it are replaced.
        guards: Names from `TWINS`.
        num_seeds: Train the seeds 0 … num_seeds − 1 under every guard.
        num_processes: Number of runs at a time. None means one for each core that this
            process may use.
        console: Where progress is shown.

    Returns:
        ``finished``, ``interrupted`` (by Ctrl-C; the results so far are kept) or ``failed``.

    Raises:
        ConfigurationError: A guard is unknown, or a file of an earlier demo cannot be removed.
    """
    unknown = sorted(set(guards) - set(TWINS))
    if unknown or not guards or len(set(guards)) < len(guards):
        raise ConfigurationError(
            f"You asked for the guards {', '.join(guards) or 'none'}; name each once, out of "
            f"{', '.join(TWINS)}."
        )
    console = console or Console()
    started = time.monotonic()
    cells = [
        Cell(
            recipe_name=_RECIPE_NAME,
            recipe=recipe,
            optimizer=TRAINERS_OWN,
            guard_name=guard,
            pss=replace(TWINS[guard], health_every_steps=recipe.health_every_steps),
            seed=seed,
        )
        for seed in range(num_seeds)
        for guard in guards
    ]
    (corpus,) = prepare_corpora(cells, console)
    at_a_time = min(num_processes or num_cores(), len(cells))
    info = {
        **_description(recipe, corpus),
        "pss": {guard: TWINS[guard].to_dict() for guard in guards},
        "machine": f"{num_cores()} cores, {platform.machine()}, {at_a_time} runs at a time",
        "guards": list(guards),
        "seeds": list(range(num_seeds)),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    _remove_earlier_demo(output_dir)
    _write_json(output_dir / "run.json", info)
    status = _train_all(output_dir, cells, at_a_time, console)
    elapsed = time.monotonic() - started
    _write_json(output_dir / "run.json", {**info, "status": status, "elapsed_seconds": elapsed})
    return status


def _description(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    program = Path(sys.argv[0]).name
    return {
        "version": _VERSION,
        "command": " ".join([program if program == "hf-pss" else "python", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "elapsed_seconds": 0.0,
        "recipe": asdict(recipe),
        "model": {
            "params": recipe.model().num_parameters(),
            "layers": recipe.num_layers,
            "width": recipe.width,
            "context_length": recipe.context_length,
        },
        "data": corpus.description,
        "training": {
            "optimizer": f"AdamW, betas (0.9, {recipe.adam_beta2})",
            **{name: getattr(recipe, name) for name in _TRAINING_NUMBERS},
        },
        "unigram_entropy_nats": corpus.unigram_entropy_nats,
        "versions": versions(),
    }


def _train_all(out: Path, cells: Sequence[Cell], at_a_time: int, console: Console) -> str:
    columns = (
        "{task.description:<14}",
        BarColumn(),
        "{task.completed:>5.0f}/{task.total:.0f}",
        "{task.fields[note]}",
        TimeRemainingColumn(),
    )
    broken: dict[Path, str] = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            _folder(out, cell): progress.add_task(
                _title(cell), start=False, total=cell.recipe.num_steps, note="waiting"
            )
            for cell in cells
        }

        def take(cell: Cell, row: Row) -> None:
            folder = _folder(out, cell)
            if row.status == "finished":
                _write_summary(folder, row)
            else:
                broken[folder] = f"{_title(cell)} {row.status}"
                progress.update(tasks[folder], note="[red]failed[/red]")

        def poll() -> None:
            for folder, task in tasks.items():
                if folder not in broken:
                    _show(progress, task, _last_row(folder / METRICS_FILE))

        try:
            status = run_cells(
                cells,
                take,
                num_processes=at_a_time,
                folder_of=lambda cell: _folder(out, cell),
                poll=poll,
            )
        except PSSError as error:
            console.print(str(error), style="red")
            status = "failed"
    for folder, what in broken.items():
        log = folder / LOG_FILE
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        console.print(f"{what}; {log} ends with:\n{tail}", style="red")
    return "failed" if broken and status == "finished" else status


def _title(cell: Cell) -> str:
    return f"{cell.guard_name}, seed {cell.seed}"


def _show(progress: Progress, task: TaskID, row: Mapping[str, Any] | None) -> None:
    if row is None:
        return
    progress.start_task(task)
    loss, count = row["loss"], int(row["interventions"] or 0)
    note = f"loss {loss:.3f}" if loss is not None else "loss not finite"
    note += f", {count} interventions" if count else ""
    progress.update(task, completed=row["step"], note=note)


def _last_row(path: Path) -> dict[str, Any] | None:
    """Return the last complete training row of a file that a run may still be writing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2048))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    # The block may begin inside a line. Such a partial line cannot hold both keys.
    rows = (line for line in reversed(lines) if line.startswith(b'{"step":') and b'"loss"' in line)
    return next(map(json.loads, rows), None)


def _write_summary(folder: Path, row: Row) -> None:
    events = folder / EVENTS_FILE
    last = _last_row(folder / METRICS_FILE) or {}
    summary = {
        "status": row.status,
        "final_eval_loss": row.eval_losses[-1] if row.eval_losses else None,
        "final_train_loss": last["loss"],
        "num_steps": last["step"],
        "train_seconds": row.train_seconds,
        "pss_seconds": last["pss_seconds"],
        "num_interventions": int(last["interventions"] or 0),
        "num_events": len(events.read_text().splitlines()) if events.exists() else 0,
        "num_nonfinite_steps": int(last["nonfinite_steps"] or 0),
    }
    _write_json(folder / SUMMARY_FILE, summary)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1, allow_nan=False))


def _folder(out: Path, cell: Cell) -> Path:
    return out / cell.guard_name / f"seed-{cell.seed}"


def _remove_earlier_demo(out: Path) -> None:
    """Remove every file of an earlier demo that could be mistaken for a result of the next one.

    Files that no demo writes stay, and so do their folders.

    Raises:
        ConfigurationError: A file cannot be removed.
    """
    folders = [
        path
        for guard in TWINS
        for path in (out / guard).glob("seed-*")
        if path.is_dir() and path.name.removeprefix("seed-").isdecimal()
    ]
    try:
        for path in (out / "report.html", *(x / name for x in folders for name in _RUN_FILES)):
            path.unlink(missing_ok=True)
        for folder in (*folders, *(out / guard for guard in TWINS)):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise ConfigurationError(
            f"What an earlier demo left in {out} cannot be removed: {error}. Choose another folder."
        ) from error
