"""Train the weight matrices with Muon and everything else with AdamW, with one option."""

from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_pss import PSSTrainer, PSSTrainingArguments

text = torch.tensor(list("".join(topics.values()).encode()))
rows = [{"input_ids": row, "labels": row} for row in text[: 2000 * 64].view(-1, 64)]
sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes)

arguments = PSSTrainingArguments(
    "runs/examples/muon",
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=5,
    report_to="none",
    pss_optim="muon",  # or normuon, softmuon, softsignum, specmuon, spectra, amuse
    pss_optim_args="others_lr=1e-3",  # the rate of embeddings, head, biases and norms
    pss_observe_only=True,  # Muon keeps the stable rank high by itself
)
trainer = PSSTrainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows)
trainer.train()
