from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

Run = Callable[..., Result]

# A model that takes a training step in milliseconds.
SIZES = "n_layer=2,n_embd=32,n_head=2,n_positions=32"
TINY = ("--model_config", "gpt2", "--model_overrides", SIZES)
SHORT = (
    *("--max_steps", "5", "--context_length", "32", "--per_device_train_batch_size", "4"),
    *("--max_validation_blocks", "4", "--use_cpu", "--vocab_size", "300"),
)

PROSE = "\n".join(f"line {i}: the quick brown fox jumps over the lazy dog." for i in range(300))
