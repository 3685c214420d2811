"""Tokens per second, model FLOPs utilisation, time to the end, and perplexity, in every log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = [
    "PEAK_BF16_FLOPS",
    "Stopwatch",
    "ThroughputTrainerMixin",
    "flops_per_token",
    "num_parameters",
    "peak_flops",
    "perplexity",
]

# Dense bf16, from NVIDIA's data sheets; the first key that the device's name holds counts.
PEAK_BF16_FLOPS: Mapping[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""FLOPs per second of one device in bf16 without sparsity, by what its name holds."""


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 FLOPs per second; None for one that is not in the table.

    >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("cpu")
    (312000000000000.0, None)
    """
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in device_name), None)


def flops_per_token(model: PreTrainedModel, *, context_length: int) -> float:
    """Count the FLOPs of training on one token, 6·N + 12·L·H·Q·T.

    N is the number of parameters that are multiplied with: all but tables that are only looked up
    (positions; the input embedding, unless it is tied to the output). L layers, H heads, Q the
    width of a head, T the context. Attention is counted in full, causal or not, and recomputed
    activations are not counted. After PaLM (arXiv 2204.02311, appendix B) and nanoGPT's
    ``estimate_mfu``.

    Args:
        model: A causal language model whose configuration names its layers, heads and width.
        context_length: Tokens a sequence.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    tied = None if output is None else output.weight
    looked_up = {
        table.weight
        for table in model.modules()
        if isinstance(table, nn.Embedding) and table.weight is not tied
    }
    num_multiplied = num_parameters(model) - sum(map(_num_elements, looked_up))
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12 * config.num_hidden_layers * heads * head_width * context_length
    return float(6 * num_multiplied + attention)


def num_parameters(model: PreTrainedModel, *, trained: bool = False) -> int:
    """Count a model's parameters, or those that are trained.

    As transformers does, but those that ZeRO-3 has split, too, which are empty between uses.
    """
    counted: int = model.num_parameters(only_trainable=trained)
    for parameter in model.parameters():
        if parameter.requires_grad or not trained:
            counted += _num_elements(parameter) - parameter.numel()
    return counted


def _num_elements(parameter: Tensor) -> int:
    whole: int = getattr(parameter, "ds_numel", parameter.numel())
    return whole


def perplexity(loss: float) -> float:
    """Return exp(loss), which is inf where a float cannot hold it.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Stopwatch:
    """Tokens and seconds of training since the last reading, without evaluations and saves.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._first_step = 0
        self._window_began = 0.0
        self._step_ended = 0.0
        self._tokens = 0

    def begin(self, step: int) -> None:
        """Start, at the first step of this session: a resumed one does not count earlier steps."""
        if self._began is None:
            self._began = self._window_began = self._step_ended = self._clock()
            self._first_step = step

    def reset(self) -> None:
        """Forget everything: another call of ``train`` begins."""
        self._began, self._tokens = None, 0

    def add_tokens(self, count: int) -> None:
        """Count a micro-batch."""
        self._tokens += count

    def end_step(self) -> None:
        """Note when a step ended; `leave_out` counts from here."""
        self._step_ended = self._clock()

    def leave_out(self) -> None:
        """Exclude the time since the step ended, or since the last call, from the window."""
        now = self._clock()
        self._window_began += now - self._step_ended
        self._step_ended = now

    def read(self, *, step: int, max_steps: int) -> dict[str, float]:
        """Return ``tokens_per_second`` and ``eta_seconds`` and begin a new window.

        The estimate of the end takes the mean of this session's steps, evaluations and saves
        included. A number without a value is left out.
        """
        if self._began is None:
            return {}
        now = self._clock()
        seconds, tokens = now - self._window_began, self._tokens
        self._window_began, self._tokens = now, 0
        # An evaluation or a save after this reading does not belong to the next window.
        self._step_ended = now
        numbers = {}
        if seconds > 0 and tokens > 0:
            numbers["tokens_per_second"] = tokens / seconds
        if (done := step - self._first_step) > 0:
            numbers["eta_seconds"] = (now - self._began) / done * max(0, max_steps - step)
        return numbers


class _Times(TrainerCallback):
    """Starts and stops the stopwatch, and excludes evaluations and saves."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopwatch.reset()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not in on_train_begin: a resumed run skips data in between.
        self._stopwatch.begin(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopwatch.end_step()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopwatch.leave_out()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stopwatch.leave_out()


class ThroughputTrainerMixin:
    """Left of a Trainer class: adds ``throughput/…`` to training logs and perplexity to the others.

    - ``throughput/tokens_per_second``: over all ranks, since the last log; padding counts
    - ``throughput/mfu``: share of the devices' dense bf16 peak that `flops_per_token` makes use of;
      left out in full precision and on devices that `PEAK_BF16_FLOPS` does not know
    - ``throughput/eta_seconds``: to the end of the run
    - ``eval_perplexity``: exp(``eval_loss``), likewise for every evaluation set

    They reach every reporter and ``trainer_state.json``. Ranks are taken to split the data evenly,
    as Accelerate does; under tensor parallelism, where they share it, the numbers are too high. ::

        class MyTrainer(ThroughputTrainerMixin, PSSTrainer): ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopwatch = Stopwatch()
        self._context_length = 0
        # Last in the list: what other callbacks do at the end of a step is part of the step.
        self.add_callback(_Times(self._stopwatch))  # type: ignore[attr-defined]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Count a micro-batch's tokens by its shape: nothing is read from the device."""
        ids = inputs["input_ids"]
        self._context_length = ids.shape[-1]
        self._stopwatch.add_tokens(ids.numel())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with these numbers."""
        if "loss" in logs:
            logs.update(self._throughput())
        for key in [key for key in logs if key.startswith("eval_") and key.endswith("_loss")]:
            logs[f"{key.removesuffix('_loss')}_perplexity"] = perplexity(logs[key])
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _throughput(self) -> dict[str, float]:
        # The Trainer has just read the loss from the device, so the step's work is done there.
        args: TrainingArguments = self.args  # type: ignore[attr-defined]
        state: TrainerState = self.state  # type: ignore[attr-defined]
        numbers = self._stopwatch.read(step=state.global_step, max_steps=state.max_steps)
        if (rate := numbers.get("tokens_per_second")) is not None:
            numbers["tokens_per_second"] = rate = rate * args.world_size
            if (peak := self._peak_flops(args)) is not None:
                model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
                flops = flops_per_token(model, context_length=self._context_length)
                numbers["mfu"] = rate * flops / peak
        return {f"throughput/{name}": value for name, value in numbers.items()}

    def _peak_flops(self, args: TrainingArguments) -> float | None:
        """Return the peak of all ranks' devices together."""
        if args.device.type != "cuda" or not (args.bf16 or args.fp16):
            return None
        peak = peak_flops(torch.cuda.get_device_name(args.device))
        return None if peak is None else peak * args.world_size * max(1, args.n_gpu)
