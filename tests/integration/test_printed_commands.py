"""What `hf-pss rescue` prints starts, for every kind of model and for scripts of other people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import arguments
from kinds import KINDS, rows_for
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_pss import PSSTrainer, PSSTrainingArguments
from hf_pss.rescue.command import ResumePlan, plan_resume
from hf_pss.rescue.investigate import investigate

NUM_STEPS = 6
GIVEN: dict[str, Any] = {"max_steps": NUM_STEPS, "save_steps": 2, "remove_unused_columns": False}
KINDS_HERE = ("gpt2", "mixtral", "mamba", "resnet", "regression", "lora", "lora with a full copy")
KINDS_HERE += ("ia3", "prompt tuning")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a run of a kind of model that a plain Trainer has begun."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("kind") / "run"
            options = arguments(made[kind], **{**GIVEN, "max_steps": 4})
            trained = Trainer(model=KINDS[kind](), args=options, train_dataset=rows_for(kind))
            trained.train()
        return made[kind]

    return find


def plan_for(run: Path, smoothing: str, failed_at: int | None = None) -> ResumePlan:
    found = investigate(run, margin_steps=1, failed_at=failed_at)
    assert found.choice.chosen is not None
    return plan_resume(found, found.choice.chosen, smoothing=smoothing)


def typed(plan: ResumePlan, given: dict[str, Any]) -> PSSTrainingArguments:
    """Parse the printed words after those of a launch command."""
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    parser = HfArgumentParser(PSSTrainingArguments)
    (found,) = parser.parse_args_into_dataclasses([*words, *plan.options])
    assert isinstance(found, PSSTrainingArguments)
    return found


def follow(plan: ResumePlan, kind: str) -> tuple[Trainer, TrainingArguments]:
    """Run the printed lines of Python, and return the trainer and the arguments of the words."""
    given = arguments(Path("unused"), **GIVEN).to_dict()
    given = {name: given[name] for name in (*GIVEN, "use_cpu", "disable_tqdm", "learning_rate")}
    trainers = []

    def trainer(**options: Any) -> PSSTrainer:
        trainers.append(PSSTrainer(**options))
        return trainers[0]

    names = {"PSSTrainingArguments": PSSTrainingArguments, "PSSTrainer": trainer, "given": given}
    names |= {"model": KINDS[kind](), "dataset": rows_for(kind)}
    exec(plan.python.replace("...", "**given", 1), names)
    return trainers[0], typed(plan, given)


@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("smoothing", ["floor", "clip", "none"])
@pytest.mark.parametrize("failed_at", [None, 1])
def test_it_starts(
    run_of: Any, kind: str, smoothing: str, failed_at: int | None, tmp_path: Path
) -> None:
    plan = plan_for(run_of(kind), smoothing, failed_at)
    trainer, words = follow(plan, kind)
    assert trainer.state.global_step == NUM_STEPS
    first = min(row["step"] for row in trainer.state.log_history[-3:] if "loss" in row)
    assert first > 2  # it was resumed
    assert isinstance(trainer.args, PSSTrainingArguments)
    assert words.pss_config() == trainer.args.pss_config()  # type: ignore[attr-defined]
    assert words.output_dir == trainer.args.output_dir


@pytest.mark.parametrize("kind", ["mamba", "resnet", "regression", "ia3", "prompt tuning"])
@pytest.mark.parametrize("smoothing", ["floor", "clip"])
def test_without_a_matrix_only_the_guard_stays(run_of: Any, kind: str, smoothing: str) -> None:
    plan = plan_for(run_of(kind), smoothing, failed_at=1)
    assert plan.options[4:] == ("--pss_preset", "anchored")
    assert "PSS only skips steps that are not finite." in " ".join(plan.remarks)
