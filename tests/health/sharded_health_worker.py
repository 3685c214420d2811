"""One rank of a test of shards: the same three steps with shards, replicas and the whole."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import mixtral
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_pss.health.spectrum_metrics import (
    effective_rank_of,
    measure_alignments,
    measure_low_rank_distances,
    measure_spectra,
)
from hf_pss.health.update_metrics import RelativeUpdateMeter, SpectralEdgeMeter
from hf_pss.health.update_operator import measure_denominators
from hf_pss.models.distributed import Backend, Replicated, backend_for
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.tracked import SpectrumTracker

NUM_STEPS = 3


def build(kind: str) -> torch.nn.Module:
    """Return Conv1D with 20 rows, uneven over three ranks, or stacks of experts."""
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=20, n_head=2, vocab_size=48))
    return mixtral(5)


def measured(kind: str, backend: Backend | None) -> dict[str, float]:
    """Train for three steps; return every number by name. None: shard the model first."""
    model = build(kind)
    if backend is None:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parameters = named_parameters_canonical(model)
    backend = backend or backend_for(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    views = select_matrices(model).matrices
    updates = RelativeUpdateMeter(views, backend)
    edge = SpectralEdgeMeter(views, backend, window_size=NUM_STEPS)
    tracker = SpectrumTracker(views, backend)
    generator = torch.Generator().manual_seed(1)
    found = {}
    edge.measure(parameters)
    tracker.measure(parameters)
    for _ in range(NUM_STEPS):
        for _, parameter in sorted(parameters.items()):
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        updates.start(parameters)
        optimizer.step()
        found = {f"relative {name}": x for name, x in updates.stop(parameters).items()}
        gap = edge.measure(parameters)
        # Read at each step: more rounds for the same matrices, however many ranks there are.
        tracked = tracker.measure(parameters)
    assert gap is not None
    found |= {f"edge {i}": sigma for i, sigma in enumerate(gap.sigmas)}
    found |= {f"followed {name}": one.sigma for name, one in tracked.items()}
    found |= {f"norm {name}": one.frobenius for name, one in tracked.items()}
    spectra = measure_spectra(views, parameters, backend)
    ranks = {name: effective_rank_of(sigmas) for name, sigmas in spectra.items()}
    distances = measure_low_rank_distances(views, parameters, backend, 3)
    alignments = measure_alignments(views, parameters, backend)
    ranges = measure_denominators(views, parameters, optimizer, backend, trim=0.05)
    found |= {f"rank {name}": x for name, x in ranks.items()}
    found |= {f"distance {name}": x for name, x in distances.items()}
    found |= {f"alignment {pair}": x for pair, x in alignments.items()}
    found |= {f"bound {name}": one.sqrt_condition for name, one in ranges.items()}
    found |= {f"trimmed {name}": one.trimmed_sqrt_condition for name, one in ranges.items()}
    return found


def main() -> None:
    dist.init_process_group("gloo")
    drifts = {}
    for kind in ("gpt2", "experts"):
        whole = measured(kind, Backend())
        for name, backend in (("sharded", None), ("replicated", Replicated())):
            other = measured(kind, backend)
            assert other.keys() == whole.keys()
            assert all(map(math.isfinite, whole.values()))
            by_metric: dict[str, float] = {}
            for key, expected in whole.items():
                metric = key.split()[0]
                drift = abs(other[key] - expected) / (1.0 if metric == "alignment" else expected)
                by_metric[metric] = max(by_metric.get(metric, 0.0), drift)
            drifts[f"{kind} {name}"] = by_metric
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(drifts))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an ordinary exit


if __name__ == "__main__":
    main()
