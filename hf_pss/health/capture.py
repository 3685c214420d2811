"""Hooks that look on at a training step: nothing that they do or raise reaches the model.

A bounded sample of the tokens that leave chosen blocks, taken by hooks and gone with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_pss.errors import ConfigurationError, SelectionError
from hf_pss.health.representations import TokenMask
from hf_pss.models.selection import canonical_name

__all__ = ["Capture", "QuietHooks", "capture"]

logger = logging.getLogger(__name__)

After: TypeAlias = Callable[[nn.Module, Any, Any], object]
Before: TypeAlias = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], object]


class QuietHooks:
    """Forward hooks of one armed step; all gone with `remove`.

    They see forward passes in training mode and with gradients, and no recomputation of
    checkpointed blocks: a reference's pass or generation is no training step's. A graph that is
    compiled while they are there leaves them out: it is not broken for them.

    Args:
        root: Holds all that they are put on. Whether there are gradients is asked when it is
            entered: reentrant checkpointing runs blocks without. A part that is called by itself
            is taken to have them.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root, self._has_gradients = root, True
        self._handles: list[RemovableHandle] = []
        self.error: Exception | None = None
        """The first that one of them has raised; none of them is called after it."""
        self.num_calls = 0
        self.seconds = 0.0
        """Spent in them."""

    def __bool__(self) -> bool:
        return bool(self._handles)

    def listen(self) -> None:
        """Put on the root what tells passes with gradients from those without; before all else."""
        self._handles += [
            self._root.register_forward_pre_hook(self._enter),
            self._root.register_forward_hook(self._leave),
        ]

    def after(self, module: nn.Module, see: After) -> None:
        """Call with module, inputs and output, after each of its forwards."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A constant while torch traces: what follows is not compiled.
            if torch.compiler.is_compiling():
                return
            self._call(module, lambda: see(module, inputs, output))

        self._handles.append(module.register_forward_hook(hook))

    def before(self, module: nn.Module, see: Before) -> None:
        """Call with module, inputs and keyword arguments, before each of its forwards."""

        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            if torch.compiler.is_compiling():
                return
            self._call(module, lambda: see(module, inputs, named))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks away; what was counted and raised stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, root: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._has_gradients = torch.is_grad_enabled()

    def _leave(self, root: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._has_gradients = True

    @torch.no_grad()
    def _call(self, module: nn.Module, work: Callable[[], object]) -> None:
        # A checkpointed block runs again in the backward pass: that has been seen.
        if not module.training or torch._C._current_graph_task_id() != -1:
            return
        if not self._has_gradients or self.error is not None:
            return
        started = time.perf_counter()
        self.num_calls += 1
        try:
            work()
        except Exception as error:
            self.error = error
        self.seconds += time.perf_counter() - started


Choose: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""From a block's name and its hidden states (..., d) to the positions of the tokens that count, on
the host; None leaves them out."""


