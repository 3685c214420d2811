"""Fine-tune with trl's SFTTrainer and LoRA: PSS joins as a callback."""

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_pss import PSSCallback

# A model and a tokenizer of letters. Use your own: AutoModelForCausalLM.from_pretrained(...)
letters = {token: i for i, token in enumerate(["<eos>", *map(chr, range(32, 127))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<eos>", pad_token="<eos>"
)
sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=len(letters), bos_token_id=0, eos_token_id=0, **sizes)
texts = [f"{i} plus {i} is {2 * i}" for i in range(256)]

arguments = SFTConfig(
    "runs/examples/sft_lora",
    max_steps=20,
    learning_rate=2e-4,
    max_length=64,
    report_to="none",
    bf16=False,  # trl's default is True, for GPUs
)
trainer = SFTTrainer(
    model=GPT2LMHeadModel(config),
    args=arguments,
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    callbacks=[PSSCallback()],
)
trainer.train()
