"""Measurements of one model for the detectors: norms, stable ranks, and the origin of NaN."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_pss.config import PSSConfig, check_config
from hf_pss.detection.detectors import GLOBAL, Readings
from hf_pss.errors import ConfigurationError
from hf_pss.linalg import quick_stable_rank, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.adapters import AdapterSpectrum, measure_adapter_spectra
from hf_pss.models.anchors import NUM_RECORDED, leading_values
from hf_pss.models.batching import (
    MatrixRef,
    matrix_refs,
    matrix_shapes,
    measure_each,
    measure_rows,
)
from hf_pss.models.distributed import Backend, Part, backend_for, gathered
from hf_pss.models.selection import (
    MatrixView,
    Selection,
    canonical_name,
    named_parameters_canonical,
    select_matrices,
)
from hf_pss.models.selection.by_name import ADAPTER_FACTOR
from hf_pss.models.tracked import SpectrumTracker
from hf_pss.records.messages import name_on_ranks

logger = logging.getLogger(__name__)


@torch.no_grad()
def gradient_norms(
    named_parameters: Iterable[tuple[str, nn.Parameter]], backend: Backend
) -> dict[str, Tensor]:
    """Return the norm of this rank's part of each gradient, on the device, by parameter.

    Measure before clipping. Clipping by a NaN norm makes every gradient NaN, and this hides the
    parameter where the NaN began. Cost: one pass over the gradients, and no device-to-host read.
    """
    grads = {n: _local(p.grad, backend).tensor for n, p in named_parameters if p.grad is not None}
    return dict(zip(grads, _norms(list(grads.values())), strict=True))


def nonfinite_gradients(norms: Mapping[str, Tensor], backend: Backend) -> tuple[str, ...]:
    """Return the parameters, in the model's order, whose gradient holds NaN or inf. One read.

    If there are several ranks, all of them must make this call.

    Args:
        norms: The result of `gradient_norms`.
        backend: How parameters are stored.
    """
    if not norms:
        return ()
    device = next(iter(norms.values())).device
    flags = torch.stack([(~norm.isfinite()).double().to(device) for norm in norms.values()])
    backend.total_(flags)
    return tuple(n for n, bad in zip(norms, flags.tolist(), strict=True) if bad)


@torch.no_grad()
def first_nonfinite(tensors: Iterable[tuple[str, Tensor, bool]]) -> str | None:
    """Return the name of the first tensor that holds NaN or inf, or None if all are finite.

    The device reads each tensor once, and the host reads one bool per tensor.

    Args:
        tensors: The name of each tensor, the tensor, and whether it may hold inf, though not NaN.
            Of a sharded tensor only the part of this rank is read, without a collective.
    """
    names, largest, may_be_inf = [], [], []
    for name, tensor, may in tensors:
        # A DTensor keeps the part of this rank in _local_tensor. DeepSpeed ZeRO-3 empties the
        # parameter and keeps that part in ds_tensor.
        stored: Any = getattr(tensor, "ds_tensor", tensor)
        local = getattr(stored, "_local_tensor", stored).detach()
        # Eight-bit floats store quantised weights, which are not trained directly.
        if local.is_floating_point() and local.element_size() > 1 and local.numel():
            names.append(name)
            # The norm is max |x|, or NaN if any x is NaN. It needs no copy of the tensor.
            largest.append(torch.linalg.vector_norm(local, torch.inf).float())
            may_be_inf.append(may)
    if not names:
        return None
    device = largest[0].device
    sizes = torch.stack([size.to(device) for size in largest])
    is_bad = sizes.isnan() | (sizes.isinf() & ~torch.tensor(may_be_inf, device=device))
    return next((name for name, bad in zip(names, is_bad.tolist(), strict=True) if bad), None)


@torch.no_grad()
def measure_matrix_grad_norms(
    views: Sequence[MatrixView],
    parameters: Mapping[str, nn.Parameter],
    backend: Backend,
    grad_norm_preclip: float,
    *,
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, float]:
    """Return the gradient norm of each 2-D matrix by name, as it was before clipping.

    Clipping and loss scaling multiply all gradients by one factor. The current norms are therefore
    rescaled so that their total is the norm before clipping.

    Args:
        views: The matrices to measure.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        grad_norm_preclip: The global norm before clipping. It is finite.
        groups: Parameters that count as one matrix, by the name of that matrix.

    Returns:
        The norm of each matrix by name. Matrices without a gradient are left out.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    both = {name: own for name, own in groups.items() if all(n in grads for n in own)}
    if not held and not both:
        return {}
    parts = {name: _local(grad, backend) for name, grad in grads.items()}
    refs = matrix_refs(held)
    norms = [_norm(ref, parts[ref.view.parameter_name]) for ref in refs]
    device = next(iter(parts.values())).tensor.device
    squares = torch.stack(
        [
            *(norm.to(device, torch.float64).square() for norm in norms),
            *(_total([parts[n].tensor for n in own], device) for own in both.values()),
            _total([part.tensor for part in parts.values()], device),
        ]
    )
    backend.total_(squares)
    *host, found = backend.agree(squares.sqrt())
    factor = grad_norm_preclip / found if found else 0.0
    names = (*(ref.name for ref in refs), *both)
    return {name: norm * factor for name, norm in zip(names, host, strict=True)}


