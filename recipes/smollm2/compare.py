r"""Fine-tune SmolLM2-135M with one bad batch, with the plain Trainer and with PSS, and compare.

    python recipes/smollm2/compare.py                           the model comes from the Hub
    python recipes/smollm2/compare.py --model FOLDER --text 'notes/*.md'

The script trains all weights, and LoRA adapters, on real text. It does this with good batches only,
with one batch of random tokens, and with one batch without labels. Each of these six runs is made
with Trainer and with PSSTrainer in its default settings. Seed, batches and options are the same.

The bad batch consists of rows of the data set. PSS can therefore name these rows afterwards.

Each run adds a row to ``rows.jsonl``. If you repeat the command, rows that exist are not measured
again, and a run that was interrupted starts from its beginning. At the end, the script writes
``report.md`` with the perplexity on held-out text and with short generations.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pss import PSSTrainer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RATES = {"full": 2e-5, "lora": 2e-4}
BATCHES = ("good", "random", "no_labels")
TRAINERS: dict[str, Any] = {"Trainer": Trainer, "PSSTrainer": PSSTrainer}
BATCH_SIZE, CONTEXT_LENGTH, NUM_HELD_OUT = 2, 96, 16
PROMPTS = ("The with statement", "A list comprehension is", "The capital of France is")
NUM_NEW_TOKENS = 24
Name = tuple[str, str, str]
UNTRAINED = ("–", "–", "untrained")
TITLES = ("trained", "batch", "trainer", "perplexity", "skipped", "edits", "events", "time")


class Bar(ProgressCallback):
    """Show the Trainer's progress bar without a line for each step."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def mean_over_labels(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Return the mean loss of the tokens with a label, as many scripts compute it.

    Without any label this is 0 / 0, and the gradient is NaN. The built-in loss of transformers is
    then NaN as well, but its gradient is 0.
    """
    labels = labels[:, 1:]
    has_label = labels != -100
    log_probs = outputs.logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(chosen * has_label).sum() / has_label.sum()


def rows_of(given: argparse.Namespace, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random rows to train on, and rows of the last tenth of the text."""
    texts = [topics[name] for name in sorted(topics)]
    if given.text is not None:
        paths = sorted(glob.glob(given.text, recursive=True))
        texts = [Path(path).read_text(encoding="utf-8") for path in paths]
    ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False).input_ids, dtype=torch.long)
    num_rows = given.steps * BATCH_SIZE
    rows = ids[: len(ids) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    end = len(rows) * 9 // 10
    if end < num_rows or len(rows) - end < NUM_HELD_OUT:
        needed = max(-(-num_rows * 10 // 9), NUM_HELD_OUT * 10) * CONTEXT_LENGTH
        sys.exit(f"The text has {len(ids):,} tokens. Give one of {needed:,} or more as --text.")
    order = torch.randperm(end, generator=torch.Generator().manual_seed(given.seed))
    return rows[order[:num_rows]], rows[end : end + NUM_HELD_OUT]


def dataset(rows: torch.Tensor, batch: str, bad_step: int, vocab_size: int) -> list[dict[str, Any]]:
    """Return the rows with their labels. The rows of one step are bad."""
    found = [{"input_ids": row, "labels": row} for row in rows]
    generator = torch.Generator().manual_seed(0)
    for index in range((bad_step - 1) * BATCH_SIZE, bad_step * BATCH_SIZE):
        if batch == "random":
            noise = torch.randint(vocab_size, (CONTEXT_LENGTH,), generator=generator)
            found[index] = {"input_ids": noise, "labels": noise}
        elif batch == "no_labels":
            found[index] = {"input_ids": rows[index], "labels": torch.full_like(rows[index], -100)}
    return found


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, held_out: torch.Tensor) -> dict[str, Any]:
    """Return the loss on held-out rows, None if it is not finite, and what the model writes."""
    model.eval()
    batches = held_out.to(model.device).split(4)
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
    loss = sum(losses) / len(losses)
    texts = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt").to(model.device)
        options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
        written = model.generate(**given, **options, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(written[0, given.input_ids.shape[1] :]))
    return {"loss": loss if math.isfinite(loss) else None, "texts": texts}


def load(given: argparse.Namespace, method: str) -> Any:
    """Return the model with fresh weights from its folder, and with adapters if it is LoRA."""
    set_seed(given.seed)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    if method == "lora":
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    return model


def train(given: argparse.Namespace, name: Name, data: Any) -> dict[str, Any]:
    """Train and evaluate one run; return its row, and leave files for `hf-pss report`."""
    (method, batch, trainer_name), (tokenizer, rows, held_out, untrained_loss) = name, data
    folder = Path(given.output_dir, f"{method}-{batch}", trainer_name, f"seed-{given.seed}")
    shutil.rmtree(folder, ignore_errors=True)  # files of a run that was killed
    model = load(given, method)
    trainer = TRAINERS[trainer_name](
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=given.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=RATES[method],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            seed=given.seed,
        ),
        train_dataset=dataset(rows, batch, given.bad_step, model.config.vocab_size),
        processing_class=tokenizer,
        compute_loss_func=mean_over_labels,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_state()
    log = [row for row in trainer.state.log_history if "grad_norm" in row]
    events = folder / "pss_events.jsonl"
    row = {
        **{"name": name, "seconds": seconds, **evaluate(model, tokenizer, held_out)},
        "skipped": int(log[-1].get("pss/nonfinite_steps", 0)),
        "edits": int(log[-1].get("pss/interventions", 0)),
        "events": len(events.read_text().splitlines()) if events.exists() else 0,
    }
    write_for_report(folder, log, row, untrained_loss)
    return row


def write_for_report(folder: Path, log: Any, row: dict[str, Any], untrained_loss: float) -> None:
    """Write the files that `hf-pss demo` writes, from which `hf-pss report` makes a page."""
    curves = [{"step": 0, "eval_loss": untrained_loss}]
    for one in log:
        # The Trainer logs 0.0 in place of a loss that is NaN.
        loss = one["loss"] if math.isfinite(one["grad_norm"]) else None
        lines = {key: one.get(f"pss/{key}") for key in ("baseline", "threshold")}
        norm = {"grad_norm_preclip": one["grad_norm"]}
        curves.append({"step": one["step"], "loss": loss, **norm, **lines})
    curves.append({"step": log[-1]["step"], "eval_loss": row["loss"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in curves))
    summary = {"final_eval_loss": row["loss"], "train_seconds": row["seconds"]}
    summary |= {"status": "finished", "num_interventions": row["edits"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    twins = {"status": "finished", "guards": [*TRAINERS], "command": shlex.join(sys.argv)}
    (folder.parents[1] / "run.json").write_text(json.dumps(twins))


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: a table of numbers, and the texts after each prompt."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for row in rows:
        perplexity = "not finite" if row["loss"] is None else f"{math.exp(row['loss']):.2f}"
        counts = [str(row.get(key, "–")) for key in ("skipped", "edits", "events")]
        duration = f"{row['seconds']:.0f} s" if "seconds" in row else "–"
        lines.append(f"| {' | '.join([*row['name'], perplexity, *counts, duration])} |")
    for place, prompt in enumerate(PROMPTS):
        lines += ["", f"**{prompt} …**", ""]
        texts: dict[str, list[str]] = {}
        for row in rows:
            texts.setdefault(row["texts"][place], []).append(" ".join(row["name"]).strip("– "))
        lines += [f"- {', '.join(names)}: `{json.dumps(text)}`" for text, names in texts.items()]
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=HUB_ID, help="A folder, or a name on the Hub.")
    parser.add_argument("--text", help="A text file, or a pattern for several.")
    parser.add_argument("--output-dir", default="runs/smollm2")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--bad-step", type=int, default=24, help="PSS calibrates for 20 steps.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if not 1 <= given.bad_step <= given.steps:
        parser.error(f"--bad-step is a step from 1 to {given.steps}; you gave {given.bad_step}")
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Train the runs that are missing, and write the report."""
    given = parse(words)
    out = Path(given.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(given).items() if name != "output_dir"}
    settings, path = out / "settings.json", out / "rows.jsonl"
    if settings.exists() and json.loads(settings.read_text()) != asked:
        sys.exit(f"{settings}: {out} holds runs with other options. Give another --output-dir.")
    settings.write_text(json.dumps(asked))
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {tuple(row["name"]): row for row in kept}
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    train_rows, held_out = rows_of(given, tokenizer)
    names: list[Name] = [UNTRAINED, *itertools.product(RATES, BATCHES, TRAINERS)]
    for number, name in enumerate(names):
        if name not in rows:
            print(f"{number} of {len(names) - 1}: {' '.join(name)}", flush=True)
            if name == UNTRAINED:
                rows[name] = {"name": name, **evaluate(load(given, "full"), tokenizer, held_out)}
            else:
                data = (tokenizer, train_rows, held_out, rows[UNTRAINED]["loss"])
                rows[name] = train(given, name, data)
            with path.open("a") as stream:
                stream.write(json.dumps(rows[name]) + "\n")
    (out / "report.md").write_text(report([*rows.values()]), encoding="utf-8")
    print(report([*rows.values()]), out / "report.md", sep="\n")


if __name__ == "__main__":
    main()
