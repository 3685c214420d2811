r"""Ruin small runs in every way that the sweeps know, follow `hf-pss rescue`, and compare.

    python recipes/rescue_run/compare.py --output-dir runs/rescues --seeds 10

For each recipe and seed: the undamaged run; the damaged one, by `hf-pss train`, watched and not
touched (``pss_observe_only``); what `hf-pss rescue` says of it; the printed command, run as it
stands; and its control, what is printed with ``--smoothing none``, which only watches. Where the
rate itself was too high, also: where nothing was found, what is printed with ``--failed-at 1``;
else, a copy with a tenth of the rate. One row a seed goes to ``rows.jsonl``; what is there is not
measured again, and the table is of all rows. A row that fails is told and left out, and the others
go on; a signal ends all of it, and what it leaves half done is begun anew.

The harm is done once: a resumed run does not meet the same batch, the same NaN or the same rate
again, unless the schedule itself is what was wrong (slow_damage, ramp, collapse).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_pss.cli.training
from hf_pss.cli.app import INTERRUPTED, NON_FINITE, app
from hf_pss.evidence.corpus import read_library
from hf_pss.evidence.data import train_tokenizer
from hf_pss.evidence.recipes import Fault
from hf_pss.records.strict_json import read_object
from hf_pss.trainer.pss_trainer import PSSTrainer

NUM_STEPS = 240
VOCAB_SIZE = 512
TEXT_LENGTH = 1_500_000
LR_SCALE = "0.1"
WITHIN_NATS = 0.1
TERMINATED = 128 + signal.SIGTERM
_MAX_BYTES = 2**26
_NO_DROPOUT = "resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to ruin a run."""

    damaged: dict[str, str]
    """Options that differ from those of the undamaged run."""
    healthy: dict[str, str]
    """Options that differ from `COMMON`, of both."""
    truth: str
    """What went wrong, and when: for the table."""
    fault: Fault | None = None


COMMON = {
    "model_config": "gpt2",
    "model_overrides": f"n_layer=2,n_head=4,n_embd=64,n_positions=64,{_NO_DROPOUT}",
    "max_tokens": "300000",
    "validation_fraction": "0.04",
    "context_length": "64",
    "max_validation_blocks": "128",
    "max_steps": str(NUM_STEPS),
    "per_device_train_batch_size": "8",
    "per_device_eval_batch_size": "64",
    "learning_rate": "3e-3",
    "warmup_steps": "20",
    "max_grad_norm": "1.0",
    "logging_steps": "1",
    "eval_steps": str(NUM_STEPS),
    "save_steps": "20",
    "save_total_limit": "20",
    "use_cpu": "true",
    "pss_observe_only": "true",
}
_POST_LN = {
    "model_config": "openai-gpt",
    "model_overrides": f"n_layer=4,n_head=4,n_embd=64,n_positions=64,{_NO_DROPOUT}",
    "learning_rate": "1e-3",
}
_TOO_HIGH = {"learning_rate": "1e-2"}
_RAMP = {
    "learning_rate": "1e-1",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": str(NUM_STEPS),
}
CASES = {
    "damaged": Case(
        {}, {}, "steps 121 to 140 at 30 × the rate", Fault("high_learning_rate", 121, 20, 30.0)
    ),
    "damaged_mildly": Case(
        {}, {}, "steps 121 to 125 at 10 × the rate", Fault("high_learning_rate", 121, 5, 10.0)
    ),
    "random_batch": Case({}, {}, "random tokens, steps 121 to 123", Fault("random_batch", 121, 3)),
    "nan_gradient": Case({}, {}, "NaN in the gradients of step 121", Fault("nan_gradient", 121)),
    "slow_damage": Case(_TOO_HIGH, {}, "the rate, 1e-2, from the beginning"),
    "ramp": Case(_RAMP, {}, "the rate rises to 1e-1 at the end"),
    "collapse": Case(_TOO_HIGH, _POST_LN, "the rate, 1e-2, from the beginning"),
}


