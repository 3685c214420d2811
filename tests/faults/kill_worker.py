"""Runs that are killed, over and over, and resumed: what the tests of kill -9 start.

A fork for every life, so that nothing is imported twice. ``kill_worker.py OUT phases`` kills in
every phase of a save, ``kill_worker.py OUT moments N SEED`` at N random moments, and
``kill_worker.py OUT operations N SEED`` before N random operations on files; each writes
``result.json``. ``kill_worker.py OUT phases SafeTrainer`` kills a trainer without PSS.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import checkpoint_differences, differences, make_trainer
from transformers import Trainer, TrainerCallback, TrainerState

from hf_pss import PSSConfig
from hf_pss.runs.checkpoint import examine
from hf_pss.runs.folder import checkpoints_by_step
from hf_pss.trainer import safe_checkpoints as saving

STEPS = 8
KILLED_SAVE = 5
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 2}


class SafeTrainer(saving.SafeCheckpointsMixin, Trainer):
    """Safe checkpoints without PSS."""


TRAINERS: dict[str, dict[str, Any]] = {
    "PSSTrainer": {"pss": PSSConfig.preset("paper")},
    "SafeTrainer": {"trainer_class": SafeTrainer},
}


Patch = Callable[[], None]


class Killer:
    """Kills this process when it is called for the given time."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killing(owner: Any, name: str, *, before: bool = False, at: int = KILLED_SAVE) -> Patch:
    """Return a patch: the process dies in the fifth call of this function."""

    def patch() -> None:
        original, kill = getattr(owner, name), Killer(at)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if before:
                kill()
            result = original(*args, **kwargs)
            if not before:
                kill()
            return result

        setattr(owner, name, patched)

    return patch


