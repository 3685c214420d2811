"""The rules that need no model. They read names, class names, shapes and numbers of a config.

`select_matrices` applies them to a model. `hf_pss.inspection` and `hf_pss.rescue` apply them to the
tensors of a checkpoint. Both must choose the same matrices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hf_pss.models.selection.views import Role

Steps: TypeAlias = Sequence[tuple[str, str]]
"""The name and class name of each module around a tensor. The order is from the innermost module
outwards to the module just below the block. A class name may be empty."""

ADAPTER_FACTOR = "LoRA factor: the matrix is the product"
MIXER = "state-space or convolutional mixer"
_OUTPUT_HEAD = "output head inside a block"

_LORA = re.compile(
    r"(?:^|\.)lora_(?:embedding_)?[AB](?:\.|$)|(?:^|\.)lora_magnitude_vector(?:\.|$)"
)
_EMBEDDING = re.compile(r"embed|relative_attention_bias", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"router|^(?:gate|shared_expert_gate|wg)$", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"Router|Gating")
_RECURRENT_CLASS = re.compile(r"Mamba|Mixer$|SSM|Rwkv|ShortConv|RecurrentBlock|LSTM")
_RECURRENT_NAME = re.compile(r"mamba|mixer|ssm|rwkv", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|qkv|^att_proj$", re.IGNORECASE)
# FocalNet's `modulation` mixes tokens, as attention does in other models.
_TOKEN_MIXER_CLASS = re.compile(r"attn|attention|^(?:FSDP)?Focal", re.IGNORECASE)
# The reasons why the matrices of a module are not selected, by the module's name or class. A
# norm without conditioning holds no matrix. Names and classes of wrappers around a whole
# layer (PreNorm, DBRX's norm_attn_norm) must not match, and neither must linear layers with a
# norm (timm's LinearNorm).
_PURPOSES = (
    (
        _OUTPUT_HEAD,
        re.compile(
            r"^(?:(?:lm|shared|mtp|medusa|output|pred(?:iction)?|cls|class)_?)?head$"
            r"|^(?:embed_out|unembed(?:ding)?|to_logits|classifier)$",
            re.IGNORECASE,
        ),
        re.compile(r"(?:LM|Medusa|MTP|Prediction)Head$"),
    ),
    (
        "modulation or conditioning layer",
        re.compile(
            r"^(?!pre_?norm|post_?norm)(?:\w*_)?(?:layer|rms|group)?_?norm_?\d*(?:_context)?$"
            r"|modulat|ada_?ln|ada_?(?:layer_?)?norm|(?:^|_)mod(?:_|\d*$)|(?:^|_)film"
            r"|^mapper(?:_(?:sca|crp))?$"  # Stable Cascade's, of the timestep
            r"|scale_?shift|shift_?scale|(?:^|_)cond(?:ition(?:ing|er)?)?(?:_|\d*$)",
            re.IGNORECASE,
        ),
        re.compile(
            r"(?:Ada\w*|(?<!Pre)(?<!Post)(?:Layer|RMS|Rms|Group|Batch|Instance))Norm"
            r"(?:Zero|Single|Continuous|Shift|Final|Out|X|_)*$|AdaL[Nn]|Modulat(?:ion|or)$|Fi[Ll]M"
        ),
    ),
    (
        "timestep, position or other embedder",
        re.compile(
            r"(?:^|_)emb(?:ed(?:d(?:er|ing))?s?)?(?:_|\d*$)|timestep|(?:^|_)time_(?:mlp|proj)"
            r"|(?:^|_)pos(?:ition)?(?:al)?_?(?:bias|enc|mlp)|(?:^|_)(?:cpb|rel_pos|meta_mlp)(?:_|$)",
            re.IGNORECASE,
        ),
        re.compile(r"Embed(?:s|der|dings?)?(?:\dD)?$|RelPos(?:Mlp|Bias)"),
    ),
)
# The pattern is anchored at the end: class names begin with the model's name, and
# JetMoeMoA is attention.
_MLP_CLASS = re.compile(r"(?:MLP|Mlp|MoE|MoeBlock|FFN|FeedForward)$")
_MLP_NAME = re.compile(r"^(?:mlp|ffn|feed_forward|moe)$", re.IGNORECASE)
# A checkpoint has no classes. If the name of a module does not suffice, the names of its children
# determine its class. For example, Nemotron-H uses the name `mixer` for attention, MLP and Mamba.
_CLASS_BY_CHILDREN: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"time_decay"}), "Rwkv"),
    (frozenset({"time_mix_key"}), "Rwkv"),
    (frozenset({"A_log", "D"}), "Mamba"),
    (frozenset({"rg_lru"}), "RecurrentBlock"),
    (frozenset({"conv", "in_proj", "out_proj"}), "ShortConv"),
    (frozenset({"projection_in", "projection_context"}), "FocalModulation"),
    (frozenset({"q_proj", "k_proj"}), "Attention"),
    (frozenset({"up_proj", "down_proj"}), "MLP"),
)

# The largest number of parts of a name. The work below grows with its square, and
# a file may be hostile.
_MOST_PARTS = 64

# The block is the first number of the path, as in transformer.h.3.attn.c_attn.
_BLOCK = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<block>\d{1,6})\.(?P<rest>.+)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a matrix in its network, read from its name."""

    stack: str
    """The path before the block's number, such as ``model.layers``. Empty without a number."""
    block: int | None
    """The block's number. None outside the repeated blocks, as for embeddings and heads."""
    kind: str
    """The path after the block's number, equal in all blocks: ``mlp.experts.*.down_proj``."""


