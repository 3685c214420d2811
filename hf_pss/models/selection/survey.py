"""What a model holds: each parameter and its place, and the LoRA adapters in training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hf_pss.models.selection.layouts import class_names, stores_inputs_first
from hf_pss.models.selection.views import AdapterView

# Prefixes of torch.compile, activation checkpointing and FSDP1. DDP's `module.` is removed only at
# the start, because further inside it may be a name in the model.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)"
)
_LEADING_WRAPPERS = re.compile(r"^(?:module\.)+|^module$")
# peft moves the layer that it replaces one level deeper.
_NESTED = re.compile(r"(?:\.base_layer)+$")
_ADAPTED = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)$")


@runtime_checkable
class _HasOutputEmbeddings(Protocol):
    def get_output_embeddings(self) -> nn.Module | None: ...


@dataclass(frozen=True, slots=True)
class Site:
    """One parameter and its place in the model.

    Attributes:
        name: The canonical name of the parameter.
        shape: The full shape. Under ZeRO-3 the parameter is empty between uses.
        parameter: The parameter. Only its flags are read, never its values.
        module: The module that holds it.
        owner: The module whose forward uses it. This is the parent of an nn.Linear,
            and otherwise `module`.
        leaf: The name of the projection inside `owner`: ``c_attn``, ``in_proj_weight``.
        steps: The name and class name of each module from `module` outwards
            to just below the block.
        block: The name of the repeated block, or None outside all blocks.
        tied_to: The canonical name under which the same parameter occurred earlier.
        shared_with: The canonical name of the same parameter outside all blocks, if it has one.
        is_embedding: Whether an embedding or the output head holds the parameter, tied or not.
        vocabularies: The numbers of rows of the model's embeddings.
        block_inputs: The numbers of inputs that the matrices of the block have.
    """

    name: str
    shape: tuple[int, ...]
    parameter: nn.Parameter
    module: nn.Module
    owner: nn.Module
    leaf: str
    steps: tuple[tuple[str, str], ...]
    block: str | None
    tied_to: str | None
    shared_with: str | None
    is_embedding: bool
    vocabularies: frozenset[int]
    block_inputs: frozenset[int]

    @property
    def own_name(self) -> str:
        """The name of the parameter inside `module`."""
        return self.name.rpartition(".")[2]


@cache  # a look-up of all parameters, which every step makes, would search each name again
def canonical_name(name: str) -> str:
    """Return a module's or parameter's name without the prefixes that wrappers add to it.

    Example:
        >>> canonical_name("module._orig_mod.h.0._checkpoint_wrapped_module.mlp.weight")
        'h.0.mlp.weight'
    """
    return _LEADING_WRAPPERS.sub("", _WRAPPERS.sub("", name)).rstrip(".")


def named_parameters_canonical(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by canonical name. Tied ones have only their first name."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def survey(model: nn.Module) -> Iterator[Site]:
    """Yield every parameter of a model with its place. Tied parameters occur once per name."""
    modules = {
        canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    blocks = find_blocks(modules)
    embeddings = _embedding_rows(model)
    vocabularies = frozenset(embeddings.values())
    parameters = {
        canonical_name(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    first_names: dict[int, str] = {}
    outside: dict[int, str] = {}
    inputs: defaultdict[str | None, set[int]] = defaultdict(set)
    for name, parameter in parameters.items():
        module_name = name.rpartition(".")[0]
        block = _enclosing(module_name, blocks)
        first_names.setdefault(id(parameter), name)
        if block is None:
            outside.setdefault(id(parameter), name)
        if len(shape := stored_shape(parameter)) > 1:
            inputs[block].add(shape[-2 if stores_inputs_first(modules[module_name]) else -1])
    block_inputs = {block: frozenset(numbers) for block, numbers in inputs.items()}
    for name, parameter in parameters.items():
        module_name, _, own_name = name.rpartition(".")
        block = _enclosing(module_name, blocks)
        owner, leaf = _user(modules, module_name, own_name)
        first = first_names[id(parameter)]
        other = outside.get(id(parameter))
        yield Site(
            name=name,
            shape=stored_shape(parameter),
            parameter=parameter,
            module=modules[module_name],
            owner=owner,
            leaf=leaf,
            steps=_steps(modules, module_name, block),
            block=block,
            tied_to=None if first == name else first,
            shared_with=None if other == name else other,
            is_embedding=id(parameter) in embeddings,
            vocabularies=vocabularies,
            block_inputs=block_inputs.get(block, frozenset()),
        )


def find_blocks(modules: dict[str, nn.Module]) -> set[str]:
    """Return the names of the repeated blocks: the composite children of the outermost stacks.

    A stack is an nn.ModuleList, or an nn.Sequential that repeats a class. A child is a block if it
    has children and holds a matrix. So lists of plain nn.Linear (heads) and stacks of convolutions
    have no blocks. If a block is used under a second name, it is a block under that name as well.
    """
    blocks: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _enclosing(name, blocks) is None:
            prefix = f"{name}." if name else ""
            blocks.update(
                canonical_name(f"{prefix}{child_name}")
                for child_name, child in module.named_children()
                if next(child.children(), None) is not None
                and any(map(is_linear, child.modules()))
                and _is_stacked(child, module)
            )
    found = {id(modules[name]) for name in blocks}
    return {name for name, module in modules.items() if id(module) in found}


def _is_stacked(child: nn.Module, stack: nn.Module) -> bool:
    if isinstance(stack, nn.ModuleList):
        return True
    # A SentenceTransformer is an nn.Sequential of a whole model and sometimes several Dense layers.
    if any(isinstance(module, _HasOutputEmbeddings) for module in stack.modules()):
        return False
    return sum(type(sibling) is type(child) for sibling in stack.children()) > 1


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear or transformers' Conv1D, or derived from one."""
    return isinstance(module, nn.Linear) or "Conv1D" in class_names(module)


