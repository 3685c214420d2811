from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_pss.runs import follow as module
from hf_pss.runs.follow import Tail


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    tail = Tail(path)
    assert tail.poll().lines == ()  # it comes later
    assert tail.modified_seconds is None
    append(path, b"one\ntw")
    assert tail.poll().lines == (b"one",)
    assert tail.poll().lines == ()
    append(path, b"o\n\n  \nthree\n")
    assert tail.poll().lines == (b"two", b"three")
    assert tail.modified_seconds == path.stat().st_mtime


def test_a_replaced_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    append(path, b"1\n2\n3\nhal")
    tail = Tail(path)
    assert not tail.poll().has_restarted
    partial = tmp_path / "e.partial"
    partial.write_bytes(b"1\n2\n")
    os.replace(partial, path)  # as JsonLines does when a run resumes
    news = tail.poll()
    assert news.has_restarted
    assert news.lines == (b"1", b"2")
    append(path, b"4\n")
    assert tail.poll().lines == (b"4",)


def test_a_cut_file_is_read_from_its_start_and_a_vanished_one_may_return(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    append(path, b"1\n2\n")
    tail = Tail(path)
    tail.poll()
    path.write_bytes(b"1\n")
    assert tail.poll().has_restarted
    path.unlink()
    assert tail.poll().lines == ()
    append(path, b"5\n6\n")
    assert tail.poll().lines == (b"5", b"6")


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(1000)))
    assert Tail(path, max_bytes=11).poll().lines == (b"998", b"999")


def test_the_newest_line_is_read_however_long_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    longest = b"x" * module.MAX_LINE_BYTES
    path.write_bytes(b"1\n" + longest + b"\n" + longest[:-1])  # the next one is being written
    news = Tail(path).poll()
    is_there = news.lines == (longest,)  # a difference would take a minute to print
    assert (is_there, news.num_lost) == (True, 0)


def test_growth_is_read_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 10)
    path = tmp_path / "e.jsonl"
    tail = Tail(path, max_bytes=20)
    append(path, b"0\n")
    assert not tail.poll().has_more
    whole = b"".join(b"%d\n" % i for i in range(10, 30))  # 60 bytes
    append(path, whole)
    looks = [tail.poll() for _ in range(3)]
    assert [look.has_more for look in looks] == [True, True, False]
    assert b"".join(line + b"\n" for look in looks for line in look.lines) == whole


def test_a_line_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "e.jsonl"
    tail = Tail(path)
    append(path, b"1\n" + b"x" * 150)
    news = tail.poll()
    assert (news.lines, news.num_lost) == ((b"1",), 1)
    append(path, b"x" * 150)
    assert tail.poll().num_lost == 0  # the same line still
    append(path, b"x\n2\n")
    assert tail.poll().lines == (b"2",)
    news = Tail(path, max_bytes=250).poll()  # begins in the middle of it
    assert (news.lines, news.num_lost) == ((b"2",), 1)


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert Tail(tmp_path / "pipe").poll().lines == ()
    assert Tail(tmp_path).poll().lines == ()
