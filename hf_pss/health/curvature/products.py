"""Hessian–vector products of any scalar loss, by double backward or differences of gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_pss.errors import ConfigurationError

__all__ = ["Hessian", "HessianMethod"]

logger = logging.getLogger(__name__)

# [ours] Chosen on GPT-2s and a tanh network of 47 to 813,824 parameters, along a random direction
# and the sharpest: the worst of both is least there, between rounding and the third derivative.
_STEP_RATIO = 5
_DEAD_ENDS = {"torch::autograd::Error", "torch::autograd::NotImplemented"}

HessianMethod = Literal["auto", "double_backward", "differences"]


class Hessian:
    """The Hessian H of a loss in some parameters, as a map v ↦ Hv; nothing n × n is ever built.

    By double backward, Hv = ∂(∇L·v)/∂θ (Pearlmutter 1994, Neural Computation 6(1)): the loss is
    evaluated once, its graph kept as long as this object lives, and each product walks back
    through it. While it is being built, scaled dot product attention is asked for its ``MATH``
    kernel, for its fused ones have no second derivative.

    By differences, Hv ≈ (∇L(θ + hv) − ∇L(θ − hv)) / 2h, two gradients a product: for what has no
    second derivative at all, such as flash-attn, some compiled code and functions that are marked
    once-differentiable. Parameters are moved in place and put back bit for bit, so nothing else
    may use them meanwhile. The step, h‖v‖ = 5 ε^⅓ · rms(θ) with the coarsest ε among the
    parameters, is [ours]; one in proportion to ‖θ‖ leaves the quadratic region of a large model's
    sharpest directions. On small GPT-2s in float32 it errs by up to 1.6e-3 of ‖Hv‖, on a tanh
    network by 5e-5, and in bfloat16, where θ ± hv is rounded, by 8 %; double backward there by
    1.3e-7 and 0.6 %.

    One case is missed by torch and by us: a once-differentiable function followed by linear ones
    only. Double backward then leaves its curvature out in silence; where a loss ends in such a
    function, ask for differences.

    Each evaluation starts from the same state of torch's generators and leaves them as it found
    them: dropout, where it is on, is part of the loss, and training is not disturbed. Neither is
    ``.grad``. Between building and the last product the parameters must not be updated: double
    backward raises torch's version error, and differences would measure a moving point.

    Cost: on demand. On a four-block GPT-2 of width 256 a product takes 2.4 gradients by double
    backward and 2.8 by differences, building the graph 4.5; memory, the graph of a gradient.
    In bfloat16 products inherit the dtype's rounding: v and Hv hold 2⁻⁹ of themselves; probes of
    ±1 are exact in it. Plain tensors of one device and one process: sharded parameters are not
    gathered, and under data parallelism each rank sees the loss of its own batch.

    Args:
        loss: Evaluates the scalar loss, on the same batch at every call.
        parameters: By name, each once; all must require a gradient.
        method: ``auto`` tries double backward, and where torch refuses it logs a warning and takes
            differences.

    Raises:
        ConfigurationError: no parameters, one that is given twice or requires no gradient, a loss
            that is no scalar, or one with reentrant checkpointing.
        RuntimeError: torch's own, where ``double_backward`` was asked for and is not to be had.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> Hessian(lambda: (w**3).sum(), {"w": w}).product(torch.tensor([1.0, 1.0])).tolist()
    [6.0, 12.0]
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Mapping[str, Tensor],
        *,
        method: HessianMethod = "auto",
    ) -> None:
        _require_leaves(parameters)
        self._loss = loss
        self._tensors = tuple(parameters.values())
        self.names = tuple(parameters)
        self.sizes = tuple(tensor.numel() for tensor in self._tensors)
        self.size = sum(self.sizes)
        self.device = self._tensors[0].device
        is_double = any(tensor.dtype == torch.float64 for tensor in self._tensors)
        self.dtype = torch.float64 if is_double else torch.float32
        self._gradients: tuple[Tensor, ...] = ()
        self.method = method
        if method != "differences":
            self._differentiate_twice()

    def product(self, vector: Tensor) -> Tensor:
        """Return Hv.

        Args:
            vector: (n,), the parameters flattened and joined in order, of `dtype`: float32, or
                float64 where a parameter is.

        Returns:
            (n,), of the same dtype; NaN and inf where derivatives are.
        """
        if self.method == "differences":
            return self._difference(vector)
        return self._double_backward(vector)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the part of each parameter, (numel,), by name."""
        return dict(zip(self.names, self._parts(vector), strict=True))

    def _differentiate_twice(self) -> None:
        try:
            with _same_randomness(self.device), sdpa_kernel(SDPBackend.MATH):
                self._gradients = torch.autograd.grad(
                    self._evaluate(),
                    self._tensors,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            _require_derivatives(self._gradients)
            # Compiled code refuses in the first product, not before.
            self._double_backward(torch.zeros(self.size, dtype=self.dtype, device=self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.method == "double_backward":
                raise
            logger.warning(
                "Hessian–vector products are differences of gradients: torch refuses to "
                "differentiate this loss twice (%s).",
                str(error).partition("\n")[0],
            )
            self._gradients, self.method = (), "differences"
        else:
            self.method = "double_backward"

    def _evaluate(self) -> Tensor:
        with torch.enable_grad():
            loss = self._loss()
        if loss.numel() != 1 or not loss.requires_grad:
            raise ConfigurationError(
                f"You gave a loss of shape {tuple(loss.shape)} that "
                f"{'has' if loss.requires_grad else 'lacks'} a gradient; "
                "return one number that depends on the parameters."
            )
        if any(node.name() == "CheckpointFunctionBackward" for node in _nodes([loss])):
            raise ConfigurationError(
                "You gave a loss with reentrant activation checkpointing, which hides parameters "
                "from autograd.grad: their curvature would read 0. Give use_reentrant=False, or "
                "switch checkpointing off."
            )
        return loss.squeeze() if loss.ndim else loss

    def _double_backward(self, vector: Tensor) -> Tensor:
        parts = self._parts(vector.to(self.dtype))
        # A loss that is linear in a parameter leaves a gradient without a graph: its rows are zero.
        held = [(g, v) for g, v in zip(self._gradients, parts, strict=True) if g.requires_grad]
        if not held:
            return torch.zeros_like(vector)
        found = torch.autograd.grad(
            [g for g, _ in held],
            self._tensors,
            grad_outputs=[v.view_as(g).to(g) for g, v in held],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._join(found)

    @torch.no_grad()
    def _difference(self, vector: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(vector)
        norms = torch.stack([torch.linalg.vector_norm(t.to(self.dtype)) for t in self._tensors])
        theta = torch.linalg.vector_norm(norms)
        epsilon = max(torch.finfo(tensor.dtype).eps for tensor in self._tensors)
        rms = theta / self.size**0.5
        step = _STEP_RATIO * epsilon ** (1 / 3) * torch.where(rms > 0, rms, 1.0)
        step = step / torch.where(length > 0, length, 1.0)
        rise = self._gradient_at(vector * step) - self._gradient_at(vector * -step)
        product: Tensor = rise / (2 * step)
        return product

    def _gradient_at(self, displacement: Tensor) -> Tensor:
        saved = [tensor.detach().clone() for tensor in self._tensors]
        try:
            for tensor, part in zip(self._tensors, self._parts(displacement), strict=True):
                # Through .data: what is put back bit for bit needs no new version, which would
                # break the graphs of others.
                tensor.data.copy_(tensor.to(self.dtype) + part.view_as(tensor))
            with _same_randomness(self.device):
                found = torch.autograd.grad(
                    self._evaluate(), self._tensors, allow_unused=True, materialize_grads=True
                )
        finally:
            for tensor, before in zip(self._tensors, saved, strict=True):
                tensor.data.copy_(before)
        return self._join(found)

    def _parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector, list(self.sizes))

    def _join(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1).to(self.dtype) for tensor in tensors])


def _require_derivatives(gradients: Iterable[Tensor]) -> None:
    """Raise `RuntimeError` where a gradient's graph holds one of torch's nodes that only raise.

    Asked for certain inputs, autograd prunes the node of a once-differentiable function, for no
    input lies behind it, and would return zeros.
    """
    if any(node.name() in _DEAD_ENDS for node in _nodes(gradients)):
        raise RuntimeError("a function in it has no second derivative")


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Yield every node of the tensors' graph once."""
    seen = set()
    ahead = [tensor.grad_fn for tensor in tensors]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions]


def _require_leaves(parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ConfigurationError("You gave no parameters; name at least one.")
    seen: dict[int, str] = {}
    for name, tensor in parameters.items():
        if not tensor.requires_grad:
            raise ConfigurationError(
                f"You gave {name!r}, which requires no gradient; leave it out or unfreeze it."
            )
        if id(tensor) in seen:
            raise ConfigurationError(
                f"You gave one tensor as {seen[id(tensor)]!r} and as {name!r}; name a tied "
                "parameter once, or its curvature counts twice."
            )
        seen[id(tensor)] = name


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
