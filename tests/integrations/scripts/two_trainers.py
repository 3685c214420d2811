import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 8}
rows = [{name: torch.arange(i, i + 8) % 32 for name in ("input_ids", "labels")} for i in range(32)]


def make_trainer(seed: int) -> Trainer:
    """Return a trainer of a new model with a folder of its own."""
    set_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    folder = f"{sys.argv[1]}/{seed}"
    args = TrainingArguments(
        folder, max_steps=6, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    return Trainer(model, args, train_dataset=rows)


trainers = [make_trainer(0), make_trainer(1)]

if __name__ == "__main__":
    for trainer in trainers:
        trainer.train()
