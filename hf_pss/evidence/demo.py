"""Train the demo's twins side by side, each in a process of its own, with live progress."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.corpus import build_corpus
from hf_pss.evidence.demo_recipe import (
    GUARDS,
    LOG_FILE,
    DemoRecipe,
    remove_earlier_demo,
    run_folder,
)
from hf_pss.evidence.processes import num_cores, signals_interrupt, versions
from hf_pss.runs.durable import write_whole
from hf_pss.runs.folder import METRICS_FILE, SUMMARY_FILE

__all__ = ["run_demo"]

_VERSION = 1
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0


@dataclass(slots=True)
class _Run:
    """One twin: what it is, its process once started, and its line on the screen."""

    guard: str
    seed: int
    folder: Path
    task: TaskID
    process: subprocess.Popen[bytes] | None = None

    @property
    def failed(self) -> bool:
        """Whether the process ended without its summary."""
        ended = self.process is not None and self.process.poll() is not None
        return ended and not (self.folder / SUMMARY_FILE).exists()


def run_demo(
    recipe: DemoRecipe,
    output_dir: Path,
    *,
    guards: Sequence[str] = ("plain", "paper", "anchored"),
    num_seeds: int = 1,
    num_processes: int | None = None,
    console: Console | None = None,
) -> str:
    """Train every guard with every seed and write the run directory that the report reads.

    Args:
        recipe: What is trained.
        output_dir: Made if need be; results of an earlier demo in it are replaced.
        guards: Names from `GUARDS`.
        num_seeds: Seeds 0 … num_seeds − 1, each trained under every guard.
        num_processes: Runs at a time; as many as there are cores for this process when None.
        console: Where progress is shown.

    Returns:
        ``finished``, ``interrupted`` (Ctrl-C: what was there by then is kept) or ``failed``.

    Raises:
        ConfigurationError: An unknown guard, a count below one, or an earlier demo's file that
            cannot be removed.
    """
    _check(guards, num_seeds, num_processes)
    console = console or Console()
    started = time.monotonic()
    corpus = build_corpus(
        vocab_size=recipe.vocab_size,
        context_length=recipe.context_length,
        max_tokens=None,
        progress=lambda text: console.print(f"Preparing the corpus: {text} …"),
    )
    num_runs = len(guards) * num_seeds
    cores = num_cores()
    at_a_time = min(num_processes or cores, num_runs)
    info = {
        "version": _VERSION,
        "command": _command(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "elapsed_seconds": 0.0,
        "recipe": recipe.to_dict(),
        "model": {
            "params": recipe.model().num_parameters(),
            "layers": recipe.num_layers,
            "width": recipe.width,
            "context_length": recipe.context_length,
        },
        "data": corpus.description,
        "training": {
            "optimizer": f"AdamW, betas (0.9, {recipe.adam_beta2})",
            "learning_rate": recipe.learning_rate,
            "num_steps": recipe.num_steps,
            "batch_size": recipe.batch_size,
            "weight_decay": recipe.weight_decay,
            "max_grad_norm": recipe.max_grad_norm,
        },
        "pss": {guard: GUARDS[guard].to_dict() for guard in guards},
        "unigram_entropy_nats": corpus.unigram_entropy_nats,
        "versions": versions(),
        "machine": f"{cores} cores, {platform.machine()}, {at_a_time} runs at a time",
        "guards": list(guards),
        "seeds": list(range(num_seeds)),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_earlier_demo(output_dir)
    _write_json(output_dir / "run.json", info)
    status = _train_all(output_dir, recipe, info, at_a_time, console)
    elapsed = time.monotonic() - started
    _write_json(output_dir / "run.json", {**info, "status": status, "elapsed_seconds": elapsed})
    return status


def _train_all(
    out: Path, recipe: DemoRecipe, info: Mapping[str, Any], at_a_time: int, console: Console
) -> str:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, signals_interrupt():
        runs = [
            _Run(
                guard=guard,
                seed=seed,
                folder=run_folder(out, guard, seed),
                task=progress.add_task(
                    f"{guard}, seed {seed}", start=False, total=recipe.num_steps, note="waiting"
                ),
            )
            for seed in info["seeds"]
            for guard in info["guards"]
        ]
        try:
            _supervise(runs, out, at_a_time, progress)
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            _end(runs)
    for run in (run for run in runs if run.failed):
        log = run.folder / LOG_FILE
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        console.print(f"{run.guard}, seed {run.seed} failed; {log} ends with:\n{tail}", style="red")
    return "failed" if any(run.failed for run in runs) else "finished"


def _supervise(runs: Sequence[_Run], out: Path, at_a_time: int, progress: Progress) -> None:
    """Keep ``at_a_time`` runs going until all have ended."""
    waiting, going = deque(runs), list[_Run]()
    while waiting or going:
        while waiting and len(going) < at_a_time:
            run = waiting.popleft()
            run.process = _start(run, out)
            progress.start_task(run.task)
            going.append(run)
        time.sleep(_POLL_SECONDS)
        for run in going:
            _show(run, progress)
        going = [r for r in going if r.process is not None and r.process.poll() is None]


def _start(run: _Run, out: Path) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    words = [str(out), run.guard, str(run.seed), str(os.getpid())]
    # One thread a run: its matrices are too small to share.
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (run.folder / LOG_FILE).open("wb") as log:
        # A session of its own: Ctrl-C reaches the demo alone, which then ends its runs in order.
        return subprocess.Popen(
            [sys.executable, "-m", "hf_pss.evidence.demo_worker", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet},
            start_new_session=True,
        )


def _end(runs: Sequence[_Run]) -> None:
    """Leave no process behind: ask, wait, insist."""
    alive = [r.process for r in runs if r.process is not None and r.process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _show(run: _Run, progress: Progress) -> None:
    row = _last_row(run.folder / METRICS_FILE)
    if run.failed:
        progress.update(run.task, note="[red]failed[/red]")
    elif row is not None:
        loss = row.get("loss")
        shown = f"loss {loss:.3f}" if loss is not None else "loss not finite"
        count = int(row.get("interventions") or 0)
        note = f"{shown}, {count} interventions" if count else shown
        progress.update(run.task, completed=row["step"], note=note)


def _last_row(path: Path) -> dict[str, Any] | None:
    """Return the last whole training row of a file that is still being written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2048))
            lines = file.read().split(b"\n")[1:-1]
    except FileNotFoundError:
        return None
    rows = (json.loads(line) for line in reversed(lines))
    return next((row for row in rows if "loss" in row), None)


def _check(guards: Sequence[str], num_seeds: int, num_processes: int | None) -> None:
    unknown = sorted(set(guards) - set(GUARDS))
    if unknown or not guards or len(set(guards)) < len(guards):
        raise ConfigurationError(
            f"You asked for the guards {', '.join(guards) or 'none'}; name each once, out of "
            f"{', '.join(GUARDS)}."
        )
    if num_seeds < 1 or (num_processes is not None and num_processes < 1):
        raise ConfigurationError("The numbers of seeds and of processes must be 1 or more.")


def _command() -> str:
    program = Path(sys.argv[0]).name
    return " ".join([program if program == "hf-pss" else "python", *sys.argv[1:]])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1, allow_nan=False))
