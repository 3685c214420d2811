"""Train a causal language model. Like all scripts of this folder, it knows nothing of PSS."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(0)
sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 8}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
rows = [{name: torch.arange(i, i + 8) % 32 for name in ("input_ids", "labels")} for i in range(32)]
args = TrainingArguments(
    sys.argv[1], max_steps=6, learning_rate=1e-2, report_to="none", use_cpu=True
)
trainers = [Trainer(model, args, train_dataset=rows)]

if __name__ == "__main__":
    trainers[0].train()
