"""Every test runs offline, on one thread, and with the signals' default dispositions."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest
import torch

# Read when transformers, trl and huggingface_hub are imported.
for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")

from transformers import Trainer  # noqa: E402

# Folders whose tests train or start processes: --fast does not look into them. What does so in
# other folders it skips.
HEAVY = ("benchmarks", "cli", "demo", "distributed", "faults", "integration", "invariants")
HEAVY += ("integrations", "pretrained", "recipes", "report", "reports_of_users", "rescue", "sweep")


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "leave out the tests that start a process, a Trainer or a compiler"
    parser.addoption("--fast", action="store_true", help=told)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_heavy = collection_path.parent == Path(__file__).parent and collection_path.name in HEAVY
    return True if is_heavy and config.getoption("--fast") else None


def pytest_sessionstart() -> None:
    # Whoever starts this in the background may have Ctrl-C ignored, which processes inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for one in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(one) is signal.SIG_IGN:
            signal.signal(one, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    # Each Trainer collects garbage: without this it looks through all of torch and transformers.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _fast(request: pytest.FixtureRequest) -> Iterator[None]:
    def skip(*_: object, **__: object) -> NoReturn:
        pytest.skip("--fast: starts a process, a Trainer or a compiler")

    processes = ((subprocess.Popen, "__init__"), (BaseProcess, "start"), (os, "fork"))
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--fast"):
            for owner, name in (*processes, (Trainer, "__init__"), (torch, "compile")):
                patch.setattr(owner, name, skip)
        yield


# Doctests are collected from every module; these two of one name would be taken for each other.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
