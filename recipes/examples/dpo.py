"""Train on preferences with trl's DPOTrainer, with the options of PSS in its own arguments."""

from copy import deepcopy

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from hf_pss import PSSTrainerMixin, PSSTrainingArguments


class Arguments(PSSTrainingArguments, DPOConfig):
    """DPOConfig with one `pss_*` argument for each option of PSS."""


class PSSDPOTrainer(PSSTrainerMixin, DPOTrainer):
    """DPOTrainer with PSS, complete checkpoints and rollback."""


letters = {token: i for i, token in enumerate(["<eos>", *map(chr, range(32, 127))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<eos>", pad_token="<eos>"
)
sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=len(letters), bos_token_id=0, eos_token_id=0, **sizes)
rows = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{i}"} for i in range(64)]

arguments = Arguments("runs/examples/dpo", max_steps=10, report_to="none", bf16=False)
model = GPT2LMHeadModel(config)
trainer = PSSDPOTrainer(
    model=model,
    ref_model=deepcopy(model),  # leave it out for a model from the Hub or from a folder
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
