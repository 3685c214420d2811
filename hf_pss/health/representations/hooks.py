"""Hooks that look on at a training step: nothing that they do or raise reaches the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["QuietHooks"]

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
