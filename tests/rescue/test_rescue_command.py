"""The printed command: its folders, processes and guard, and the remarks on it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

from hf_pss import PSSTrainingArguments
from hf_pss.cli.parsing import parse_plan
from hf_pss.errors import ConfigurationError
from hf_pss.rescue.candidates import CheckpointReport, Choice
from hf_pss.rescue.command import ResumePlan, plan_resume
from hf_pss.rescue.diagnosis import FailureKind, RunFailure
from hf_pss.rescue.investigate import Investigation
from hf_pss.runs.folder import OPTIONS_FILE
from hf_pss.runs.records_files import LogRow, RunLog

# Logged every four steps, of a hundred.
LOG = RunLog(Path("x"), 80, 100, 8, tuple(LogRow(step, 3.0) for step in range(4, 84, 4)))
OPTIONS = """{
"model_config": "gpt2", "dataset": "python", "vocab_size": 300,
"training": {
    "per_device_train_batch_size": 4, "use_cpu": true, "pss_preset": "anchored",
    "pss_scope": "fired",
    "pss_observe_only": true, "pss_detectors": ["grad_norm_ratio"], "pss_moments": "project"
}}"""


def failed(kind: FailureKind = "spike", noticed: int = 71) -> RunFailure:
    return RunFailure(kind, noticed - 1, noticed, "")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoint-40").mkdir(parents=True)
    (tmp_path / "run" / OPTIONS_FILE).write_text(OPTIONS)
    return tmp_path / "run"


def plan(run_dir: Path, **options: Any) -> ResumePlan:
    layout = options.pop("layout", "whole")
    path = run_dir / "checkpoint-40"
    chosen = CheckpointReport(path, 40, datetime.now(UTC), 0, layout)
    failure = options.pop("failure", None)
    choice = Choice(chosen, "", (), options.pop("is_last_resort", False))
    is_from_noise = options.pop("began_from_noise", False)
    found = Investigation(run_dir, LOG, failure, (), (chosen,), choice, (), is_from_noise)
    return plan_resume(found, chosen, **{"smoothing": "floor", **options})


def said(run_dir: Path, **options: Any) -> str:
    return " ".join(plan(run_dir, **options).remarks)


def test_processes_are_started_again(run_dir: Path) -> None:
    for rank in range(2):
        (run_dir / "checkpoint-40" / f"rng_state_{rank}.pth").touch()
    command = plan(run_dir).command
    assert command is not None
    assert command[0] == "torchrun"
    launched = parse_args(command[1:])
    assert launched.nproc_per_node == "2"
    assert launched.standalone
    assert launched.no_python  # the program itself
    assert launched.training_script == "hf-pss"
    assert launched.training_script_args[0] == "train"
    arguments = parse_plan(launched.training_script_args[1:]).arguments
    assert arguments.per_device_train_batch_size == 4
    assert "2 processes trained" in said(run_dir)


@pytest.mark.parametrize("layout", ["whole", "fsdp"])
def test_a_launcher_that_is_not_known_is_not_made_up(run_dir: Path, layout: str) -> None:
    (run_dir / "checkpoint-40" / "rng_state_1.pth").touch()
    resumed = plan(run_dir, layout=layout)
    assert resumed.command is None
    assert resumed.shell.startswith("<your launcher> hf-pss train --resume_from_checkpoint ")
    assert "launcher" in " ".join(resumed.remarks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "floor start False"),
        ({"failure": failed("slow_damage")}, "floor start False"),
        ({"failure": failed()}, "anchored start False"),
        ({"failure": failed(), "is_last_resort": True}, "anchored start False"),
        (
            {"failure": failed(), "is_last_resort": True, "began_from_noise": True},
            "anchored noise True",
        ),
        ({"failure": failed(), "repaired": Path("out")}, "anchored start False"),
        ({"smoothing": "log"}, "paper start True"),
    ],
)
def test_the_guard(run_dir: Path, options: dict[str, Any], expected: str) -> None:
    command = plan(run_dir, **options).command
    assert command is not None
    config = (arguments := parse_plan(command[2:]).arguments).pss_config()
    found = f"{arguments.pss_preset} {config.floor_reference} {config.smooth_on_resume}"
    assert found == expected
    assert config.scope == "fired"  # as in the run
    assert config.moments == ("reset" if "noise" in expected else "project")
    assert not config.observe_only
    assert arguments.pss_detectors is None


def test_a_guard_that_only_watches_is_the_run_s(run_dir: Path) -> None:
    command = plan(run_dir, smoothing="none", failure=failed()).command
    assert command is not None
    config = parse_plan(command[2:]).arguments.pss_config()
    assert config.observe_only
    assert not config.smooth_on_resume
    assert config.detectors == ("grad_norm_ratio",)


@pytest.mark.parametrize("name", [".", "..", "run", "../tmp/run"])
def test_folders_are_named_from_the_root(
    run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = run_dir / "checkpoint-40"
    start = {".": run_dir, "..": inner}.get(name, run_dir.parent)
    monkeypatch.chdir(start)
    given = Path(name.replace("/tmp/", f"/{run_dir.parent.name}/"))
    words = plan(given).options
    assert words[:4] == (
        *("--resume_from_checkpoint", str(inner)),
        *("--output_dir", str(run_dir.with_name("run-rescued"))),
    )


def test_a_second_rescue_has_a_folder_of_its_own(run_dir: Path) -> None:
    for expected in ("run-rescued", "run-rescued-2", "run-rescued-3"):
        folder = Path(plan(run_dir).options[3])
        assert folder.name == expected
        folder.mkdir()
    os.rmdir(run_dir.with_name("run-rescued"))
    assert Path(plan(run_dir).options[3]).name == "run-rescued"


@pytest.mark.parametrize("name", ["run-rescued", "run-rescued-2"])
def test_the_rescue_of_a_rescued_run_is_numbered(run_dir: Path, name: str) -> None:
    for one in ("run-rescued", "run-rescued-2"):
        (run_dir.with_name(one) / "checkpoint-40").mkdir(parents=True)
    assert Path(plan(run_dir.with_name(name)).options[3]).name == "run-rescued-3"


def test_skipping_batches_is_advised_once(run_dir: Path) -> None:
    for options in ({}, {"failure": failed()}, {"failure": failed("slow_damage")}):
        assert said(run_dir, **options).count("--skip-batches") == 1


@pytest.mark.parametrize(
    ("rates", "is_named"),
    [([1e-3, 1e-3], False), ([1e-4, 1e-2], True), ([1e-2, 1e-3], False), ([None, None], False)],
)
def test_a_rate_that_no_earlier_step_had_survived_is_named_as_a_cause(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, rates: list[float | None], is_named: bool
) -> None:
    rows = [
        *(LogRow(step, 3.0, learning_rate=rates[step > 60]) for step in range(4, 72, 4)),
        LogRow(76, 9.0, learning_rate=0.5),  # after the failure
    ]
    monkeypatch.setattr(f"{__name__}.LOG", replace(LOG, rows=tuple(rows)))
    text = said(run_dir, failure=failed(noticed=72))
    assert "A batch may have caused the failure" in text
    named = f"or a learning rate that is too high: {rates[1] or 0:.2g} was its highest value"
    assert (named in text) == is_named


def test_how_many_batches_lead_past_it(run_dir: Path) -> None:
    """The step it was noticed at, one interval of the log behind it, less the checkpoint's."""
    for kind in ("spike", "non_finite"):
        text = said(run_dir, failure=failed(kind))
        assert "--skip-batches 35." in text
        assert "costs the data of 35 updates" in text
        assert "more than --max_steps" not in text
    assert "--skip-batches 35." in said(run_dir, failure=failed(), skipped=34)
    for nothing in ({"failure": failed(), "skipped": 35}, {"failure": failed("slow_damage")}, {}):
        assert "costs the data" not in said(run_dir, **nothing)
    assert "costs the data" not in said(run_dir, failure=failed(noticed=30))  # the last resort
    assert "more than --max_steps 103" in said(run_dir, failure=failed(noticed=99))


