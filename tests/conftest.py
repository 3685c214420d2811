"""Every test runs offline, on one thread, and with the signals' default dispositions."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch

# Read when transformers, trl and huggingface_hub are imported.
for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")


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


# Doctests are collected from every module; these two of one name would be taken for each other.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
