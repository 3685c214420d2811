"""`hf-pss train`: pretrain or fine-tune a causal language model with PSSTrainer."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hf_pss.cli.option_help import print_help

__all__ = ["TrainCommand", "train"]


class TrainCommand(TyperCommand):
    """A command with options that typer does not know, because transformers' parser reads them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print our page, because typer would show only the option that it knows."""
        print_help()


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
