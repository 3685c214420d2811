"""Train with trl's GRPOTrainer and a reward function: PSS joins as a callback."""

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from hf_pss import PSSCallback, PSSConfig

letters = {token: i for i, token in enumerate(["<eos>", *map(chr, range(32, 127))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<eos>", pad_token="<eos>"
)
sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=len(letters), bos_token_id=0, eos_token_id=0, **sizes)


def share_of_digits(completions: list[str], **_: object) -> list[float]:
    """Reward completions that consist of digits."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


arguments = GRPOConfig(
    "runs/examples/grpo",
    max_steps=5,
    num_generations=4,
    per_device_train_batch_size=8,
    max_completion_length=8,
    report_to="none",
    bf16=False,
)
trainer = GRPOTrainer(
    model=GPT2LMHeadModel(config),
    reward_funcs=share_of_digits,
    args=arguments,
    train_dataset=Dataset.from_list([{"prompt": f"{i} plus {i} is "} for i in range(64)]),
    processing_class=tokenizer,
    callbacks=[PSSCallback(PSSConfig.preset(on_nonfinite="stop"))],
)
trainer.train()
