"""One rank of a test of shared work: every rule on split and on replicated matrices, and alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from shards_worker import experts, gpt2
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_pss.models.distributed import Replicas, Sharing, gathered
from hf_pss.models.selection import named_parameters_canonical
from hf_pss.optim import RULES, build_optimizer
from hf_pss.optim.rules import rule_named

MODELS = {"gpt2": gpt2, "experts": experts}
NUM_STEPS, LR = 6, 0.05
SOFT = {"total_steps": NUM_STEPS, "hard_fraction": 0.5}


def trained(kind: str, algo: str, *, mesh: object | None, sharing: Sharing) -> dict[str, Tensor]:
    """Make a few steps on random gradients and return the weights."""
    torch.manual_seed(0)
    model: nn.Module = MODELS[kind]()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    known = rule_named(algo).defaults
    options = {"dtype": "float32", **SOFT}
    chosen = {name: value for name, value in options.items() if name in known}
    optimizer = build_optimizer(model, algo=algo, lr=LR, **chosen)
    optimizer.share_work_(sharing)
    generator = torch.Generator().manual_seed(1)
    parameters = named_parameters_canonical(model)
    for step in range(NUM_STEPS):
        for _, parameter in sorted(parameters.items()):
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                layout = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *layout)
            parameter.grad = gradient
        optimizer.loss = 3.0 / (step + 1)
        optimizer.step()
    return {name: gathered(p.detach()).clone() for name, p in parameters.items()}


def main() -> None:
    num_replicas, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    shape, names = (world_size,), ("shard",)
    if num_replicas > 1:
        shape, names = (num_replicas, world_size // num_replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    drifts: dict[str, float] = {}
    for kind in MODELS:
        for algo in RULES:
            alone = trained(kind, algo, mesh=None, sharing=Sharing())
            split = trained(kind, algo, mesh=mesh, sharing=Sharing())
            copies = trained(kind, algo, mesh=None, sharing=Replicas())
            for name, found in (("split", split), ("replicated", copies)):
                drift = max(float((found[n] - alone[n]).abs().max()) for n in alone)
                drifts[f"{kind} {algo} {name}"] = drift
    rank = dist.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(drifts))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may hang at exit


if __name__ == "__main__":
    main()
