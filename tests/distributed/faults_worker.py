"""One rank of several runs in a row; in each, rank 1 alone suffers one fault."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cpu_shims import enable_deepspeed_on_cpu, enable_fsdp2_on_cpu
from helpers import controller_of, make_trainer, token_rows
from torch import Tensor, nn
from transformers import TrainerCallback
from worker import strategy, strategy_name

from hf_pss import PSSConfig, PSSTrainer
from hf_pss.models.distributed import local

STEP = 3
"""The step that rank 1 suffers in."""
TIMEOUT_SECONDS = 12


class OneRank(TrainerCallback):
    def __init__(self, fault: str) -> None:
        self.fault = fault

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != STEP - 1 or os.environ["RANK"] != "1":
            return
        if self.fault == "weight":
            break_a_weight(kwargs["model"])
        if self.fault == "moment":
            optimizer = kwargs["optimizer"]
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            states = [s["exp_avg"] for s in optimizer.state.values() if "exp_avg" in s]
            break_(local(max(states, key=lambda m: local(m).numel())))
        if self.fault == "hang":
            time.sleep(600)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if os.environ["RANK"] != "1":
            return
        if self.fault == "stop" and state.global_step == STEP:
            control.should_training_stop = True
        if self.fault == "last weight" and state.global_step == state.max_steps:
            break_a_weight(kwargs["model"])


def break_a_weight(model: nn.Module) -> None:
    break_(max((local(stored(p)) for p in model.parameters()), key=Tensor.numel))


def stored(parameter: Any) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter)


@torch.no_grad()
def break_(tensor: Tensor) -> None:
    tensor.view(-1)[0] = math.nan


def main(backend: str, folder: str, faults: str) -> None:
    if strategy_name(backend) == "fsdp":
        enable_fsdp2_on_cpu()
    if strategy_name(backend) == "zero":
        enable_deepspeed_on_cpu()
    # On a CPU, transformers 5.23 does not pass ddp_timeout on.
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    outcomes = {}
    rank = os.environ["RANK"]
    for fault in faults.split(","):
        trainer = make_trainer(
            Path(folder, fault),
            PSSConfig.preset("paper"),
            trainer_class=PSSTrainer,
            model_name="llama",
            rows=token_rows(),
            optim="adamw_torch",
            save_strategy="no",
            logging_steps=100,
            ddp_timeout=TIMEOUT_SECONDS,
            **strategy(backend),
        )
        trainer.add_callback(OneRank(fault))
        error, began = None, time.monotonic()
        try:
            trainer.train()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        seconds = time.monotonic() - began
        digest = None
        if fault != "hang":
            measured = controller_of(trainer)._measurements
            try:
                weights = [measured.backend.full(p).float() for p in measured.parameters().values()]
                digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
            except Exception as e:
                digest = repr(e)
        outcomes[fault] = {
            "error": error,
            "step": trainer.state.global_step,
            "digest": digest,
            "seconds": seconds,
        }
        Path(folder, f"rank{rank}.json").write_text(json.dumps(outcomes))
    sys.stdout.flush()
    os._exit(fault == "hang")  # see worker.py


if __name__ == "__main__":
    main(*sys.argv[1:])
