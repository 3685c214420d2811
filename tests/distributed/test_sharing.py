"""Work shared out over ranks: who does what, how much of it, and how much travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from helpers import gpt2, mixtral
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from hf_pss.errors import ElsewhereError
from hf_pss.linalg import Clip, quick_stable_rank
from hf_pss.models import batching as stacks
from hf_pss.models.batching import (
    DecompositionError,
    assign_rounds,
    decomposition_cost,
    matrix_names,
    measure_each,
)
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import named_parameters_canonical, select_matrices
from hf_pss.models.smoother import RAISED, smooth_matrices_

WORLD_SIZES = [2, 4, 8]
# A rank's share of the work, relative to 1/N.
IMBALANCE = 0.15  # 0, counted and planned, at all of these sizes


@dataclass(frozen=True)
class Simulated(Backend):
    """One rank of many, the others of which never answer: it does its own share and no other."""

    number: int
    count: int
    sent: list[int] = field(default_factory=list)
    collected: list[tuple[int, int]] = field(default_factory=list)
    is_shared: ClassVar[bool] = True

    @property
    def rank(self) -> int:
        return self.number

    @property
    def world_size(self) -> int:
        return self.count

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        found = super().collect(parameter, owner, rows)
        if found is not None:
            self.collected.append((id(parameter), len(found)))
        return found

    def send_(self, tensor: Tensor, owner: int) -> None:
        if owner == self.rank:
            self.sent.append(tensor.numel() * tensor.element_size())


MODELS: Mapping[str, PreTrainedModel] = {
    "GPT-2 124M": GPT2Config(),
    "Llama 7B": LlamaConfig(intermediate_size=11008),
}


@pytest.fixture(scope="module", params=list(MODELS))
def on_meta(request: pytest.FixtureRequest) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[request.param])
    return model


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_planned_shares_are_alike_at_real_sizes(on_meta: nn.Module, world_size: int) -> None:
    views = select_matrices(on_meta).matrices
    turns = assign_rounds(views, named_parameters_canonical(on_meta), world_size)
    load = [0] * world_size
    names = []
    for turn in turns:
        assert len(turn) == world_size
        for rank, slots in enumerate(turn):
            load[rank] += sum(decomposition_cost(slot.shape) for slot in slots)
            names += [slot.name for slot in slots]
    assert sorted(names) == sorted(matrix_names(views)), "each matrix has one owner"
    for share in load:
        assert share / sum(load) == pytest.approx(1 / world_size, rel=IMBALANCE)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_counted_operations_are_alike(world_size: int) -> None:
    """Multiplications that torch counts, in decompositions above the size of an exact SVD."""
    torch.manual_seed(0)
    model = gpt2(num_layers=8, width=192)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    counted = []
    for rank in range(world_size):
        backend = Simulated(rank, world_size)
        with FlopCounterMode(display=False) as counter:
            measure_each(views, parameters, backend, quick_stable_rank)
            smooth_matrices_(views, parameters, backend, lambda names: Clip(), max_rank=32)
        counted.append(counter.get_total_flops())
    for flops in counted:
        assert flops / sum(counted) == pytest.approx(1 / world_size, rel=IMBALANCE)


def test_only_what_moves_travels() -> None:
    """(m + n + 2) · k floats of 4 bytes and eight numbers of 8 bytes a matrix, and nothing else."""
    torch.manual_seed(0)
    model = gpt2(num_layers=2, width=192)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    backend = Simulated(0, 1)
    changes = smooth_matrices_(views, parameters, backend, lambda names: Clip(), max_rank=32)
    assert {change.status for change in changes} == {"truncated"}  # noise has a higher stable rank
    # Clip moves the k dominant values; the one behind them is its level.
    floats = sum((sum(c.shape) + 2) * (c.rank or 0) for c in changes)
    assert sum(backend.sent) == 4 * floats + 8 * 8 * len(changes)
    of_weights = sum(4 * m * n for m, n in (c.shape for c in changes))
    assert sum(backend.sent) < of_weights / 2


def experts() -> PreTrainedModel:
    torch.manual_seed(0)
    return mixtral(8)


def test_experts_are_gathered_once_though_they_take_several_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gate and up projections of an expert come together: they are rows of one parameter."""
    monkeypatch.setattr(stacks, "_MAX_ELEMENTS", 4 * 16 * 24)  # two experts' gate and up a turn
    model = experts()
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    backend = Simulated(0, 1)
    measure_each(views, parameters, backend, lambda w: w.flatten(1).norm(dim=1))
    for name in ("gate_up_proj", "down_proj"):
        parameter = parameters[f"model.layers.0.mlp.experts.{name}"]
        pieces = [rows for key, rows in backend.collected if key == id(parameter)]
        assert sum(pieces) == len(parameter) == 8
        assert len(pieces) == {"gate_up_proj": 4, "down_proj": 2}[name]


