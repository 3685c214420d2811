"""Measure the largest attention logit of each head by hooking into transformers' attention."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import AttentionInterface, TrainerCallback

from hf_pss.errors import ConfigurationError, IncompatibleVersionError
from hf_pss.health.meter import StopAttention, WatchAttention
from hf_pss.models.selection.heads import AttentionHeads, find_heads

logger = logging.getLogger(__name__)

Attention = Callable[..., Any]

# The largest number of logits in one block. The block for a GPU is large enough to keep the GPU
# busy. The block for a CPU fits into its cache.
_MAX_ELEMENTS = 2**24
_MAX_ELEMENTS_CPU = 2**20
# An additive mask marks excluded positions with −inf or with the lowest number of its dtype. Any
# value below this threshold counts as excluded.
_MASKED_BELOW = -1e4
_FLASH = "flash"


class AttentionMaxima:
    """Measures S_h = max(q·k) · scaling for each attention head, after rotary position encoding.

    The maximum covers all pairs of positions that attend to each other. It excludes masked and
    padded positions. It does not include a bias, a soft cap or sinks that the attention adds. In
    cross-attention only the padded keys are known, so queries at padded positions are included. The
    model's attention function receives its arguments unchanged, so its output is bit-identical.

    The class computes the logits a second time, in blocks of bounded size and in the dtype of the
    attention. For float16 it uses float32, because the unscaled q·k would overflow. Logits and
    maxima stay on the device. The class hooks into `transformers.AttentionInterface`, so it works
    with eager, SDPA and flash attention. Under ``torch.compile``, each measurement breaks the
    graph. A forward pass without gradients is measured only if ``in_evaluation`` is set.

    You can also use the class on its own, as a health metric::

        from hf_pss.trainer.attention_maxima import AttentionMaxima

        maxima = AttentionMaxima(model, in_evaluation=True)
        maxima.start()
        model(**batch)
        largest = maxima.read()  # {"transformer.h.0.attn": tensor of (heads,)}
        maxima.stop()

    Args:
        model: A transformers model, wrapped or not.
        in_evaluation: Whether to measure also in evaluation mode and without gradients.

    Attributes:
        attentions: The measured attention modules.

    Raises:
        ConfigurationError: The heads of an attention module are unknown, its queries or keys are
            normalised, or it does not call attention through the interface.
        IncompatibleVersionError: The installed transformers has no such interface.
    """

    attentions: tuple[AttentionHeads, ...]
    _ADVICE = "Leave qk_clip out."

    def __init__(self, model: nn.Module, *, in_evaluation: bool = False) -> None:
        found, reasons = find_heads(model)
        for attention in found:
            if not _uses_interface(attention.module):
                reasons[attention.name] = "it computes attention without the AttentionInterface"
        if reasons or not found:
            name, reason = next(iter(reasons.items()), ("the model", "it holds no known attention"))
            kind = type(dict(model.named_modules()).get(name, model)).__name__
            raise ConfigurationError(
                f"The attention logits of {name} ({kind}) cannot be measured: {reason}. "
                f"{self._ADVICE}".rstrip()
            )
        self.attentions = tuple(found)
        self._in_evaluation = in_evaluation
        self._places = WeakKeyDictionary({a.module: i for i, a in enumerate(found)})
        self._maxima: list[Tensor | None] = [None] * len(found)
        self._was_seen = False

    def start(self) -> None:
        """Start measuring."""
        _install()
        _active.add(self)

    def stop(self) -> None:
        """Stop measuring. The maxima remain until `take` or `forget` is called."""
        _active.discard(self)
        _remove_unused()

    def forget(self) -> None:
        """Discard the maxima of this rank, for example after a skipped step."""
        self._maxima = [None] * len(self.attentions)

    def read(self) -> Mapping[str, Tensor]:
        """Return the maxima of this rank since the last `take`.

        Returns:
            A float32 tensor of shape (heads,) for each attention module, by its name.
        """
        return {
            attention.name: largest
            for attention, largest in zip(self.attentions, self._maxima, strict=True)
            if largest is not None
        }

    def take(self) -> Tensor:
        """Return the maxima over all ranks, and discard them. Every rank must call this method.

        Returns:
            A float32 tensor of shape (attentions, heads). An entry is −inf if no logits were
            measured, and NaN if any rank measured NaN.

        Raises:
            ConfigurationError: No logits have been measured since `start`.
        """
        seen = [largest for largest in self._maxima if largest is not None]
        # Loading a sharded optimizer state performs a step before the first batch. At that time the
        # measurement has not started, so the step must not raise the error.
        if not seen and not self._was_seen and self in _active:
            raise ConfigurationError(
                "No attention logits were seen before the first step: the model's attention does "
                "not go through the AttentionInterface. Leave qk_clip out."
            )
        if seen and not self._was_seen:
            self._was_seen = True
            for attention, own in zip(self.attentions, self._maxima, strict=True):
                if own is None:
                    logger.warning("No attention logits were seen of %s.", attention.name)
        linear = self.attentions[0].query.linear
        device = seen[0].device if seen else next(linear.parameters()).device
        width = max(attention.heads.num_heads for attention in self.attentions)
        table = torch.full((len(self.attentions), width), -torch.inf, device=device)
        for i, largest in enumerate(self._maxima):
            if largest is not None:
                table[i, : len(largest)] = largest
        self.forget()
        ranks: Tensor = gather(table[None])
        return ranks.amax(dim=0)

    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, *, name: str, options: Any
    ) -> None:
        """Measure one attention call, if it belongs to this model.

        Raises:
            ConfigurationError: The call comes from DataParallel, its number of heads differs from
                that of the module, or its mask or packing cannot be read.
        """
        # With gradient checkpointing, the first forward pass has no gradients and is not measured.
        # The recomputed forward pass is.
        if not (self._in_evaluation or (module.training and torch.is_grad_enabled())):
            return
        if getattr(module, "_is_replica", False):
            raise ConfigurationError(
                "Attention logits are measured on one GPU, or under DDP (torchrun), but not in "
                f"the copies that DataParallel makes in each step. {self._ADVICE}".rstrip()
            )
        if (place := self._places.get(module)) is None:
            return
        attention = self.attentions[place]
        heads, is_cross = attention.heads, attention.is_cross_attention
        found, num_keys = query.shape[1], key.shape[1]
        if found != heads.num_heads or num_keys not in (heads.num_key_heads, heads.num_heads):
            raise ConfigurationError(
                f"{attention.name} attends with {found} heads and {num_keys} of keys where "
                f"{heads.num_heads} and {heads.num_key_heads} were expected. "
                f"{self._ADVICE}".rstrip()
            )
        counts = _counted(module, query, key, mask, name=name, options=options, is_cross=is_cross)
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        largest = _largest_logits(query.detach(), key.detach(), counts) * scaling
        before = self._maxima[place]
        self._maxima[place] = largest if before is None else torch.maximum(before, largest)


class MeasureAttention(TrainerCallback):
    """Measures while a Trainer trains. The maxima of each step are separate."""

    def __init__(self, maxima: AttentionMaxima) -> None:
        self._maxima = maxima

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start measuring, without the maxima that an aborted run may have left."""
        self._maxima.forget()
        self._maxima.start()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Discard maxima that were not taken because a GradScaler skipped the last update."""
        self._maxima.forget()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop measuring."""
        self.stop()

    def stop(self) -> None:
        """Stop measuring. Call this also after an exception, when the Trainer calls no callback."""
        self._maxima.stop()


