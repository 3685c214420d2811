"""Metrics of the hidden states in ordinary training forward passes, at sampled steps."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pss.errors import ConfigurationError
from hf_pss.health.representations import (
    TokenMask,
    TokenSample,
    attention_logit_bound,
    collapse_measures,
    hidden_states,
    log_det_bounds,
    sign_diversity,
    spectral_alignment,
    token_cosine,
)
from hf_pss.models.batching import raise_together
from hf_pss.models.distributed import Backend
from hf_pss.models.selection import Selection, canonical_name
from hf_pss.models.selection.heads import AttentionHeads, HeadRows, find_heads

logger = logging.getLogger(__name__)

See: TypeAlias = Callable[[nn.Module, Any, Any], None]
"""Takes a module, its inputs, and its output or keyword arguments."""
StopAttention: TypeAlias = Callable[[], tuple[Mapping[str, Tensor], float]]
"""Ends the measurement of attention logits. Returns the largest logit of each head on this rank,
shape (heads,), by the attention's name. Also returns the seconds spent."""
WatchAttention: TypeAlias = Callable[[], StopAttention]
"""Starts the measurement of attention logits, and returns the function that ends it."""

# Limits per rank [ours]: tokens of a block over all micro-batches, and inputs of a layer in each.
_MAX_TOKENS, _MAX_SIGNS = 256, 1024
_OF_BLOCKS = (
    "token_cosine",
    "gram_log_det",
    "gram_log_det_lower",
    "gram_log_det_upper",
    "token_mean_share",
    "token_top_share",
    "token_centred_top_share",
    "token_effective_rank",
)
_DIVERSITY, _NORM, _LOGIT = "sign_diversity", "largest_input", "attention_logit_max"
_MAXIMA = {_NORM, _LOGIT}
# Attributes of transformers' modules that hold the factor on q·k.
_SCALES = ("scaling", "softmax_scale", "inv_norm_factor", "scale")
_MOST_NAMES = 3
_BLOCK = re.compile(r"^(?:.*?\.)??\d+(?=\.)")


