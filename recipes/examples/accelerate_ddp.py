"""Add PSS to a loop with Accelerate: `accelerate launch --num_processes 2 accelerate_ddp.py`."""

from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pss import PSSConfig, PSSController

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
text = torch.tensor(list("".join(topics.values()).encode()))[: 640 * 64].view(-1, 64)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(text, batch_size=8))

pss = PSSController(model, PSSConfig.preset("floor"), optimizer=optimizer)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:  # once for each update, not for each micro-batch
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            report = pss.step(grad_norm, update=optimizer.step, loss=loss)
            if report.records and accelerator.is_main_process:
                print(report)
        optimizer.zero_grad()
