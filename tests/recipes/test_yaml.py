"""Every YAML under recipes/ is read by its program, and every command has its files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from scripts import RECIPES, load_script

from hf_pss.cli.parsing import parse_plan
from hf_pss.errors import ConfigurationError
from hf_pss.evidence.grid import read_grid

ROOT = RECIPES.parent
SCRIPTS = {name: load_script(name) for name in ("pretrain_gpt2", "finetune_llm")}
FILES = sorted(RECIPES.rglob("*.yaml"))
CARDS = sorted(RECIPES.rglob("README.md"))
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
# A path as it stands in a command or in a comment, without the punctuation behind it; not in a URL.
PATH = re.compile(r"(?<![\w/])recipes/[\w./-]*\w")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def commands_of(card: Path) -> list[str]:
    """Return the commands of a card, each on one line, without its comment."""
    text = "".join(BLOCK.findall(card.read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip()]


def read(path: Path) -> None:
    """Read a recipe as its command would.

    Raises:
        ConfigurationError: Its command would refuse it.
    """
    if path.parent.name == "accelerate":
        load_config_from_file(str(path))
    elif path.parent.name == "lr_sweep":
        assert read_grid(path)
    elif "model_name_or_path" in yaml.safe_load(path.read_text(encoding="utf-8")):
        SCRIPTS["finetune_llm"].parse(["--config", str(path), "--use_cpu"])
    else:
        parse_plan(["--config", str(path), "--use_cpu"])


def check(command: str) -> None:
    """Read the options of a command of ours.

    Raises:
        ConfigurationError: It would refuse them.
    """
    words = shlex.split(command)
    scripts = [place for place, word in enumerate(words) if Path(word).stem in SCRIPTS]
    if scripts:
        script = SCRIPTS[Path(words[scripts[0]]).stem]
        script.parse([*words[scripts[0] + 1 :], "--use_cpu"])
    elif words[:2] == ["hf-pss", "train"]:
        parse_plan([*words[2:], "--use_cpu"])
    elif "hf_pss.cli" in words:
        name, *own = words[words.index("hf_pss.cli") + 1 :]
        assert name == "train"
        parse_plan([*own, "--use_cpu"])


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_yaml_is_read_by_its_program(path: Path) -> None:
    read(path)


@pytest.mark.parametrize("place", ["llm_tiny_cpu", "gpt2_tiny_cpu", "accelerate", "lr_sweep"])
def test_a_yaml_with_a_mistake_is_refused(place: str, tmp_path: Path) -> None:
    sound = next(path for path in FILES if path.parent.name == place)
    broken = tmp_path / place / sound.name
    broken.parent.mkdir()
    extra = "- {reciepts: [x]}\n" if place == "lr_sweep" else "no_such_option: 1\n"
    broken.write_text(sound.read_text(encoding="utf-8") + extra, encoding="utf-8")
    with pytest.raises((ConfigurationError, ValueError)):
        read(broken)


@pytest.mark.parametrize("name", sorted((RECIPES / "gpt2_124m").glob("*.yaml")), ids=name_of)
def test_the_pretraining_script_reads_the_large_recipes(name: Path) -> None:
    given, arguments = SCRIPTS["pretrain_gpt2"].parse(["--config", str(name)])
    assert given.streaming
    assert arguments.gradient_accumulation_steps == 40


@pytest.mark.parametrize("path", [*FILES, *CARDS, *RECIPES.rglob("*.py")], ids=name_of)
def test_every_path_that_is_named_exists(path: Path) -> None:
    for name in PATH.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_every_link_of_a_card_leads_somewhere(card: Path) -> None:
    for name in LINK.findall(card.read_text(encoding="utf-8")):
        assert (card.parent / name).exists(), name


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_every_command_of_a_card_is_understood(card: Path) -> None:
    commands = commands_of(card)
    assert commands
    for command in commands:
        check(command)


def test_a_command_with_a_mistake_is_refused() -> None:
    begin = "accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/finetune_llm.py"
    check(f"{begin} --config recipes/llm_tiny_cpu/lora.yaml")
    with pytest.raises(ValueError, match="lora_rang"):
        check(f"{begin} --config recipes/llm_tiny_cpu/lora.yaml --lora_rang 8")
    begin = "accelerate launch --config_file recipes/accelerate/ddp.yaml -m hf_pss.cli train"
    with pytest.raises(ConfigurationError, match="Did you mean"):
        check(f"{begin} --config recipes/gpt2_124m/pss.yaml --model_sise 350m")


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_every_recipe_is_on_its_card(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    for path in card.parent.glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", text), path.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_folder_has_a_card(path: Path) -> None:
    # The launcher's files are commented line by line.
    assert path.parent.name == "accelerate" or (path.parent / "README.md").is_file()
