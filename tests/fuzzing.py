"""Files that are changed at random, and what no command may do with them.

Used by the fuzz tests of the commands that read files which may come from anyone.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from hf_pss.cli.app import app

# Of processor time: by the clock a busy disk alone took 5.1 s once.
MOST_SECONDS = 5.0
NUM_PARTS = 10
# The content of a file outside of the run, to which links lead. It must not be shown.
SECRET = "7531902468"

Change = Callable[[bytes], bytes]
Act = Callable[[Path, str], None]
"""Does something to the file of a name in a run."""
Acts = list[tuple[str, Act]]
Contents = dict[str, tuple[int, bytes]]


@contextmanager
def workplace(on_disk: Path) -> Iterator[Path]:
    """Yield a folder to work in, and work in an empty one, beside files that are nobody's business.

    The folder is one that no disk waits for, where there is one: fsync is most of the time
    otherwise. The command's parser is built once, and not for each example.
    """
    build = typer.testing._get_command
    command = build(app)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else on_disk
    with tempfile.TemporaryDirectory(dir=place) as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        outside = folder / "outside"
        outside.mkdir()
        row = {"step": 3, "loss": float(SECRET), "stable_rank": {SECRET: 1.0}}
        state = {"global_step": 4, "log_history": [row], "model": SECRET, **row}
        (outside / "state.json").write_text(json.dumps(state))
        (outside / "checkpoint-6").mkdir()
        (outside / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
        (folder / "empty").mkdir()
        patch.chdir(folder / "empty")
        patch.setattr(typer.testing, "_get_command", lambda _: command)
        yield folder


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../../x.safetensors", "/etc/passwd", "\x1b[2J", "F32", "a" * 400])
    | st.sampled_from(["\ud800", "[red]", "<script>", "\u202e"]),
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


def of_json(choices: list[int], value: Any, literal: bytes = b"") -> Change:
    """Put a value in some place of a JSON document, or of a safetensors header.

    For the value "@" that is `literal` as it stands, which no `json.dumps` would write.
    """

    def change(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        is_header = 8 + size <= len(raw)
        lines = [raw[8 : 8 + size]] if is_header else raw.split(b"\n")
        index = 0 if is_header or raw.startswith(b"{\n") else choices[0] % len(lines)
        text = lines[0] if is_header else raw if raw.startswith(b"{\n") else lines[index]
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):  # of an earlier change
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
        new = json.dumps(parsed).encode().replace(b'"@"', literal)
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


def _huge(choices: list[int], literal: bytes) -> Act:
    """Put into some place of a JSON document what no program would write."""
    return _written(of_json(choices, "@", literal))


def link(target: str) -> Act:
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
        path = run / extra
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(raw)

    return act


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
PLACES = st.floats(0, 1, exclude_max=True)
KEYS = st.lists(st.integers(0, 1000), min_size=1, max_size=6)
CHANGES = (
    st.builds(_cut, PLACES)
    | st.builds(_flip, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(_insert, PLACES, st.binary(min_size=1, max_size=8))
    | st.builds(of_json, KEYS, VALUES)
)


def acts_with(extra: Sequence[str], *own: Act) -> st.SearchStrategy[Act]:
    """Return what may be done to a file of a run, or beside it.

    Args:
        extra: Names of files that may be added.
        own: Further acts.
    """
    return (
        CHANGES.map(_written)
        | CHANGES.map(_written)
        | CHANGES.map(_written)
        | st.builds(_huge, KEYS, st.sampled_from(HUGE))
        | st.builds(link, st.sampled_from(LINKS))
        | st.sampled_from([_pipe, _folder, _gone, *own])
        | st.builds(
            _more, st.sampled_from(extra), st.sampled_from([b"", b"{}", b"PK\x03\x04", b"[" * 9])
        )
    )


def apply(acts: Acts, run: Path) -> None:
    for name, act in acts:
        if (run / name).parent.is_dir():
            act(run, name)


def invoke(*words: object) -> Result:
    """Run a command: it must answer soon, with a result or a message that can be shown."""
    began = time.process_time()
    result = CliRunner().invoke(app, [str(word) for word in words])
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


def contents(folder: Path) -> Contents:
    """Everything below a folder: its kind, and the bytes or where it leads."""
    found = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        raw = path.read_bytes() if kind == stat.S_IFREG else b""
        if kind == stat.S_IFLNK:
            raw = os.fsencode(path.readlink())
        found[str(path.relative_to(folder))] = (kind, raw)
    return found


def put_back(run: Path, kept: Contents) -> None:
    now = contents(run)
    for name in sorted(now, reverse=True):  # files before their folders
        if name not in kept or now[name][0] != kept[name][0]:
            remove(run / name)
    for name, (kind, raw) in kept.items():
        if kind == stat.S_IFDIR:
            (run / name).mkdir(exist_ok=True)
        elif now.get(name) != (kind, raw):
            (run / name).write_bytes(raw)


def reset_peak() -> float:
    """Reset the process's peak, which an earlier test set, and return its present memory in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    return in_mib("VmRSS")


def in_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def fuzz(
    check: Callable[[Acts, tuple[str, ...]], None],
    names: Sequence[str],
    acts: st.SearchStrategy[Act],
    words: st.SearchStrategy[tuple[str, ...]],
    *,
    num_examples: int,
    part: int = 0,
    most_mib: float,
) -> None:
    """Check as many examples.

    Args:
        check: It gets what is done to which file, and the words of the command.
        names: The files that something is done to.
        acts: What may be done to a file.
        words: The options of the command.
        num_examples: How many.
        part: The seed.
        most_mib: By how much the peak of the memory may rise.
    """
    checked, before = 0, reset_peak()

    @seed(part)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(names), acts), min_size=1, max_size=3), words)
    def every(done: Acts, given_words: tuple[str, ...]) -> None:
        nonlocal checked
        checked += 1
        check(done, given_words)

    every()
    assert checked >= num_examples
    assert in_mib("VmHWM") - before <= most_mib
