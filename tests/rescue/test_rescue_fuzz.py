"""Runs whose files were changed at random: a message or a result, and never anything else."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import stat
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
from typer.testing import CliRunner, Result

from hf_pss import PSSConfig
from hf_pss.cli.app import app

# Of processor time: by the clock a busy disk alone took 5.1 s once.
MOST_SECONDS = 5.0
NUM_QUICK, NUM_SLOW, NUM_PARTS = 200, 20_000, 10
# By how much the peak may rise while a part runs: the run itself has 90 KB.
MOST_MIB = 256
# The content of a file outside of the run, to which links lead. It must not be shown.
SECRET = "7531902468"

Change = Callable[[bytes], bytes]
Act = Callable[[Path, str], None]
"""Does something to the file of a name in a run."""


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


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(in_memory: Path) -> Iterator[None]:
    """Work in an empty folder, beside files that are nobody's business."""
    outside = in_memory / "outside"
    outside.mkdir()
    row = {"step": 3, "loss": float(SECRET), "stable_rank": {SECRET: 1.0}}
    state = {"global_step": 4, "log_history": [row], "model": SECRET, **row}
    (outside / "state.json").write_text(json.dumps(state))
    (outside / "checkpoint-6").mkdir()
    (outside / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    (in_memory / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(in_memory / "empty")
        yield


@pytest.fixture(scope="module")
def original(in_memory: Path) -> Path:
    """Two checkpoints with PSS's files, the newer one of several shards."""
    run = in_memory / "run"
    config = PSSConfig.preset(
        "anchored", calibration_steps=1, threshold_ratio=1.01, cooldown_steps=0
    )
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


def _of_json(choices: list[int], value: Any, text: bytes = b"") -> Change:
    """Put a value in some place of a JSON document, or of a safetensors header.

    For the value "@" that is `text` as it stands, which no `json.dumps` would write.
    """

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
        new = json.dumps(parsed).encode().replace(b'"@"', text)
        if is_header:
            return len(new).to_bytes(8, "little") + new + raw[8 + size :]
        if raw.startswith(b"{\n"):
            return new
        return b"\n".join([*lines[:index], new, *lines[index + 1 :]])

    return change


def _written(change: Change) -> Act:
    def act(run: Path, name: str) -> None:
        path = run / name
        if path.is_file() and not path.is_symlink():
            path.write_bytes(change(path.read_bytes()))

    return act


def _huge(choices: list[int], text: bytes) -> Act:
    """Put into some place of a JSON document what no program would write."""
    return _written(_of_json(choices, "@", text))


def _link(target: str) -> Act:
    def act(run: Path, name: str) -> None:
        remove(run / name)
        (run / name).symlink_to(target.replace("OUT", str(run.parent / "outside")))

    return act


def _pipe(run: Path, name: str) -> None:
    remove(run / name)
    os.mkfifo(run / name)


def _folder(run: Path, name: str) -> None:
    remove(run / name)
    (run / name).mkdir()


def _gone(run: Path, name: str) -> None:
    remove(run / name)


def _more(extra: str, raw: bytes) -> Act:
    """Add a file that no Trainer wrote."""

    def act(run: Path, name: str) -> None:
        path = run / EXTRA_FOLDER / extra if "/" not in extra else run / extra
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(raw)

    return act


def _more_link(run: Path, name: str) -> None:
    """Add a checkpoint that is a link out of the run."""
    if not (run / "checkpoint-6").is_symlink():
        (run / "checkpoint-6").symlink_to(run.parent / "outside" / "checkpoint-6")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


EXTRA_FOLDER = "checkpoint-4"
LINKS = ("OUT/state.json", "OUT", "/etc/passwd", "/dev/zero", "nowhere", ".", "trainer_state.json")
HUGE = (
    b"[" + b"2," * (10**6 - 1) + b"2]",
    b"1" + b"0" * 4300,
    b"-1" + b"0" * 400,
    b"1e999",
    b"[" * 100_000,
    b'"' + b"\xc3\xa9" * 10**6 + b'"',
    b'{"a": 1, "a": 2}',
)
EXTRA = (
    *("pytorch_model.bin", "adapter_model.bin", "x.safetensors", "\x1b[2J.safetensors"),
    *("latest", "model.safetensors.index.json", "rng_state_1.pth", "hf_pss_options.json"),
    *("checkpoint-4/one/adapter_model.safetensors", "checkpoint-4/global_step4/x.pt"),
    *("checkpoint-4/pytorch_model_fsdp_0/.metadata", "checkpoint-999999999999/trainer_state.json"),
    *("checkpoint-3/\x1b[2J\u202e.pt", "checkpoint-9999999999999/x"),
)
PLACES = st.floats(0, 1, exclude_max=True)
KEYS = st.lists(st.integers(0, 1000), min_size=1, max_size=6)
CHANGES = (
    st.builds(_cut, PLACES)
    | st.builds(_flip, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(_insert, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(_of_json, KEYS, VALUES)
)
ACTS = (
    CHANGES.map(_written)
    | CHANGES.map(_written)
    | CHANGES.map(_written)
    | st.builds(_huge, KEYS, st.sampled_from(HUGE))
    | st.builds(_link, st.sampled_from(LINKS))
    | st.sampled_from([_pipe, _folder, _gone, _more_link])
    | st.builds(
        _more, st.sampled_from(EXTRA), st.sampled_from([b"", b"{}", b"PK\x03\x04", b"[" * 9])
    )
)
# A picture takes longer than all the rest.
WORDS = st.sampled_from(
    [*[(), ("--json",), ("--write", "OUT"), ("--write", "OUT", "--json")] * 6, ("--plot", "PNG")]
)
PICKLES = ("--moments", "reset", "--lr-scale", "0.5", "--allow-pickle")


def check(run: Path, acts: list[tuple[str, Act]], words: tuple[str, ...]) -> None:
    """Change files, run the command, put them back."""
    out, png = run.parent / "out", run.parent / "plot.png"
    kept = contents(run)
    try:
        for name, act in acts:
            if (run / name).parent.is_dir():
                act(run, name)
        before = contents(run.parent)
        places = {"OUT": str(out), "PNG": str(png)}
        given = [places.get(word, word) for word in words]
        result = invoke(run, *given, *(PICKLES if "--write" in words else ()))
        if "--json" in words and result.exit_code < 2:
            json.loads(result.stdout, parse_constant=_refuse)
        done = {out: "--write" in words and result.exit_code == 0}
        done[png] = "--plot" in words and result.exit_code < 2
        for path, is_expected in done.items():
            assert path.exists() == is_expected
            remove(path)
        assert contents(run.parent) == before
    finally:
        remove(out)
        remove(png)
        put_back(run, kept)


def invoke(run: Path, *words: str) -> Result:
    began = time.process_time()
    result = CliRunner().invoke(app, ["rescue", str(run), *words])
    assert time.process_time() - began < MOST_SECONDS
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    judge(result.stdout + result.stderr)
    return result


def judge(said: str) -> None:
    """Refuse terminal commands, and text from outside of the run."""
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert SECRET not in said.replace(",", "").replace("\n", "")
    assert "Traceback" not in said


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: its kind, and the bytes or where it leads."""
    found = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        raw = path.read_bytes() if kind == stat.S_IFREG else b""
        if kind == stat.S_IFLNK:
            raw = os.fsencode(path.readlink())
        found[str(path.relative_to(folder))] = (kind, raw)
    return found


def put_back(run: Path, kept: dict[str, tuple[int, bytes]]) -> None:
    now = contents(run)
    for name in sorted(now, reverse=True):  # files before their folders
        if name not in kept or now[name][0] != kept[name][0]:
            remove(run / name)
    for name, (kind, raw) in kept.items():
        if kind == stat.S_IFDIR:
            (run / name).mkdir(exist_ok=True)
        elif now.get(name) != (kind, raw):
            (run / name).write_bytes(raw)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def names_in(run: Path) -> list[str]:
    found = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(("training_args.bin", "README.md")))


def reset_peak() -> float:
    """Reset the process's peak, which an earlier test set, and return its present memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    return in_mib("VmRSS")


def in_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def fuzz(run: Path, num_examples: int, part: int = 0) -> None:
    names = names_in(run)
    assert any("index.json" in name for name in names)
    checked, before = 0, reset_peak()

    @seed(part)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(names), ACTS), min_size=1, max_size=3), WORDS)
    def every(acts: list[tuple[str, Act]], words: tuple[str, ...]) -> None:
        nonlocal checked
        checked += 1
        check(run, acts, words)

    every()
    assert checked >= num_examples
    assert in_mib("VmHWM") - before <= MOST_MIB


def test_unchanged_it_goes_through(original: Path) -> None:
    for words in ((), ("--json",), ("--write", "OUT"), ("--plot", "PNG")):
        check(original, [], words)


def test_each_check_can_fail(original: Path) -> None:
    for said in ("\x1b[2J", "\u202e", "loss 7,531,902,468", "Traceback (most recent call last)"):
        with pytest.raises(AssertionError):
            judge(said)
    before, kept = reset_peak(), contents(original)
    with mmap.mmap(-1, 64 * 2**20) as held:  # pages of its own, whatever the heap has left over
        held.write(bytes(len(held)))
    assert in_mib("VmHWM") - before > 60
    (original / "trainer_state.json").write_bytes(b"x")
    assert contents(original) != kept
    put_back(original, kept)
    assert contents(original) == kept


def test_changed_files(original: Path) -> None:
    fuzz(original, NUM_QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(1, NUM_PARTS + 1))
def test_many_changed_files(original: Path, part: int) -> None:
    fuzz(original, NUM_SLOW // NUM_PARTS, part)