# ---- which positions count ----

Counted = Callable[[int, int], tuple[int, Tensor | None]]
"""A function of i and j, which select the query rows i … j − 1. It returns the number n of leading
keys that these queries can see, and a bool tensor that says which of these keys count. The tensor
broadcasts to (batch, heads, j − i, n). None instead of a tensor means that all of them count."""


def _counted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    *,
    name: str,
    options: Any,
    is_cross: bool = False,
) -> Counted:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigurationError(
            f"Attention logits are measured under masks that are tensors, and {name} takes a "
            f"{type(mask).__name__}: choose sdpa or eager as attn_implementation."
        )
    if options.get("cu_seq_lens_q") is not None:
        raise ConfigurationError(
            "Attention logits cannot be told apart by the sequences that cu_seq_lens_q divides: "
            "choose sdpa or eager as attn_implementation, or pad instead of packing."
        )
    if mask is not None and mask.ndim == 4:
        return _as_masked(mask[..., :num_keys], is_cross=is_cross)
    given = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if given is None else given
    is_causal = bool(is_causal) and num_queries > 1 and name != "eager"
    # SDPA aligns queries with the first keys, and flash attention aligns them with the last keys.
    shift = num_keys - num_queries if _FLASH in name else 0
    window = options.get("sliding_window") if _FLASH in name else None
    padding = mask[:, None, :, None].bool() if mask is not None else None
    is_same = num_queries == num_keys and not is_cross  # query i and key i share a position
    sequence = _packed(query, options) if _FLASH in name and mask is None and is_same else None

    def counts(i: int, j: int) -> tuple[int, Tensor | None]:
        seen = None
        last = min(j + shift, num_keys) if is_causal else num_keys
        if is_causal:
            rows = torch.arange(i, j, device=query.device)[:, None] + shift
            columns = torch.arange(last, device=query.device)
            seen = columns <= rows
            if window is not None:
                seen &= columns > rows - window
        if sequence is not None:
            is_together = sequence[i:j, None] == sequence[:last]
            seen = is_together if seen is None else seen & is_together
        if padding is not None:
            is_real = padding[:, :, :last].mT
            if is_same:
                is_real = is_real & padding[:, :, i:j]
            seen = is_real if seen is None else seen & is_real
        return last, seen

    return counts


