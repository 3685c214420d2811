"""Every test runs offline and on one thread."""

from __future__ import annotations

import os

import pytest
import torch

# Read when transformers, trl and huggingface_hub are imported.
for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


# Doctests are collected from every module; these two of one name would be taken for each other.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
