"""A trial under FSDP2 in one's own loop: the second loss reads no gathered weights of the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from trained import language, loss_of, trained_gpt2

from hf_pss import PSSConfig, PSSController
from hf_pss.detection.policy import Action
from hf_pss.models.distributed import gathered, reshard

ROWS = language(0, 64)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_an_edit_of_shards_is_judged_and_taken_back(
    reshard_after_forward: bool, one_rank: None
) -> None:
    model = trained_gpt2()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    assert isinstance(model, FSDPModule)
    before = {name: gathered(value).clone() for name, value in model.state_dict().items()}
    pss = PSSController(
        model,
        PSSConfig.preset("paper", trial="spikes"),
        evaluate_loss=lambda: loss_of(model, ROWS),
    )
    assert type(pss._measurements.backend).__name__ == "Sharded"
    record = pss.smooth_now()
    assert record.event.decision is Action.UNDO
    assert record.loss_before is not None
    assert record.loss_after is not None
    assert record.loss_after > 1.01 * record.loss_before
    reshard(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], gathered(value)) for name, value in after.items())