class Capture:
    """What the hooks of one `capture` have kept; to be read inside or after its block."""

    def __init__(self, names: Sequence[str], *, max_tokens: int, seed: int, choose: Choose) -> None:
        self._reservoirs = {name: _Reservoir(max_tokens, seed) for name in names}
        self._choose = choose
        self.has_listened = False
        """Whether any block was applied."""

    @property
    def samples(self) -> dict[str, Tensor]:
        """Tokens by block, (n, d), float32, n ≤ max_tokens; (0, 0) where a block was not applied.

        A uniform sample without replacement of all that passed. Blocks that saw equally many
        tokens, as those of a decoder do, keep the same ones in the same order.
        """
        return {name: reservoir.rows for name, reservoir in self._reservoirs.items()}

    @property
    def num_seen(self) -> dict[str, int]:
        """How many tokens passed through each block, masked ones left out."""
        return {name: reservoir.num_seen for name, reservoir in self._reservoirs.items()}

    def listen(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return the forward hook of one block."""

        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.has_listened = True
            # A checkpointed block runs again in the backward pass: those tokens have been seen.
            if torch._C._current_graph_task_id() != -1:
                return
            hidden = _hidden_states(output)
            if hidden is None or not hidden.is_floating_point():
                logger.warning("%s returns no hidden states; it is left out.", name)
                return
            positions = self._choose(name, hidden)
            if positions is not None:
                tokens = hidden.detach().reshape(-1, hidden.shape[-1])
                self._reservoirs[name].add(tokens, positions)

        # Traced, it would break the graph in the middle of its bookkeeping.
        untraced: Callable[[nn.Module, Any, Any], None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        return untraced


@contextmanager
def capture(
    model: nn.Module,
    block_names: Sequence[str],
    *,
    max_tokens: int = 256,
    seed: int = 0,
    mask: Tensor | None = None,
) -> Iterator[Capture]:
    """Sample the tokens that leave each block while the context lasts.

    Cost: low, for sampled steps. A copy of at most max_tokens rows a block and forward pass, 0.2 ms
    of 8,192 tokens of width 768 on one CPU thread, and no device-to-host read. No hook is left when
    the block ends, however it ends. In a model that was compiled as a whole before, torch may run
    no new hooks: where nothing is seen, a warning says so. One compiled with fullgraph=True while
    the hooks are there raises torch's error.

    Args:
        model: Wrapped or not.
        block_names: Canonical names of modules whose output is hidden states (batch, tokens, d),
            or a tuple or mapping that begins with them.
        max_tokens: The most rows to keep of each block, over all forward passes.
        seed: Of the sample; torch's global generator is left alone.
        mask: (batch, tokens), nonzero where a token counts, for instance the attention mask. None:
            all count, padding too, which looks like collapse. A block whose output is not of its
            shape is left out, with a warning.

    Raises:
        SelectionError: a name that the model does not have.
        ConfigurationError: max_tokens below 1.

    >>> model = nn.Sequential(nn.Identity())
    >>> with capture(model, ["0"], max_tokens=2) as captured:
    ...     _ = model(torch.ones(5, 3))
    >>> captured.samples["0"].shape, captured.num_seen
    (torch.Size([2, 3]), {'0': 5})
    """
    if max_tokens < 1:
        raise ConfigurationError(f"You gave max_tokens={max_tokens}; give 1 or more.")
    modules: Mapping[str, nn.Module] = {
        canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    unknown = [name for name in block_names if name not in modules]
    if unknown:
        raise SelectionError(
            f"You gave {unknown[0]!r}, which the model does not have; names are those of "
            "named_modules(), such as 'transformer.h.0'."
        )
    choose = _choose_by(None if mask is None else TokenMask(mask))
    captured = Capture(block_names, max_tokens=max_tokens, seed=seed, choose=choose)
    handles = []
    try:
        for name in dict.fromkeys(block_names):
            handles.append(modules[name].register_forward_hook(captured.listen(name)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
    if block_names and not captured.has_listened:
        logger.warning(
            "None of %s was seen in a forward pass. Hooks do not run in a model that was compiled "
            "before they came; capture from it before compiling, or compile its blocks.",
            ", ".join(block_names),
        )


def _choose_by(mask: TokenMask | None) -> Choose:
    has_warned: set[str] = set()

    def choose(name: str, hidden: Tensor) -> Tensor | None:
        if mask is None:
            return torch.arange(hidden.shape[:-1].numel())
        if mask.fits(hidden):
            return mask.positions
        if name not in has_warned:
            has_warned.add(name)
            logger.warning(
                "%s returns tokens of shape %s where the mask has %s; it is left out.",
                name,
                tuple(hidden.shape[:-1]),
                mask.shape,
            )
        return None

    return choose


class _Reservoir:
    """Keeps the rows with the smallest of independent uniform keys: a uniform sample at any time.

    (Vitter's reservoirs, ACM TOMS 11(1), in the form of priorities.) The keys live on the host, so
    that no hook waits for the device.
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
            # Held rows first: their keys in the same order.
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