def test_a_copy_that_skips_all_steps_gets_a_remark(run_dir: Path) -> None:
    for skipped, is_said in ((59, False), (60, True)):
        text = said(run_dir, repaired=run_dir.with_name("out"), skipped=skipped)
        assert ("skips all remaining steps" in text) == is_said


class FakeTrainer(dict[str, Any]):
    """Takes what a trainer takes."""

    def train(self, **_: Any) -> None:
        """Nothing."""


def rising(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, to: float = 0.04) -> None:
    """Let the rate be 0.01 up to step 40, where the checkpoint lies, and `to` from there on."""
    rows = [replace(row, learning_rate=0.01 if row.step <= 40 else to) for row in LOG.rows]
    monkeypatch.setitem(globals(), "LOG", replace(LOG, rows=tuple(rows)))


def lr_scale_of(resumed: ResumePlan) -> float | None:
    assert resumed.command is not None
    return parse_plan(resumed.command[2:]).arguments.pss_lr_scale


def test_a_rate_that_rose_to_slow_damage_is_held(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising(run_dir, monkeypatch)
    resumed = plan(run_dir, failure=failed("slow_damage"))
    assert lr_scale_of(resumed) == 0.25
    text = " ".join(resumed.remarks)
    assert "has 0.25 times the rates that it had: 0.01 at first, 0.01 there" in text
    assert "has no effect" not in text
    copied = plan(run_dir, failure=failed("slow_damage"), repaired=Path("out"))
    assert lr_scale_of(copied) == 0.25
    # A spike may have been a batch's doing.
    spiked = plan(run_dir, failure=failed())
    assert lr_scale_of(spiked) is None
    assert "lower it, call hf-pss rescue with --lr-scale 0.25." in " ".join(spiked.remarks)
    as_it_was = plan(run_dir, failure=failed("slow_damage"), lr_scale=1.0)
    assert lr_scale_of(as_it_was) is None
    assert "--lr-scale" not in " ".join(as_it_was.remarks)
    stuck = plan(run_dir, failure=failed("collapse", noticed=43))
    assert lr_scale_of(stuck) is None
    assert "lower it, call hf-pss rescue with --lr-scale 0.25." in " ".join(stuck.remarks)
    # It rose when all was over.
    early = plan(run_dir, failure=failed("slow_damage", noticed=43))
    assert lr_scale_of(early) is None


def test_a_checkpoint_of_the_warm_up_keeps_a_tenth(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising(run_dir, monkeypatch, to=10.0)
    assert lr_scale_of(plan(run_dir, failure=failed("slow_damage"))) == 0.1


@pytest.mark.parametrize("to", [0.001, 0.0109, float("nan")])
def test_a_rate_that_does_not_rise_is_left(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, to: float
) -> None:
    rising(run_dir, monkeypatch, to=to)
    resumed = plan(run_dir, failure=failed("slow_damage"))
    assert lr_scale_of(resumed) is None
    assert "rises" not in (text := " ".join(resumed.remarks))
    assert "stays as it was. If it did the harm" in text


def test_a_factor_that_is_asked_for(run_dir: Path) -> None:
    assert lr_scale_of(plan(run_dir, lr_scale=0.5)) == 0.5
    assert "--lr-scale 0.5" in said(run_dir)
    # What the run had already counts: rates are those given, times this.
    of_run(run_dir, 0.5)
    assert lr_scale_of(plan(run_dir)) == 0.5
    assert lr_scale_of(plan(run_dir, lr_scale=2.0)) == 1.0
    for repaired in (None, Path("out")):
        assert lr_scale_of(plan(run_dir, lr_scale=0.5, repaired=repaired)) == 0.25
    of_run(run_dir, 2)
    assert lr_scale_of(plan(run_dir, lr_scale=0.25)) == 0.5


def of_run(run_dir: Path, scale: Any) -> None:
    options = json.loads(OPTIONS)
    options["training"]["pss_lr_scale"] = scale
    (run_dir / OPTIONS_FILE).write_text(json.dumps(options))


@pytest.mark.parametrize(
    "scale", [0, -1.0, True, "0.5", [0.5], pytest.param(2 * 10**308, id="huge")]
)
def test_a_run_with_a_factor_that_is_none_is_not_known(run_dir: Path, scale: Any) -> None:
    of_run(run_dir, scale)
    assert plan(run_dir).command is None


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_factors_that_are_too_much_together(run_dir: Path, scale: float) -> None:
    of_run(run_dir, scale)
    with pytest.raises(ConfigurationError, match="give another"):
        plan(run_dir, lr_scale=scale)


def test_a_copy_of_an_unknown_launch_has_its_rates_in_its_files(run_dir: Path) -> None:
    (run_dir / OPTIONS_FILE).unlink()
    resumed = plan(run_dir, lr_scale=0.5)
    assert "--pss_lr_scale" in resumed.options
    assert "multiply the two factors" in " ".join(resumed.remarks)
    names = {"PSSTrainingArguments": dict, "PSSTrainer": FakeTrainer, "model": 0, "dataset": 0}
    exec(resumed.python.replace("...", "use_cpu=True", 1), names)
    given: Any = names["args"]
    assert PSSTrainingArguments(**given).pss_lr_scale == 0.5
    copied = plan(run_dir, lr_scale=0.5, repaired=Path("out"))
    assert "--pss_lr_scale" not in (*copied.options, *" ".join(copied.remarks).split())


def test_options_of_an_earlier_version_get_a_remark(run_dir: Path) -> None:
    assert "optimizer and the other options of PSS are those of the run" in said(run_dir)
    (run_dir / OPTIONS_FILE).write_text('{"model_config": "gpt2"}')
    assert "give --pss_optim" in said(run_dir)


@pytest.mark.parametrize("place", ["adapter_config.json", "default/adapter_config.json"])
def test_adapters_are_not_asked_for_a_floor(place: str, run_dir: Path) -> None:
    options = plan(run_dir, is_last_resort=True).options
    assert options[options.index("--pss_preset") + 1] == "floor"
    path = run_dir / "checkpoint-40" / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    options = plan(run_dir, is_last_resort=True).options
    assert options[options.index("--pss_preset") + 1] == "anchored"
    assert not {"--pss_floor_reference", "--pss_smooth_on_resume"} & set(options)
    assert "no stable-rank floor" in said(run_dir, is_last_resort=True)


@pytest.mark.parametrize("has_own_scheduler", [True, False])
def test_a_schedule_of_deepspeed_is_not_scaled(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, has_own_scheduler: bool
) -> None:
    """PSSTrainer refuses pss_lr_scale there. The Trainer saves scheduler.pt for its own alone."""
    rising(run_dir, monkeypatch)
    options: dict[str, Any] = {"layout": "deepspeed", "failure": failed("slow_damage")}
    if has_own_scheduler:
        assert "--pss_lr_scale" not in plan(run_dir, **options).options
        assert "change the rates there" in said(run_dir, **options)
        assert "--pss_lr_scale" not in plan(run_dir, **options, lr_scale=1.0).options
        with pytest.raises(ConfigurationError, match="cannot start with --lr-scale"):
            plan(run_dir, **options, lr_scale=0.5)
    else:
        (run_dir / "checkpoint-40" / "scheduler.pt").touch()
        assert "--pss_lr_scale" in plan(run_dir, **options).options


def test_a_schedule_that_cannot_be_scaled_is_left(run_dir: Path) -> None:
    options = json.loads(OPTIONS)
    options["training"]["lr_scheduler_type"] = "reduce_lr_on_plateau"
    (run_dir / OPTIONS_FILE).write_text(json.dumps(options))
    assert "not multiples of a base rate" in said(run_dir)
    with pytest.raises(ConfigurationError, match="Leave it out"):
        plan(run_dir, lr_scale=0.5)


def test_a_run_without_steps_left_gets_a_command_to_complete(run_dir: Path) -> None:
    """`hf-pss train` ends with an error if the checkpoint is at --max_steps."""
    resumed = plan(run_dir, repaired=run_dir.with_name("out"), skipped=60)
    assert resumed.command is None
    assert "--max_steps <more than 100>" in resumed.shell
    assert plan(run_dir, repaired=run_dir.with_name("out"), skipped=59).command is not None


def test_an_unknown_word_of_a_file_is_quoted(run_dir: Path) -> None:
    options = json.loads(OPTIONS) | {"dataset": "<more than 1> x; rm <your launcher>"}
    (run_dir / OPTIONS_FILE).write_text(json.dumps(options))
    assert "'<more than 1> x; rm <your launcher>'" in plan(run_dir).shell


def test_each_option_of_rescue_is_named_as_such(run_dir: Path) -> None:
    """Every other option in the remarks belongs to the command that is printed."""
    own = re.compile(r"--(?:write|skip-batches|lr-scale|failed-at|smoothing|moments) ")
    for options in ({}, {"failure": failed()}, {"failure": failed("slow_damage")}):
        for remark in plan(run_dir, **options).remarks:
            assert not own.search(remark.partition("call hf-pss rescue with ")[0]), remark
