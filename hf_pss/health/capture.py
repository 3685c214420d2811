"""Hooks that observe a training step, and a bounded sample of the tokens that leave its blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Capture", "ForwardHooks"]

logger = logging.getLogger(__name__)

See: TypeAlias = Callable[[nn.Module, Any, Any], None]
"""Takes a module, its inputs, and its output or keyword arguments."""


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


Choose: TypeAlias = Callable[[str, Tensor], Tensor]
"""Maps a block's name and its hidden states (..., d) to the positions of the tokens that count. The
positions are on the host."""


class Capture:
    """A uniform sample of the tokens that leave each block.

    Cost: each forward pass copies at most ``max_tokens`` rows per block. For 8,192 tokens of width
    768 this takes 0.2 ms on one CPU thread. It does not read from the device.

    Args:
        names: The names of the blocks.
        max_tokens: The largest number of rows to keep for each block, over all forward passes.
        seed: The seed of the sample. The global generator of torch is not used.
        choose: Returns the tokens that count.
    """

    def __init__(self, names: Sequence[str], *, max_tokens: int, seed: int, choose: Choose) -> None:
        self._reservoirs = {name: _Reservoir(max_tokens, seed) for name in names}
        self._choose = choose

    @property
    def samples(self) -> dict[str, Tensor]:
        """The tokens of each block, (n, d), float32, with n ≤ max_tokens.

        The shape is (0, 0) if a block was not applied. The tokens are a uniform sample without
        replacement of all tokens that passed. If blocks saw equally many tokens, as the blocks of a
        decoder do, they keep the same tokens in the same order.
        """
        return {name: reservoir.rows for name, reservoir in self._reservoirs.items()}

    @property
    def num_seen(self) -> dict[str, int]:
        """The number of tokens that passed through each block, without masked ones."""
        return {name: reservoir.num_seen for name, reservoir in self._reservoirs.items()}

    def add(self, name: str, output: Any) -> None:
        """Add the output of a block.

        The output is hidden states (batch, tokens, d), or a tuple, list or mapping
        that begins with them.
        """
        hidden = _hidden_states(output)
        if hidden is None or not hidden.is_floating_point():
            logger.warning("%s returns no hidden states; it is left out.", name)
            return
        tokens = hidden.detach().reshape(-1, hidden.shape[-1])
        self._reservoirs[name].add(tokens, self._choose(name, hidden))


class _Reservoir:
    """Keeps the rows with the smallest independent uniform keys, which are always a uniform sample.

    This is a form of Vitter's reservoirs (ACM TOMS 11(1)) with priorities. The keys are on the
    host, so no hook waits for the device.
    """

    def __init__(self, max_tokens: int, seed: int) -> None:
        self._max_tokens = max_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, 0)
        self.num_seen = 0

    def add(self, tokens: Tensor, positions: Tensor) -> None:
        num_held = len(self._keys)
        fresh = torch.rand(len(positions), generator=self._generator, dtype=torch.float64)
        keys = torch.cat([self._keys, fresh])
        self._keys, kept = keys.topk(min(self._max_tokens, len(keys)), largest=False)
        old, new = kept[kept < num_held], kept[kept >= num_held] - num_held
        rows = _take(tokens, positions[new])
        if num_held:
            # The rows that are already held come first, and their keys are in the same order.
            is_old = kept < num_held
            self._keys = torch.cat([self._keys[is_old], self._keys[~is_old]])
            rows = torch.cat([_take(self.rows, old), rows.to(self.rows.device)])
        self.rows = rows
        self.num_seen += len(positions)


def _take(rows: Tensor, positions: Tensor) -> Tensor:
    return rows[positions.to(rows.device, non_blocking=True)].float()


def _hidden_states(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim > 0 else None
