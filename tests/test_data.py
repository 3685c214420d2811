from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.data import (
    END_OF_TEXT,
    BlockDataset,
    TextSource,
    encode_documents,
    hold_out,
    load_text,
    open_rows,
    pack_blocks,
    train_tokenizer,
    unigram_entropy_nats,
)

SENTENCE = "The spectrum of a healthy matrix is broad; a collapsing one is narrow. σ₁ grows.\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([SENTENCE * 20], vocab_size=300)


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_tokenizer_restores_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "naïve – 東京 \t\x00 é\r\n" + SENTENCE
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 257"):
        train_tokenizer([SENTENCE], vocab_size=256)


def test_every_document_ends_with_the_separator(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode_documents(["one", "two"], tokenizer)
    assert tokenizer.decode(tokens) == f"one{END_OF_TEXT}two{END_OF_TEXT}"


def test_max_tokens_cuts_the_stream_and_stops_reading(tokenizer: PreTrainedTokenizerFast) -> None:
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield SENTENCE

    tokens = encode_documents(endless(), tokenizer, max_tokens=100)
    assert len(tokens) == 100
    assert num_read <= 64


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigurationError, match="no end-of-text token"):
        encode_documents(["one"], bare)


def test_blocks_are_full_and_labels_are_the_inputs() -> None:
    blocks = pack_blocks(np.arange(23, dtype=np.int32), context_length=5)
    assert len(blocks) == 4
    item = blocks[1]
    assert item["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["labels"], item["input_ids"])


@pytest.mark.parametrize("context_length", [1, 0, -3])
def test_a_context_with_nothing_to_predict_is_refused(context_length: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 2 tokens"):
        pack_blocks(np.arange(9, dtype=np.int32), context_length=context_length)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="9 tokens, too few for one block of 10"):
        pack_blocks(np.arange(9, dtype=np.int32), context_length=10)


def test_the_end_of_the_text_is_held_out() -> None:
    blocks = pack_blocks(np.arange(40, dtype=np.int32), context_length=2)
    train, validation = hold_out(blocks, fraction=0.1)
    assert torch.equal(torch.cat([train.blocks, validation.blocks]), blocks.blocks)
    assert len(validation) == 2


@pytest.mark.parametrize("num_blocks", [2, 3])
@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_neither_part_is_ever_empty(num_blocks: int, fraction: float) -> None:
    parts = hold_out(BlockDataset(torch.zeros(num_blocks, 4, dtype=torch.int64)), fraction=fraction)
    assert all(len(part) > 0 for part in parts)


def test_holding_out_what_is_not_there_is_refused() -> None:
    one = BlockDataset(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="one block only"):
        hold_out(one)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        hold_out(one, fraction=1.0)


def test_unigram_entropy_of_uniform_tokens_is_the_log_of_their_number() -> None:
    tokens = np.arange(1024, dtype=np.int32) * 2
    assert unigram_entropy_nats(tokens) == pytest.approx(np.log(1024))
    assert unigram_entropy_nats(np.full(9, 7, dtype=np.int32)) == 0.0


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_blocks(
    ending: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = SENTENCE * 30
    path = tmp_path / f"text{ending}"
    if ending == ".txt":
        path.write_text(text, encoding="utf-8")
    elif ending == ".jsonl":
        write_rows(path, [{"text": text, "id": 1}, {"text": None, "id": 2}, {"text": " ", "id": 3}])
    else:
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(str(path))
    blocks = load_text(TextSource(str(path)), tokenizer, context_length=16)
    expected = pack_blocks(encode_documents([text], tokenizer), context_length=16)
    assert torch.equal(blocks.blocks, expected.blocks)


def test_another_column_can_hold_the_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"body": SENTENCE * 9, "id": 1}])
    text, body, number = (TextSource(str(path), column) for column in ("text", "body", "id"))
    assert len(load_text(body, tokenizer, context_length=8)) > 0
    with pytest.raises(ConfigurationError, match="no column 'text'; it has 'body', 'id'"):
        load_text(text, tokenizer, context_length=8)
    with pytest.raises(ConfigurationError, match="holds int, not text"):
        load_text(number, tokenizer, context_length=8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\n", "holds no text"),
        ("short.txt", "ab", "too few for one block"),
        ("text.docx", "abc", "is unknown from its ending"),
        ("broken.jsonl", '{"text": "a"', "could not be read as json"),
    ],
)
def test_a_file_that_gives_no_block_is_refused(
    name: str, content: str, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        load_text(TextSource(str(tmp_path / name)), tokenizer, context_length=64)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/such/place"])
def test_a_missing_file_is_not_looked_up_on_the_hub(
    source: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigurationError, match="There is no file"):
        load_text(TextSource(source), tokenizer, context_length=64)


def test_a_folder_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a folder"):
        load_text(TextSource(str(tmp_path)), tokenizer, context_length=64)


def test_a_dataset_that_is_a_script_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    # A name that `datasets` takes for a script's without asking the Hub, and we not for a file's.
    with pytest.raises(ConfigurationError, match=r"nobody/\.py.*scripts are no longer supported"):
        load_text(TextSource("nobody/.py"), tokenizer, context_length=64)


def test_an_unknown_dataset_names_what_was_tried(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"nobody/nothing.*subset 'raw', split 'train'"):
        load_text(TextSource("nobody/nothing", subset="raw"), tokenizer, context_length=64)


def test_a_pattern_names_several_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name * 20}])
    blocks = load_text(TextSource(str(tmp_path / "*.jsonl")), tokenizer, context_length=4)
    expected = pack_blocks(encode_documents(["a" * 20, "b" * 20], tokenizer), context_length=4)
    assert torch.equal(blocks.blocks, expected.blocks)


def test_a_pattern_of_several_formats_or_of_nothing_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_text("b", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"several formats \(json, text\)"):
        open_rows(TextSource(str(tmp_path / "*")))
    with pytest.raises(ConfigurationError, match="No file matches"):
        open_rows(TextSource(str(tmp_path / "*.parquet")))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_is_checked_when_rows_are_opened(streaming: bool, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"body": "a", "id": 1}])
    with pytest.raises(ConfigurationError, match="no column 'text'; it has 'body', 'id'"):
        open_rows(TextSource(str(path)), streaming=streaming)
