"""Gradient norms: one a parameter, to find where NaN began, and one a selected matrix.

Stable rank of every selected matrix: ‖W‖_F² / σ₁² (arXiv 2602.01308).

Norm of an optimizer update: ‖W_t − W_{t−1}‖ over the parameters that are watched.

What the controller reads off a model: norms, stable ranks, and where NaN began.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from hf_pss.config import PSSConfig
from hf_pss.detection import GLOBAL, Readings
from hf_pss.errors import ConfigurationError
from hf_pss.linalg import quick_stable_rank, spectral_norm
from hf_pss.linalg.norms import QUICK_ROUNDS
from hf_pss.linalg.scaling import compute_dtype
from hf_pss.models.adapters import measure_adapter_spectra, measure_adapters
from hf_pss.models.anchors import NUM_RECORDED, leading_values
from hf_pss.models.batching import (
    Slot,
    matrix_names,
    matrix_shapes,
    matrix_slots,
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
from hf_pss.models.selection.parameter_rules import what_to_do, why_empty

__all__ = [
    "Gauges",
    "GradientProbe",
    "UpdateMeter",
    "measure_matrix_grad_norms",
    "measure_stable_ranks",
    "select_watched",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GradientProbe:
    """Norm of each parameter's gradient, left on the device until somebody asks.

    Taken before clipping, since clipping by a NaN norm makes every gradient NaN and so hides the
    parameter where it began.
    """

    names: tuple[str, ...]
    norms: tuple[Tensor, ...]
    """Of what is kept here of each gradient."""

    @classmethod
    @torch.no_grad()
    def take(cls, named_parameters: Iterable[tuple[str, nn.Parameter]], backend: Backend) -> Self:
        """Measure the gradients that are there. Cost: one pass over them, nothing read back."""
        grads = {
            n: _here(p.grad, backend).tensor for n, p in named_parameters if p.grad is not None
        }
        return cls(tuple(grads), _norms(list(grads.values())))

    def nonfinite(self, backend: Backend) -> tuple[str, ...]:
        """Return the parameters, in the model's order, whose gradient holds NaN or inf; one read.

        On several ranks all must call.
        """
        if not self.norms:
            return ()
        device = self.norms[0].device
        flags = torch.stack([(~norm.isfinite()).double().to(device) for norm in self.norms])
        backend.total_(flags)
        return tuple(n for n, bad in zip(self.names, flags.tolist(), strict=True) if bad)


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

    Clipping and loss scaling multiply all gradients by one factor, so the norms found now are
    rescaled such that their total is the norm before clipping.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name, with gradients.
        backend: How parameters are stored.
        grad_norm_preclip: The global norm before clipping, finite.
        groups: Parameters that count as one matrix, by its name.

    Returns:
        Names to norms; matrices without a gradient are left out.
    """
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    held = [view for view in views if view.parameter_name in grads]
    both = {name: own for name, own in groups.items() if all(n in grads for n in own)}
    if not held and not both:
        return {}
    parts = {name: _here(grad, backend) for name, grad in grads.items()}
    norms = [_norm(slot, parts[slot.view.parameter_name]) for slot in matrix_slots(held)]
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
    return {name: n * factor for name, n in zip((*matrix_names(held), *both), host, strict=True)}


def _here(grad: Tensor, backend: Backend) -> Part:
    with backend.part(grad) as part:
        return part


