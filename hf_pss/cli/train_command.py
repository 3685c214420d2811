"""`hf-pss train`: pretrain or fine-tune a causal language model with PSSTrainer; its help page.

This module imports neither torch nor transformers, so that the page appears at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from hf_pss.cli.train_options import (
    LEARNING_RATE_HELP,
    DataOptions,
    ModelOptions,
    RunOptions,
    ScaleOptions,
)
from hf_pss.config import PRESETS, PSSConfig

_INTRODUCTION = """\
Usage: hf-pss train [--config FILE.yaml] [OPTIONS]

Pretrain or fine-tune a causal language model on your text with PSSTrainer: transformers' Trainer \
that notices an imminent loss explosion and smooths the weights' leading singular values.

Give every option on the command line, as --learning_rate 3e-3 or --learning-rate 3e-3, or as a \
line of a YAML file, as learning_rate: 3e-3. The command line wins over the file."""

_EXAMPLES = """\
1. Pretrain a small GPT-2 on the Python library, in minutes on a laptop:

   hf-pss train --model_config gpt2 --model_overrides n_layer=4,n_embd=96 \\
     --context_length 128 --max_steps 500 --learning_rate 3e-3

2. Fine-tune a model on your own text:

   hf-pss train --model gpt2 --dataset notes.jsonl --text_column body \\
     --learning_rate 5e-5 --output_dir runs/notes

3. Keep the options in a file, change one, continue after an interruption:

   hf-pss train --config recipes/gpt2_tiny_cpu/pss.yaml --max_steps 400
   hf-pss train --config recipes/gpt2_tiny_cpu/pss.yaml --max_steps 400 --resume

4. Train the weight matrices with Muon, and everything else with AdamW at a different rate:

   hf-pss train --model_config gpt2 --model_overrides n_layer=4,n_embd=96 \\
     --context_length 128 --max_steps 500 --learning_rate 1e-2 \\
     --pss_optim muon --pss_optim_args others_lr=3e-3

5. Train on several GPUs, with DDP, FSDP2 or DeepSpeed:

   accelerate launch --config_file recipes/accelerate/ddp.yaml \\
     -m hf_pss.cli train --config recipes/gpt2_124m/pss.yaml"""

_CLOSING = """\
All arguments of transformers.TrainingArguments and all pss_* options:
hf-pss train --help-all

Exit codes: 0 done, 2 a mistake that you can correct, 3 not finite, 130 interrupted."""

# The few options of TrainingArguments that most runs set. `--help-all` lists the others.
_TRAINING = (
    ("output_dir", "Checkpoints and the final model. Default: runs/<name of the YAML file>."),
    ("learning_rate", LEARNING_RATE_HELP),
    (
        "pss_lr_scale",
        "Multiply all learning rates by this factor. A resumed run keeps its checkpoint's rates; "
        "with this option it takes the ones you give.",
    ),
    ("max_steps", "Optimizer steps; or use num_train_epochs."),
    ("num_train_epochs", "Passes over the text. Default: 3."),
    ("per_device_train_batch_size", "Blocks per step and device. Default: 8."),
    ("gradient_accumulation_steps", "Micro-batches per step. Default: 1."),
    ("warmup_steps", "Steps of linear warm-up."),
    ("lr_scheduler_type", "linear, cosine, warmup_stable_decay, … Default: linear."),
    ("eval_steps, save_steps", "Interval in steps, or below 1 a share of all steps. Default: 0.1."),
    ("bf16, fp16", "Mixed precision."),
    ("report_to", "none, wandb, tensorboard, trackio. Default: none."),
    ("seed", "Seed of weights, data order and dropout. Default: 42."),
)
_OPTIMIZER = (
    (
        "pss_optim",
        "muon, normuon, softmuon, softsignum, specmuon, spectra, amuse or adamw for the weight "
        "matrices, AdamW for everything else. Default: AdamW, or the optimizer of --optim.",
    ),
    (
        "pss_optim_args",
        "Options of pss_optim, as momentum=0.95,scale=rms_match,others_lr=3e-4. In YAML this may "
        "be a mapping. --learning_rate applies to the matrices. With rms_match, the default, you "
        "can keep the rate of AdamW. With adamw it applies to all other parameters, and the "
        "matrices get matrix_lr_ratio times this rate. --weight_decay, --adam_beta1 and "
        "--adam_beta2 keep their meaning.",
    ),
)
_PSS = (
    "detectors",
    "threshold_ratio",
    "floor_ratio",
    "smoothing",
    "spike_update",
    "on_nonfinite",
    "observe_only",
    "health",
    "health_every_steps",
)


def _default(value: object) -> str:
    return "" if value in (None, False) else f" Default: {value}."


def _pss_rows() -> Iterable[tuple[str, str]]:
    yield "pss_preset", f"Starting point: {', '.join(PRESETS)}. Default: anchored."
    known = {option.name: option for option in fields(PSSConfig)}
    yield from ((f"pss_{name}", known[name].metadata["help"]) for name in _PSS)


def _panel(title: str, rows: Iterable[tuple[str, str]]) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for names, text in rows:
        table.add_row(", ".join(f"--{name}" for name in names.split(", ")), Text(text))
    return Panel(table, title=title, title_align="left")


class TrainCommand(TyperCommand):
    """A command with options that typer does not know, because transformers' parser reads them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print our page, because typer would show only the option that it knows."""
        console = Console(highlight=False)
        console.print(Text(_INTRODUCTION))
        for options in (ModelOptions, DataOptions, ScaleOptions, RunOptions):
            rows = (
                (option.name, option.metadata["help"] + _default(option.default))
                for option in fields(options)
            )
            console.print(_panel(options._argument_group_name, rows))
        console.print(_panel("Training", _TRAINING))
        console.print(_panel("Optimizer", _OPTIMIZER))
        console.print(_panel("PSS (some; --help-all lists the others)", _pss_rows()))
        console.print(Panel(Text(_EXAMPLES), title="Examples", title_align="left"))
        console.print(Text(_CLOSING))


def _show_all(wanted: bool) -> None:
    if wanted:
        from hf_pss.cli.parsing import make_parser

        make_parser().print_help()
        raise typer.Exit


def train(
    ctx: typer.Context,
    help_all: Annotated[bool, typer.Option(callback=_show_all, is_eager=True)] = False,
) -> None:
    """Pretrain or fine-tune a causal language model on your text, guarded by PSS."""
    from hf_pss.cli.parsing import parse_plan
    from hf_pss.cli.training import run_training

    run_training(parse_plan(ctx.args))
