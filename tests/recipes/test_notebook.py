"""The notebook of recipes/examples: it is stored with its outputs, and runs as it is."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from scripts import RECIPES

NOTEBOOK = RECIPES / "examples" / "spike.ipynb"
MOST_BYTES = 300_000
SAME_EVERYWHERE = "same-everywhere"
"""The tag of cells whose text does not depend on the machine."""
ABSOLUTE_PATH = re.compile(r"(?<![\w.<])/\w+/\w+")


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    outputs = cell.outputs
    return "".join(one.get("text", one.get("data", {}).get("text/plain", "")) for one in outputs)


def test_the_notebook_is_stored_with_the_outputs_of_one_run() -> None:
    cells = code_of(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(one.output_type != "error" for cell in cells for one in cell.outputs)
    assert any("image/png" in one.get("data", {}) for cell in cells for one in cell.outputs)
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_the_stored_outputs_hold_no_path_of_a_machine() -> None:
    assert ABSOLUTE_PATH.search("see /usr/lib and ./runs/a")
    assert not ABSOLUTE_PATH.search("see ./runs/a, runs/a/b and <b>1/2</b>")
    outputs = str([cell.outputs for cell in code_of(read())])
    assert ABSOLUTE_PATH.findall(re.sub(r"'image/png': '[^']*'", "", outputs)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as a user runs it
def test_the_notebook_runs_again_to_the_stored_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The notebook calls hf-pss. tqdm warns about a missing ipywidgets with a path.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    stored, notebook = read(), read()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    pairs = zip(code_of(stored), code_of(notebook), strict=True)
    tagged = [pair for pair in pairs if SAME_EVERYWHERE in pair[0].metadata.get("tags", ())]
    assert len(tagged) > 3
    for before, after in tagged:
        assert text_of(after) == text_of(before), after.source
