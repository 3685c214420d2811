"""Runs whose files were changed at random: a message or a result, and never anything else."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from helpers import gpt2, train
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_pss import PSSConfig
from hf_pss.cli.app import app

# Of processor time: by the clock a busy disk alone took 5.1 s once.
MOST_SECONDS = 5.0
NUM_QUICK, NUM_SLOW, NUM_PARTS = 200, 20_000, 10
# By how much the peak may rise while a part runs: the run itself has 90 KB.
MOST_MIB = 256

Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that no disk waits for, where there is one: fsync is most of the time otherwise."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("fuzzed")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def _one_parser() -> Iterator[None]:
    """Build the command's parser once, not for each example: a third of an example's time."""
    build = typer.testing._get_command
    command = build(app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", lambda _: command)
        yield


@pytest.fixture(scope="module")
def original(in_memory: Path) -> Path:
    """Two checkpoints with PSS's files, the newer one of several shards."""
    run = in_memory / "run"
    config = PSSConfig.preset("both", calibration_steps=1, threshold_ratio=1.01, cooldown_steps=0)
    train(run, config, max_steps=4, save_steps=2, model=gpt2(1, 8))
    newest = run / "checkpoint-4"
    (newest / "model.safetensors").unlink()
    gpt2(1, 8).save_pretrained(newest, max_shard_size="4KB")
    health = [{"step": i, "stable_rank": {"a": 1.0 + i, "b": 2.0}} for i in range(4)]
    (run / "pss_health.jsonl").write_text("\n".join(map(json.dumps, health)))
    return run


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../../x.safetensors", "/etc/passwd", "\x1b[2J", "F32", "a" * 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def _cut(at: float) -> Change:
    return lambda raw: raw[: int(len(raw) * at)]


def _flip(at: float, with_what: bytes) -> Change:
    def change(raw: bytes) -> bytes:
        place = int(len(raw) * at)
        return raw[:place] + with_what + raw[place + len(with_what) :]

    return change


def _insert(at: float, what: bytes) -> Change:
    def change(raw: bytes) -> bytes:
        place = int(len(raw) * at)
        return raw[:place] + what + raw[place:]

    return change


def _of_json(choices: list[int], value: Any) -> Change:
    """Put a value in some place of a JSON document, or of a safetensors header."""

    def change(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        is_header = 8 + size <= len(raw)
        lines = [raw[8 : 8 + size]] if is_header else raw.split(b"\n")
        index = 0 if is_header or raw.startswith(b"{\n") else choices[0] % len(lines)
        text = lines[0] if is_header else raw if raw.startswith(b"{\n") else lines[index]
        try:
            parsed = json.loads(text)
        except ValueError:
            return raw
        node: Any = parsed
        for choice in choices:
            if not isinstance(node, dict | list) or not node:
                break
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[choice % len(keys)]
            if choice % 3 == 0 or not isinstance(node[key], dict | list):
                node[key] = value
                break
            node = node[key]
        new = json.dumps(parsed).encode()
        if is_header:
            return len(new).to_bytes(8, "little") + new + raw[8 + size :]
        if raw.startswith(b"{\n"):
            return new
        return b"\n".join([*lines[:index], new, *lines[index + 1 :]])

    return change


PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = (
    st.builds(_cut, PLACES)
    | st.builds(_flip, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(_insert, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(_of_json, st.lists(st.integers(0, 1000), min_size=1, max_size=6), VALUES)
)
WORDS = st.sampled_from([(), ("--json",), ("--write", "out"), ("--write", "out", "--json")])
PICKLES = ("--moments", "reset", "--lr-scale", "0.5", "--allow-pickle")


def check(run: Path, changes: list[tuple[str, Change]], words: tuple[str, ...]) -> None:
    """Change files, run the command, put them back."""
    out = run.parent / "out"
    kept = {name: (run / name).read_bytes() for name, _ in changes}
    listed = sorted(run.rglob("*"))
    try:
        for name, change in changes:
            (run / name).write_bytes(change((run / name).read_bytes()))
        if "--write" in words:
            words = (*(str(out) if word == "out" else word for word in words), *PICKLES)
        began = time.process_time()
        result = CliRunner().invoke(app, ["rescue", str(run), *words])
        assert time.process_time() - began < MOST_SECONDS
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.exit_code in (0, 1, 2)
        assert "\x1b[2J" not in result.stdout
        if "--json" in words and result.exit_code < 2:
            json.loads(result.stdout, parse_constant=_refuse)
        assert out.exists() == ("--write" in words and result.exit_code == 0)
    finally:
        for name, raw in kept.items():
            (run / name).write_bytes(raw)
        shutil.rmtree(out, ignore_errors=True)
    assert sorted(run.rglob("*")) == listed
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def names_in(run: Path) -> list[str]:
    found = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(("training_args.bin", "README.md")))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(run: Path, num_examples: int, part: int = 0) -> None:
    names = names_in(run)
    assert any("index.json" in name for name in names)
    checked, before = 0, peak_mib()

    @seed(part)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(names), CHANGES), min_size=1, max_size=3), WORDS)
    def every(changes: list[tuple[str, Change]], words: tuple[str, ...]) -> None:
        nonlocal checked
        checked += 1
        check(run, changes, words)

    every()
    assert checked >= num_examples
    assert peak_mib() - before <= MOST_MIB


def test_unchanged_it_goes_through(original: Path) -> None:
    for words in ((), ("--json",), ("--write", "out")):
        check(original, [], words)


def test_changed_files(original: Path) -> None:
    fuzz(original, NUM_QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(1, NUM_PARTS + 1))
def test_many_changed_files(original: Path, part: int) -> None:
    fuzz(original, NUM_SLOW // NUM_PARTS, part)
