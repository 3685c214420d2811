"""One run of the demo, in a process of its own; its parent is the demo."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

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

from hf_pss.evidence.corpus import Corpus, build_corpus
from hf_pss.evidence.demo_recipe import GUARDS, DemoRecipe, run_folder
from hf_pss.runs.folder import EVENTS_FILE, METRICS_FILE, SUMMARY_FILE
from hf_pss.trainer.pss_trainer import PSSTrainer

__all__ = ["main"]


class _Recorder(TrainerCallback):
    """Writes every step's numbers into a file of lines; stops the run when its parent is gone."""

    def __init__(self, file: TextIO, *, parent: int) -> None:
        self._file = file
        self._parent = parent
        self._started = 0.0
        self._num_nonfinite_steps = 0.0
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
        _stop_if_orphaned(self._parent)

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
                "loss": self._loss(logs),
                "grad_norm_preclip": _finite(logs.get("pss/grad_norm_preclip")),
                "baseline": _finite(logs.get("pss/baseline")),
                "threshold": _finite(logs.get("pss/threshold")),
                "interventions": logs.get("pss/interventions"),
                "nonfinite_steps": logs.get("pss/nonfinite_steps"),
                "pss_seconds": logs.get("pss/seconds"),
            }
            self._write(self.last)

    def _loss(self, logs: dict[str, float]) -> float | None:
        """Return the step's loss; None for the 0.0 by which the Trainer's filter replaces a NaN.

        Without its filter (``logging_nan_inf_filter``) the Trainer's sum stays NaN to the end.
        """
        before, now = self._num_nonfinite_steps, logs.get("pss/nonfinite_steps", 0.0)
        self._num_nonfinite_steps = now
        return None if now > before and logs["loss"] == 0.0 else _finite(logs["loss"])

    def _write(self, row: dict[str, float | None]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")


def main(out: Path, guard: str, seed: int, *, parent: int) -> None:
    """Train one twin and write its metrics, health, events and summary into its folder.

    Args:
        out: The demo's folder; its run.json holds the recipe.
        guard: A name from `GUARDS`.
        seed: Of the weights and of the order of the data.
        parent: Process id of the demo. The run ends as soon as this is not its parent any more.
    """
    _stop_if_orphaned(parent)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    recipe = DemoRecipe(**json.loads((out / "run.json").read_text())["recipe"])
    folder = run_folder(out, guard, seed)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(
        vocab_size=recipe.vocab_size, context_length=recipe.context_length, max_tokens=None
    )
    # Buffered by lines: a killed run leaves all it had.
    with (folder / METRICS_FILE).open("w", encoding="utf-8", buffering=1) as file:
        recorder = _Recorder(file, parent=parent)
        _train(recipe, folder, guard, seed, corpus, recorder)
    _write_summary(folder, recorder)


def _train(
    recipe: DemoRecipe, folder: Path, guard: str, seed: int, corpus: Corpus, recorder: _Recorder
) -> None:
    set_seed(seed)
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


def _stop_if_orphaned(parent: int) -> None:
    if os.getppid() != parent:
        raise SystemExit("The demo that started this run is gone.")


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
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), parent=int(sys.argv[4]))