def _packed(query: Tensor, options: Any) -> Tensor | None:
    """Return the number of the sequence to which each position belongs, or None without packing.

    transformers divides a row into sequences by ``position_ids`` if the batch size is 1 and there
    is no mask. A new sequence begins wherever the position id is the lowest in the row. If the row
    holds only one sequence, all positions get the same number.
    """
    positions: Tensor | None = options.get("position_ids")
    if positions is None or query.shape[0] != 1:
        return None
    if positions.numel() != query.shape[2]:
        raise ConfigurationError(
            f"Attention logits cannot be told apart by position_ids of shape "
            f"{tuple(positions.shape)} where a row has {query.shape[2]} positions: choose sdpa or "
            "eager as attn_implementation."
        )
    flat = positions.flatten()
    return (flat == flat.min()).cumsum(dim=0)


def _as_masked(mask: Tensor, *, is_cross: bool) -> Counted:
    """Return which positions count under a mask.

    Such a mask hides padded keys but not the queries at the same positions. In self-attention the
    diagonal of the mask shows which queries are real, because only real positions see themselves.

    Args:
        mask: A bool or additive mask of shape (batch, 1 or heads, queries or 1, keys).
        is_cross: Whether the mask belongs to cross-attention.
    """
    num_queries, num_keys = mask.shape[-2:]

    def counts(i: int, j: int) -> tuple[int, Tensor | None]:
        part = mask if num_queries == 1 else mask[..., i:j, :]
        seen = part if part.dtype == torch.bool else part > _MASKED_BELOW
        if 1 < num_queries == num_keys and not is_cross:
            seen = seen & seen[..., i:j].diagonal(dim1=-2, dim2=-1)[..., None]
        return num_keys, seen

    return counts


