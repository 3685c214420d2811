"""Imports point downwards: the layers of the package, and what each may know of the outside."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_pss

# First component under the package -> layer; a module may import its own layer and those below.
# Configuration sits just above errors; "" is the package itself, the public face.
LAYERS = {
    "errors": 0,
    "config": 1,
    "linalg": 2,
    "detection": 3,
    "policy": 3,
    "events": 3,
    "notices": 3,
    "advice": 3,
    "steps": 4,
    "floors": 3,
    "selection": 4,
    "gauges": 4,
    "watch": 4,
    "stacks": 4,
    "edits": 4,
    "adapters": 4,
    "smoother": 4,
    "anchors": 4,
    "trial": 4,
    "moments": 4,
    "iterates": 4,
    "health": 4,
    "optim": 4,
    "distributed": 4,
    "controller": 4,
    "data": 5,
    "packing": 5,
    "integration": 5,
    "processes": 5,
    "demo": 5,
    "sweep": 5,
    "report": 5,
    "inspection": 5,
    "rescue": 5,
    "watching": 5,
    "cli": 5,
    "": 6,
    "__main__": 6,
}
NUMERICS, DECISIONS, MODELS = 2, 3, 4

HUGGING_FACE_AND_TRACKERS = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "peft",
    "tokenizers",
    "trackio",
    "transformers",
    "trl",
    "wandb",
}
# The one file that knows how a model is spread over devices.
KNOWS_DISTRIBUTED = {"distributed"}

Imports = dict[str, set[str]]


def modules_of(root: Path) -> dict[str, Path]:
    """Map dotted module names to files, the package's own name first."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Yield what a file imports, anywhere in it: also lazily and under TYPE_CHECKING.

    ``from a import b`` yields ``a.b``: whether b is a module is for the caller to find out.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imports_of(root: Path) -> Imports:
    """Map every module to the modules of the package, and the outside names, that it imports."""
    modules = modules_of(root)
    return {
        module: {
            name if name in modules or not is_inside(name, root.name) else owner(name, modules)
            for name in imported_names(module, path)
        }
        for module, path in modules.items()
    }


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def owner(name: str, modules: dict[str, Path]) -> str:
    """Return the module that an imported name lives in: the longest prefix that is a module."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def component(module: str) -> str:
    return ([*module.split("."), ""])[1]


def outside_family(name: str, family: str) -> bool:
    return name == family or name.startswith(family + ".")


def violations(root: Path) -> list[str]:
    """Return every breach of the architecture, in words."""
    imports = imports_of(root)
    strangers = sorted(m for m in imports if component(m) not in LAYERS)
    if strangers:
        return [f"{module} is in no layer" for module in strangers]
    found = []
    for module, targets in imports.items():
        layer = LAYERS[component(module)]
        for target in sorted(targets):
            if is_inside(target, root.name):
                if LAYERS[component(target)] > layer:
                    found.append(f"{module} imports {target}, which is above it")
            elif reason := forbidden(component(module), layer, target):
                found.append(f"{module} imports {target}: {reason}")
    return found + circles(imports)


def forbidden(name: str, layer: int, target: str) -> str | None:
    """Say why a module may not import this outside name; None if it may."""
    top = target.partition(".")[0]
    if layer < NUMERICS and top not in sys.stdlib_module_names:
        return "errors and configuration know the standard library only"
    if layer == DECISIONS and top == "torch":
        return "decisions are made from plain numbers"
    if layer <= MODELS and top in HUGGING_FACE_AND_TRACKERS:
        return "only layer 4 knows Hugging Face and trackers"
    if layer <= MODELS and name not in KNOWS_DISTRIBUTED:
        if outside_family(target, "torch.distributed"):
            return "only distributed.py knows torch.distributed"
    return None


def circles(imports: Imports) -> list[str]:
    graph = {module: targets & imports.keys() - {module} for module, targets in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["circle: " + " -> ".join(error.args[1])]
    return []


def test_imports_point_downwards() -> None:
    assert violations(Path(hf_pss.__file__).parent) == []


def plant(root: Path, files: dict[str, str]) -> Path:
    package = root / "hf_pss"
    for name, source in {"__init__.py": "", "errors.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def test_walker_accepts_a_sound_package(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from hf_pss.controller import C as C",
        "config.py": "import math\nfrom hf_pss.errors import E",
        "linalg/__init__.py": "from hf_pss.linalg.norms import n as n",
        "linalg/norms.py": "import torch\nfrom hf_pss import errors",
        "policy.py": "from hf_pss.errors import E",
        "distributed.py": "import torch.distributed as dist",
        "controller.py": "from . import policy\nfrom .linalg import norms\nfrom torch import nn",
        "cli/app.py": "import transformers\nfrom ..controller import C",
    }
    assert violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("linalg/norms.py", "from hf_pss.policy import P", "above"),
        ("linalg/norms.py", "from ..policy import P", "above"),
        ("linalg/norms.py", "from .. import policy", "above"),
        ("linalg/norms.py", "import hf_pss.policy", "above"),
        ("linalg/norms.py", "def f():\n    from hf_pss import policy", "above"),
        ("linalg/norms.py", "if TYPE_CHECKING:\n    from hf_pss.policy import P", "above"),
        ("linalg/norms.py", "from hf_pss import P", "above"),
        ("config.py", "import torch", "standard library"),
        ("config.py", "from hf_pss.policy import P", "above"),
        ("policy.py", "import torch", "plain numbers"),
        ("events.py", "import wandb", "layer 4"),
        ("selection.py", "from transformers import PreTrainedModel", "layer 4"),
        ("health/rank.py", "from peft.tuners import lora", "layer 4"),
        ("smoother.py", "import torch.distributed.tensor", "torch.distributed"),
        ("linalg/norms.py", "from torch import distributed", "torch.distributed"),
        ("elsewhere.py", "", "no layer"),
        ("policy.py", "from hf_pss.events import E", "circle"),
    ],
)
def test_walker_catches_a_planted_violation(
    tmp_path: Path, name: str, source: str, message: str
) -> None:
    sound = {"policy.py": "", "events.py": "from hf_pss.policy import P"}
    found = violations(plant(tmp_path, {**sound, name: source}))
    assert len(found) == 1
    assert message in found[0]
