"""DeepSpeed ZeRO 1, 2 and 3: an fp32 master split over the ranks, and a copy for the forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_pss.distributed.backend import Part, Replicated

__all__ = ["Zero", "is_zero"]


def is_zero(parameter: Tensor) -> bool:
    """Tell whether DeepSpeed holds a parameter's fp32 master: marked by it, at any stage."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


@dataclass(frozen=True, slots=True)
class Zero(Replicated):
    """Reads the copy for the forward; writes the fp32 master and that copy.

    Written to the copy alone, the next step would undo an edit; to the master alone, the next
    forward would not see it. The copy is whole on every rank under stages 1 and 2 and gathered
    under stage 3, a parameter at a time.

    DeepSpeed applies the update inside ``backward``: gradients are gone and the update has happened
    before anybody can judge its norm.
    """

    can_hold_back: ClassVar[bool] = False

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Tell what DeepSpeed has done before anybody can look."""
        told = (
            "Under DeepSpeed an update has happened before its gradient norm is known: a step that "
            "is not finite cannot be skipped, and ends the run instead.",
        )
        if not any(getattr(parameter, "use_muon", False) for parameter in parameters.values()):
            return told
        return (
            *told,
            "DeepSpeed's own Muon reports the norm of the orthogonalised update, which hardly ever "
            "changes: gradient-norm detectors are blind here; use stable_rank_floor.",
        )

    def full(self, parameter: Tensor) -> Tensor:
        """Return a copy of the parameter as the forward sees it."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Write master and copy."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if is_zero(parameter):
            safe_set_full_fp32_param(parameter, full.float())
        # Rank 0's value goes to all where the copy is split, too.
        source = 0 if hasattr(parameter, "ds_id") else None
        with GatheredParameters([parameter], modifier_rank=source), torch.no_grad():
            parameter.copy_(full.to(parameter.dtype))

    def collect(self, parameter: Tensor, owner: int) -> Tensor | None:
        """Gather the copy under stage 3; it is there under the others."""
        whole = self.full(parameter)
        return whole if owner == self.rank else None

    @contextmanager
    def part(self, parameter: Tensor) -> Iterator[Part]:
        """Give the whole fp32 master, and write it and the copy at the end."""
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter) if is_zero(parameter) else None
        whole = master.detach().clone() if master is not None else self.full(parameter).clone()
        yield Part(whole)
        self.write_back_(parameter, whole)

    @contextmanager
    def moment_part(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> Iterator[Part | None]:
        """Give the whole moment, and write it back at the end."""
        from deepspeed.utils import (
            safe_get_full_optimizer_state,
            safe_set_full_optimizer_state,
        )

        for name in self._kept_states(parameter, names):
            try:
                moment = safe_get_full_optimizer_state(parameter, name)
            except KeyError:  # stage 3; on all ranks alike
                continue
            if moment is not None:
                whole = moment.detach().clone()
                yield Part(whole)
                safe_set_full_optimizer_state(parameter, whole, name)
                return
        yield None

    def _kept_states(self, parameter: Tensor, names: Sequence[str]) -> list[str]:
        """Return the states that can be asked for.

        Under stages 1 and 2 a rank that holds nothing of the parameter knows none, and would wait
        for those that do: the ranks tell each other first.
        """
        if hasattr(parameter, "ds_id"):
            return list(names)
        mapping = getattr(parameter, "_hp_mapping", None)
        keys = mapping.get_optim_state_keys() if mapping is not None else ()
        has = torch.tensor([float(name in keys) for name in names], device=parameter.device)
        return [name for name, count in zip(names, self.tell(has), strict=True) if count]
