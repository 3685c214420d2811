"""Train Whisper with Seq2SeqTrainer: PSSTrainerMixin goes in front of any Trainer class."""

import torch
import transformers
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hf_pss import PSSTrainerMixin, PSSTrainingArguments


class Arguments(PSSTrainingArguments, transformers.Seq2SeqTrainingArguments):
    """Both sets of arguments. Each field keeps the default of the class that declares it."""


class WhisperTrainer(PSSTrainerMixin, transformers.Seq2SeqTrainer):
    """Seq2SeqTrainer with PSS."""


tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
config = WhisperConfig(
    vocab_size=16, d_model=32, num_mel_bins=8, max_source_positions=32, max_target_positions=8,
    encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
    decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64, **tokens,
)  # fmt: skip
# A "recording" has one loud mel bin out of eight. Its "transcript" is the token of that bin.
bins = torch.randint(8, (256,))
sounds = torch.randn(256, 8, 64)
sounds[torch.arange(256), bins] += 3
texts = torch.stack([8 + bins, torch.full_like(bins, 2)], dim=1)
rows = [{"input_features": s, "labels": t} for s, t in zip(sounds, texts, strict=True)]

arguments = Arguments("runs/examples/whisper", max_steps=20, learning_rate=1e-3, report_to="none")
model = WhisperForConditionalGeneration(config)
trainer = WhisperTrainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
