"""LoRA adapters in a model: the trained pairs of factors and their products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_pss.models.selection.survey import canonical_name, stored_shape

_NESTED = re.compile(r"(?:\.base_layer)+$")


@dataclass(frozen=True, slots=True)
class AdapterView:
    """The product s·B·A of an adapter. It holds names and numbers, never tensors.

    Attributes:
        name: The adapted module with the adapter in brackets: ``…q_proj[default]``. If there are
            several experts, the number of the expert follows: ``…experts.down_proj[default][2]``.
        left_name: The canonical name of B's parameter, (m, r), or (m, r·E) for E experts.
        right_name: The canonical name of A's parameter, (r, n), or (E·r, n).
        base_name: The canonical name of the frozen weight, or None if it is not a plain parameter.
        scaling: The factor s.
        shape: The shape (m, n) of the product.
        num_experts: E, which is 1 for a linear map.
        expert: The number of the expert.
    """

    name: str
    left_name: str
    right_name: str
    base_name: str | None
    scaling: float
    shape: tuple[int, int]
    num_experts: int = 1
    expert: int = 0

    @property
    def names(self) -> tuple[str, str, str]:
        """The names that a pattern may match: that of the product and those of its factors."""
        return self.name, self.left_name, self.right_name


def find_adapters(model: nn.Module) -> tuple[tuple[AdapterView, ...], dict[str, str]]:
    """Return the products of all LoRA adapters in training, and reasons for the other factors.

    An adapter is recognised by its structure in PEFT: a module has `lora_A`, `lora_B` and
    `scaling`, each with an entry for the adapter's name.

    Returns:
        The products in the model's order, and the reason for each factor without a product
        by its canonical name.
    """
    views: list[AdapterView] = []
    left_out: dict[str, str] = {}
    for path, module in model.named_modules():
        for adapter in _adapters_of(module):
            factors = [f"{path}.lora_{side}.{adapter}.weight" for side in "BA"]
            reason = _why_none(module, adapter)
            if reason is None:
                views += _views(path, module, adapter, *map(canonical_name, factors))
            else:
                left_out |= dict.fromkeys(map(canonical_name, factors), reason)
    return tuple(views), left_out


def _adapters_of(module: nn.Module) -> Iterator[str]:
    lefts, rights = getattr(module, "lora_B", None), getattr(module, "lora_A", None)
    # Tuners of other kinds, such as AdaLoRA, use the same names for bare parameters. These are not
    # products of two matrices.
    if isinstance(lefts, nn.ModuleDict) and isinstance(rights, nn.ModuleDict):
        yield from (adapter for adapter in lefts if adapter in rights)


def _why_none(module: Any, adapter: str) -> str | None:
    left, right = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    if len(stored_shape(left)) != 2 or len(stored_shape(right)) != 2:
        return "LoRA factor of a convolution"
    if adapter in getattr(module, "merged_adapters", ()):
        return "LoRA factor: merged into the base weight"
    if adapter not in getattr(module, "active_adapters", module.lora_B):
        return f"LoRA factor: adapter {adapter!r} is not active"
    if not (left.requires_grad and right.requires_grad):
        return "LoRA factor: frozen, or its partner is"
    return None


def _views(
    path: str, module: Any, adapter: str, left_name: str, right_name: str
) -> Iterator[AdapterView]:
    num_experts = int(getattr(module, "num_experts", 1) or 1)
    target = canonical_name(path)
    # PEFT wraps a module once for each adapted parameter.
    parameter: str | None = getattr(module, "parameter_name", None)
    base_name = _base_name(path, module, parameter or "weight")
    if parameter is not None:
        target = f"{_NESTED.sub('', target)}.{parameter}"
    shape = (
        stored_shape(module.lora_B[adapter].weight)[0],
        stored_shape(module.lora_A[adapter].weight)[1],
    )
    for expert in range(num_experts):
        behind = f"[{expert}]" if num_experts > 1 else ""
        yield AdapterView(
            name=f"{target}[{adapter}]{behind}",
            left_name=left_name,
            right_name=right_name,
            base_name=base_name,
            scaling=float(module.scaling[adapter]),
            shape=shape,
            num_experts=num_experts,
            expert=expert,
        )


def _base_name(path: str, module: Any, parameter: str) -> str | None:
    """Return the name of the weight under an adapter, or None if it is not a plain parameter."""
    inner, path = getattr(module, "base_layer", None), f"{path}.base_layer"
    while (deeper := getattr(inner, "base_layer", None)) is not None:
        inner, path = deeper, f"{path}.base_layer"
    is_plain = isinstance(getattr(inner, parameter, None), nn.Parameter)
    return canonical_name(f"{path}.{parameter}") if is_plain else None
