"""The documentation site: its pages, its links, the generated parts, and the build itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml

import hf_pss
from hf_pss import PSSConfig, RecoveryConfig
from hf_pss.trainer.arguments import OptimizerName

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = DOCS / "site"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(((?!https?:|mailto:)[^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", SITE / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def text_of(page: Path) -> str:
    """Return a page without its code, and with its generated parts."""
    text = page.read_text(encoding="utf-8")
    return FENCE.sub("", HOOKS.MARKER.sub(lambda found: HOOKS.PARTS[found[1]](text), text))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", one).lower()) for one in headings)
    return {one.strip().replace(" ", "-") for one in kept}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(text_of(page)):
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        is_page = target.suffix == ".md" and target.is_file()
        if not target.exists() or (anchor and is_page and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name_of
)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](page.md#one) [c](no.md)\n```\n[d](no)\n```\n")
    assert broken_links(page) == ["page.md#one", "no.md"]


def pages_in(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_in(part)]  # type: ignore[attr-defined]


def test_the_navigation_lists_every_page_once() -> None:
    config = (SITE / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(config[config.index("\nnav:") :])["nav"]
    assert sorted(pages_in(nav)) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_options_page_has_every_option_and_what_a_preset_changes() -> None:
    sections = dict(re.findall(r"^### `pss_(\w+)`\n(.*?)(?=^##|\Z)", HOOKS.options(), re.M | re.S))
    options = [spec for kind in (PSSConfig, RecoveryConfig) for spec in fields(kind)]
    assert list(sections) == [spec.name for spec in options]
    for spec in options:
        assert spec.metadata["help"] in sections[spec.name]
    assert "- Default: `healthy`; in the preset `paper`: `off`\n" in sections["anchor"]
    assert "- Allowed: a number above 0 and at most 1\n" in sections["baseline_alpha"]
    assert "- Allowed: a whole number of at least 0\n" in sections["cooldown_steps"]
    assert "- Has an effect with: `stable_rank_floor`" in sections["floor_ratio"]


def test_the_options_page_names_every_optimizer() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `pss_optim` |"))
    assert sorted(re.findall(r"`(\w+)`", row.split("|")[3])) == sorted(get_args(OptimizerName))


def test_every_error_that_the_page_explains_exists_in_the_code() -> None:
    texts = [text for _, _, text in HOOKS.messages()]
    entries = HOOKS.entries((DOCS / "errors.md").read_text(encoding="utf-8"))
    assert len(entries) > 50
    assert [e for e in entries if not any(HOOKS.is_about(e, text) for text in texts)] == []


def test_every_message_of_the_code_is_on_the_errors_page() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    whole, explained = HOOKS.errors(page), HOOKS.entries(page)
    texts = [text.strip() for _, _, text in HOOKS.messages()]
    assert len(texts) > 200
    for text in texts:
        assert text in whole or any(HOOKS.is_about(entry, text) for entry in explained), text


def test_an_entry_belongs_only_to_its_message() -> None:
    assert HOOKS.is_about("Give … or …", "Give one or two.")
    assert not HOOKS.is_about("Give … or …", "Give one, two.")


def test_the_python_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: hf_pss\.(\w+)$", page, re.MULTILINE)) == hf_pss.__all__


def test_links_out_of_the_docs_become_text_or_lead_to_the_repository() -> None:
    link = HOOKS.LINK_UP.search("see [the recipe](../../recipes/gpt2_muon/README.md#a).")
    path = "recipes/gpt2_muon/README.md"
    assert HOOKS._link(link, "guides/x.md", None) == f"the recipe (`{path}`)"
    assert HOOKS._link(link, "guides/x.md", "https://x.org/r") == (
        f"[the recipe](https://x.org/r/blob/main/{path}#a)"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE / "mkdocs.yml")]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "site")], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "pss_threshold_ratio" in (tmp_path / "site" / "options" / "index.html").read_text()
