"""Train BERT with masked-language modelling, and keep the usual collator of transformers."""

from pydoc_data.topics import topics

from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Masking

from hf_pss import PSSTrainer

special = ["<pad>", "<unk>", "<mask>"]
letters = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [], unk_token="<unk>")),
    **dict(zip(("pad_token", "unk_token", "mask_token"), special, strict=True)),
)
lines = [line for line in "\n".join(topics.values()).splitlines() if len(line) > 40]
config = BertConfig(
    vocab_size=len(letters),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)

# Plain TrainingArguments run the default preset of PSS, which is `anchored`.
trainer = PSSTrainer(
    model=BertForMaskedLM(config),
    args=TrainingArguments(
        "runs/examples/bert_mlm", max_steps=20, learning_rate=1e-3, report_to="none"
    ),
    train_dataset=[tokenizer(line, truncation=True, max_length=64) for line in lines[:512]],
    data_collator=Masking(tokenizer, mlm_probability=0.15),
)
trainer.train()
