"""Carry an intervention out, in place: smooth the spectra of the model's selected matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_pss.distributed import Backend
from hf_pss.events import MatrixChange
from hf_pss.linalg import (
    Smoothed,
    SmoothingFunction,
    SmoothingStatus,
    StableRankCap,
    Triplets,
    quick_triplets,
    smooth_spectrum,
)
from hf_pss.selection import MatrixView
from hf_pss.stacks import Stack, gather, stacks, write_stack_

__all__ = ["Look", "cap_matrices_", "look_at_matrices", "smooth_matrices_"]


@torch.no_grad()
def smooth_matrices_(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    phi_for: Callable[[Sequence[str]], SmoothingFunction],
    *,
    names: Collection[str] | None = None,
    max_rank: int,
    keep_frobenius: bool = False,
    and_then: Callable[[Stack, Smoothed], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Smooth the dominant singular values of matrices in place: W ← W + U_k (φ(Σ_k) − Σ_k) V_kᵀ.

    Equal shapes go through one batched call. A matrix that holds NaN or inf is reported, never
    decomposed, never written.

    Args:
        views: The selected matrices.
        parameters: The model's parameters by canonical name; those touched change in place.
        backend: How parameters are stored.
        phi_for: The smoothing function for a batch of matrices, given their names in order: a
            function whose level differs from matrix to matrix returns it per name.
        names: Only these 2-D matrices; all when None.
        max_rank: At most so many singular values of a matrix move.
        keep_frobenius: Rescale each smoothed matrix to the Frobenius norm it had.
        and_then: Told of each batch, as it was read, and what was done to it.

    Returns:
        What happened to each matrix looked at, in the order of the batches.
    """
    changes: list[MatrixChange] = []
    for stack in stacks(views, parameters, backend, names=names):
        finite = stack.matrices.isfinite().flatten(1).all(1).tolist()
        shape = tuple(stack.matrices.shape[-2:])
        changes += [
            MatrixChange(name, shape, "non_finite")
            for name, is_finite in zip(stack.names, finite, strict=True)
            if not is_finite
        ]
        healthy = stack if all(finite) else stack.where(finite)
        if healthy.slots:
            smoothed = smooth_spectrum(
                healthy.matrices,
                phi_for(healthy.names),
                max_rank=max_rank,
                keep_frobenius=keep_frobenius,
                check_finite=False,  # just done, matrix by matrix
            )
            changed = smoothed.changed.tolist()
            write_stack_(healthy, smoothed.weight, changed, parameters, backend)
            if and_then is not None:
                and_then(healthy, smoothed)
            changes += _on_record(healthy.names, shape, smoothed)
    return tuple(changes)


@dataclass(frozen=True, slots=True)
class Look:
    """The leading singular triplets of a stack of matrices, and what they say."""

    stack: Stack
    """Without its matrices: they would be a second copy of the model."""
    triplets: Triplets
    tails: Tensor
    """(len(stack.names),), the Frobenius norm of what the triplets leave."""
    stable_ranks: Tensor
    """(len(stack.names),), NaN where a matrix holds NaN or inf."""

    def reaches(self, floors: Mapping[str, float], max_rank: int) -> list[bool]:
        """Tell of each matrix whether capping the triplets at hand can bring it to its floor.

        Capped at the last of K values, a matrix has the stable rank K + tail² / σ_K².
        """
        num_values = self.triplets.sigma.shape[-1]
        last = self.triplets.sigma[:, -1]
        highest = num_values + (self.tails / torch.where(last > 0, last, 1.0)).square()
        enough = num_values <= max_rank + 1
        return [
            enough and rank >= floors[name]
            for name, rank in zip(self.stack.names, highest.tolist(), strict=True)
        ]


@torch.no_grad()
def look_at_matrices(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> tuple[Look, ...]:
    """Look at all matrices with `quick_triplets`; σ₁ is low, and the stable rank high, by its band.

    Args:
        views: What to look at.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    looks = []
    for stack in stacks(views, parameters, backend):
        triplets, tails = quick_triplets(stack.matrices)
        values = torch.cat([triplets.sigma, tails.unsqueeze(-1)], dim=-1)
        ratios = values / torch.where(values[:, :1] == 0, 1.0, values[:, :1])
        ranks = ratios.square().sum(dim=-1)
        looks.append(Look(replace(stack, matrices=tails.new_empty(0)), triplets, tails, ranks))
    return tuple(looks)


@torch.no_grad()
def cap_matrices_(
    looks: Sequence[Look],
    floors: Mapping[str, float],
    names: Collection[str],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    *,
    max_rank: int,
    keep_frobenius: bool = False,
    and_then: Callable[[Stack, Smoothed], None] | None = None,
) -> tuple[MatrixChange, ...]:
    """Bring the named matrices up to their stable-rank floors, with the triplets of a look at them.

    Where a look has too few triplets to reach the floor, the matrix is decomposed thoroughly.

    Args:
        looks: Of the matrices as they are now.
        floors: Of each matrix, by name.
        names: Which matrices; finite ones only.
        parameters: The model's parameters by canonical name; those touched change in place.
        backend: How parameters are stored.
        max_rank: At most so many singular values of a matrix move.
        keep_frobenius: Rescale each capped matrix to the Frobenius norm it had.
        and_then: As in `smooth_matrices_`.
    """
    changes: list[MatrixChange] = []
    for look in looks:
        kept = [name in names for name in look.stack.names]
        if not any(kept):
            continue
        reaches = look.reaches(floors, max_rank)
        for is_known in (True, False):
            part = [keep and reach is is_known for keep, reach in zip(kept, reaches, strict=True)]
            if not any(part):
                continue
            slots = look.stack.where_slots(part)
            stack = Stack(slots, gather(slots, parameters, backend))
            index = [i for i, keep in enumerate(part) if keep]
            smoothed = smooth_spectrum(
                stack.matrices,
                StableRankCap(torch.tensor([floors[name] for name in stack.names])),
                max_rank=max_rank,
                keep_frobenius=keep_frobenius,
                check_finite=False,
                known=(look.triplets.where(part), look.tails[index]) if is_known else None,
            )
            write_stack_(stack, smoothed.weight, smoothed.changed.tolist(), parameters, backend)
            if and_then is not None:
                and_then(stack, smoothed)
            changes += _on_record(stack.names, tuple(stack.matrices.shape[-2:]), smoothed)
    return tuple(changes)


def _on_record(
    names: Sequence[str], shape: tuple[int, ...], smoothed: Smoothed
) -> Iterator[MatrixChange]:
    columns = (
        smoothed.status,
        smoothed.rank,
        smoothed.sigma_before[:, 0],
        smoothed.spectral_norm_after,
        smoothed.stable_rank_before,
        smoothed.stable_rank_after,
    )
    for name, status, *numbers in zip(names, *(c.tolist() for c in columns), strict=True):
        yield MatrixChange(name, shape, SmoothingStatus(status).name.lower(), *numbers)
