"""Train a small GPT-2 on English text, from random weights, with PSSTrainer."""

from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_pss import PSSTrainer, PSSTrainingArguments

# The help texts of your Python, as bytes. Each row holds 64 of them.
text = torch.tensor(list("".join(topics.values()).encode()))
rows = [{"input_ids": row, "labels": row} for row in text[: 2000 * 64].view(-1, 64)]
sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes)

arguments = PSSTrainingArguments(
    "runs/examples/causal_lm",
    max_steps=30,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=5,
    report_to="none",
    pss_preset="floor",  # from random weights, the floor alone is a good choice
)
trainer = PSSTrainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows)
trainer.train()