def _local(tensor: Tensor, backend: Backend) -> Part:
    with backend.part(tensor) as part:
        return part


def _norm(ref: MatrixRef, part: Part) -> Tensor:
    piece = ref.view.piece(part.tensor, part.start, ref.expert)
    if piece is None:
        return part.tensor.new_zeros((), dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(part.tensor))
    return norm


def _norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the norm of each tensor, never in a half dtype, because fp16 ends at 65,504."""
    if not tensors:
        return ()
    dtypes = {compute_dtype(tensor) for tensor in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(torch._foreach_norm(list(tensors), 2, dtype))


def _total(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the squared norm of the entries of all tensors, float64, on that device."""
    norms = [norm.to(device, torch.float64) for norm in _norms(tensors)]
    return torch.stack(norms).square().sum()


class UpdateMeter:
    """Measures one update as ‖W_t − W_{t−1}‖ over the named parameters.

    Cost: the memory of one copy of the parameters, and three passes over it at every step.
    """

    def __init__(self, names: Sequence[str], backend: Backend) -> None:
        self.names = tuple(names)
        self._backend = backend
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the parameters before the update."""
        self._before = [tensor.clone() for tensor in self._now(parameters)]

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of the change since `start`, shape (1,), and drop the copy."""
        changes = [
            torch.linalg.vector_norm(after.float() - before.float())
            for after, before in zip(self._now(parameters), self._before, strict=True)
        ]
        self._before = []
        device = changes[0].device
        norms = torch.stack([change.to(device) for change in changes])
        total = norms.double().square().sum().reshape(1)
        self._backend.total_(total)
        return total.sqrt()

    def _now(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        return [_local(parameters[name], self._backend).tensor for name in self.names]


_MAX_NAMED = 3


class Measurements:
    """Measures one model. It makes no decisions and changes nothing.

    Args:
        model: The model. Its parameters are looked up by name every time, so
            wrappers may swap them.
        config: The options that select the matrices to measure.
        backend: How parameters are stored. If None, it is determined from the parameters.

    Raises:
        SelectionError: A pattern matches nothing, or nothing that can be selected.
        ConfigurationError: The model is sharded in a way that is not supported, has no weights yet,
            or is not a model.
    """

    def __init__(self, model: nn.Module, config: PSSConfig, backend: Backend | None) -> None:
        _check(model, config)
        self.model = model
        """The measured model, which may be wrapped."""
        self._config = config
        self.backend = backend if backend is not None else backend_for(self.parameters())
        self.selection = select_watched(model, config)
        self.shapes = matrix_shapes(self.selection.matrices)
        self._adapters = self.selection.adapters
        self.tracker = SpectrumTracker(self.selection.matrices, self.backend)
        """Follows the spectra of the matrices from reading to reading, after each `follow`."""
        self._followed: Mapping[str, nn.Parameter] = {}
        watched = {view.parameter_name for view in self.selection.matrices}
        watched |= {name for view in self._adapters for name in (view.left_name, view.right_name)}
        self._meter = UpdateMeter(sorted(watched), self.backend)
        self._probe: dict[str, Tensor] | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's current parameters by canonical name."""
        return named_parameters_canonical(self.model)

    def fingerprint(self) -> str:
        """Return a short hash of the names and shapes of the selected matrices."""
        products = {view.name: view.shape for view in self._adapters}
        rows = (f"{name} {m}x{n}" for name, (m, n) in {**self.shapes, **products}.items())
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def to_host(self, *values: float | Tensor | None) -> list[float | None]:
        """Return numbers as host floats. All tensors among them need one device-to-host read.

        If there are several ranks, each number is the mean over ranks, even if it is a float. So
        every rank must make this call.
        """
        if self.backend.is_shared:
            device = next(iter(self.model.parameters())).device
            values = tuple(
                torch.tensor(v, dtype=torch.float64, device=device) if isinstance(v, float) else v
                for v in values
            )
        tensors = [gathered(v.detach()).reshape(()) for v in values if isinstance(v, Tensor)]
        host: Iterator[float] = iter(())
        if tensors:
            is_exact = any(tensor.dtype == torch.float64 for tensor in tensors)
            # If a model is spread over several devices, the loss and the norm
            # are on different ones.
            target = (tensors[0].device, torch.float64 if is_exact else torch.float32)
            host = iter(self.backend.agree(torch.stack([tensor.to(*target) for tensor in tensors])))
        return [next(host) if isinstance(v, Tensor) else v for v in values]

    def inspect_gradients(self) -> None:
        """Record on the device which gradients are finite."""
        self._probe = gradient_norms(self.model.named_parameters(), self.backend)

    def first_nonfinite_gradients(self) -> tuple[str, ...]:
        """Return the first parameters whose gradient is not finite, with one device-to-host read.

        If every gradient is NaN, the result is empty unless `inspect_gradients` was called before
        clipping. The reason is that clipping by a NaN norm makes every gradient NaN.
        """
        norms = self._probe or gradient_norms(self.model.named_parameters(), self.backend)
        broken = nonfinite_gradients(norms, self.backend)
        if self._probe is None and len(broken) == len(norms):
            return ()
        return tuple(map(canonical_name, broken[:_MAX_NAMED]))

    def nonfinite_weight(self) -> str | None:
        """Return the name and the rank of the first trained weight that is not finite, or None.

        Cost: one pass over the weights, and one collective that every rank must join.
        """
        trained = ((n, p, False) for n, p in self.parameters().items() if p.requires_grad)
        broken = first_nonfinite(trained)
        device = next(iter(self.model.parameters())).device
        ranks = self.backend.ranks_with(broken is not None, device)
        return name_on_ranks(broken, ranks) if ranks else None

    def forget_gradients(self) -> None:
        """Drop the record of `inspect_gradients` at the end of its step."""
        self._probe = None

    def matrix_grad_norms(self, grad_norm_preclip: float) -> Readings:
        """Return the gradient norm of each matrix before clipping.

        For a LoRA product this is the norm of the gradients of both factors.
        """
        return measure_matrix_grad_norms(
            self.selection.matrices,
            self.parameters(),
            self.backend,
            grad_norm_preclip,
            groups={view.name: (view.left_name, view.right_name) for view in self._adapters},
        )

    def start_update(self) -> None:
        """Copy the selected parameters before the update."""
        self._meter.start(self.parameters())

    def update_norm(self) -> Readings:
        """Return the norm of the change since `start_update`."""
        if not self._meter.names:
            return {}
        return {GLOBAL: self.backend.agree(self._meter.stop(self.parameters()))[0]}

    def stable_ranks(self) -> dict[str, float]:
        """Return the stable rank of each matrix and LoRA product, read from scratch.

        Broken ones give NaN.
        """
        parameters = self.parameters()
        return {
            **measure_each(self.selection.matrices, parameters, self.backend, quick_stable_rank),
            **{name: product.stable_rank for name, product in self._products(parameters).items()},
        }

    def spectral_norms(self) -> dict[str, float]:
        """Return σ₁ of each matrix, read from scratch, without LoRA products."""
        return measure_each(
            self.selection.matrices,
            self.parameters(),
            self.backend,
            lambda stack: spectral_norm(stack, num_rounds=QUICK_ROUNDS),
        )

    def follow(self) -> None:
        """Update the tracked spectra to the current weights."""
        # One search of the model serves `follow` and its readings: it costs as much as a round.
        self._followed = self.parameters()
        self.tracker.refresh(self._followed)

    def followed_stable_ranks(self, floors: Mapping[str, float]) -> dict[str, float]:
        """Return `stable_ranks` as of the last `follow`, with the error of `SpectrumTracker`.

        Matrices are read from scratch if the tracked value leaves open on which side of their floor
        they are. Both values are from above, and the smaller one counts.

        Args:
            floors: The stable-rank floor of each matrix. Matrices without one are not read.
        """
        parameters = self._followed
        found = self.tracker.read(parameters)
        ranks = {name: one.stable_rank for name, one in found.items()}
        doubtful = {n for n, one in found.items() if one.is_doubtful(floors.get(n, 0.0))}
        if doubtful:
            views = self.selection.matrices
            read = measure_each(views, parameters, self.backend, quick_stable_rank, names=doubtful)
            ranks |= {name: min(rank, ranks[name]) for name, rank in read.items()}
        return ranks | {name: one.stable_rank for name, one in self._products(parameters).items()}

    def followed_spectral_norms(self) -> dict[str, float]:
        """Return σ₁ of each matrix as of the last `follow`.

        LoRA products are left out, because they start at zero and only grow.
        """
        return {name: one.sigma for name, one in self.tracker.read(self._followed).items()}

    def leading_values(self) -> dict[str, list[float]]:
        """Return the leading singular values above zero of each matrix and LoRA product.

        An empty list means that a matrix is zero or not finite.
        """
        parameters = self.parameters()
        rows: dict[str, tuple[float, ...]] = measure_rows(
            self.selection.matrices,
            parameters,
            self.backend,
            leading_values,
            width=NUM_RECORDED,
        )
        rows |= {name: product.leading for name, product in self._products(parameters).items()}
        return {name: [v for v in row if v > 0] for name, row in rows.items()}

    def _products(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, AdapterSpectrum]:
        return measure_adapter_spectra(self._adapters, parameters, self.backend)


def _check(model: nn.Module, config: PSSConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"PSS watches a torch.nn.Module; you gave a {type(model).__name__}."
        )
    check_config(config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            "The model is on the meta device: it has no weights yet. Load them first."
        )


def needs_no_matrix(config: PSSConfig) -> bool:
    """Return whether these options only guard against steps that are not finite."""
    return not config.detectors and not config.health_every_steps and config.health == "off"


def select_watched(model: nn.Module, config: PSSConfig) -> Selection:
    """Return the matrices that these options select. There may be none.

    Raises:
        SelectionError: A pattern matches nothing, or nothing that can be selected.
    """
    if needs_no_matrix(config):
        return Selection((), ())
    selection = select_matrices(
        model,
        roles=config.roles,
        include=config.include,
        exclude=config.exclude,
        may_be_empty=True,
    )
    if any(exclusion.reason == ADAPTER_FACTOR for exclusion in selection.exclusions):
        logger.info("Some LoRA factors are left alone; the table of matrices lists them.")
    return selection
