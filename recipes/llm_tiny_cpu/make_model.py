"""Write the model that this folder's recipes fine-tune: a tiny Llama with fresh weights.

    python recipes/llm_tiny_cpu/make_model.py [FOLDER]

FOLDER is runs/llm_tiny_cpu/base by default. The tokenizer is trained on chat.jsonl, and carries
chat.jinja. Nothing is downloaded, and every run writes the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import LlamaConfig, set_seed

from hf_pss.cli.model import make_model
from hf_pss.evidence.data import open_rows, train_tokenizer

HERE = Path(__file__).parent
FOLDER = Path("runs/llm_tiny_cpu/base")


def main(folder: Path) -> None:
    """Train the tokenizer, draw the weights, and write both."""
    rows = open_rows(HERE / "chat.jsonl", column="messages")
    texts = (turn["content"] for row in rows for turn in row["messages"])
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.chat_template = (HERE / "chat.jinja").read_text(encoding="utf-8")
    set_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # 1 / sqrt(64): the head is the embedding, and no adapter could raise the logits of 0.02.
        initializer_range=0.125,
    )
    model = make_model(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: a Llama of {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