@dataclass(frozen=True)
class WithAnother(Simulated):
    """The last of some ranks; the others do nothing, or report that they have failed."""

    flag: float = 0.0
    failed: float = 0.0

    def sum_to_host(self, values: Tensor) -> list[float]:
        *numbers, failed, own = values.tolist()
        return [*numbers, failed + self.failed, own + self.flag]


def test_who_fails_on_the_way_goes_on_to_where_all_raise() -> None:
    torch.manual_seed(0)
    model = gpt2(num_layers=2, width=32)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    turns = assign_rounds(views, parameters, 2)
    backend, calls = WithAnother(0, 2), []

    def measure(matrices: Tensor) -> Tensor:
        calls.append(len(matrices))
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        measure_each(views, parameters, backend, measure)
    assert len(calls) == sum(bool(turn[0]) for turn in turns), "every turn was taken part in"
    with pytest.raises(ElsewhereError, match="Another rank has failed"):
        measure_each(views, parameters, WithAnother(0, 2, flag=1.0), lambda w: w[:, 0, 0])


def test_a_decomposition_that_fails_on_one_rank_is_the_same_error_on_all() -> None:
    model = gpt2(num_layers=1, width=32)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)

    def fails(matrices: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    with pytest.raises(DecompositionError, match="did not converge"):
        measure_each(views, parameters, WithAnother(0, 2), fails)
    with pytest.raises(DecompositionError, match="on another rank"):
        measure_each(views, parameters, WithAnother(0, 2, failed=1.0), lambda w: w[:, 0, 0])
    # What is worse elsewhere ends the run on all, also where only a decomposition has failed.
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        measure_each(views, parameters, WithAnother(0, 2, flag=1.0), fails)
    assert not isinstance(caught.value, DecompositionError)


def test_a_smoothing_that_fails_is_told_before_it_is_raised() -> None:
    torch.manual_seed(0)
    model = gpt2(num_layers=1, width=32)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    backend = Simulated(0, 2)

    def phi_for(names: Sequence[str]) -> Clip:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        smooth_matrices_(views, parameters, backend, phi_for, max_rank=32)
    assert backend.sent, "the others do not wait"

    class Failing(Simulated):
        def send_(self, tensor: Tensor, owner: int) -> None:
            if owner == 0:
                tensor[:, 0] = RAISED  # what the other rank sends

    with pytest.raises(ElsewhereError):
        smooth_matrices_(views, parameters, Failing(1, 2), lambda names: Clip(), max_rank=32)


def test_each_measured_once_and_named() -> None:
    torch.manual_seed(0)
    model = gpt2(num_layers=2, width=32)
    views, parameters = select_matrices(model).matrices, named_parameters_canonical(model)
    alone = measure_each(views, parameters, Backend(), lambda w: w.flatten(1).norm(dim=1))
    assert list(alone) == list(matrix_names(views))
    shares = [
        measure_each(views, parameters, Simulated(r, 3), lambda w: w.flatten(1).norm(dim=1))
        for r in range(3)
    ]
    for name, number in alone.items():
        assert sorted(share[name] for share in shares) == [0.0, 0.0, number]
