"""Write the model that this folder's recipes fine-tune: a tiny Llama with fresh weights.

    python recipes/llm_tiny_cpu/make_model.py [FOLDER]

FOLDER is runs/llm_tiny_cpu/base by default. The tokenizer is trained on chat.jsonl and includes
chat.jinja. Nothing is downloaded, and every run writes the same weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed

HERE = Path(__file__).parent
FOLDER = Path("runs/llm_tiny_cpu/base")


def main(folder: Path) -> None:
    """Train the tokenizer, draw the weights, and write both."""
    rows = map(json.loads, (HERE / "chat.jsonl").read_text(encoding="utf-8").splitlines())
    texts = (turn["content"] for row in rows for turn in row["messages"])
    # A blank byte-level BPE like that of GPT-2.
    tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>").train_new_from_iterator(texts, 512)
    tokenizer.chat_template = (HERE / "chat.jinja").read_text(encoding="utf-8")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # 1 / sqrt(64). The head is the embedding. With 0.02 the logits would be too small, and no
        # adapter could raise them.
        initializer_range=0.125,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: a Llama of {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
