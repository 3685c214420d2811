from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import Run
from rich.text import Text
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_pss.cli.app import _Commands, app, main
from hf_pss.cli.sweep_command import sweep
from hf_pss.errors import ConfigurationError

# Seconds of CPU for `hf-pss --help`: 0.24 measured; torch or transformers would add 3 and more.
HELP_CPU_SECONDS = 1.5


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for word in ("demo", "train", "report", "Exit codes"):
        assert word in result.output


def test_help_of_report_names_demo_runs(run: Run) -> None:
    assert "For demo runs only" in run("report", "--help").output


def test_version(run: Run) -> None:
    assert run("--version").output.startswith("hf-pss ")


def test_help_texts_break_no_line_of_their_own() -> None:
    """typer keeps the line breaks of every paragraph but the first, so each must be one line."""
    commands = [*app.registered_commands, *sweep.registered_commands]
    assert len(commands) > 10
    for command in commands:
        _, *paragraphs = inspect.getdoc(command.callback).split("\n\n")
        assert [one for one in paragraphs if "\n" in one] == []
        examples = [Text.from_markup(one).plain for one in paragraphs if "[cyan]hf-pss" in one]
        assert [one for one in examples if len(one) > 78] == []  # a terminal of 80 columns


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("demo", "--help")])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    program = (
        "import sys, time\n"
        "from typer.testing import CliRunner\n"
        "from hf_pss.cli.app import app\n"
        f"CliRunner().invoke(app, {list(words)!r})\n"
        "print(time.process_time(), *sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < HELP_CPU_SECONDS


def test_unknown_command_is_a_mistake(run: Run) -> None:
    result = run("trian")
    assert result.exit_code == 2
    assert "train" in result.stderr


def test_mistake_shows_a_message_and_no_traceback(run: Run) -> None:
    result = run("train", "--model", "nowhere/[red]", "--dataset", "missing.txt")
    assert result.exit_code == 2
    assert "[red]" in result.stderr  # not eaten as markup
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("as_variable", [False, True])
def test_debug_shows_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, as_variable: bool
) -> None:
    if as_variable:
        monkeypatch.setenv("HF_PSS_DEBUG", "1")
    words = () if as_variable else ("--debug",)
    result = run(*words, "train", "--model_overrides", "n_layer=1")
    assert isinstance(result.exception, ConfigurationError)
    assert result.exit_code == 1


def test_a_bug_keeps_its_traceback() -> None:
    import typer

    broken = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)

    @broken.callback()
    def options(debug: bool = False) -> None: ...

    @broken.command()
    def bug() -> None:
        raise KeyError("ours")

    @broken.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(broken, ["bug"])
    assert isinstance(result.exception, KeyError)
    assert result.exit_code == 1
    assert CliRunner().invoke(broken, ["interrupted"]).exit_code == 130
    assert app is not broken


# ---- stdout ----


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A model of which `health` prints a table with letters that ASCII lacks."""
    path = tmp_path / "model.safetensors"
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"model.layers.0.self_attn.q_proj.weight": weights}, path)
    return str(path)


def code_of_health(
    monkeypatch: pytest.MonkeyPatch, stdout: str | int, *words: str, encoding: str = "utf-8"
) -> object:
    """Return the exit code of the program with this stdout, a path or a descriptor."""
    monkeypatch.setattr(sys, "argv", ["hf-pss", "health", *words])
    with open(stdout, "w", encoding=encoding) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_full_stdout_does_not_say_that_weights_are_not_finite(
    words: tuple[str, ...],
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert code_of_health(monkeypatch, "/dev/full", checkpoint, *words) == 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_reader_that_left_does_not_say_that_weights_are_not_finite(
    words: tuple[str, ...], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    assert code_of_health(monkeypatch, write, checkpoint, *words) == 141


def test_a_stdout_without_greek_letters_gets_question_marks(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shown.txt"
    assert code_of_health(monkeypatch, str(path), checkpoint, encoding="ascii") == 0
    assert "?" in path.read_text(encoding="ascii")
