"""Where a demo writes, and how the results of an earlier one are cleared away."""

from __future__ import annotations

from pathlib import Path

from hf_pss.demo.recipe import GUARDS
from hf_pss.errors import ConfigurationError
from hf_pss.integration.reporting import EVENTS_FILE, HEALTH_FILE

__all__ = ["LOG_FILE", "METRICS_FILE", "SUMMARY_FILE", "remove_earlier_demo", "run_folder"]

LOG_FILE = "train.log"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_RUN_FILES = (METRICS_FILE, SUMMARY_FILE, EVENTS_FILE, HEALTH_FILE, LOG_FILE)


def run_folder(out: Path, guard: str, seed: int) -> Path:
    """Return where one run writes."""
    return out / guard / f"seed-{seed}"


def remove_earlier_demo(out: Path) -> None:
    """Leave nothing of an earlier demo that could pass for a result of the next one.

    Files that no demo writes stay, and so do the folders that hold them.

    Raises:
        ConfigurationError: Something in the way cannot be removed.
    """
    folders = [x for guard in GUARDS for x in (out / guard).glob("seed-*") if _is_run_folder(x)]
    try:
        for path in (out / "report.html", *(x / name for x in folders for name in _RUN_FILES)):
            path.unlink(missing_ok=True)
        for folder in (*folders, *(out / guard for guard in GUARDS)):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise ConfigurationError(
            f"What an earlier demo left in {out} cannot be removed: {error}. Choose another folder."
        ) from error


def _is_run_folder(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("seed-").isdecimal()