class ForwardHooks:
    """Forward hooks of one training step. Errors that they raise never reach the model.

    The hooks run only in training mode and only with gradients, so they skip generation and the
    pass of a reference model. They also skip the second run of a checkpointed block. If a graph is
    compiled while the hooks exist, it leaves them out and is not split.

    Args:
        root: The module that contains all hooked modules. When it starts, the hooks note whether
            gradients are on, because reentrant checkpointing runs blocks without them. If a part of
            it is called directly, the hooks assume that gradients are on.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root, self._has_gradients = root, True
        self._handles: list[RemovableHandle] = []
        self.error: Exception | None = None
        """The first error of a hook. After it no hook is called."""
        self.seconds = 0.0
        """The time spent in the hooks."""

    def __bool__(self) -> bool:
        return bool(self._handles)

    def listen(self) -> None:
        """Note for each pass whether gradients are on. Call this before `before` and `after`."""
        self._handles += [
            self._root.register_forward_pre_hook(self._enter),
            self._root.register_forward_hook(self._leave),
        ]

    def after(self, module: nn.Module, see: See) -> None:
        """Call ``see`` with the module, inputs and output after each forward of the module."""
        self._handles.append(module.register_forward_hook(self._observe(see)))

    def before(self, module: nn.Module, see: See) -> None:
        """Call ``see`` with the module, inputs and keyword arguments before each forward."""
        hook = self._observe(see)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks. `error` and `seconds` keep their values."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, root: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._has_gradients = torch.is_grad_enabled()

    def _leave(self, root: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._has_gradients = True

    def _observe(self, see: See) -> See:
        def hook(module: nn.Module, inputs: Any, last: Any) -> None:
            # This is a constant while torch traces, so torch does not compile the rest.
            if not torch.compiler.is_compiling():
                self._call(module, inputs, last, see)

        return hook

    @torch.no_grad()
    def _call(self, module: nn.Module, inputs: Any, last: Any, see: See) -> None:
        # A checkpointed block runs again in the backward pass.
        if not module.training or torch._C._current_graph_task_id() != -1:
            return
        if not self._has_gradients or self.error is not None:
            return
        started = time.perf_counter()
        try:
            see(module, inputs, last)
        except Exception as error:
            self.error = error
        self.seconds += time.perf_counter() - started


class RepresentationMeter:
    """Observes one training step with hooks, and makes three measurements on each rank.

    - For each block it takes a uniform sample of at most 256 output tokens. If the model gets a 2-D
      ``attention_mask`` of their shape, masked tokens are left out. (In an encoder-decoder the mask
      belongs to the encoder.)
    - For each linear layer it measures the alignment of at most 1,024 inputs
      per micro-batch with v₁.
    - For each attention with a known scale it finds the longest input, which bounds its logits.

    The hooks exist between `arm` and `read`, see `ForwardHooks`. They leave the model's
    output the same to the bit. A model that was compiled before `arm` does not run them. If
    `read` is never called, for example after a step that raised, the first forward pass after
    an update removes them.

    Cost: full, for sampled steps. There is one device-to-host read, and one read of
    the mask per micro-batch.

    Args:
        model: The model, wrapped or not.
        selection: The model's matrices. If it has adapters, logits are not bounded, because the
            weights alone do not give queries and keys.
        backend: How parameters are stored.
    """

    def __init__(self, model: nn.Module, selection: Selection, backend: Backend) -> None:
        self._model, self._backend = model, backend
        self._watch: WatchAttention | None = None
        self._modules = {
            canonical_name(name): module
            for name, module in model.named_modules(remove_duplicate=False)
        }
        self._blocks = tuple(name for name in blocks_of(selection) if name in self._modules)
        self._layers: dict[str, list[str]] = {}
        for view in selection.matrices:
            layer, _, leaf = view.parameter_name.rpartition(".")
            if len(view.shape) == 2 and leaf == "weight" and layer in self._modules:
                self._layers.setdefault(layer, []).append(view.name)
        self._attentions: Sequence[AttentionHeads] = find_heads(model)[0]
        self._scales = {
            attention.name: scale
            for attention in self._attentions
            if not selection.adapters and (scale := _scale_of(attention.module)) is not None
        }
        self._has_two_sequences = any(
            getattr(getattr(module, "config", None), "is_encoder_decoder", False)
            for module in model.modules()
        )
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._has_warned: set[str] = set()
        self._stop: StopAttention | None = None
        self._begin()

    def _begin(self) -> None:
        """Drop the state of the last step."""
        self.is_armed = False
        """Whether a step has begun that `read` can end."""
        self._hooks = ForwardHooks(self._model)
        self._samples = {name: TokenSample(_MAX_TOKENS) for name in self._blocks}
        self._mask: TokenMask | None = None
        self._num_writes: int | None = None
        self._unmasked: list[str] = []
        self._alignments: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self._logits: Mapping[str, Tensor] = {}
        self._logit_seconds = 0.0

    @property
    def seconds(self) -> float:
        """The time spent in the hooks of the last armed step, and on its attention logits."""
        return self._hooks.seconds + self._logit_seconds

    def watch_attention(self, watch: WatchAttention) -> None:
        """Measure attention logits as well. Without this call they are only bounded."""
        self._watch = watch
        if self._hooks and self._stop is None:
            self._stop = watch()

    def arm(self, directions: Mapping[str, Tensor]) -> None:
        """Register the hooks for one step.

        Args:
            directions: v₁ of the matrices by name, (n,). Other matrices get no sign diversity.
        """
        self.disarm()
        self._begin()
        self.is_armed = True
        self._hooks.listen()
        self._hooks.before(self._model, self._see_batch)
        for name in self._blocks:
            self._hooks.after(self._modules[name], partial(self._see_tokens, name))
        for layer, names in self._layers.items():
            known = [name for name in names if name in directions]
            if known:
                v = torch.stack([directions[name] for name in known], dim=-1)
                see = partial(self._see_signs, layer, known, v)
                self._hooks.before(self._modules[layer], see)
        for attention in self._attentions:
            if attention.name not in self._scales:
                continue
            for linear in {attention.query.linear, attention.key.linear}:
                self._hooks.before(linear, partial(self._see_norm, attention.name))
        if self._watch is not None:
            self._stop = self._watch()

    def disarm(self) -> None:
        """Remove the hooks without taking a reading."""
        self.is_armed = False
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._hooks.remove()
        stop, self._stop = self._stop, None
        if stop is not None:
            self._logits, self._logit_seconds = stop()

    def read(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, float]]:
        """Remove the hooks, and return each metric by block, matrix or attention.

        All ranks must call it. Metrics are means over the samples of all ranks, and
        logits are maxima. Blocks that were not applied are left out. If a sample contains
        NaN, its metric is NaN.

        Args:
            parameters: Parameters by canonical name. Their norms are part of the bound.

        Raises:
            ConfigurationError: No hook ran on any rank.
            ElsewhereError: A hook failed on another rank, which raises its own error.
        """
        error = None
        own: dict[tuple[str, str], Tensor] = {}
        try:
            self.disarm()
            if self._hooks.error is not None:
                raise self._hooks.error
            own = self._measured()
        except Exception as caught:  # raised after the exchange with the other ranks
            error = caught
        self._warn_unmasked()
        joined = self._joined(own, error)
        norms = joined.pop(_NORM, {})
        if bounds := self._bounds(norms, parameters):
            joined["attention_logit_bound"] = bounds
        return joined

    # ---- the hooks ----

    def _see_batch(self, module: nn.Module, inputs: Any, named: Mapping[str, Any]) -> None:
        # Count from the first pass, because schedule-free optimizers swap the weights after `arm`.
        num_writes = sum(parameter._version for parameter in self._trained)
        if self._num_writes not in (None, num_writes):
            self._remove_hooks()
            return
        self._num_writes = num_writes
        mask = named.get("attention_mask")
        self._mask = TokenMask(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _counting(self, name: str, hidden: Tensor) -> Tensor:
        """Return the positions of the tokens that count, on the host."""
        mask = self._mask
        if mask is not None:
            is_its_own = not self._has_two_sequences or _is_of_encoder(name)
            if is_its_own and mask.fits(hidden):
                return mask.positions
            if mask.hides_some and name in self._blocks and name not in self._has_warned:
                self._has_warned.add(name)
                self._unmasked.append(name)
        return torch.arange(hidden.shape[:-1].numel())

    def _see_tokens(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = hidden_states(output)
        if hidden is None:
            logger.warning("%s returns no hidden states; it is left out.", name)
        else:
            self._samples[name].add(hidden, self._counting(name, hidden))

    def _see_signs(
        self, layer: str, names: Sequence[str], v: Tensor, module: nn.Module, inputs: Any, _: Any
    ) -> None:
        x = inputs[0].detach()
        positions = self._counting(layer, x)
        if len(positions) == 0:
            return
        chosen = positions[:: -(-len(positions) // _MAX_SIGNS)].to(x.device)
        cosines = spectral_alignment(x.reshape(-1, x.shape[-1])[chosen], v)
        for name, column in zip(names, cosines.mT, strict=True):
            self._alignments.setdefault(name, []).append(column)

    def _see_norm(self, name: str, module: nn.Module, inputs: Any, _: Any) -> None:
        norm = torch.linalg.vector_norm(inputs[0].detach(), dim=-1, dtype=torch.float32).amax()
        self._norms[name] = torch.maximum(norm, self._norms.get(name, norm))

    # ---- the numbers ----

    def _warn_unmasked(self) -> None:
        if self._unmasked:
            hidden = len(self._unmasked) - _MOST_NAMES
            logger.warning(
                "The model's attention_mask does not fit the tokens of %s%s: all of them count in "
                "health metrics, padding too.",
                ", ".join(self._unmasked[:_MOST_NAMES]),
                f" and {hidden} more blocks" if hidden > 0 else "",
            )

    def _measured(self) -> dict[tuple[str, str], Tensor]:
        """Return this rank's numbers by metric and name, on the device."""
        found: dict[tuple[str, str], Tensor] = {}
        for name, sample in self._samples.items():
            if sample.num_seen:
                numbers = (
                    token_cosine(sample.rows),
                    *log_det_bounds(sample.rows, sample.num_seen),
                    *collapse_measures(sample.rows),
                )
                found |= {(m, name): x for m, x in zip(_OF_BLOCKS, numbers, strict=True)}
        for name, cosines in self._alignments.items():
            found[_DIVERSITY, name] = sign_diversity(torch.cat(cosines))
        found |= {(_NORM, name): norm for name, norm in self._norms.items()}
        found |= {(_LOGIT, name): heads.amax() for name, heads in self._logits.items()}
        return found

    def _joined(
        self, own: Mapping[tuple[str, str], Tensor], error: Exception | None
    ) -> dict[str, dict[str, float]]:
        """Exchange the numbers with all ranks, and combine them.

        The layout depends only on the model, not on this rank's sample.
        """
        attentions = [attention.name for attention in self._attentions]
        keys = [(metric, name) for metric in _OF_BLOCKS for name in self._blocks]
        keys += [(_DIVERSITY, name) for names in self._layers.values() for name in names]
        keys += [(metric, name) for metric in (_NORM, _LOGIT) for name in attentions]
        device = next(self._model.parameters()).device
        # A mean is never inf and a maximum never −inf, so these values stand for "not seen".
        unseen = [-math.inf if metric in _MAXIMA else math.inf for metric, _ in keys]
        numbers = [own.get(key, torch.tensor(x)) for key, x in zip(keys, unseen, strict=True)]
        row = [torch.tensor(float(error is not None)), *numbers]
        shape = self._backend.world_size, len(row)
        table = torch.zeros(shape, dtype=torch.float64, device=device)
        table[self._backend.rank] = torch.stack([x.detach().to(device).double() for x in row])
        every = torch.tensor(self._backend.sum_to_host(table.flatten()), dtype=torch.float64)
        flags, *columns = every.view(shape).mT
        if flags.any():
            raise_together(error)
        joined: dict[str, dict[str, float]] = {}
        for (metric, name), empty, column in zip(keys, unseen, columns, strict=True):
            seen = column[column != empty]
            if len(seen):
                number = seen.amax() if metric in _MAXIMA else seen.mean()
                joined.setdefault(metric, {})[name] = float(number)
        if not joined:
            raise ConfigurationError(
                "no hook ran in a training step; the model may be compiled, or called in "
                "evaluation mode. pss_health=standard uses no hooks"
            )
        return joined

    def _bounds(
        self, norms: Mapping[str, float], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, float]:
        """Return a bound of the logits of each attention with known inputs, equal on all ranks."""
        found = {}
        for attention in [a for a in self._attentions if a.name in norms]:
            (query, query_bias), (key, key_bias) = (
                self._projection(rows, parameters) for rows in (attention.query, attention.key)
            )
            found[attention.name] = attention_logit_bound(
                query,
                key,
                norms[attention.name],
                num_heads=attention.heads.num_heads,
                query_bias=query_bias,
                key_bias=key_bias,
                scale=self._scales[attention.name],
            ).amax()
        numbers = torch.stack(list(found.values())).tolist() if found else []
        return dict(zip(found, numbers, strict=True))

    def _projection(
        self, rows: HeadRows, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[Tensor, Tensor | None]:
        name = rows.view.parameter_name
        weight = rows.view.read(self._backend.full(parameters[name]))
        bias = parameters.get(f"{name.removesuffix('weight')}bias")
        if bias is None:
            return weight, None
        whole = self._backend.full(bias)
        return weight, whole[rows.stored_rows(whole.device)]


def _scale_of(attention: nn.Module) -> float | None:
    """Return the factor on q·k, or None without such an attribute (GPT-Neo does not scale)."""
    values = (getattr(attention, name, None) for name in _SCALES)
    # Exclude bool, which is a subclass of int.
    numbers = (v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    return next((float(v) for v in numbers), None)


def _is_of_encoder(name: str) -> bool:
    """Return whether a block belongs to the encoder, judged by the outermost name.

    Only the outermost name counts, because a decoder may be a model that calls
    its blocks an encoder.
    """
    parts = (part for part in name.split(".") if part in ("encoder", "decoder"))
    return next(parts, None) == "encoder"


def blocks_of(selection: Selection) -> tuple[str, ...]:
    """Return the names of the blocks with matrices. An adapter's ends at the first number."""
    found = [view.block for view in selection.matrices]
    adapted = (_BLOCK.match(view.name) for view in selection.adapters)
    found += [match.group() for match in adapted if match is not None]
    return tuple(dict.fromkeys(found))
