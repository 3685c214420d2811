"""One rank of a distributed training run; writes down what it saw and what its model became."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from cpu_shims import enable_deepspeed_on_cpu, enable_fsdp2_on_cpu
from helpers import controller_of, make_trainer, token_rows
from shards_worker import MAX_ELEMENTS, MOMENTS, build

from hf_pss import GradientNorms, PSSConfig, PSSTrainer, RecoveryConfig
from hf_pss.models import batching as stacks
from hf_pss.models.distributed import gathered, local
from hf_pss.trainer.schedule_free import unwrapped

BATCH = 4
FAULT_STEP = 5


class FaultyTrainer(PSSTrainer):
    """Does the harm that the test asks for, to rank 1's batches of step 5."""

    fault: str = "none"
    num_batches = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[float] = []
        """Of each training batch: what its update was to be taken at."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        if not model.training:
            return loss
        self.num_batches += 1
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        # The twin in one process has rank 1's batches as the second of each pair.
        is_rank_1 = self.args.process_index == 1 or (
            self.args.world_size == 1 and self.num_batches % 2 == 0
        )
        if self.state.global_step != FAULT_STEP - 1 or not is_rank_1:
            return loss
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        factor = {"spike": 1000.0, "nan": float("nan")}.get(self.fault, 1.0)
        return loss * factor


def strategy(backend: str) -> dict[str, Any]:
    """Trainer's options for a backend; a launcher that read a file has said all in advance."""
    if backend == "fsdp2-launched":
        return {}
    if backend == "zero-launched":
        return {"use_cpu": False}
    if backend.startswith("fsdp2"):
        kind = "FULL_STATE_DICT" if backend == "fsdp2-full" else "SHARDED_STATE_DICT"
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "state_dict_type": kind,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            },
        }
    if backend.startswith("zero"):
        config = {
            # 0: as large parameters are, small ones are split too.
            "zero_optimization": {
                "stage": int(backend[-1]),
                **({"stage3_param_persistence_threshold": 0} if backend[-1] == "3" else {}),
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        }
        return {"deepspeed": config, "use_cpu": False}
    return {"ddp_backend": "gloo"} if backend == "ddp" else {"gradient_accumulation_steps": 2}


def strategy_name(backend: str) -> str:
    return backend.split("-")[0].rstrip("23")


def num_state_elements(optimizer: Any) -> int:
    """Return how many numbers of the optimizer's state lie on this rank."""
    states = optimizer.state.values()
    return sum(local(v).numel() for state in states for v in state.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--recovery", type=json.loads, default={})
    parser.add_argument("--trainer", type=json.loads, default={})
    parser.add_argument("--fault", default="none")
    parser.add_argument("--resume", default=None)
    parser.add_argument("--model", default="llama")
    given = parser.parse_args()
    if given.model in MOMENTS:
        stacks._MAX_ELEMENTS = MAX_ELEMENTS
    if strategy_name(given.backend) == "fsdp":
        enable_fsdp2_on_cpu()
    if strategy_name(given.backend) == "zero":
        enable_deepspeed_on_cpu()
    FaultyTrainer.fault = given.fault
    options = {
        "per_device_train_batch_size": BATCH,
        **({} if "pss_optim" in given.trainer else {"optim": "adamw_torch"}),
        "logging_nan_inf_filter": False,
        "save_steps": 4,
        # FSDP2 shows plain parameters for a while after an evaluation.
        "eval_strategy": "steps",
        "eval_steps": 3,
        **strategy(given.backend),
        **given.trainer,
    }
    trainer = make_trainer(
        given.folder,
        PSSConfig.preset(**{"name": "paper", **given.options}),
        recovery=RecoveryConfig(**given.recovery),
        trainer_class=FaultyTrainer,
        model_name=given.model,
        model=build(given.model) if given.model in MOMENTS else None,
        rows=token_rows(),
        eval_rows=token_rows(8),
        **options,
    )
    if strategy_name(given.backend) != "zero":
        trainer.add_callback(GradientNorms())
    error = None
    try:
        trainer.train(resume_from_checkpoint=given.resume)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    controller = controller_of(trainer)
    state = controller.state_dict()
    backend = controller._measurements.backend
    weights = {
        name: backend.full(parameter).float().cpu()
        for name, parameter in controller._measurements.parameters().items()
    }
    rank = os.environ.get("RANK", "0")
    torch.save(weights, given.folder / f"weights-{rank}.pt")
    outcome = {
        "backend": type(backend).__name__,
        "error": error,
        "history": state["history"],
        "detectors": state["detectors"],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "rates": trainer.rates,
        "grad_norms": [
            line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line
        ],
        "parameter_norms": [
            {name: norm for name, norm in line.items() if name.startswith("grad_norm/")}
            for line in trainer.state.log_history
            if "loss" in line
        ],
        "sharing": [
            type(sharing).__name__
            for sharing in getattr(unwrapped(trainer.optimizer), "_sharing", {}).values()
        ],
        "num_state_elements": num_state_elements(trainer.optimizer),
        "digest": hashlib.sha256(
            b"".join(gathered(w).contiguous().numpy().tobytes() for w in weights.values())
        ).hexdigest(),
    }
    (given.folder / f"rank{rank}.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    # Gloo's destructor joins a thread that may wait for the interpreter's lock, which that thread's
    # joiner holds (torch 2.13): seen once in about ten runs. So leave without any destructor.
    os._exit(0)


if __name__ == "__main__":
    main()