class HarmedTrainer(PSSTrainer):
    """A PSSTrainer whose steps go wrong as `fault` says."""

    fault: Fault | None = None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run a batch: a random one, at too high a rate, or with NaN for a gradient."""
        fault = self.fault
        if fault is None or not fault.covers(self.state.global_step + 1):
            return super().training_step(model, inputs, *args, **kwargs)
        if fault.kind == "random_batch":
            ids = inputs["input_ids"]
            drawn = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
            noise = torch.randint(model.config.vocab_size, ids.shape, generator=drawn)
            inputs = {**inputs, "input_ids": noise, "labels": noise}
        loss = super().training_step(model, inputs, *args, **kwargs)
        if fault.kind == "nan_gradient":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
        if fault.kind == "high_learning_rate":
            for group in self.optimizer.param_groups:
                group["lr"] *= fault.factor  # the scheduler sets the next step's anew
        return loss


@contextlib.contextmanager
def _harm(fault: Fault | None) -> Iterator[None]:
    """Let `hf-pss train` train with a Trainer that does harm."""
    HarmedTrainer.fault = fault
    hf_pss.cli.training.PSSTrainer = HarmedTrainer  # type: ignore[misc]
    try:
        yield
    finally:
        hf_pss.cli.training.PSSTrainer = PSSTrainer  # type: ignore[misc]


def hf_pss_command(words: Sequence[str]) -> tuple[int, str]:
    """Run `hf-pss WORDS` in this process; returns its exit code and what it wrote to stdout.

    Raises:
        KeyboardInterrupt: After a SIGINT, for all that was to follow.
        SystemExit: After a SIGTERM, likewise: the run saves, and leaves with 143.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(args=list(words))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    if code == TERMINATED:
        raise SystemExit(code)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code, out.getvalue()


def train(folder: Path, options: dict[str, str], fault: Fault | None = None) -> float | None:
    """Train a run unless its folder is there; returns its last validation loss."""
    if not folder.exists():
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        half = folder.with_name(f"{folder.name}.part")  # until it is done
        shutil.rmtree(half, ignore_errors=True)
        with _harm(fault):
            code, _ = hf_pss_command(["train", "--output_dir", str(half), *words])
        if code not in (0, NON_FINITE):
            raise RuntimeError(f"hf-pss train {' '.join(words)} ended with {code}.")
        half.rename(folder)
    return loss_of(folder)


def text_in(folder: Path) -> dict[str, str]:
    """Return the options of a text and a tokenizer that are quick to load; made if need be."""
    text, tokenizer = folder.absolute() / "text.txt", folder.absolute() / "tokenizer"
    if not tokenizer.exists():
        documents, _ = read_library()
        text.write_text("\n".join(documents)[:TEXT_LENGTH], encoding="utf-8")
        lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
        train_tokenizer(lines, vocab_size=VOCAB_SIZE).save_pretrained(tokenizer)
    return {"dataset": str(text), "tokenizer": str(tokenizer), "vocab_size": str(VOCAB_SIZE)}


def loss_of(folder: Path) -> float | None:
    """Return the validation loss at the last step; None where none is there and finite."""
    path = folder / "trainer_state.json"
    if not path.exists():
        return None
    state = read_object(path, max_bytes=_MAX_BYTES, allow_nonfinite=True)
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    finite = losses and state["global_step"] == state["max_steps"] and math.isfinite(losses[-1])
    return losses[-1] if finite else None


