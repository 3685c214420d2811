"""Runs whose files were changed at random: a message or a result, and never anything else.

The commands are `rescue`, `watch` and `health`.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import pytest
from fuzzing import NUM_PARTS, Acts, contents, judge, put_back, remove, reset_peak
from helpers import gpt2, train
from hypothesis import strategies as st

from hf_pss import PSSConfig

NUM_QUICK, NUM_SLOW = 60, 20_000
# By how much the peak may rise while a part runs: the run itself has 90 KB.
MOST_MIB = 256


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with fuzzing.workplace(tmp_path_factory.mktemp("fuzzed")) as folder:
        yield folder


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


def _more_link(run: Path, name: str) -> None:
    """Add a checkpoint that is a link out of the run."""
    if not (run / "checkpoint-6").is_symlink():
        (run / "checkpoint-6").symlink_to(run.parent / "outside" / "checkpoint-6")


INNER = (
    *("pytorch_model.bin", "adapter_model.bin", "x.safetensors", "\x1b[2J.safetensors"),
    *("latest", "model.safetensors.index.json", "rng_state_1.pth", "hf_pss_options.json"),
    *("one/adapter_model.safetensors", "global_step4/x.pt", "pytorch_model_fsdp_0/.metadata"),
)
OUTER = (
    *("checkpoint-999999999999/trainer_state.json", "checkpoint-9999999999999/x"),
    "checkpoint-3/\x1b[2J\u202e.pt",
)
ACTS = fuzzing.acts_with([*(f"checkpoint-4/{name}" for name in INNER), *OUTER], _more_link)
OPTIONS = [(), ("--json",), ("--write", "OUT"), ("--write", "OUT", "--json")]
# A picture takes longer than all the rest.
COMMANDS = [*[("rescue", *words) for words in OPTIONS] * 6, ("rescue", "--plot", "PNG")]
COMMANDS += [*[("watch", "--once"), ("health",), ("health", "--json")] * 4]
WORDS = st.sampled_from(COMMANDS)
PICKLES = ("--moments", "reset", "--lr-scale", "0.5", "--allow-pickle")


def check(run: Path, acts: Acts, words: tuple[str, ...]) -> None:
    """Change files, run the command, put them back."""
    out, png = run.parent / "out", run.parent / "plot.png"
    kept = contents(run)
    try:
        fuzzing.apply(acts, run)
        before = contents(run.parent)
        places = {"OUT": str(out), "PNG": str(png)}
        command, *given = (places.get(word, word) for word in words)
        place = run / "checkpoint-4" if command == "health" else run
        more = PICKLES if "--write" in words else ()
        result = fuzzing.invoke(command, place, *given, *more)
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


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def names_in(run: Path) -> list[str]:
    found = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(("training_args.bin", "README.md")))


def fuzz(run: Path, num_examples: int, part: int = 0) -> None:
    names = names_in(run)
    assert any("index.json" in name for name in names)

    def checked(acts: Acts, words: tuple[str, ...]) -> None:
        check(run, acts, words)

    fuzzing.fuzz(
        checked, names, ACTS, WORDS, num_examples=num_examples, part=part, most_mib=MOST_MIB
    )


def test_unchanged_it_goes_through(original: Path) -> None:
    for words in sorted(set(COMMANDS)):
        check(original, [], words)


def test_each_check_can_fail(original: Path) -> None:
    for said in ("\x1b[2J", "\u202e", "loss 7,531,902,468", "Traceback (most recent call last)"):
        with pytest.raises(AssertionError):
            judge(said)
    before, kept = reset_peak(), contents(original)
    with mmap.mmap(-1, 64 * 2**20) as held:  # pages of its own, whatever the heap has left over
        held.write(bytes(len(held)))
    assert fuzzing.in_mib("VmHWM") - before > 60
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
