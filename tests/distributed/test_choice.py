"""Which backend fits a model, and what each does with a parameter of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor

from hf_pss import ConfigurationError, PSSConfig, PSSController
from hf_pss.models.distributed import Backend, Replicated, Sharded, Zero, backend_for


@pytest.fixture
def one_process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_process_is_the_identity() -> None:
    backend, parameter = Backend(), nn.Parameter(torch.randn(2, 3))
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
    assert type(backend_for({"w": nn.Parameter(torch.ones(2, 2))})) is Backend


@pytest.mark.usefixtures("one_process_group")
def test_a_group_of_one_gets_the_identity() -> None:
    assert type(backend_for({"w": nn.Parameter(torch.ones(2, 2))})) is Backend


@pytest.mark.usefixtures("one_process_group")
def test_agreeing_replicas_keep_equal_numbers_to_the_bit() -> None:
    numbers = torch.randn(50).tolist()
    assert Replicated().agree(torch.tensor(numbers)) == numbers


def sharded(placement: Placement) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (1,))
    return nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [placement]))


@pytest.mark.usefixtures("one_process_group")
def test_rows_over_a_mesh_are_fsdp2() -> None:
    parameter = sharded(Shard(0))
    backend = backend_for({"w": parameter})
    assert isinstance(backend, Sharded)
    full = backend.full(parameter).clone()
    assert torch.equal(full, parameter.full_tensor())
    assert torch.equal(backend.collect(parameter, 0), full)
    assert torch.equal(backend.collect(parameter, 0, slice(1, 3)), full[1:3])
    backend.write_back_(parameter, full + 1)
    assert torch.equal(parameter.full_tensor(), full + 1)
    with backend.part(parameter) as part:
        part.tensor.zero_()
    assert not parameter.full_tensor().any()


@pytest.mark.usefixtures("one_process_group")
def test_two_meshes_over_the_same_ranks_are_one_layout() -> None:
    """Each has a process group of its own."""
    backend = backend_for({"a": sharded(Shard(0)), "b": sharded(Shard(0))})
    assert isinstance(backend, Sharded)
    assert backend.replicas == ((0,),)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("placement", [Shard(1)])
def test_tensor_parallelism_is_refused(placement: Placement) -> None:
    with pytest.raises(ConfigurationError, match="w is split as"):
        backend_for({"w": sharded(placement)})


@pytest.mark.usefixtures("one_process_group")
def test_fsdp1_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter._fsdp_flattened = True  # what FSDP1 writes on a parameter
    with pytest.raises(ConfigurationError, match="w belongs to FSDP1"):
        backend_for({"w": parameter})


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_what_deepspeed_has_marked_is_zero(mark: str) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    setattr(parameter, mark, 3)
    assert isinstance(backend_for({"w": parameter}), Zero)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize(
    "options",
    [
        {"spike_update": "skip"},
        {"detectors": ("update_norm_ratio",)},
        {"detectors": ("matrix_grad_norm_ratio",)},
    ],
)
def test_deepspeed_refuses_what_it_is_too_late_for(options: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with pytest.raises(ConfigurationError, match="cannot work under DeepSpeed"):
        PSSController(model, PSSConfig.preset("paper", **options), backend=Zero())


@pytest.mark.usefixtures("one_process_group")
def test_deepspeeds_own_muon_is_announced() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    assert len(Zero().cautions({"w": parameter})) == 1
    parameter.use_muon = True
    assert "notice nothing" in Zero().cautions({"w": parameter})[1]


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
