"""One run of the demo, in a process of its own: ``python -m hf_pss.demo.worker OUT GUARD SEED``."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_pss.demo.corpus import build_corpus
from hf_pss.demo.recipe import GUARDS, DemoRecipe
from hf_pss.integration.reporting import EVENTS_FILE, HEALTH_FILE
from hf_pss.integration.trainer import PSSTrainer

__all__ = ["METRICS_FILE", "SUMMARY_FILE", "main"]

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


class _Recorder(TrainerCallback):
    """Writes every step's numbers, flushed at once: a killed run leaves all it had."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._parent = os.getppid()
        self._started = 0.0
        self.train_seconds = 0.0
        self.last: dict[str, float | None] = {}
        self.final_eval_loss: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a training step; evaluation and logging do not count."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock; stop the run, too, if whoever started it is gone."""
        self.train_seconds += time.perf_counter() - self._started
        if os.getppid() != self._parent:
            raise SystemExit("The demo that started this run is gone.")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line a training step, and one an evaluation."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.final_eval_loss = _finite(logs["eval_loss"])
            self._write({"step": state.global_step, "eval_loss": self.final_eval_loss})
        elif "loss" in logs:
            self.last = {
                "step": state.global_step,
                "loss": _finite(logs["loss"]),
                "grad_norm_preclip": _finite(logs.get("pss/grad_norm_preclip")),
                "baseline": _finite(logs.get("pss/baseline")),
                "threshold": _finite(logs.get("pss/threshold")),
                "interventions": logs.get("pss/interventions"),
                "nonfinite_steps": logs.get("pss/nonfinite_steps"),
                "pss_seconds": logs.get("pss/seconds"),
            }
            self._write(self.last)

    def _write(self, row: dict[str, float | None]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def main(out: Path, guard: str, seed: int) -> None:
    """Train one twin and write its metrics, health, events and summary into its folder."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    recipe = DemoRecipe(**json.loads((out / "run.json").read_text())["recipe"])
    folder = run_folder(out, guard, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, SUMMARY_FILE, EVENTS_FILE, HEALTH_FILE):
        (folder / name).unlink(missing_ok=True)
    corpus = build_corpus(
        vocab_size=recipe.vocab_size, context_length=recipe.context_length, max_tokens=None
    )
    set_seed(seed)
    recorder = _Recorder(folder / METRICS_FILE)
    trainer = PSSTrainer(
        model=recipe.model(),
        args=recipe.arguments(folder, seed),
        train_dataset=corpus.train,
        eval_dataset=Subset(corpus.validation, _evenly(len(corpus.validation), recipe)),
        pss_config=replace(GUARDS[guard], health_every_steps=recipe.health_every_steps),
        callbacks=[],
    )
    trainer.add_callback(recorder)  # after PSS, so that its clock holds the smoothing too
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _write_summary(folder, recorder)


def run_folder(out: Path, guard: str, seed: int) -> Path:
    """Return where one run writes."""
    return out / guard / f"seed-{seed}"


def _evenly(length: int, recipe: DemoRecipe) -> list[int]:
    """Indices spread over all of the validation text, the same for every run."""
    count = min(recipe.num_eval_blocks, length)
    return [int(i) for i in torch.linspace(0, length - 1, count)]


def _write_summary(folder: Path, recorder: _Recorder) -> None:
    events = folder / EVENTS_FILE
    last = recorder.last
    summary = {
        "status": "finished",
        "final_eval_loss": recorder.final_eval_loss,
        "final_train_loss": last["loss"],
        "num_steps": last["step"],
        "train_seconds": recorder.train_seconds,
        "pss_seconds": last["pss_seconds"],
        "num_interventions": int(last["interventions"] or 0),
        "num_events": len(events.read_text().splitlines()) if events.exists() else 0,
        "num_nonfinite_steps": int(last["nonfinite_steps"] or 0),
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1, allow_nan=False))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
