from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from failing_runs import fail

RunOf = Callable[..., Path]


@pytest.fixture(scope="session")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Return the folder of a run that failed in the named way; each is trained once."""
    made: dict[tuple[str, int], Path] = {}

    def find(how: str, logging_steps: int = 1) -> Path:
        key = (how, logging_steps)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{how}-{logging_steps}") / "run"
            fail(made[key], how, logging_steps=logging_steps)
        return made[key]

    return find