def _enclosing(name: str, blocks: set[str]) -> str | None:
    """Return the block that is or contains the named module."""
    while name:
        if name in blocks:
            return name
        name = name.rpartition(".")[0]
    return None


def _user(modules: dict[str, nn.Module], module_name: str, own_name: str) -> tuple[nn.Module, str]:
    """Return the module whose forward uses a parameter, and the parameter's name in its code."""
    if own_name != "weight":
        return modules[module_name], own_name
    parent_name, _, leaf = _ADAPTED.sub("", module_name).rpartition(".")
    return modules[parent_name], leaf


def _steps(
    modules: dict[str, nn.Module], module_name: str, block: str | None
) -> tuple[tuple[str, str], ...]:
    steps = []
    while module_name and module_name != block:
        parent, _, segment = module_name.rpartition(".")
        steps.append((segment, type(modules[module_name]).__name__))
        module_name = parent
    return tuple(steps)


def _embedding_rows(model: nn.Module) -> dict[int, int]:
    """Return the number of rows of each embedding and output head, by the parameter's id."""
    held = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    heads = [
        m.get_output_embeddings() for m in model.modules() if isinstance(m, _HasOutputEmbeddings)
    ]
    modules = [*held, *(head for head in heads if head is not None)]
    held_by = (p for m in modules for p in m.parameters(recurse=False))
    return {id(p): shape[0] for p in held_by if (shape := stored_shape(p))}


def stored_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the complete parameter, which ZeRO-3 stores separately."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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
        lefts, rights = getattr(module, "lora_B", None), getattr(module, "lora_A", None)
        # Tuners of other kinds, such as AdaLoRA, use the same names for bare parameters. These are
        # not products of two matrices.
        if not (isinstance(lefts, nn.ModuleDict) and isinstance(rights, nn.ModuleDict)):
            continue
        for adapter in (name for name in lefts if name in rights):
            factors = [f"{path}.lora_{side}.{adapter}.weight" for side in "BA"]
            reason = _why_none(module, adapter)
            if reason is None:
                views += _views(path, module, adapter, *map(canonical_name, factors))
            else:
                left_out |= dict.fromkeys(map(canonical_name, factors), reason)
    return tuple(views), left_out


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
