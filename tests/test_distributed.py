"""Backends: whole weights in one process, replicas that agree, and a refusal of shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_pss import ConfigurationError, PSSController
from hf_pss.distributed import OneProcess, Replicated, backend_for

WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process_is_the_identity() -> None:
    backend, parameter = OneProcess(), nn.Parameter(torch.randn(2, 3))
    full = backend.full(parameter)
    assert full.data_ptr() == parameter.data_ptr()
    assert not full.requires_grad
    backend.write_back_(parameter, full)  # its own memory: nothing to copy
    backend.write_back_(parameter, torch.ones(2, 3))
    assert (parameter == 1).all()
    assert backend.agree(torch.tensor([0.1, float("inf")])) == [
        float(torch.tensor(0.1)),
        float("inf"),
    ]


def test_whole_parameters_in_one_process_get_the_identity() -> None:
    assert backend_for({"w": nn.Parameter(torch.ones(2, 2))}) == OneProcess()


@pytest.mark.usefixtures("one_process_group")
def test_a_group_of_one_gets_the_identity() -> None:
    assert backend_for({"w": nn.Parameter(torch.ones(2, 2))}) == OneProcess()


@pytest.mark.usefixtures("one_process_group")
def test_agreeing_replicas_keep_equal_numbers_to_the_bit() -> None:
    numbers = torch.randn(50).tolist()
    assert Replicated().agree(torch.tensor(numbers)) == numbers


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    mesh = init_device_mesh("cpu", (1,))
    shard = distribute_tensor(layer.linear1.weight.detach(), mesh, [Shard(0)])
    layer.linear1.weight = nn.Parameter(shard)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model.layers[0] = layer
    with pytest.raises(ConfigurationError, match=r"linear1\.weight belongs to FSDP2"):
        PSSController(model)


@pytest.mark.parametrize(
    ("mark", "owner"),
    [
        pytest.param("ds_id", "DeepSpeed ZeRO", id="ZeRO-3"),
        pytest.param("_hp_mapping", "DeepSpeed ZeRO", id="ZeRO-1 and 2"),
        pytest.param("_fsdp_flattened", "FSDP1", id="FSDP1 with its original parameters"),
    ],
)
def test_a_marked_parameter_is_refused(mark: str, owner: str) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    setattr(parameter, mark, 3)  # what these frameworks write on a parameter
    with pytest.raises(ConfigurationError, match=f"w belongs to {owner}"):
        backend_for({"w": parameter})


@pytest.mark.usefixtures("one_process_group")
def test_floats_are_agreed_upon_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-written DDP loop may give floats: NaN on another rank must reach this one."""

    def add_a_nan(values: torch.Tensor) -> None:
        values[1] += float("nan")

    monkeypatch.setattr(torch.distributed, "all_reduce", add_a_nan)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    norm, loss = PSSController(model, backend=Replicated()).to_host(0.1, 2.0)
    assert norm == 0.1
    assert loss != loss


def test_two_ddp_replicas_end_identical(tmp_path: Path) -> None:
    """Interventions at the same steps, and a NaN loss on one rank skipped by both."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parent), *sys.path]),
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher = subprocess.Popen(
        [sys.executable, *command, str(WORKER), str(tmp_path)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        _, errors = launcher.communicate(timeout=120)
    finally:
        launcher.terminate()  # and with it both ranks; a kill would leave them behind
    assert launcher.returncode == 0, errors[-3000:]
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["interventions"] >= 2
    assert (one["nonfinite_steps"], one["backend"]) == (1, "Replicated")
    lines = (tmp_path / "pss_events.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"intervention"' in line]) == one["interventions"]