def _norm(slot: Slot, part: Part) -> Tensor:
    piece = slot.view.piece(part.tensor, part.start, slot.expert)
    if piece is None:
        return part.tensor.new_zeros((), dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(piece.read(), dtype=compute_dtype(part.tensor))
    return norm


def _norms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the norm of each, never in a half dtype: fp16's largest number is 65,504."""
    if not tensors:
        return ()
    dtypes = {compute_dtype(tensor) for tensor in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return tuple(torch._foreach_norm(list(tensors), 2, dtype))


def _total(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the square of all their numbers' norm, float64, on that device."""
    norms = [norm.to(device, torch.float64) for norm in _norms(tensors)]
    return torch.stack(norms).square().sum()


@torch.no_grad()
def measure_stable_ranks(
    views: Sequence[MatrixView], parameters: Mapping[str, nn.Parameter], backend: Backend
) -> dict[str, float]:
    """Return the stable rank of each 2-D matrix by name; NaN where a matrix holds NaN or inf.

    Cost: a few products of each matrix with a narrow block, one batched call a shape, and one
    device-to-host read for the whole model.

    Args:
        views: What to read.
        parameters: The model's parameters by canonical name.
        backend: How parameters are stored.
    """
    return measure_each(views, parameters, backend, quick_stable_rank)


class UpdateMeter:
    """Measures one update; keeps a copy of the watched parameters while it happens.

    Cost: the memory of one copy and three passes over it at every step.
    """

    def __init__(self, names: Sequence[str], backend: Backend) -> None:
        self.names = tuple(names)
        self._backend = backend
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember the parameters as they are before the update."""
        self._before = [self._here(parameters[name]).clone() for name in self.names]

    @torch.no_grad()
    def stop(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the norm of what changed since `start`, shape (1,), and forget the copy."""
        now = [self._here(parameters[name]) for name in self.names]
        changes = [
            torch.linalg.vector_norm(after.float() - before.float())
            for after, before in zip(now, self._before, strict=True)
        ]
        self._before = []
        device = changes[0].device
        total = (
            torch.stack([change.to(device) for change in changes])
            .double()
            .square()
            .sum()
            .reshape(1)
        )
        self._backend.total_(total)
        return total.sqrt()

    def _here(self, parameter: Tensor) -> Tensor:
        with self._backend.part(parameter) as part:
            return part.tensor


_MAX_NAMED = 3
_GUARD = "The guard against steps that are not finite stays."
_REPORTS = "Steps that are not finite are still reported; observe_only leaves them alone, too."


class Gauges:
    """Reads one model; decides nothing and changes nothing.

    Args:
        model: Looked up by name at every reading, so wrappers may swap its parameters.
        config: Which matrices to read.
        backend: How parameters are stored; found from the parameters when None.

    Raises:
        SelectionError: A pattern matches nothing, or nothing that can be selected.
        ConfigurationError: The model is sharded in a way that is not supported, has no weights yet,
            or is no model.
    """

    def __init__(self, model: nn.Module, config: PSSConfig, backend: Backend | None) -> None:
        _check(model, config)
        self._model, self._config = model, config
        self.backend = backend if backend is not None else backend_for(self.parameters())
        self.selection = select_watched(model, config)
        self.shapes = matrix_shapes(self.selection.matrices)
        self._adapters = self.selection.adapters
        watched = {view.parameter_name for view in self.selection.matrices}
        watched |= {name for view in self._adapters for name in (view.left_name, view.right_name)}
        self._meter = UpdateMeter(sorted(watched), self.backend)
        self._probe: GradientProbe | None = None

    @property
    def model(self) -> nn.Module:
        """What is measured, wrapped or not."""
        return self._model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters by canonical name, as they are now."""
        return named_parameters_canonical(self._model)

    def caution(self, spelling: str = "PSSConfig({})") -> str | None:
        """Say what of the options finds nothing to watch in this model; None where all do.

        Args:
            spelling: How the caller spells an option; the braces stand for ``name=value``.
        """
        if needs_no_matrix(self._config):
            return None
        guard = _REPORTS if self._config.observe_only else _GUARD
        has_floor = "stable_rank_floor" in self._config.detectors
        others = [name for name in self._config.detectors if name != "stable_rank_floor"]
        if self._adapters:
            if not has_floor:
                return None
            rest = "" if self.selection.matrices else f" Nothing else is left to watch. {guard}"
            return _floor_on_adapters(len(self._adapters), others, rest, spelling)
        if self.selection.matrices:
            return None
        advice = what_to_do(self._model, exclude=self._config.exclude, spelling=spelling)
        noticed = (
            "Spikes of the gradient norm are noticed, but there is nothing to smooth. "
            if "grad_norm_ratio" in others
            else ""
        )
        return f"{why_empty(self.selection)} {noticed}{guard} {advice}"

    def fingerprint(self) -> str:
        """Return a short hash of the names and shapes of the watched matrices."""
        products = {view.name: view.shape for view in self._adapters}
        rows = (f"{name} {m}x{n}" for name, (m, n) in {**self.shapes, **products}.items())
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def to_host(self, *values: float | Tensor | None) -> list[float | None]:
        """Return numbers as host floats: all tensors among them in one device-to-host read.

        On several ranks the numbers are agreed upon, floats too: every rank must call.
        """
        if self.backend.is_shared:
            values = tuple(self._on_device(v) if isinstance(v, float) else v for v in values)
        tensors = [gathered(v.detach()).reshape(()) for v in values if isinstance(v, Tensor)]
        read = self._read(tensors)
        return [next(read) if isinstance(v, Tensor) else v for v in values]

    def inspect_gradients(self) -> None:
        """Note on the device which gradients are finite."""
        self._probe = GradientProbe.take(self._model.named_parameters(), self.backend)

    def first_nonfinite_gradients(self) -> tuple[str, ...]:
        """Name the first parameters whose gradient is not finite; reads back from the device.

        Without `inspect_gradients` before clipping there may be nothing left to tell: clipping by a
        NaN norm makes every gradient NaN. Then no name is given.
        """
        probe = self._probe or GradientProbe.take(self._model.named_parameters(), self.backend)
        broken = probe.nonfinite(self.backend)
        if self._probe is None and len(broken) == len(probe.names):
            return ()
        return tuple(map(canonical_name, broken[:_MAX_NAMED]))

    def forget_gradients(self) -> None:
        """Drop what `inspect_gradients` noted: it is of a step that is over."""
        self._probe = None

    def matrix_grad_norms(self, grad_norm_preclip: float) -> Readings:
        """Return the gradient norm of each matrix before clipping; see `health.grad_norm`.

        That of a LoRA product is the norm of both factors' gradients.
        """
        return measure_matrix_grad_norms(
            self.selection.matrices,
            self.parameters(),
            self.backend,
            grad_norm_preclip,
            groups={view.name: (view.left_name, view.right_name) for view in self._adapters},
        )

    def start_update(self) -> None:
        """Remember the watched parameters as they are before the update."""
        self._meter.start(self.parameters())

    def update_norm(self) -> Readings:
        """Return the norm of what changed since `start_update`."""
        if not self._meter.names:
            return {}
        return {GLOBAL: self.backend.agree(self._meter.stop(self.parameters()))[0]}

    def stable_ranks(self) -> dict[str, float]:
        """Return the stable rank of each matrix and LoRA product; NaN where one is broken."""
        parameters = self.parameters()
        return {
            **measure_stable_ranks(self.selection.matrices, parameters, self.backend),
            **measure_adapters(self._adapters, parameters, self.backend),
        }

    def spectral_norms(self) -> dict[str, float]:
        """Return σ₁ of each matrix, LoRA products apart: those begin at zero, and only grow."""
        return measure_each(
            self.selection.matrices, self.parameters(), self.backend, _quick_spectral_norm
        )

    def leading_values(self) -> dict[str, list[float]]:
        """Return the leading singular values of each matrix and LoRA product, those above zero.

        An empty list stands for a matrix that is zero or not finite.
        """
        parameters = self.parameters()
        rows: dict[str, tuple[float, ...]] = measure_rows(
            self.selection.matrices,
            parameters,
            self.backend,
            lambda stack: leading_values(stack, self._config.max_rank),
            width=NUM_RECORDED,
        )
        products = measure_adapter_spectra(self._adapters, parameters, self.backend)
        rows |= {name: product.leading for name, product in products.items()}
        return {name: [v for v in row if v > 0] for name, row in rows.items()}

    def _on_device(self, number: float) -> Tensor:
        device = next(iter(self._model.parameters())).device
        return torch.tensor(number, dtype=torch.float64, device=device)

    def _read(self, numbers: Sequence[Tensor]) -> Iterator[float]:
        if not numbers:
            return iter(())
        exact = any(number.dtype == torch.float64 for number in numbers)
        # A model spread over devices has its loss on another one than the norm.
        target = (numbers[0].device, torch.float64 if exact else torch.float32)
        return iter(self.backend.agree(torch.stack([number.to(*target) for number in numbers])))


def _quick_spectral_norm(matrices: Tensor) -> Tensor:
    return spectral_norm(matrices, num_rounds=QUICK_ROUNDS)


def _check(model: nn.Module, config: PSSConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"PSS watches a torch.nn.Module; you gave a {type(model).__name__}."
        )
    if not isinstance(config, PSSConfig):
        raise ConfigurationError(
            f"The options of PSS are a PSSConfig, such as PSSConfig.preset('floor'); you gave "
            f"{config!r}."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            "The model is on the meta device: it has no weights yet. Load them first."
        )


def needs_no_matrix(config: PSSConfig) -> bool:
    """Tell whether a run with these options only guards against steps that are not finite."""
    return not config.detectors and not config.health_every_steps and config.health == "off"


def select_watched(model: nn.Module, config: PSSConfig) -> Selection:
    """Return the matrices that a run with these options watches; there may be none.

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
        logger.info("Some LoRA factors are left alone; the table of matrices says which.")
    return selection


def _floor_on_adapters(num_products: int, others: Sequence[str], rest: str, spelling: str) -> str:
    told = (
        f"stable_rank_floor does not watch the {num_products} LoRA products: an adapter starts at "
        "zero and has no healthy spectrum to refer to."
    )
    if others:
        return f"{told} {', '.join(others)} does."
    option = spelling.format("detectors=['grad_norm_ratio']")
    return f"{told}{rest} To watch them, choose {option}."
