"""mkdocs calls these hooks: they write the generated parts of pages and the links out of docs/.

A page contains a marker such as ``<!-- generated: options -->`` where a generated part belongs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hf_pss.config import PRESETS, PSSConfig, RecoveryConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_pss"
EXAMPLES = ROOT / "recipes" / "examples"
NOTEBOOK = EXAMPLES / "spike.ipynb"
ERRORS = {
    node.name
    for node in ast.walk(ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
} | {"ImportError"}
PLACEHOLDER = "…"
"""Stands for the parts of a message that the code fills in."""
MARKER = re.compile(r"<!-- generated: (\w+) -->")
LINK_UP = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Fill in the generated parts of a page, and correct its links to files outside of docs/."""
    filled = MARKER.sub(lambda found: PARTS[found[1]](markdown), markdown)
    return LINK_UP.sub(lambda link: _link(link, page.file.src_uri, config.repo_url), filled)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Keep the messages of the errors page out of its table of contents, which would be long."""
    if page.file.src_uri == "errors.md":
        for section in page.toc:
            for part in section.children:
                part.children = []
    return html


def _link(link: re.Match[str], page: str, repository: str | None) -> str:
    target = (ROOT / "docs" / page).parent.joinpath(link[2]).resolve()
    if target.is_relative_to(ROOT / "docs"):
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    if repository is not None:
        return f"[{link[1]}]({repository.rstrip('/')}/blob/main/{path}{link[3] or ''})"
    return f"`{path}`" if link[1].strip("`") in path else f"{link[1]} (`{path}`)"


# ---- options ----


def options(_: str = "") -> str:
    """Return a section for each option, named as users of `PSSTrainingArguments` type it."""
    parts = (("Smoothing and detection", PSSConfig), ("Checkpoints and rollback", RecoveryConfig))
    return "\n\n".join(f"## {title}\n\n{_sections(kind)}" for title, kind in parts)


def _sections(kind: type[Any]) -> str:
    hints = get_type_hints(kind)
    sections = []
    for spec in fields(kind):
        default = _shown(spec.default)
        for preset, changes in PRESETS.items() if kind is PSSConfig else ():
            if spec.name in changes:
                default += f"; in the preset `{preset}`: {_shown(changes[spec.name])}"
        lines = [
            f"### `pss_{spec.name}`\n\n{spec.metadata['help']}\n",
            f"- Default: {default}",
            f"- Allowed: {_allowed(hints[spec.name], spec.metadata)}",
        ]
        if readers := spec.metadata["read_by"]:
            lines.append(f"- Has an effect with: {', '.join(f'`{x}`' for x in sorted(readers))}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"  # as YAML and the command line write it
    items = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{item}`" for item in items if item is not None) or "none"


def _allowed(hint: Any, limits: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        words = get_args(arguments[0])
        return f"a list of {', '.join(f'`{word}`' for word in words)}" if words else "a list"
    if hint is bool:
        return "`true`, `false`"
    if limits["minimum"] is not None:
        return f"a whole number of at least {limits['minimum']}"
    if limits["above"] is not None:
        end = f" and at most {limits['at_most']:g}" if limits["at_most"] < 1e300 else ""
        return f"a number above {limits['above']:g}{end}"
    return ", ".join(f"`{word}`" for word in arguments)


# ---- errors ----


def messages() -> Iterator[tuple[str, str, str]]:
    """Yield the module, the error class and the text of every refusal in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error, given = node.exc.func, node.exc.args
                if isinstance(error, ast.Name) and error.id in ERRORS and given:
                    text = _text(given[0], constants)
                    if text.strip(f"{PLACEHOLDER} ."):
                        yield path.relative_to(PACKAGE).as_posix(), error.id, text


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """Return a message as users see it, with a placeholder for every part that varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant):
        return _text(constants[node.id], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # "…".rstrip()
        return _text(node.func.value, constants)
    return PLACEHOLDER


def entries(page: str) -> list[str]:
    """Return the messages that a page explains: its headings of level 3 that are code."""
    return re.findall(r"^### `(.+)`$", page, re.MULTILINE)


def is_about(entry: str, message: str) -> bool:
    """Return whether a heading, which may shorten a message, belongs to it."""
    parts = [part.strip() for part in entry.split(PLACEHOLDER) if part.strip()]
    return re.search(".*".join(map(re.escape, parts)), message, re.DOTALL) is not None


def errors(page: str) -> str:
    """Return the messages that the page does not explain, one list for each part of the package."""
    explained = entries(page)
    lists: dict[str, list[str]] = {}
    for module, error, text in messages():
        if not any(is_about(entry, text) for entry in explained):
            lists.setdefault(module.split("/")[0].removesuffix(".py"), []).append(
                f"- `` {text.strip()} `` ({error})"
            )
    return "\n\n".join(
        f"### In `{room}`\n\n" + "\n".join(dict.fromkeys(lines)) for room, lines in lists.items()
    )


# ---- examples ----


def examples(_: str = "") -> str:
    """Return every file of recipes/examples under its name."""
    return "\n\n".join(
        f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```"
        for path in sorted(EXAMPLES.glob("*.py"))
    )


def notebook(_: str = "") -> str:
    """Return the cells of the executed notebook without its title, each with its outputs."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^# .*\n", "", source).replace("](../../docs/", "](../"))
            continue
        language = "bash" if source.startswith("%%bash") else "python"
        parts.append(f"```{language}\n{source.removeprefix('%%bash').strip()}\n```")
        parts += map(_output, cell["outputs"])
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"].split())
        return f'<img alt="The plot" src="data:image/png;base64,{image}">'
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.strip(chr(10))}\n```"


PARTS = {"options": options, "errors": errors, "examples": examples, "notebook": notebook}
