from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import (
    PackedStream,
    TextSource,
    encode_documents,
    first_blocks,
    is_held_out,
    open_rows,
    pack_documents,
    split_stream,
    train_tokenizer,
)

NUM_FILES = 4
# Of 1,000 documents; the hash puts 106 of them there.
HELD_OUT = 0.1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["document number 0 1 2 3 4 5 6 7 8 9"] * 5, vocab_size=300)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"document {i} " + "number " * (i % 13) for i in range(40)]


@pytest.fixture
def pattern(texts: list[str], tmp_path: Path) -> str:
    """Four files of JSON lines; every second row is blank."""
    for part in range(NUM_FILES):
        rows = texts[part * 10 : part * 10 + 10]
        lines = [json.dumps({"text": text}) + '\n{"text": " "}\n' for text in rows]
        (tmp_path / f"part{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(tmp_path / "part*.jsonl")


def stream_of(pattern: str, tokenizer: PreTrainedTokenizerFast, length: int = 16) -> PackedStream:
    return PackedStream(
        open_rows(TextSource(pattern), streaming=True), tokenizer, context_length=length
    )


def tokens_of(stream: PackedStream, **options: int) -> list[list[int]]:
    loader = DataLoader(stream, batch_size=None, **options)
    return [item["input_ids"].tolist() for item in loader]


@given(
    st.lists(st.lists(st.integers(1, 99), max_size=30).map(lambda ids: [*ids, 0]), max_size=20),
    st.integers(2, 17),
)
def test_blocks_joined_are_the_documents_joined(
    documents: list[list[int]], context_length: int
) -> None:
    blocks = list(pack_documents(documents, context_length=context_length))
    joined = list(chain.from_iterable(documents))
    assert all(len(block) == context_length for block in blocks)
    assert len(joined) - len(blocks) * context_length in range(context_length)
    assert list(chain.from_iterable(blocks)) == joined[: len(blocks) * context_length]


def test_no_document_is_read_before_it_is_needed() -> None:
    read = []

    def documents():
        for i in range(100):
            read.append(i)
            yield [i, i, 0]

    blocks = pack_documents(documents(), context_length=4)
    assert next(blocks) == [0, 0, 0, 1]
    assert read == [0, 1]


def test_a_context_with_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 tokens"):
        next(pack_documents([[1]], context_length=1))


def test_a_stream_holds_what_the_files_hold(
    pattern: str, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    blocks = tokens_of(stream_of(pattern, tokenizer))
    expected = encode_documents(texts, tokenizer)
    assert list(chain.from_iterable(blocks)) == expected[: len(blocks) * 16].tolist()
    assert 0 <= len(expected) - len(blocks) * 16 < 16
    item = next(iter(stream_of(pattern, tokenizer)))
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])


def test_workers_share_the_files(
    pattern: str, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every document is read by one worker; only each worker's own end is dropped."""
    blocks = tokens_of(stream_of(pattern, tokenizer, 4), num_workers=2)
    num_tokens = len(encode_documents(texts, tokenizer))
    assert num_tokens - 2 * 4 < len(blocks) * 4 <= num_tokens


def test_a_shuffled_stream_is_another_at_every_epoch(
    pattern: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = open_rows(TextSource(pattern), streaming=True).shuffle(seed=0, buffer_size=100)
    stream = PackedStream(rows, tokenizer, context_length=16)
    first, again = tokens_of(stream), tokens_of(stream)
    stream.set_epoch(1)
    assert first == again
    assert tokens_of(stream) != first


def test_the_split_depends_on_the_text_alone() -> None:
    documents = [f"document {i}" for i in range(1000)]
    rows = datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset(num_shards=3)
    kept, held_out = split_stream(rows, fraction=HELD_OUT)
    there = [row["text"] for row in held_out]
    assert sorted(there + [row["text"] for row in kept]) == sorted(documents)
    assert there == [text for text in documents if is_held_out(text, fraction=HELD_OUT)]
    assert len(there) == 106
    shuffled = held_out.shuffle(seed=1, buffer_size=1000)
    assert {row["text"] for row in shuffled} == set(there)


def test_rows_without_text_are_not_held_out() -> None:
    rows = datasets.Dataset.from_dict({"text": [None, "a"]}).to_iterable_dataset()
    kept, held_out = split_stream(rows, fraction=1.0)
    assert [row["text"] for row in kept] == [None]
    assert [row["text"] for row in held_out] == ["a"]


def test_first_blocks_are_the_streams(pattern: str, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of(pattern, tokenizer)
    blocks = first_blocks(stream, 3)
    assert blocks.blocks.tolist() == tokens_of(stream)[:3]
    with pytest.raises(ConfigurationError, match="fill no block"):
        first_blocks(stream_of(pattern, tokenizer, 100_000), 3)


def test_a_tokenizer_without_end_of_text_is_refused_at_once(
    pattern: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        stream_of(pattern, bare)


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_every_format_streams(
    ending: str, texts: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / f"text.{ending}"
    if ending == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
        expected = encode_documents(["\n".join(texts)], tokenizer)
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
        expected = encode_documents(texts, tokenizer)
    blocks = tokens_of(stream_of(str(path), tokenizer, 8))
    assert list(chain.from_iterable(blocks)) == expected[: len(blocks) * 8].tolist()
    assert len(blocks) == len(expected) // 8
