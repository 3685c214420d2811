from __future__ import annotations

import subprocess
import sys

import pytest
from commandline import Run
from typer.testing import CliRunner

from hf_pss.cli.app import _Commands, app
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
