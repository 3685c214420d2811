"""The comparison of `recipes/rescue_run`: a signal ends all of it, and nothing half done counts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "rescue_run" / "compare.py"
PROSE = "\n".join(f"line {i}: the quick brown fox jumps over the lazy dog." for i in range(600))


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
    spec = importlib.util.spec_from_file_location("rescue_run_compare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up here
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


@pytest.fixture
def options(compare: ModuleType, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "prose.txt").write_text(PROSE)
    short = {
        "model_overrides": "n_layer=1,n_head=2,n_embd=32,n_positions=64",
        "max_steps": "4",
        "eval_steps": "4",
        "save_steps": "2",
        "vocab_size": "300",
        "max_validation_blocks": "4",
        "dataset": str(tmp_path / "prose.txt"),
    }
    return {**compare.COMMON, **short}


def test_a_signal_ends_all_of_it(
    compare: ModuleType, options: dict[str, str], tmp_path: Path
) -> None:
    """The next call starts the run from its beginning, so a loss is that of a whole run."""
    folder = tmp_path / "run"
    half = folder.with_name("run.part")

    def terminate() -> None:
        while not any(half.glob("checkpoint-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    endless = {"max_steps": "100000", "eval_steps": "100000"}
    # An observed run ends by a signal as the plain Trainer does, with this process.
    endless["pss_observe_only"] = "false"
    with pytest.raises(SystemExit) as ended:
        compare.train(folder, {**options, **endless})
    assert ended.value.code == compare.TERMINATED == 143
    assert half.is_dir()
    assert not folder.exists()
    loss = compare.train(folder, options)
    assert loss is not None
    assert not half.exists()
    assert compare.train(folder, options) == loss


def test_going_back_does_so_without_smoothing(
    compare: ModuleType, options: dict[str, str], tmp_path: Path
) -> None:
    """The control; each of two rescues has a folder of its own."""
    run = tmp_path / "run"
    compare.train(run, options)
    shutil.rmtree(run / "checkpoint-4")
    for words, folder in ((["--smoothing", "none"], "run-rescued"), ([], "run-rescued-2")):
        found, loss, error = compare.follow(run, words)
        assert loss is not None
        assert error == ""
        command = found["resume"]["command"]
        assert command[command.index("--output_dir") + 1] == str(tmp_path / folder)
        assert ("--pss_observe_only" in command) == (words != [])
        assert "--pss_smooth_on_resume" not in command  # its own floors would change nothing


@pytest.mark.parametrize(
    ("harm", "is_broken"),
    [
        ({"kind": "nan_gradient", "first": 3}, True),
        ({"kind": "high_learning_rate", "first": 1, "last": 4, "factor": 3.0}, False),
        ({"kind": "random_batch", "first": 2, "last": 3}, False),
    ],
)
def test_a_run_is_harmed_in_the_steps_that_are_named(
    compare: ModuleType,
    options: dict[str, str],
    tmp_path: Path,
    harm: dict[str, object],
    is_broken: bool,
) -> None:
    sound = compare.train(tmp_path / "sound", options)
    harmed = compare.train(tmp_path / "harmed", options, harm)
    assert harmed != sound
    assert (harmed is None) == is_broken


def test_a_row_that_fails_does_not_end_the_others(
    compare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(name: str, seed: int, folder: Path) -> dict[str, object]:
        if seed == 0:
            raise RuntimeError("no checkpoint")
        row = {"recipe": name, "seed": seed, "failure": None, "has_steps_left": False}
        return {**row, "undamaged": 3.0, "untreated": 3.5, "rolled_back": 3.0, "rescued": None}

    monkeypatch.setattr(compare, "measure", measure)
    words = ["--output-dir", str(tmp_path), "--seeds", "2", "--recipes", "ramp"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(SystemExit, match="ramp, seed 0: no checkpoint"):
        compare.main()
    line = "| ramp | 1 | none 1 | – | – | 3.000 (1 of 1) | 3.500 (0 of 1) | 3.000 (1 of 1) |"
    assert f"{line} – (0 of 1) | – | – |" in capsys.readouterr().out
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
