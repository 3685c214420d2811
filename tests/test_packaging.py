"""The wheel, alone in an environment that has only the core dependencies, and what surrounds it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_pss

PACKAGE = Path(hf_pss.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

TRAINS = """
import sys
from importlib.util import find_spec
from transformers import GPT2Config, GPT2LMHeadModel
import hf_pss
from hf_pss import PSSTrainer, PSSTrainingArguments

assert sys.prefix in hf_pss.__file__, hf_pss.__file__
assert not any(map(find_spec, ("matplotlib", "peft", "pytest", "scipy", "sklearn", "wandb")))
rows = [{"input_ids": [i % 7] * 8, "labels": [i % 7] * 8} for i in range(16)]
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, n_positions=8))
args = PSSTrainingArguments("out", max_steps=6, use_cpu=True, save_steps=3, report_to="none")
trainer = PSSTrainer(model=model, args=args, train_dataset=rows)
trainer.train()
"""
NEEDS_AN_EXTRA = """
import torch
from types import SimpleNamespace
from hf_pss.evidence.baselines import OPTIMIZERS
from hf_pss.evidence.examples import examples_of
from hf_pss.evidence.rows import bootstrap_interval

args = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)
for call in (
    lambda: examples_of(SimpleNamespace(corpus="digits"), seed=0),
    lambda: bootstrap_interval([0.1, 0.2, 0.3, 0.4, 0.5]),
    lambda: OPTIMIZERS["pytorch_optimizer_muon"]([{}], args),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_every_hint_names_packages_of_an_extra() -> None:
    extras = PROJECT["optional-dependencies"].values()
    offered = {Requirement(one).name for extra in extras for one in extra}
    hinted = {
        name
        for path in PACKAGE.rglob("*.py")
        for call in re.findall(r"how_to_install\(('[^)]+)\)", path.read_text(encoding="utf-8"))
        for name in re.findall(r"'([^']+)'", call)
    }
    evidence = {"scikit-learn", "scipy", "pytorch_optimizer", "peft"}
    assert hinted == {"matplotlib", "jinja2", *evidence}
    assert hinted <= offered


def test_nothing_asks_to_install_hf_pss_from_a_registry() -> None:
    texts = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert [path for path in texts if "pip install 'hf-pss" in path.read_text("utf-8")] == []


def test_the_citation_names_the_version_and_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]


def test_the_release_makes_the_links_of_the_readme_absolute(tmp_path: Path) -> None:
    """Run the step of the workflow on copies of the two files that it changes."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    steps = {step.get("name"): step for step in workflow["jobs"]["build"]["steps"]}
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    own = {"GITHUB_REPOSITORY": "some/where", "GITHUB_REF_NAME": f"v{PROJECT['version']}"}
    for name in ("The tag is the version", "Fill in the repository's address"):
        command = ["bash", "-euc", steps[name]["run"]]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **own}, check=True)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    base = f"https://github.com/some/where/{{}}/v{PROJECT['version']}/"
    assert f"{base.format('raw')}docs/figures/demo.png" in links
    assert f"{base.format('blob')}docs/guides/rescue.md" in links
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == "https://github.com/some/where"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel and only its core dependencies."""
    folder = tmp_path_factory.mktemp("alone")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    target = next((folder / "venv").glob("lib/python*/site-packages"))
    for name in closure(Requirement(one).name for one in PROJECT["dependencies"]):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            link = target / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(found.locate_file(top))))
    (wheel,) = folder.glob("hf_pss-*.whl")
    into = [*pip, "--python", folder / "venv" / "bin" / "python"]
    subprocess.run([*into, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    subprocess.run([*into, "check"], check=True)
    return folder / "venv" / "bin"


def closure(names: object) -> set[str]:
    """Return the names of packages with those that they need without any extra."""
    todo, found = list(names), set()  # type: ignore[call-overload]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            needed = map(Requirement, distribution(name).requires or ())
            todo += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_alone_trains_and_names_what_an_extra_needs(alone: Path, tmp_path: Path) -> None:
    shown = run(alone / "hf-pss", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "rescue" in shown.stdout
    trained = run(alone / "python", "-c", TRAINS, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    checkpoint = tmp_path / "out" / "checkpoint-6"
    health = run(alone / "hf-pss", "health", checkpoint, "--html", "page.html", cwd=tmp_path)
    assert health.returncode == 2
    assert "Every number that was read is finite" in health.stdout
    demo = run(alone / "hf-pss", "demo", cwd=tmp_path)
    for refused in (health, demo):
        assert "Run `pip install matplotlib jinja2`." in refused.stderr
    hints = run(alone / "python", "-c", NEEDS_AN_EXTRA, cwd=tmp_path)
    named = re.findall(r"pip install (\S+)`", hints.stdout)
    assert named == ["scikit-learn", "scipy", "pytorch_optimizer"], hints.stderr
    words = ("--model_config", "gpt2", "--report_to", "wandb", "--max_steps", "1")
    tracked = run(alone / "hf-pss", "train", *words, cwd=tmp_path)
    assert tracked.returncode == 2
    assert "You asked to report to wandb, which is not installed" in tracked.stderr
