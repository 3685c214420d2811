import sys

import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

set_seed(0)
sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
rows = [{name: torch.arange(i, i + 8) % 32 for name in ("input_ids", "labels")} for i in range(32)]
args = Seq2SeqTrainingArguments(
    sys.argv[1], max_steps=6, learning_rate=1e-2, report_to="none", use_cpu=True
)
trainers = [Seq2SeqTrainer(model, args, train_dataset=rows)]

if __name__ == "__main__":
    trainers[0].train()
