"""A run with two workers of a data loader that goes on until it is signalled.

``signalled_worker.py OUT START_METHOD``. It writes ``OUT/begun`` when it has made three steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from helpers import make_trainer, token_rows
from transformers import TrainerCallback

from hf_pss import PSSConfig


class SlowRows:
    """Rows that take so long that the workers are always at work."""

    def __init__(self) -> None:
        self.rows = token_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.002)
        return self.rows[index]


class Notes(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            Path(args.output_dir, "begun").touch()


def main(folder: str, start_method: str) -> None:
    trainer = make_trainer(
        Path(folder),
        PSSConfig.preset("paper"),
        rows=SlowRows(),
        max_steps=1_000_000,
        save_steps=1_000_000,
        dataloader_num_workers=2,
        dataloader_persistent_workers=start_method == "spawn",
        dataloader_multiprocessing_context=start_method,
    )
    trainer.add_callback(Notes())
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