def killing_while_removing() -> None:
    """Die when half of a checkpoint that rotation removes is gone."""
    original, num_calls, kill = saving.rotate, 0, Killer(4)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.remove" and num_calls == KILLED_SAVE:
            kill()

    def patched(*args: Any, **kwargs: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        original(*args, **kwargs)

    saving.rotate = patched
    sys.addaudithook(watch)


class Operations:
    """Counts a life's operations on the files of a folder, and kills it before one of them.

    Python reports these operations: to open, make, rename and remove a file or folder. It does not
    report the writes of torch and safetensors.

    Args:
        folder: The run's folder.
        at: The number of the operation; 0 kills nothing.
    """

    def __init__(self, folder: Path, at: int = 0) -> None:
        self._within, self._kill = f"{folder}{os.sep}", Killer(at)
        self._count = mmap.mmap(-1, 8)  # shared with the process that dies

    @property
    def count(self) -> int:
        return int.from_bytes(self._count[:8], "little")

    def __call__(self) -> None:
        sys.addaudithook(self._watch)

    def _watch(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        # What removes a tree names a file by the descriptor of its folder.
        is_by_folder = event in ("os.remove", "os.rmdir") and args[1] != -1
        if is_by_folder or str(args[0]).startswith(self._within):
            self._count[:8] = (self.count + 1).to_bytes(8, "little")
            self._kill()


def killing_between_renames() -> None:
    """Save every step twice, and die when the first has lost its name and the second has none."""
    original = saving.move_into_place

    def patched(staged: Path, target: Path) -> None:
        if target.exists() and target.name == "checkpoint-5":
            target.rename(staged.parent / "replaced")
            os.kill(os.getpid(), signal.SIGKILL)
        original(staged, target)

    saving.move_into_place = patched
    once = saving.SafeCheckpointsMixin._save_checkpoint

    def twice(self: Any, model: Any, trial: Any) -> None:
        once(self, model, trial)
        once(self, model, trial)

    saving.SafeCheckpointsMixin._save_checkpoint = twice


PHASES: dict[str, Patch] = {
    "before the save": killing(Trainer, "_save_checkpoint", before=True),
    "weights written": killing(Trainer, "save_model"),
    "optimizer written": killing(Trainer, "_save_optimizer_and_scheduler"),
    "random state written": killing(Trainer, "_save_rng_state"),
    "trainer state written": killing(TrainerState, "save_to_json"),
    "all on the disk": killing(saving, "sync_tree", at=2 * KILLED_SAVE - 1),
    "marker written": killing(saving, "write_marker"),
    "before it gets its name": killing(saving, "move_into_place", before=True),
    "it has its name": killing(saving, "move_into_place"),
    "between two names": killing_between_renames,
    "half of an old one removed": killing_while_removing,
}


class NoteStart(TrainerCallback):
    """Writes down at which step a life began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, "began").write_text(str(state.global_step))


def published(folder: Path) -> int:
    """Return the step of the newest folder that has a checkpoint's name; 0 without any."""
    names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return max((int(name[1]) for name in names if name), default=0)


def half_removed(folder: Path) -> list[str]:
    """Return the folders with a checkpoint's name that lack one of its files."""
    return [path.name for path in checkpoints_by_step(folder) if not examine(path).is_whole]


def live(folder: Path, kind: str) -> None:
    """Train, or go on where the last life ended."""
    resume = True if published(folder) else None
    trainer = make_trainer(folder, **TRAINERS[kind], **OPTIONS)
    trainer.add_callback(NoteStart())
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.model.state_dict(), folder / "final.pt")


def fork(folder: Path, patch: Patch | None = None, kind: str = "PSSTrainer") -> int:
    """Begin a life and return its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "began").unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if patch is not None:
            patch()
        live(folder, kind)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def began(folder: Path) -> int | None:
    """Return the step at which the last life began; None where it did not get so far."""
    path = folder / "began"
    text = path.read_text() if path.exists() else ""
    return int(text) if text else None


def differences_at_the_end(reference: Path, folder: Path) -> list[str]:
    """Compare the last checkpoint, and the weights that the run ended with, to the bit."""
    finals = [torch.load(path / "final.pt", weights_only=True) for path in (reference, folder)]
    last = f"checkpoint-{STEPS}"
    return [
        *checkpoint_differences(reference / last, folder / last),
        *differences(*finals, "final"),
    ]


def kill_in_phases(out: Path, reference: Path, kind: str = "PSSTrainer") -> list[dict[str, Any]]:
    found = []
    for name, patch in PHASES.items():
        folder = out / name.replace(" ", "_")
        killed = wait(fork(folder, patch, kind))
        newest, half = published(folder), half_removed(folder)
        ended = wait(fork(folder, kind=kind))
        found.append(
            {
                "phase": name,
                "killed": killed,
                "newest": newest,
                "half_removed": half,
                "began": began(folder),
                "ended": ended,
                "differences": differences_at_the_end(reference, folder),
                "left": sorted(path.name for path in folder.iterdir()),
            }
        )
    return found


def kill_at_random(
    out: Path, reference: Path, num_kills: int, seed: int, *, at_operations: bool
) -> list[dict[str, Any]]:
    """Kill lives until so many are dead; every run ends in the end.

    A life dies at a random moment or before a random operation on a file. Many lives die while
    they restart, save or rotate, because most operations are there.
    """
    generator, kills, found = random.Random(seed), 0, []
    started, counted = time.monotonic(), Operations(out / "timed")
    wait(fork(out / "timed", counted))
    seconds = time.monotonic() - started
    while kills < num_kills:
        folder = out / f"run-{len(found)}"
        lives, fresh, failed, half, code = 0, 0, 0, list[str](), -1
        while code < 0:
            newest, is_killed = published(folder), kills < num_kills
            at = generator.randint(1, counted.count) if is_killed and at_operations else 0
            child = fork(folder, Operations(folder, at))
            lives += 1
            if is_killed and not at_operations:
                time.sleep(generator.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            kills += code == -signal.SIGKILL
            start = began(folder)
            fresh += start is not None and start < newest
            failed += code > 0
            half += half_removed(folder)
        found.append(
            {
                "lives": lives,
                "fresh_starts": fresh,
                "failed": failed,
                "half_removed": half,
                "differences": differences_at_the_end(reference, folder) if code == 0 else None,
            }
        )
        shutil.rmtree(folder)
    return found


def main(out: Path, kind: str, *rest: str) -> None:
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads; there are none
    torch.set_num_threads(1)
    reference = out / "reference"
    trainer = rest[0] if kind == "phases" and rest else "PSSTrainer"
    if wait(fork(reference, kind=trainer)) != 0:
        raise SystemExit("the uninterrupted run failed")
    if kind == "phases":
        found = kill_in_phases(out, reference, trainer)
    else:
        num_kills, seed = map(int, rest)
        is_at = kind == "operations"
        found = kill_at_random(out, reference, num_kills, seed, at_operations=is_at)
    (out / "result.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
