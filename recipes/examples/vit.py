"""Train a vision transformer from random weights: is the left half of the image brighter?"""

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_pss import PSSTrainer, PSSTrainingArguments

labels = torch.arange(512) % 2
images = torch.randn(512, 3, 32, 32)
images[labels == 1, :, :, :16] += 0.5
rows = [
    {"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)
]
config = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
    num_labels=2,
)

arguments = PSSTrainingArguments(
    "runs/examples/vit",
    max_steps=20,
    learning_rate=1e-3,
    logging_steps=5,
    report_to="none",
    remove_unused_columns=False,
    pss_health="light",  # logs σ₁ and the stable rank of every matrix
)
trainer = PSSTrainer(model=ViTForImageClassification(config), args=arguments, train_dataset=rows)
trainer.train()
