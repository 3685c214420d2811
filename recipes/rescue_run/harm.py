"""Run `hf-pss train` while something goes wrong in some of its steps: a tool of compare.py.

    python recipes/rescue_run/harm.py '{"kind": "nan_gradient", "first": 121}' train ...

The first argument is the harm, as JSON. The others are those of `hf-pss`.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from typing import Any

import torch

from hf_pss import PSSTrainer

HARM = {"last": 0, "factor": 1.0, **json.loads(sys.argv.pop(1))}
training_step = PSSTrainer.training_step


def harmed_step(self: PSSTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Take a step: on random tokens, with NaN in its gradients, or at too high a rate."""
    if not HARM["first"] <= self.state.global_step + 1 <= max(HARM["first"], HARM["last"]):
        return training_step(self, model, inputs, *args, **kwargs)
    if HARM["kind"] == "random_batch":
        ids = inputs["input_ids"]
        drawn = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        noise = torch.randint(model.config.vocab_size, ids.shape, generator=drawn)
        inputs = {**inputs, "input_ids": noise, "labels": noise}
    loss = training_step(self, model, inputs, *args, **kwargs)
    if HARM["kind"] == "nan_gradient":
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.view(-1)[0] = math.nan
    if HARM["kind"] == "high_learning_rate":
        for group in self.optimizer.param_groups:
            group["lr"] *= HARM["factor"]  # the scheduler sets the rate of the next step
    return loss


PSSTrainer.training_step = harmed_step
runpy.run_module("hf_pss.cli", run_name="__main__")