def follow(run: Path, options: Sequence[str] = ()) -> tuple[dict[str, Any], float | None, str]:
    """Ask `hf-pss rescue`, and run the command that it prints.

    Returns:
        What it found, the loss at the end, and an error where the command failed.
    """
    code, said = hf_pss_command(["rescue", str(run), *options, "--json"])
    if code:
        raise RuntimeError(f"hf-pss rescue {run} ended with {code}.")
    found = json.loads(said)
    words = found["resume"]["command"]
    target = Path(words[words.index("--output_dir") + 1])
    code, _ = hf_pss_command(words[1:])
    return found, loss_of(target), f"the command ended with {code}" if code else ""


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Ruin and rescue one run; returns its row."""
    case = CASES[name]
    healthy = {**COMMON, **text_in(folder), **case.healthy, "seed": str(seed)}
    twin = "post_ln" if case.healthy else "gpt2"
    undamaged = train(folder / f"undamaged-{twin}-{seed}", healthy)
    own = folder / f"{name}-{seed}"
    shutil.rmtree(own, ignore_errors=True)  # of a comparison that was killed
    run = own / "run"
    untreated = train(run, {**healthy, **case.damaged}, case.fault)
    found, rescued, error = follow(run)
    has_steps_left = Path(found["chosen"]).name != f"checkpoint-{healthy['max_steps']}"
    rolled_back = follow(run, ["--smoothing", "none"])[1] if has_steps_left else untreated
    is_unnoticed = case.fault is None and not has_steps_left
    told = follow(run, ["--failed-at", "1"])[1] if is_unnoticed else None
    copy = ["--write", str(own / "repaired"), "--lr-scale", LR_SCALE, "--allow-pickle"]
    lowered = follow(run, copy)[1] if case.fault is None and has_steps_left else None
    row = {
        "recipe": name,
        "seed": seed,
        "undamaged": undamaged,
        "untreated": untreated,
        "rolled_back": rolled_back,
        # Where rescue finds no failure, it has nothing to go on with: the run stays as it is.
        "rescued": rescued if has_steps_left else untreated,
        "told": told,
        "lowered": lowered,
        "has_steps_left": has_steps_left,
        "failure": found["failure"],
        "notes": found["notes"],
        "chosen": Path(found["chosen"]).name,
        "reason": found["reason"],
        "is_last_resort": found["is_last_resort"],
        "command": found["resume"]["command"],
        "error": error if has_steps_left else "",
    }
    shutil.rmtree(own)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, one line a recipe."""
    lines = [
        "| recipe | runs | named | onset | goes on from | undamaged | left alone | rolled back "
        "| rescued | told when | lowered | within 0.1: left / back / rescued / told / lowered |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        some = [row for row in rows if row["recipe"] == name]
        if some:
            lines.append(_line(name, some))
    return "\n".join(lines)


def _line(name: str, rows: Sequence[dict[str, Any]]) -> str:
    kinds = [(row["failure"] or {}).get("kind", "none") for row in rows]
    named = ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))
    onsets = [row["failure"]["onset_step"] for row in rows if row["failure"]]
    chosen = [int(row["chosen"].rsplit("-", 1)[1]) for row in rows if row["has_steps_left"]]
    arms = ["untreated", "rolled_back", "rescued", "told", "lowered"]
    measured = {arm: [row for row in rows if _is_measured(row, arm)] for arm in arms}
    means = [_mean([row.get(arm) for row in some], len(rows)) for arm, some in measured.items()]
    shares = " / ".join(_share(some, arm) for arm, some in measured.items())
    columns = (_mean([row["undamaged"] for row in rows], len(rows)), *means, shares)
    spans = " | ".join(_span(steps) for steps in (onsets, chosen))
    return f"| {name} | {len(rows)} | {named} | {spans} | {' | '.join(columns)} |"


def _is_measured(row: dict[str, Any], arm: str) -> bool:
    """Tell whether the arm was run; a loss of None is then one that is not finite."""
    if arm not in ("told", "lowered"):
        return True
    return CASES[row["recipe"]].fault is None and row["has_steps_left"] == (arm == "lowered")


def _share(rows: Sequence[dict[str, Any]], arm: str) -> str:
    return str(sum(_is_within(row, arm) for row in rows)) if rows else "–"


def _is_within(row: dict[str, Any], arm: str) -> bool:
    """Tell whether a run ended no more than 0.1 above its undamaged twin."""
    return row.get(arm) is not None and row[arm] <= row["undamaged"] + WITHIN_NATS


def _mean(losses: Sequence[float | None], num_rows: int) -> str:
    finite = [loss for loss in losses if loss is not None]
    remarks = [f"{len(losses)} runs"] if 0 < len(losses) < num_rows else []
    remarks += [f"{len(losses) - len(finite)} not finite"] if len(finite) < len(losses) else []
    mean = f"{statistics.mean(finite):.3f}" if finite else "–"
    return f"{mean} ({', '.join(remarks)})" if remarks else mean


def _span(steps: Sequence[int]) -> str:
    if not steps:
        return "–"
    return str(steps[0]) if len(set(steps)) == 1 else f"{min(steps)} … {max(steps)}"


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/rescues"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    path = given.output_dir / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    failed = []
    for seed in range(given.seeds):
        for name in (name for name in given.recipes if (name, seed) not in done):
            try:
                rows.append(measure(name, seed, given.output_dir))
            except RuntimeError as error:
                failed.append(f"{name}, seed {seed}: {error}")
                continue
            with path.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    if failed:
        sys.exit("\n".join(["Not measured:", *failed]))


if __name__ == "__main__":
    main()
