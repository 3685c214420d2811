"""`hf-pss exec`: scripts that know nothing of PSS train as with a PSSCallback."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments, events_of, gpt2, token_rows
from preloaded import start, wait_until
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, set_seed

from hf_pss import ConfigurationError, PSSCallback, PSSConfig, PSSTrainer
from hf_pss.cli.exec_command import read_options
from hf_pss.integrations.every_trainer import environment, joined_trainers
from hf_pss.integrations.startup.sitecustomize import wrap_train_

SCRIPTS = Path(__file__).parent / "scripts"
EACH_SCRIPT = pytest.mark.parametrize(
    "name", ["causal_lm", "classification", "sft_lora", "seq2seq", "two_trainers"]
)
# Spikes and floors: one of them fires in the six steps of every script.
INTERVENES = PSSConfig.preset(
    threshold_ratio=1.0001,
    calibration_steps=1,
    cooldown_steps=0,
    floor_ratio=1.3,
    check_every_steps=1,
)
OPTIONS = ("--pss_threshold_ratio", "1.0001", "--pss_calibration_steps", "1")
OPTIONS += ("--pss_cooldown_steps", "0", "--pss_floor_ratio", "1.3", "--pss_check_every_steps", "1")

pytestmark = pytest.mark.filterwarnings("default")  # as a user runs them


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process one that `hf-pss exec` has started; return the file of joined Trainers."""
    file = tmp_path / "joined"
    monkeypatch.setattr(Trainer, "train", Trainer.train)
    wrap_train_(Trainer)
    for name, value in environment(INTERVENES, file).items():
        monkeypatch.setenv(name, value)
    return file


def run_script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    if name == "sft_lora":
        pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    return runpy.run_path(str(SCRIPTS / f"{name}.py"), **options)["trainers"]


def run_with_callback(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    trainers = run_script(name, folder, monkeypatch)
    for trainer in trainers:
        PSSCallback(INTERVENES).attach(trainer)
        trainer.train()
    return trainers


def trained(trainers: list[Trainer]) -> list[Tensor]:
    return [p for one in trainers for p in one.model.parameters() if p.requires_grad]


@EACH_SCRIPT
def test_a_script_trains_as_with_a_callback(
    name: str, joined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_executed = run_script(name, tmp_path / "exec", monkeypatch, run_name="__main__")
    reported = joined_trainers(joined, had_own=False)
    assert reported == [type(one).__name__ for one in as_executed]
    with_callback = run_with_callback(name, tmp_path / "callback", monkeypatch)
    for one, other in zip(as_executed, with_callback, strict=True):
        events = [e["step"] for e in events_of(Path(one.args.output_dir))]
        assert events
        assert events == [e["step"] for e in events_of(Path(other.args.output_dir))]
    for mine, theirs in zip(trained(as_executed), trained(with_callback), strict=True):
        assert torch.equal(mine, theirs)


def callback_trainer(folder: Path) -> Trainer:
    callbacks = [PSSCallback(PSSConfig.preset("floor"))]
    return Trainer(gpt2(), arguments(folder), train_dataset=token_rows(), callbacks=callbacks)


def pss_trainer(folder: Path) -> Trainer:
    options = {"pss_config": PSSConfig.preset("floor")}
    return PSSTrainer(gpt2(), arguments(folder), train_dataset=token_rows(), **options)


@pytest.mark.parametrize("build", [callback_trainer, pss_trainer])
def test_a_trainer_with_pss_is_left_alone(
    build: Callable[[Path], Trainer], joined: Path, tmp_path: Path
) -> None:
    trainer = build(tmp_path / "out")
    trainer.train()
    assert PSSCallback.of(trainer).config_for(trainer.args) == PSSConfig.preset("floor")
    assert joined_trainers(joined, had_own=True) == [type(trainer).__name__]
    assert joined_trainers(joined, had_own=False) == []


def test_a_trainer_that_trains_twice_joins_once(joined: Path, tmp_path: Path) -> None:
    trainer = Trainer(gpt2(), arguments(tmp_path / "out"), train_dataset=token_rows())
    trainer.train()
    trainer.train()
    assert joined_trainers(joined, had_own=False) == ["Trainer"]
    assert joined_trainers(joined, had_own=True) == []


def test_a_run_resumes_as_without_an_interruption(joined: Path, tmp_path: Path) -> None:
    def trainer(folder: str) -> Trainer:
        set_seed(7)
        args = arguments(tmp_path / folder, save_steps=4)
        return Trainer(gpt2(), args, train_dataset=token_rows())

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert events_of(tmp_path / "whole")
    for mine, theirs in zip(trained([resumed]), trained([whole]), strict=True):
        assert torch.equal(mine, theirs)


# ---- the command line ----


def test_options_are_those_of_the_configuration() -> None:
    assert read_options([]) is None
    assert read_options(OPTIONS) == INTERVENES
    words = ["--pss_observe_only", "--pss_roles", "mlp", "--pss_max_interventions", "3"]
    words += ["--pss_keep_frobenius", "false", "--pss_smoothing=log"]
    assert read_options(words) == PSSConfig.preset(
        observe_only=True, roles=["mlp"], max_interventions=3, smoothing="log"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pss_threshold_ratio", "0.5"], "pss_threshold_ratio must be a number above 1"),
        (["--pss_preset", "best"], "choose from"),
        (["--pss_observe_only", "maybe"], "true or false"),
        (["--learning_rate", "1"], "no option --learning_rate. It takes the options of PSSConfig"),
        (["--pss_spike_updates", "skip"], "Did you mean --pss_spike_update"),
        (["--pss_on_failure", "rollback"], "--pss_on_failure needs PSSTrainer"),
        (["--pss_optim=muon"], "--pss_optim needs PSSTrainer"),
    ],
)
def test_a_wrong_option_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_options(words)


def execute(*words: str, **options: Any) -> tuple[int, str, str]:
    with start("-m", "hf_pss.cli", "exec", *words, **options) as process:
        code = process.wait()
        return code, *process.communicate()


def test_the_exit_code_and_the_output_are_those_of_the_command() -> None:
    code, output, errors = execute("--", "sh", "-c", "echo here; exit 7")
    assert (code, output) == (7, "here\n")
    assert "PSS (preset anchored) joins every transformers Trainer of: sh" in errors
    assert "PSS watched nothing" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["python", "train.py"], "after two dashes"),
        (["--", "no-such-program"], "no-such-program cannot be run"),
        (["--pss_presett", "floor", "--", "true"], "--pss_presett"),
    ],
)
def test_a_command_that_cannot_run_is_refused(words: list[str], message: str) -> None:
    code, _, errors = execute(*words)
    assert code == 2
    assert message in errors