def place_of(name: str) -> Place:
    """Return the place of a tensor.

    >>> place_of("model.layers.3.mlp.experts.17.down_proj.weight")
    Place(stack='model.layers', block=3, kind='mlp.experts.*.down_proj')
    >>> place_of("lm_head.weight")
    Place(stack='', block=None, kind='lm_head')
    """
    bare = name.removesuffix(".weight")
    match = _BLOCK.match(bare)
    if match is None:
        return Place("", None, bare)
    return Place(match["stack"] or "", int(match["block"]), _NUMBER.sub("*", match["rest"]))


def is_adapter_factor(name: str) -> bool:
    """Return whether a parameter or tensor is a factor of a LoRA adapter."""
    return _LORA.search(name) is not None


def is_embedding_name(steps: Steps) -> bool:
    """Return whether the innermost module is an embedding, judged by its name."""
    return bool(steps) and _EMBEDDING.search(steps[0][0]) is not None


def children_by_module(names: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """Return the names that each module of a checkpoint holds directly."""
    held: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        parts = name.split(".", _MOST_PARTS)
        for depth in range(len(parts)):
            held[".".join(parts[:depth])].add(parts[depth])
    return {module: frozenset(children) for module, children in held.items()}


def steps_by_name(name: str, children: Mapping[str, frozenset[str]]) -> Steps:
    """Return the modules around a tensor of a checkpoint, with the classes that they seem to have.

    Args:
        name: The name of the tensor.
        children: The result of `children_by_module` for all tensors.

    >>> names = ["h.0.mixer.A_log", "h.0.mixer.D", "h.0.mixer.in_proj.weight"]
    >>> steps_by_name(names[2], children_by_module(names))
    (('in_proj', ''), ('mixer', 'Mamba'))
    """
    # The name of a bare parameter also counts, such as relative_position_bias_table.
    modules = name.removesuffix(".weight").split(".", _MOST_PARTS)
    block = next((i for i, part in enumerate(modules) if part.isdecimal()), -1)
    steps = []
    for i in range(len(modules) - 1, block, -1):
        held = children.get(".".join(modules[: i + 1]), frozenset())
        likely = (class_name for needed, class_name in _CLASS_BY_CHILDREN if needed <= held)
        steps.append((modules[i], next(likely, "")))
    return tuple(steps)


def role_of(steps: Steps) -> Role | None:
    """Return the role by the names around a parameter, innermost first. None for recurrent mixers.

    The class of a module has priority over its name.
    """
    for name, class_name in steps:
        if _RECURRENT_CLASS.search(class_name):
            return None
        if _ATTENTION.search(class_name) or _ATTENTION.search(name):
            return "attention"
        if _MLP_CLASS.search(class_name) or _MLP_NAME.search(name):
            return "mlp"
        if _RECURRENT_NAME.search(name):
            return None
    return "mlp"


def why_no_block_matrix(steps: Steps) -> str | None:
    """Return why a matrix inside a block does not belong to its attention or MLP.

    The innermost name decides. For example, the projections of an attention module are attention,
    whichever module holds it.

    Example:
        >>> why_no_block_matrix([("linear", "Linear"), ("norm1", "AdaLayerNormZero")])
        'modulation or conditioning layer'
    """
    for name, class_name in steps:
        if _TOKEN_MIXER_CLASS.search(class_name):
            return None
        for reason, of_name, of_class in _PURPOSES:
            if of_name.search(name) or of_class.search(class_name):
                return reason
        if _ATTENTION.search(name):
            return None
    return None


def why_no_projection(
    steps: Steps,
    shape: Sequence[int],
    *,
    vocabularies: Collection[int],
    block_inputs: Collection[int],
) -> str | None:
    """Return why a parameter inside a block is not selected, or None for attention and MLP.

    Args:
        steps: The modules around the parameter.
        shape: (..., m, n), outputs first.
        vocabularies: The numbers of rows of the model's embeddings.
        block_inputs: The numbers of inputs of the block's matrices.
    """
    if any(_ROUTER_NAME.search(name) or _ROUTER_CLASS.search(kind) for name, kind in steps):
        return "router"
    if (purpose := why_no_block_matrix(steps)) is not None:
        return purpose
    role = role_of(steps)
    if role is None:
        return MIXER
    if role == "mlp" and _is_output_head(shape, vocabularies, block_inputs):
        return _OUTPUT_HEAD
    return None


def _is_output_head(
    shape: Sequence[int], vocabularies: Collection[int], block_inputs: Collection[int]
) -> bool:
    """Return whether a matrix in a block seems to give one number for each word.

    In small models the number of hidden units often equals the number of words. But
    then a different matrix of the block reads the hidden units, gated or not. No matrix
    reads the output of a head.
    """
    if len(shape) != 2 or shape[0] not in vocabularies or shape[0] <= shape[1]:
        return False
    return shape[0] not in block_inputs and shape[0] // 2 not in block_inputs
