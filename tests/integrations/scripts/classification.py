import sys

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

set_seed(0)
sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2))
rows = [{"input_ids": torch.arange(i, i + 8) % 32, "labels": i % 2} for i in range(32)]
args = TrainingArguments(
    sys.argv[1], max_steps=6, learning_rate=1e-2, report_to="none", use_cpu=True
)
trainers = [Trainer(model, args, train_dataset=rows)]

if __name__ == "__main__":
    trainers[0].train()
