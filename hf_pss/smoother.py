"""Carry an intervention out, in place: smooth the spectra of the model's selected matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_pss.distributed import Backend
from hf_pss.events import MatrixChange
from hf_pss.linalg import Smoothed, SmoothingFunction, SmoothingStatus, smooth_spectrum
from hf_pss.selection import MatrixView
from hf_pss.stacks import stacks, write_stack_

__all__ = ["smooth_matrices_"]


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
            changes += _on_record(healthy.names, shape, smoothed)
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
