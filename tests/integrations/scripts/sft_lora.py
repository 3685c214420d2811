import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
letters = {token: i for i, token in enumerate(["<eos>", *map(chr, range(32, 127))])}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="<eos>", pad_token="<eos>"
)
sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": len(letters)}
args = SFTConfig(
    sys.argv[1],
    max_steps=8,
    learning_rate=1e-2,
    report_to="none",
    use_cpu=True,
    bf16=False,
    max_length=32,
    gradient_checkpointing=False,
)
trainers = [
    SFTTrainer(
        model=GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)),
        args=args,
        train_dataset=Dataset.from_dict({"text": [f"{i} and {i} is {2 * i}" for i in range(64)]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    )
]

if __name__ == "__main__":
    trainers[0].train()
