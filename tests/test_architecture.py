"""Imports point downwards: the layers of the package, and what each may know of the outside."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_pss

# The rooms, lowest first: a module imports from its own room and from those before it.
# "" is the package itself, the public face.
ROOMS = (
    "errors",
    "config",
    "linalg",
    "detection",
    "records",
    "view",
    "models",
    "controller",
    "health",
    "optim",
    "runs",
    "trainer",
    "integrations",
    "inspection",
    "rescue",
    "evidence",
    "cli",
    "",
)
# What each room may know of the outside, and the room below which nothing else may.
MODULES_ON_TOP = {"__init__", "config", "controller", "errors"}

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
# The one room that knows how a model is spread over devices.
KNOWS_DISTRIBUTED = "hf_pss.models.distributed"

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
    strangers = sorted(m for m in imports if component(m) not in ROOMS)
    if strangers:
        return [f"{module} is in no room" for module in strangers]
    found = []
    for module, targets in imports.items():
        room = component(module)
        for target in sorted(targets):
            if is_inside(target, root.name):
                is_above = ROOMS.index(component(target)) > ROOMS.index(room)
                if is_above:
                    found.append(f"{module} imports {target}, which is above it")
            elif reason := forbidden(module, target):
                found.append(f"{module} imports {target}: {reason}")
    return found + circles(imports)


def forbidden(module: str, target: str) -> str | None:
    """Say why a module may not import this outside name; None if it may."""
    top, room = target.partition(".")[0], component(module)
    if room in ("errors", "config") and top not in sys.stdlib_module_names:
        return "errors and configuration know the standard library only"
    if room in ("detection", "records") and top == "torch":
        return "decisions are made from plain numbers"
    if room and ROOMS.index(room) < ROOMS.index("runs"):
        if top in HUGGING_FACE_AND_TRACKERS:
            return "only runs/ and the rooms above it know Hugging Face and trackers"
        if outside_family(target, "torch.distributed") and not is_inside(module, KNOWS_DISTRIBUTED):
            return "only models/distributed knows torch.distributed"
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


def test_only_the_command_line_imports_the_evidence() -> None:
    importers = {
        component(module)
        for module, targets in imports_of(Path(hf_pss.__file__).parent).items()
        if any(component(target) == "evidence" for target in targets if is_inside(target, "hf_pss"))
    }
    assert importers == {"evidence", "cli"}


def test_few_modules_lie_directly_in_the_package() -> None:
    root = Path(hf_pss.__file__).parent
    assert {path.stem for path in root.glob("*.py")} == MODULES_ON_TOP


def test_no_module_has_the_name_of_another() -> None:
    root = Path(hf_pss.__file__).parent
    files = [path.stem for path in root.rglob("*.py") if path.stem != "__init__"]
    folders = [path.name for path in root.rglob("*") if (path / "__init__.py").is_file()]
    assert [name for name, count in Counter(files + folders).items() if count > 1] == []


def test_no_class_has_the_name_of_another() -> None:
    root = Path(hf_pss.__file__).parent
    names = Counter(
        node.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


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
        "detection/policy.py": "from hf_pss.errors import E",
        "models/distributed/zero.py": "import torch.distributed as dist",
        "controller.py": "from .detection import policy\nfrom .linalg import norms",
        "cli/app.py": "import transformers\nfrom ..controller import C",
    }
    assert violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("linalg/norms.py", "from hf_pss.detection.policy import P", "above"),
        ("linalg/norms.py", "from ..detection.policy import P", "above"),
        ("linalg/norms.py", "from ..detection import policy", "above"),
        ("linalg/norms.py", "import hf_pss.detection.policy", "above"),
        ("linalg/norms.py", "def f():\n    from hf_pss.detection import policy", "above"),
        (
            "linalg/norms.py",
            "if TYPE_CHECKING:\n    from hf_pss.detection.policy import P",
            "above",
        ),
        ("linalg/norms.py", "from hf_pss import P", "above"),
        ("config.py", "import torch", "standard library"),
        ("config.py", "from hf_pss.detection.policy import P", "above"),
        ("detection/baseline.py", "import torch", "plain numbers"),
        ("records/lines.py", "import wandb", "Hugging Face"),
        ("models/views.py", "from transformers import PreTrainedModel", "Hugging Face"),
        ("health/rank.py", "from peft.tuners import lora", "Hugging Face"),
        ("models/smoother.py", "import torch.distributed.tensor", "torch.distributed"),
        ("linalg/norms.py", "from torch import distributed", "torch.distributed"),
        ("elsewhere.py", "", "no room"),
        ("detection/policy.py", "from hf_pss.records.events import E", "above"),
        ("detection/policy.py", "from hf_pss.detection.state import S", "circle"),
    ],
)
def test_walker_catches_a_planted_violation(
    tmp_path: Path, name: str, source: str, message: str
) -> None:
    sound = {
        "detection/policy.py": "",
        "detection/state.py": "from hf_pss.detection.policy import P",
        "records/events.py": "",
    }
    found = violations(plant(tmp_path, {**sound, name: source}))
    assert len(found) == 1
    assert message in found[0]
