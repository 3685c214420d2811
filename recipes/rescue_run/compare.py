r"""Ruin small runs in every way that the sweeps know, follow `hf-pss rescue`, and compare.

    python recipes/rescue_run/compare.py --output-dir runs/rescues --seeds 10

For each recipe and seed it trains, with `hf-pss train`:

- the undamaged run;
- the damaged run, which PSS observes and does not change (``pss_observe_only``);
- the rescued run, by the command that `hf-pss rescue` prints;
- a control that is only rolled back, by the command that it prints with ``--smoothing none``.

If the rate itself was too high, there is one more run. If rescue found no failure, this is the
command that ``--failed-at 1`` gives. If it found one, this is a copy with a tenth of the rate.

The harm is done once. A resumed run does not meet the same batch, the same NaN or the same rate
again, unless the schedule itself is too high (slow_damage, ramp, collapse).

The script adds one row per recipe and seed to ``rows.jsonl``, and does not measure existing rows
again. It names failed rows at the end, and the others continue. A signal ends the comparison. The
next call starts the interrupted run from its beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import runpy
import shutil
import signal
import statistics
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harm import harmed
from transformers import GPT2Tokenizer

NUM_STEPS = 240
WITHIN_NATS = 0.1
NON_FINITE = 3  # exit code of hf-pss train
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
NO_DROPOUT = "resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
COMMON = {
    "model_config": "gpt2",
    "model_overrides": f"n_layer=2,n_head=4,n_embd=64,n_positions=64,{NO_DROPOUT}",
    "vocab_size": "512",
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
POST_LN = {
    "model_config": "openai-gpt",
    "model_overrides": f"n_layer=4,n_head=4,n_embd=64,n_positions=64,{NO_DROPOUT}",
    "learning_rate": "1e-3",
}
TOO_HIGH = {"learning_rate": "1e-2"}
RAMP = {
    "learning_rate": "1e-1",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": str(NUM_STEPS),
}
# The ways to ruin a run, as arguments of `harmed` or as options that differ from `COMMON`.
HARMS: dict[str, dict[str, Any]] = {
    "damaged": {"kind": "high_learning_rate", "first": 121, "last": 140, "factor": 30.0},
    "damaged_mildly": {"kind": "high_learning_rate", "first": 121, "last": 125, "factor": 10.0},
    "random_batch": {"kind": "random_batch", "first": 121, "last": 123},
    "nan_gradient": {"kind": "nan_gradient", "first": 121},
}
RATES = {"slow_damage": TOO_HIGH, "ramp": RAMP, "collapse": TOO_HIGH}
RECIPES = [*HARMS, *RATES]
ARMS = ("undamaged", "untreated", "rolled_back", "rescued", "failed_at", "lowered")


def hf_pss(words: Sequence[str]) -> tuple[int, str]:
    """Run `hf-pss WORDS` in this process, and return its exit code and its stdout.

    Raises:
        KeyboardInterrupt: After a SIGINT, which ends the comparison.
        SystemExit: After a SIGTERM, which also ends it: the run saves, and exits with 143.
    """
    out, code = io.StringIO(), 0
    sys.argv = ["hf-pss", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_module("hf_pss.cli", run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    if code == TERMINATED:
        raise SystemExit(code)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code, out.getvalue()


def train(
    folder: Path, options: dict[str, str], harm: dict[str, Any] | None = None
) -> float | None:
    """Train a run unless its folder exists, and return its last validation loss."""
    if not folder.exists():
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        half = folder.with_name(f"{folder.name}.part")  # the name of an unfinished run
        shutil.rmtree(half, ignore_errors=True)
        with harmed(**(harm or {})):
            code, _ = hf_pss(["train", "--output_dir", str(half), *words])
        if code not in (0, NON_FINITE):
            raise RuntimeError(f"hf-pss train {' '.join(words)} ended with {code}.")
        half.rename(folder)
    return loss_of(folder)


def loss_of(folder: Path) -> float | None:
    """Return the validation loss at the last step; None if it is missing or not finite."""
    path = folder / "trainer_state.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    finite = losses and state["global_step"] == state["max_steps"] and math.isfinite(losses[-1])
    return losses[-1] if finite else None


def follow(run: Path, options: Sequence[str] = ()) -> tuple[dict[str, Any], float | None, str]:
    """Run `hf-pss rescue`, then the command that it prints.

    Returns:
        The report of rescue, the loss at the end, and an error if the command failed.
    """
    code, report = hf_pss(["rescue", str(run), *options, "--json"])
    if code:
        raise RuntimeError(f"hf-pss rescue {run} ended with {code}.")
    found = json.loads(report)
    words = found["resume"]["command"]
    target = Path(words[words.index("--output_dir") + 1])
    code, _ = hf_pss(words[1:])
    return found, loss_of(target), f"the command ended with {code}" if code else ""


def text_in(folder: Path) -> dict[str, str]:
    """Return the options of a text, which is modules of the library, and of its tokenizer."""
    text, tokenizer = folder.absolute() / "text.txt", folder.absolute() / "tokenizer"
    if not tokenizer.exists():
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        joined = "\n".join(path.read_text(encoding="utf-8") for path in modules)
        text.write_text(joined[:1_500_000], encoding="utf-8")
        lines = joined[:1_500_000].splitlines(keepends=True)
        blank = GPT2Tokenizer(pad_token="<|endoftext|>")
        blank.train_new_from_iterator(lines, int(COMMON["vocab_size"])).save_pretrained(tokenizer)
    return {"dataset": str(text), "tokenizer": str(tokenizer)}


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Ruin and rescue one run; return its row."""
    changes, twin = (POST_LN, "post_ln") if name == "collapse" else ({}, "gpt2")
    healthy = {**COMMON, **text_in(folder), **changes, "seed": str(seed)}
    row: dict[str, Any] = {"recipe": name, "seed": seed}
    row["undamaged"] = train(folder / f"undamaged-{twin}-{seed}", healthy)
    own = folder / f"{name}-{seed}"
    shutil.rmtree(own, ignore_errors=True)  # files of a comparison that was killed
    run = own / "run"
    row["untreated"] = train(run, {**healthy, **RATES.get(name, {})}, HARMS.get(name))
    found, rescued, error = follow(run)
    row |= {key: found[key] for key in ("failure", "notes", "reason", "is_last_resort")}
    row |= {"chosen": Path(found["chosen"]).name, "command": found["resume"]["command"]}
    row["has_steps_left"] = row["chosen"] != f"checkpoint-{NUM_STEPS}"
    if row["has_steps_left"]:
        row |= {"rescued": rescued, "error": error}
        row["rolled_back"] = follow(run, ["--smoothing", "none"])[1]
        if name in RATES:
            copy = ["--write", str(own / "repaired"), "--lr-scale", "0.1", "--allow-pickle"]
            row["lowered"] = follow(run, copy)[1]
    else:  # rescue found no failure, so there is nothing to continue and the run stays as it is
        row |= {"rescued": row["untreated"], "rolled_back": row["untreated"], "error": ""}
        if name in RATES:
            row["failed_at"] = follow(run, ["--failed-at", "1"])[1]
    shutil.rmtree(own)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, one line per recipe: mean losses, and runs within 0.1 nats."""
    titles = ["recipe", "runs", "named", "onset", "continues from", *ARMS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in RECIPES:
        some = [row for row in rows if row["recipe"] == name]
        if some:
            kinds = [(row["failure"] or {}).get("kind", "none") for row in some]
            named = ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))
            onsets = [row["failure"]["onset_step"] for row in some if row["failure"]]
            chosen = [int(row["chosen"][11:]) for row in some if row["has_steps_left"]]
            spans = [f"{min(s)} … {max(s)}" if s else "–" for s in (onsets, chosen)]
            cells = [name, str(len(some)), named, *spans, *(losses_of(some, arm) for arm in ARMS)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def losses_of(rows: Sequence[dict[str, Any]], arm: str) -> str:
    """Return the mean of the finite losses of an arm, and how many of its runs came close."""
    some = [row for row in rows if arm in row]
    finite = [row for row in some if row[arm] is not None]
    close = [row for row in finite if row[arm] <= row["undamaged"] + WITHIN_NATS]
    if not finite:
        return f"– (0 of {len(some)})" if some else "–"
    return f"{statistics.mean(row[arm] for row in finite):.3f} ({len(close)} of {len(some)})"


def main() -> None:
    """Measure the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/rescues"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
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
