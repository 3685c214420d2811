"""DeepSpeed ZeRO 1, 2 and 3: a split fp32 master, and a copy for the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_pss.models.distributed.backend import Part, Replicated, to_owner


def is_zero(parameter: Tensor) -> bool:
    """Return whether DeepSpeed holds a parameter's fp32 master. It marks these at any stage."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


class Zero(Replicated):
    """Reads the copy for the forward pass. Writes the fp32 master and the copy.

    Both must be written. The next step would undo an edit of only the copy, and the next forward
    pass would ignore an edit of only the master. Under stages 1 and 2 the copy is complete on every
    rank. Under stage 3 the owner gathers the rows that it reads. The master is a flat array. Each
    rank stores a piece of it that may end in the middle of a row. The rows that an edit changes are
    assembled on all ranks, and each rank then stores its piece.

    DeepSpeed applies the update inside ``backward``. When the gradient norm is known, the
    gradients no longer exist, and the update has already happened. DeepSpeed itself drops an
    update that is not finite.
    """

    can_hold_back: ClassVar[bool] = False

    def cautions(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return warnings about DeepSpeed's early update and about DeepSpeed's Muon."""
        early = (
            "DeepSpeed applies an update before its gradient norm is known, so PSS cannot hold it "
            "back. DeepSpeed itself discards an update whose gradient is not finite. If you "
            "disabled that (bf16 with check_grad_overflow: false), such a step ends the run.",
        )
        if not any(getattr(parameter, "use_muon", False) for parameter in parameters.values()):
            return early
        return (
            *early,
            "DeepSpeed's own Muon reports the norm of the orthogonalised update, which hardly ever "
            "changes, so gradient-norm detectors notice nothing. Use stable_rank_floor instead.",
        )

    def full(self, parameter: Tensor) -> Tensor:
        """Return the parameter as the forward pass uses it."""
        if not _is_split(parameter):
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write_back_(self, parameter: Tensor, full: Tensor) -> None:
        """Write the master and the copy."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if is_zero(parameter):
            safe_set_full_fp32_param(parameter, full.float())
        # If the copy is also split, all ranks receive the value of rank 0.
        source = 0 if hasattr(parameter, "ds_id") else None
        with GatheredParameters([parameter], modifier_rank=source), torch.no_grad():
            parameter.copy_(full.to(parameter.dtype))

    def keep(self, parameter: Tensor) -> Tensor:
        """Return a copy of this rank's piece of the fp32 master."""
        if not _has_master(parameter):
            return self.full(parameter).clone()
        return _piece(parameter, None)[0].clone()

    def put_back_(self, parameter: Tensor, kept: Tensor) -> None:
        """Copy the piece back, and rebuild the copy for the forward pass from all ranks' pieces."""
        if not _has_master(parameter):
            self.write_back_(parameter, kept)
            return
        piece, _, _ = _piece(parameter, None)
        piece.copy_(kept)
        _store(parameter, None, piece)
        with self.part(parameter):
            pass  # `part` writes the master into the copy when it closes

    def master(self, parameter: Tensor) -> Tensor:
        """Return the fp32 master, or the copy if there is none (frozen under stage 3)."""
        if not _has_master(parameter):
            return self.full(parameter)
        return _Opened.of(parameter, None, None).tensor

    def collect(self, parameter: Tensor, owner: int, rows: slice | None = None) -> Tensor | None:
        """Gather these rows of the copy under stage 3. Under the other stages they are local."""
        rows = rows or slice(0, _stored_shape(parameter)[0])
        if not _is_split(parameter):
            return parameter.detach()[rows] if owner == self.rank else None
        if not _has_plain_pieces(parameter):
            whole = self.full(parameter)
            return whole[rows] if owner == self.rank else None
        stored: Any = parameter
        piece, group = stored.ds_tensor, stored.ds_process_group
        shape = _stored_shape(parameter)
        width = shape[1:].numel()
        wanted = rows.start * width, rows.stop * width
        place = dist.get_group_rank(group, owner)
        found = to_owner(piece, wanted, len(piece), place, group, parameter.device)
        return None if found is None else found.view(-1, *shape[1:])

    @contextmanager
    def part(self, parameter: Tensor, rows: slice | None = None) -> Iterator[Part]:
        """Give these rows of the fp32 master. Write them, and those of the copy, at the end."""
        if not _has_master(parameter):
            whole = self.full(parameter).clone()
            yield Part(whole)
            self.write_back_(parameter, whole)
            return
        opened = _Opened.of(parameter, None, rows)
        yield Part(opened.tensor, opened.rows.start)
        opened.close_()
        stored: Any = parameter
        if hasattr(parameter, "ds_id") and not _has_plain_pieces(parameter):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter[opened.rows].copy_(opened.tensor)
            return
        if hasattr(parameter, "ds_id"):  # the copy may be complete only for now; this piece stays
            opened.write_piece_(stored.ds_tensor)
        if not _is_split(parameter):
            parameter.detach()[opened.rows].copy_(opened.tensor)

    @contextmanager
    def moment_part(
        self,
        optimizer: Optimizer,
        parameter: Tensor,
        names: Sequence[str],
        rows: slice | None = None,
    ) -> Iterator[Part | None]:
        """Give these rows of the moment, and write them back at the end."""
        opened = self._opened_moment(parameter, names, rows)
        if opened is None:
            yield None
            return
        yield Part(opened.tensor, opened.rows.start)
        opened.close_()

    @contextmanager
    def read_part(self, parameter: Tensor) -> Iterator[Part]:
        """Give the complete copy. Under stage 3 it is gathered, one parameter at a time."""
        yield Part(self.full(parameter))

    @contextmanager
    def read_moment(
        self, optimizer: Optimizer, parameter: Tensor, names: Sequence[str]
    ) -> Iterator[Part | None]:
        """Assemble the complete moment on every rank, in fp32, and write nothing back."""
        opened = self._opened_moment(parameter, names, None)
        yield None if opened is None else Part(opened.tensor)

    def _opened_moment(
        self, parameter: Tensor, names: Sequence[str], rows: slice | None
    ) -> _Opened | None:
        for name in self._kept_states(parameter, names):
            try:
                return _Opened.of(parameter, name, rows)
            except KeyError:  # stage 3, and the same on all ranks
                continue
        return None

    def _kept_states(self, parameter: Tensor, names: Sequence[str]) -> list[str]:
        """Return the names of the states that exist.

        Under stages 1 and 2 a rank may store nothing of the parameter. It then has none of the
        states, and would leave the other ranks waiting. So the ranks exchange the names first.
        """
        if hasattr(parameter, "ds_id"):
            return list(names)
        mapping = getattr(parameter, "_hp_mapping", None)
        keys = mapping.get_optim_state_keys() if mapping is not None else ()
        has = torch.tensor([float(name in keys) for name in names], device=parameter.device)
        return [name for name, count in zip(names, self.sum_to_host(has), strict=True) if count]


@dataclass(frozen=True, slots=True)
class _Opened:
    """Rows of an fp32 master or of an optimizer's state, assembled on all ranks."""

    parameter: Any
    name: str | None
    """The name of the state. None means the master."""
    rows: slice
    tensor: Tensor
    """The rows, (rows, ...), fp32."""
    piece: Tensor
    """This rank's piece of the flattened parameter. It may be empty."""
    start: int
    """The offset of that piece, in elements."""

    @classmethod
    def of(cls, parameter: Any, name: str | None, rows: slice | None) -> _Opened:
        shape = _stored_shape(parameter)
        rows = rows or slice(0, shape[0])
        piece, start, group = _piece(parameter, name)
        tensor = torch.zeros(
            rows.stop - rows.start, *shape[1:], dtype=torch.float32, device=parameter.device
        )
        opened = cls(parameter, name, rows, tensor, piece, start)
        mine, here = opened._overlap(piece)
        here.copy_(mine)
        dist.all_reduce(tensor, group=group)
        return opened

    def close_(self) -> None:
        """Store this rank's piece of the changed rows."""
        self.write_piece_(self.piece)
        _store(self.parameter, self.name, self.piece)

    def write_piece_(self, piece: Tensor) -> None:
        """Overwrite the rows in a tensor that is laid out like this rank's piece."""
        mine, here = self._overlap(piece)
        with torch.no_grad():
            mine.copy_(here)

    def _overlap(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """Return writable views of the common elements, in the piece and in the rows."""
        flat = self.tensor.view(-1)
        offset = self.rows.start * _stored_shape(self.parameter)[1:].numel()
        first = max(self.start, offset)
        last = max(first, min(self.start + len(piece), offset + len(flat)))
        return (
            piece[first - self.start : last - self.start],
            flat[first - offset : last - offset],
        )


def _piece(parameter: Any, name: str | None) -> tuple[Tensor, int, Any]:
    """Return this rank's flat piece of a master or state, its offset, and the ranks' group."""
    if not hasattr(parameter, "ds_id"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return parameter.new_empty(0), 0, parameter._dp_group
        start = mapping.lp_fragment_address.start
        return mapping.get_hp_fragment(name).detach(), start, parameter._dp_group
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    group = parameter.ds_process_group
    piece = (
        safe_get_local_fp32_param(parameter)
        if name is None
        else safe_get_local_optimizer_state(parameter, name)
    ).detach()
    return piece, len(piece) * dist.get_rank(group), group


def _store(parameter: Any, name: str | None, piece: Tensor) -> None:
    """Store a changed piece that `_piece` returned. Under stage 3 it may be a copy."""
    if not hasattr(parameter, "ds_id"):
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if name is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, name)


def _has_master(parameter: Tensor) -> bool:
    return is_zero(parameter) and parameter.requires_grad


def _stored_shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _is_split(parameter: Tensor) -> bool:
    """Return whether the copy is split now. Under stage 3 small parameters are not split."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def _has_plain_pieces(parameter: Any) -> bool:
    """Return whether each rank stores a piece of the copy that is not swapped or quantised."""
    piece = parameter.ds_tensor
    return (
        dist.get_world_size(parameter.ds_process_group) == dist.get_world_size()
        and piece.status.name == "AVAILABLE"
        and not hasattr(piece, "ds_quant_scale")
        and getattr(parameter, "ds_secondary_tensor", None) is None
    )
