"""Add tokens per second, model FLOPs utilisation, remaining time and perplexity to the logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from hf_pss.trainer.seams import TrainerPart

# The numbers are from NVIDIA's data sheets. The first key that occurs in the device's name applies.
PEAK_BF16_FLOPS: Mapping[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""FLOPs per second of one device in bf16 without sparsity, by a part of the device's name."""


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 FLOPs per second, or None if it is not in the table.

    >>> peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("cpu")
    (312000000000000.0, None)
    """
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in device_name), None)


def flops_per_token(model: PreTrainedModel, *, context_length: int) -> float:
    """Count the FLOPs of training on one token as 6·N + 12·L·H·Q·T.

    N is the number of parameters that take part in matrix products. It excludes tables that are
    only looked up: position embeddings, and the input embedding unless it is tied to the
    output. L is the number of layers, H the number of heads, Q the width of a head and T the
    context length. The formula counts the full attention matrix even if the attention is
    causal, and it does not count recomputed activations. It follows PaLM (arXiv 2204.02311,
    appendix B) and nanoGPT's ``estimate_mfu``.

    Args:
        model: A causal language model whose configuration names its layers, heads and width.
        context_length: The number of tokens per sequence.
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
    """Count the parameters of a model, or only the trained ones.

    The count is that of transformers, except that it includes parameters that ZeRO-3 has sharded.
    These are empty while they are not in use.
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
    """Return exp(loss), or inf if a float cannot hold the result.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Stopwatch(TrainerCallback):
    """Counts training tokens and seconds since the last reading, without evaluations and saves.

    As a callback it starts and stops itself. The clock starts at the first step and not in
    ``on_train_begin``, because a resumed run skips data first.

    Args:
        clock: A function that returns seconds from a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._first_step = 0
        self._window_began = 0.0
        self._step_ended = 0.0
        self._tokens = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget everything, because a new call of ``train`` begins."""
        self._began, self._tokens = None, 0

    def on_step_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        """Start the clock if it stands."""
        self.begin(state.global_step)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the end of a step. `on_save` excludes the time from here."""
        self._step_ended = self._clock()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Exclude the time since the step ended, or since the last call, from the window."""
        now = self._clock()
        self._window_began += now - self._step_ended
        self._step_ended = now

    on_evaluate = on_save

    def begin(self, step: int) -> None:
        """Start at the first step of this session. Steps before a resume are not counted."""
        if self._began is None:
            self._began = self._window_began = self._step_ended = self._clock()
            self._first_step = step

    def add_tokens(self, count: int) -> None:
        """Add the tokens of a micro-batch."""
        self._tokens += count

    def read(self, *, step: int, max_steps: int) -> dict[str, float]:
        """Return ``tokens_per_second`` and ``eta_seconds``, and begin a new window.

        The remaining time is estimated from the mean time per step of this session, including
        evaluations and saves. The result leaves out a number that has no value.
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


class ThroughputTrainerMixin(TrainerPart):
    """Mixin that adds ``throughput/…`` to training logs and perplexity to evaluation logs.

    - ``throughput/tokens_per_second`` counts the tokens of all ranks since the last
      log, including padding.
    - ``throughput/mfu`` is the share of the devices' dense bf16 peak that the run uses, by
      `flops_per_token`. It is left out in full precision and on devices that `PEAK_BF16_FLOPS`
      does not list.
    - ``throughput/eta_seconds`` is the time to the end of the run.
    - ``eval_perplexity`` is exp(``eval_loss``). Every other evaluation set gets its own perplexity.

    All numbers reach every reporter and ``trainer_state.json``. The mixin assumes that the ranks
    split the data evenly, as they do with Accelerate. Under tensor parallelism the ranks share the
    same data, so the numbers are too high.

    List the mixin to the left of a Trainer class::

        class MyTrainer(ThroughputTrainerMixin, PSSTrainer): ...
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopwatch = Stopwatch()
        self._context_length = 0
        # The callback comes last, so that the work of other callbacks counts as part of the step.
        self.add_callback(self._stopwatch)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Count the tokens of a micro-batch by its shape, without a read from the device."""
        ids = inputs["input_ids"]
        self._context_length = ids.shape[-1]
        self._stopwatch.add_tokens(ids.numel())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add these numbers to the logs, and log them."""
        if "loss" in logs:
            logs.update(self._throughput())
        for key in [key for key in logs if key.startswith("eval_") and key.endswith("_loss")]:
            logs[f"{key.removesuffix('_loss')}_perplexity"] = perplexity(logs[key])
        super().log(logs, *args, **kwargs)

    def _throughput(self) -> dict[str, float]:
        # The Trainer has just read the loss from the device, so the device has finished the step.
        args, state = self.args, self.state
        numbers = self._stopwatch.read(step=state.global_step, max_steps=state.max_steps)
        if (rate := numbers.get("tokens_per_second")) is not None:
            numbers["tokens_per_second"] = rate = rate * args.world_size
            if (peak := self._peak_flops(args)) is not None:
                model = self.accelerator.unwrap_model(self.model)
                flops = flops_per_token(model, context_length=self._context_length)
                numbers["mfu"] = rate * flops / peak
        return {f"throughput/{name}": value for name, value in numbers.items()}

    def _peak_flops(self, args: TrainingArguments) -> float | None:
        """Return the combined peak of the devices of all ranks, or None if it is unknown."""
        if args.device.type != "cuda" or not (args.bf16 or args.fp16):
            return None
        peak = peak_flops(torch.cuda.get_device_name(args.device))
        return None if peak is None else peak * args.world_size * max(1, args.n_gpu)
