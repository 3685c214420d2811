"""One rank of the DDP test: trains, then writes down what its replica has become."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import EAGER, controller_of, make_trainer

from hf_pss import PSSTrainer


class NaNLossOnOneRank(PSSTrainer):
    """Step 5 has a NaN loss on rank 1 only, with finite gradients on both."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        if self.state.global_step == 4 and torch.distributed.get_rank() == 1:
            loss = loss + float("nan")
        return loss


def main(folder: Path) -> None:
    trainer = make_trainer(
        folder, EAGER, trainer_class=NaNLossOnOneRank, save_strategy="no", ddp_backend="gloo"
    )
    trainer.train()
    state = controller_of(trainer).state_dict()
    weights = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    outcome = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "interventions": state["history"]["num_interventions"],
        "nonfinite_steps": state["history"]["num_nonfinite_steps"],
        "detectors": state["detectors"],
        "backend": type(controller_of(trainer)._gauges.backend).__name__,
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    # Gloo's destructor joins a thread that may wait for the interpreter's lock, which that thread's
    # joiner holds (torch 2.13): seen once in about ten runs. So leave without any destructor.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
