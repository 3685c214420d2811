"""One rank of a test of shards: GPT-2, experts and LoRA, split and whole, given the same step."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import mixtral
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from hf_pss import PSSConfig, PSSController
from hf_pss.models import batching as stacks
from hf_pss.models.distributed import Backend, gathered
from hf_pss.models.selection import named_parameters_canonical

MOMENTS = {"gpt2": "project", "experts": "project", "lora": "keep", "lora experts": "keep"}


MAX_ELEMENTS = 2**10  # two experts a turn


def gpt2() -> PreTrainedModel:
    """Conv1D, which stores inputs first, and a fused projection; 20 rows, uneven over 3 ranks."""
    shape = {"n_layer": 1, "n_embd": 20, "n_head": 2, "vocab_size": 48, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **no_dropout))


def experts() -> PreTrainedModel:
    return mixtral(5)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return gpt2()
    if kind == "experts":
        return experts()
    if kind == "lora":
        names = ["c_attn", "c_proj", "c_fc"]
        model = get_peft_model(
            gpt2(), LoraConfig(r=3, lora_alpha=8, target_modules=names, fan_in_fan_out=True)
        )
    else:
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(
            experts(), LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names)
        )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def smoothed(kind: str, mesh: object | None) -> dict[str, dict[str, Tensor]]:
    """Make one step of Adam and smooth; return weights, first moments and stable ranks."""
    model = build(kind)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    parameters = named_parameters_canonical(model)
    for _, parameter in sorted(parameters.items()):
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                layout = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, *layout)
            parameter.grad = gradient
    optimizer.step()
    config = PSSConfig.preset("paper", moments=MOMENTS[kind])
    backend = None if mesh is not None else Backend()
    controller = PSSController(model, config, optimizer=optimizer, backend=backend)
    ranks = controller.stable_ranks()
    changes = controller.smooth_now().matrices
    assert {change.status for change in changes} <= {"smoothed", "truncated"}
    parameters = named_parameters_canonical(model)
    state = {n: optimizer.state[p] for n, p in parameters.items() if p in optimizer.state}
    return {
        "weights": {n: gathered(p.detach()).clone() for n, p in parameters.items()},
        "moments": {n: gathered(s["exp_avg"]).clone() for n, s in state.items()},
        "ranks": {n: torch.tensor(rank) for n, rank in ranks.items()},
        "after": {c.name: torch.tensor(c.sigma_after or 0.0) for c in changes},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("replicas", type=int)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    stacks._MAX_ELEMENTS = MAX_ELEMENTS
    dist.init_process_group("gloo")
    shape = (given.replicas, dist.get_world_size() // given.replicas)
    mesh = (
        init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
        if given.replicas > 1
        else init_device_mesh("cpu", shape[1:])
    )
    drifts = {}
    for kind in MOMENTS:
        split, whole = smoothed(kind, mesh), smoothed(kind, None)
        assert all(split[key].keys() == whole[key].keys() for key in whole)
        drifts[kind] = {
            key: max(float((split[key][n] - w).abs().max()) for n, w in found.items())
            for key, found in whole.items()
        }
    (given.folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(drifts))
    sys.stdout.flush()
    os._exit(0)  # see worker.py


if __name__ == "__main__":
    main()
