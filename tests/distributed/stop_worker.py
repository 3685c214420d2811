"""One rank of a run of which rank 1 alone is told to stop; writes down how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from helpers import make_trainer
from transformers import TrainerCallback

from hf_pss import PSSConfig

STOPPED_STEP = 3


class StopRank1(TrainerCallback):
    """As a scheduler that preempts one node."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOPPED_STEP - 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def main(_: str, folder: str) -> None:
    trainer = make_trainer(
        Path(folder), PSSConfig.preset("paper"), ddp_backend="gloo", max_steps=12
    )
    trainer.add_callback(StopRank1())
    code: Any = None
    try:
        trainer.train()
    except SystemExit as left:
        code = left.code
    outcome = {"code": code, "step": trainer.state.global_step}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)  # see worker.py


if __name__ == "__main__":
    main(*sys.argv[1:])