def test_the_users_own_sitecustomize_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.of_user = 'runs'\n")
    show = "import sitecustomize; print(of_user, sitecustomize.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code, output, _ = execute("--", sys.executable, "-c", show, env=env)
    assert (code, output) == (0, f"runs {tmp_path / 'sitecustomize.py'}\n")


def test_sigterm_reaches_the_command(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = f"touch {ready}; exec sleep 60"
    with start("-m", "hf_pss.cli", "exec", "--", "sh", "-c", command) as process:
        wait_until(ready.exists, "the command did not start")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM


def in_new_processes(*command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SCRIPTS.parents[2]), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "hf_pss.cli", "exec", *OPTIONS, "--", *command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def saved(folder: Path) -> dict[str, Tensor]:
    return {
        k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.slow
@EACH_SCRIPT
def test_a_script_in_a_process_of_its_own_trains_as_with_a_callback(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = run_with_callback(name, tmp_path / "callback", monkeypatch)
    ran = in_new_processes(sys.executable, str(SCRIPTS / f"{name}.py"), str(tmp_path / "exec"))
    assert ran.returncode == 0, ran.stderr
    names = ", ".join(type(one).__name__ for one in trainers)
    assert f"PSS watched {len(trainers)} Trainer(s): {names}." in ran.stderr
    one, other = saved(tmp_path / "exec"), saved(tmp_path / "callback")
    assert one
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key])


@pytest.mark.slow
def test_two_ranks_under_torchrun_train_as_with_a_callback(tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    ranks = (*launcher, "--nproc-per-node", "2")
    script = SCRIPTS / "causal_lm.py"
    ran = in_new_processes(*ranks, str(script), str(tmp_path / "exec"))
    assert ran.returncode == 0, ran.stderr
    assert "PSS watched 1 Trainer(s): Trainer." in ran.stderr
    with_callback = tmp_path / "with_callback.py"
    given = json.dumps(INTERVENES.to_dict())
    with_callback.write_text(
        script.read_text().replace(
            "    trainers[0].train()",
            "    from hf_pss import PSSCallback, PSSConfig\n"
            f"    config = PSSConfig(**__import__('json').loads({given!r}))\n"
            "    PSSCallback(config).attach(trainers[0])\n    trainers[0].train()",
        )
    )
    ran = in_new_processes(*ranks, str(with_callback), str(tmp_path / "callback"))
    assert ran.returncode == 0, ran.stderr
    assert "1 Trainer(s) had PSS already: Trainer." in ran.stderr
    one, other = saved(tmp_path / "exec"), saved(tmp_path / "callback")
    assert one
    for key, value in one.items():
        assert torch.equal(value, other[key])
    assert events_of(tmp_path / "exec")
