"""Train on preferences with trl's DPOTrainer, with the options of PSS in its own arguments."""

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
config = GPT2Config(len(letters), 64, 32, 2, 2, bos_token_id=0, eos_token_id=0)
rows = [
    {"prompt": f"{i} plus {i} is ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"}
    for i in range(64)
]

arguments = Arguments(
    "runs/examples/dpo", max_steps=10, report_to="none", bf16=False, gradient_checkpointing=False
)
trainer = PSSDPOTrainer(
    model=GPT2LMHeadModel(config),
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