@torch.no_grad()
def _largest_logits(query: Tensor, key: Tensor, counts: Counted) -> Tensor:
    """Return the largest unscaled q·k of each head, as a float32 tensor of shape (heads,).

    Args:
        query: A tensor of shape (batch, heads, queries, d).
        key: A tensor of shape (batch, key heads, keys, d).
        counts: The function that says which positions count.
    """
    batch, num_heads, num_queries, _ = query.shape
    groups, num_keys = key.shape[1], key.shape[2]
    dtype = _dtype_of_logits(query)
    query, key = query.to(dtype), key.to(dtype)
    limit = _MAX_ELEMENTS_CPU if query.is_cpu else _MAX_ELEMENTS
    step = max(1, limit // (batch * num_heads * num_keys))
    largest = torch.full((num_heads,), -torch.inf, device=query.device)
    # (batch, key heads, heads of a group, queries, d)
    shared = torch.unflatten(query, 1, (groups, -1))
    for i in range(0, num_queries, step):
        j = min(i + step, num_queries)
        num_seen, is_seen = counts(i, j)
        rows = shared[..., i:j, :].flatten(2, 3)
        with torch.autocast(query.device.type, enabled=False):
            logits = rows @ key[:, :, :num_seen].mT
        logits = logits.view(batch, num_heads, j - i, num_seen)
        if is_seen is not None:
            logits = logits.masked_fill(~is_seen, -torch.inf)
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)).float())
    return largest


def _dtype_of_logits(query: Tensor) -> torch.dtype:
    """Return the dtype of the attention's products, or float32 if that is float16."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return torch.float32 if dtype == torch.float16 else dtype


# ---- the seam ----

_active: WeakSet[AttentionMaxima] = WeakSet()
_own_get_interface: Callable[..., Attention] | None = None


def _install() -> None:
    """Wrap every attention function that a model gets from the interface.

    Registering an attention function under a new name and setting ``config._attn_implementation``
    to it would not work. Models compare that name and choose masks by it, and they do not register
    their eager attention.
    """
    global _own_get_interface
    if _own_get_interface is not None:
        return
    own = getattr(AttentionInterface, "get_interface", None)
    if own is None:
        raise IncompatibleVersionError(
            "This release of transformers has no AttentionInterface.get_interface, through which "
            "qk_clip sees attention: use 5.3 or later."
        )

    def get_interface(self: Any, attn_implementation: str, default: Attention) -> Attention:
        attention = own(self, attn_implementation, default)
        return partial(_attend, attention, str(attn_implementation)) if _active else attention

    _own_get_interface = own
    AttentionInterface.get_interface = get_interface


def _remove_unused() -> None:
    global _own_get_interface
    if not _active and _own_get_interface is not None:
        AttentionInterface.get_interface = _own_get_interface
        _own_get_interface = None


def _attend(
    attention: Attention,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Any:
    _see(name, module, query, key, attention_mask, options)
    return attention(module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _see(name: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: Any) -> None:
    for maxima in tuple(_active):
        maxima.see(module, query, key, mask, name=name, options=options)


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def attention_watch(model: nn.Module) -> WatchAttention:
    """Return a function that starts measuring the attention logits for the health metrics.

    Nothing happens until the function is called, and only the health level ``full`` calls it. While
    the measurement is active, the logits are computed a second time. If `AttentionMaxima` cannot
    measure the model, for example because its attention is unknown or a mask is unreadable, one
    warning is logged and the metric is not measured for the rest of the run.

    Args:
        model: A transformers model, wrapped or not. It must not be compiled, because each
            measurement would break the graph.
    """
    has_failed = False

    def fail(error: Exception) -> tuple[Mapping[str, Tensor], float]:
        nonlocal has_failed
        has_failed = True
        logger.warning(
            "The health metric attention_logit_max is not measured in this run: %s", error
        )
        return {}, 0.0

    def start() -> StopAttention:
        if has_failed:
            return lambda: ({}, 0.0)
        try:
            maxima = _QuietMaxima(model)
            maxima.start()
        except Exception as error:
            nothing = fail(error)
            return lambda: nothing

        def stop() -> tuple[Mapping[str, Tensor], float]:
            maxima.stop()
            return (maxima.read(), maxima.seconds) if maxima.error is None else fail(maxima.error)

        return stop

    return start


class _QuietMaxima(AttentionMaxima):
    """Stores an exception from `see`, which would otherwise abort the model's forward pass."""

    _ADVICE = ""
    error: Exception | None = None
    seconds = 0.0

    def see(self, *args: Any, **named: Any) -> None:
        if self.error is not None:
            return
        started = time.perf_counter()
        try:
            super().see(*args, **named)
        except Exception as error:
            self.error = error
        self.seconds += time.perf_counter() - started
