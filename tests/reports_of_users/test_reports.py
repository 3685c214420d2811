"""Failures that people reported in public trackers, as small runs. docs/reports.md lists them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from helpers import (
    EAGER,
    MAX_STEPS,
    VOCABULARY,
    arguments,
    differences,
    events_of,
    gpt2,
    history,
    llama,
    make_trainer,
    steps_of,
    token_rows,
    train,
    weights_of,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    set_seed,
)
from typer.testing import CliRunner, Result

from hf_pss import NonFiniteError, PSSConfig, PSSTrainer
from hf_pss.cli.app import app
from hf_pss.rescue.diagnosis import RunFailure, diagnose
from hf_pss.runs.records_files import RunRecords, read_log

CONFIG = PSSConfig.preset("paper")
NAN = math.nan


def is_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def saved_in(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


# Losses and gradients that are not finite


def test_fp16_weights_that_adamw_breaks_in_its_first_step_are_never_saved(tmp_path: Path) -> None:
    """afiaka87/glide-finetune#5: AdamW's eps of 1e-8 is 0 in fp16, and 0/0 is NaN."""
    options = {"optim": "adamw_torch", "save_steps": 2}
    trainer = make_trainer(tmp_path / "skip", CONFIG, model=gpt2().half(), **options)
    trainer.train()
    assert not is_finite(trainer.model)
    assert saved_in(tmp_path / "skip") == []
    config = PSSConfig.preset("paper", on_nonfinite="stop")
    trainer = make_trainer(tmp_path / "stop", config, model=gpt2().half(), **options)
    with pytest.raises(NonFiniteError, match=r"step 2.*an earlier update has ruined the weights"):
        trainer.train()


def test_a_run_whose_labels_are_all_masked_says_so_and_changes_no_weight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """huggingface/trl#6668: truncation left only labels of -100, and the log showed a loss of 0."""
    rows = token_rows()
    for row in rows:
        row["labels"].fill_(-100)
    trainer = make_trainer(tmp_path, CONFIG, rows=rows, save_strategy="no")
    before = weights_of(trainer.model)
    trainer.train()
    assert "Step 1 is not finite (loss = nan): the update was skipped." in caplog.text
    assert "the batch may have no label that counts (all are -100)" in caplog.text
    assert {row["loss"] for row in history(trainer)[:-1]} == {0.0}
    assert list(differences(before, weights_of(trainer.model))) == []


def test_masked_micro_batches_do_not_spoil_their_step(tmp_path: Path) -> None:
    """karpathy/nanochat#590: one micro-batch without labels made the whole step NaN."""
    rows = token_rows()
    for row in rows[::2]:
        row["labels"].fill_(-100)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = train(tmp_path, CONFIG, rows=rows, save_strategy="no", **options)
    assert all(0 < row["loss"] < 5 for row in history(trainer)[:-1])
    assert events_of(tmp_path) == []


class NaNFromStep4(PSSTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * NAN if self.state.global_step >= 3 else loss


def adapted() -> nn.Module:
    set_seed(1)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lora_run_that_only_gets_nan_stops_and_keeps_a_finite_adapter(tmp_path: Path) -> None:
    """getainode/ainode#186: the adapter was all NaN, and the job was recorded as a success."""
    config = PSSConfig.preset("paper", max_nonfinite_streak=3)
    options = {"trainer_class": NaNFromStep4, "save_steps": 2}
    trainer = make_trainer(tmp_path, config, model=adapted(), **options)
    with pytest.raises(NonFiniteError, match="3 non-finite steps in a row"):
        trainer.train()
    assert is_finite(trainer.model)
    assert command("health", tmp_path / f"checkpoint-{saved_in(tmp_path)[-1]}").exit_code == 0


def test_health_refuses_an_adapter_that_is_all_nan(tmp_path: Path) -> None:
    """getainode/ainode#186."""
    name = "base_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(one): torch.full((4, 4), NAN) for one in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    result = command("health", tmp_path)
    assert result.exit_code == 2
    assert "NOT FINITE" in result.output


def test_a_nan_in_the_router_of_a_moe_is_skipped_and_a_resume_is_exact(tmp_path: Path) -> None:
    """jingyaogong/minimind#567: the loss of a mixture of experts became NaN in the sixth epoch."""

    def mixtral() -> MixtralForCausalLM:
        set_seed(1)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = MixtralConfig(
            vocab_size=VOCABULARY, num_local_experts=4, output_router_logits=True, **sizes, **heads
        )
        return MixtralForCausalLM(config)

    trainer = make_trainer(tmp_path / "whole", CONFIG, model=mixtral(), save_steps=4)
    router = next(p for n, p in trainer.model.named_parameters() if n.endswith("gate.weight"))
    router.register_hook(lambda grad: grad * NAN if trainer.state.global_step == 2 else grad)
    trainer.train()
    (event,) = events_of(tmp_path / "whole")
    assert (event["step"], event["decision"]) == (3, "skip_update")
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tmp_path / "resumed", CONFIG, model=mixtral(), resume=checkpoint, save_steps=4)
    assert list(differences(weights_of(trainer.model), weights_of(resumed.model))) == []


# What `hf-pss rescue` makes of a log


def failure_of(
    folder: Path, losses: Sequence[float], norms: Sequence[float] = (), every: int = 1
) -> RunFailure | None:
    """Write a trainer_state.json as the Trainer does, and diagnose it as rescue does."""
    rows: list[dict[str, float]] = [
        {"step": every * (i + 1), "epoch": 0.1, "loss": loss, "learning_rate": 1e-5}
        for i, loss in enumerate(losses)
    ]
    for row, norm in zip(rows, norms, strict=False):
        row["grad_norm"] = norm
    state = {"global_step": every * len(rows), "max_steps": 10_000, "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return diagnose(read_log(folder / "trainer_state.json"), RunRecords()).failure


@pytest.mark.parametrize(
    ("losses", "norms", "every", "kind", "onset"),
    [
        pytest.param(
            [0.2051, 0.0, 0.0], [NAN] * 3, 1, "non_finite", 0, id="AnswerDotAI/ModernBERT#233"
        ),
        pytest.param([NAN] * 4, [NAN] * 4, 1, "non_finite", 0, id="pytorch/ao#3356"),
        pytest.param(
            [1.593, 1.406, 3.316, 6.437, 5.478, 4.857, 4.874, 4.604],
            [],
            25,
            "spike",
            50,
            id="ml-explore/mlx-examples#620",
        ),
    ],
)
def test_a_failed_run_is_found_in_its_log(
    losses: list[float], norms: list[float], every: int, kind: str, onset: int, tmp_path: Path
) -> None:
    failure = failure_of(tmp_path, losses, norms, every)
    assert failure is not None
    assert (failure.kind, failure.onset_step) == (kind, onset)


@pytest.mark.parametrize(
    ("losses", "norms", "every"),
    [
        # The loss of the norm's step is as before, and so are the losses that follow.
        pytest.param(
            [0.094, 0.1019, 0.0922, 0.0894, 0.0928, 0.0949, 0.0946, 0.1045, 0.1246, 0.0988, 0.1025],
            [3.644, 3.842, 3.097, 2.526, 2.379, 2.534, 5.650, 237.6, 4.959, 5.715, 3.743],
            1,
            id="zai-org/GLM-4#706",
        ),
        # The losses beside the two norms are finite and lower than before.
        pytest.param(
            [2.7522, 2.6150, 2.6687, 2.7682, 2.5128, 2.4566],
            [3.0608, 2.7647, 2.7647, 2.5309, NAN, NAN],
            10,
            id="InternLM/xtuner#187",
        ),
    ],
)
def test_a_run_that_goes_on_is_not_called_a_failure(
    losses: list[float], norms: list[float], every: int, tmp_path: Path
) -> None:
    assert failure_of(tmp_path, losses, norms, every) is None


# Checkpoints


def test_rotation_counts_steps_as_numbers(tmp_path: Path) -> None:
    """huggingface/transformers#27138: 9900 was kept and 10000 removed."""
    train(tmp_path, CONFIG, max_steps=12, save_steps=1, save_total_limit=3)
    assert saved_in(tmp_path) == [10, 11, 12]


class EachEvaluation(TrainerCallback):
    """Replaces the loss of each evaluation by the next of the given values."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_loss"] = next(self._values)


@pytest.mark.parametrize(
    ("losses", "limit", "best", "kept"),
    [
        # huggingface/transformers#25129: a limit of one removed every checkpoint.
        ([1.0, 2.0, 3.0, 4.0], 1, 2, [2]),
        # Lightning-AI/pytorch-lightning#2636: no later score compares as better than NaN.
        ([NAN, 3.0, 2.0, 2.5], None, 6, [2, 4, 6, 8]),
    ],
    ids=["transformers#25129", "pytorch-lightning#2636"],
)
def test_the_best_checkpoint_is_kept(
    losses: list[float], limit: int | None, best: int, kept: list[int], tmp_path: Path
) -> None:
    every_two = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    wanted = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options = {"eval_rows": token_rows(4), "save_total_limit": limit, **every_two, **wanted}
    trainer = make_trainer(tmp_path, CONFIG, **options)
    trainer.add_callback(EachEvaluation(losses))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert saved_in(tmp_path) == kept


def test_a_higher_step_of_an_earlier_run_does_not_cost_the_new_checkpoint(tmp_path: Path) -> None:
    """unslothai/unsloth-zoo#782: a limit of one kept the old run's checkpoint-1000."""
    train(tmp_path, CONFIG, max_steps=20, save_steps=20)
    train(tmp_path, CONFIG, save_steps=2, save_total_limit=1)
    assert saved_in(tmp_path) == [MAX_STEPS]


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    train(folder, EAGER, save_steps=4)
    return folder


@pytest.fixture
def run_dir(two_saves: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_saves, tmp_path / "run"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("model.safetensors", cut, id="vllm-project/speculators#739"),
        pytest.param("optimizer.pt", cut, id="sml2h3/dddd_trainer#36"),
        pytest.param("trainer_state.json", Path.unlink, id="huggingface/transformers#29059"),
    ],
)
def test_a_newest_checkpoint_that_is_damaged_is_passed_over(
    name: str, damage: Any, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(run_dir / "checkpoint-8" / name)
    assert "checkpoint-8  " in (found := command("rescue", run_dir).output)
    assert "→ checkpoint-4" in found
    resumed = train(run_dir, EAGER, resume=True)
    assert resumed.state.global_step == MAX_STEPS
    assert "Skipping" in caplog.text
    assert name in caplog.text


def test_what_another_trainers_interrupted_save_left_is_not_a_checkpoint(run_dir: Path) -> None:
    """huggingface/transformers#28848: tmp-checkpoint-N folders stayed on the other nodes."""
    (run_dir / "checkpoint-8").rename(run_dir / "tmp-checkpoint-8")
    assert "tmp-checkpoint" not in command("rescue", run_dir).output
    train(run_dir, EAGER, resume=True)
    assert saved_in(run_dir) == [4, 8]
    assert (run_dir / "tmp-checkpoint-8").is_dir()


def test_a_log_line_that_a_power_cut_tore_is_dropped_on_resume(run_dir: Path) -> None:
    """dbolya/yolact#710: after a reboot, half a line of JSON in the log ended every new start."""
    whole = events_of(run_dir)
    shutil.rmtree(run_dir / "checkpoint-8")
    log = run_dir / "pss_events.jsonl"
    os.truncate(log, log.stat().st_size - 20)
    assert command("watch", run_dir, "--once").exit_code == 0
    train(run_dir, EAGER, resume=True)
    assert [e["step"] for e in events_of(run_dir)] == [e["step"] for e in whole]


# Resuming


def resumed_differences(folder: Path, at: int, **options: Any) -> list[str]:
    """Train twice to the end, once from the checkpoint of the other, and compare to the bit."""
    make: Any = options.pop("model", gpt2)
    options["save_steps"] = at
    whole = train(folder / "whole", CONFIG, model=make(), **options)
    options["resume"] = str(folder / "whole" / f"checkpoint-{at}")
    resumed = train(folder / "resumed", CONFIG, model=make(), **options)
    logs = differences(history(whole)[:-1], history(resumed)[:-1], "log")
    return [*logs, *differences(weights_of(whole.model), weights_of(resumed.model), "model")]


def test_a_resume_in_the_second_epoch_sees_the_same_batches(tmp_path: Path) -> None:
    """huggingface/accelerate#2016: it continued with the order of the first epoch."""
    assert resumed_differences(tmp_path, at=24, max_steps=36) == []


def test_a_stream_that_is_shorter_than_the_run_is_read_again_after_a_resume(tmp_path: Path) -> None:
    """huggingface/transformers#26413: the resumed run found no sample left, and ended."""
    rows = [{key: value.tolist() for key, value in row.items()} for row in token_rows(16)]

    def trainer() -> PSSTrainer:
        set_seed(7)
        stream = IterableDataset.from_generator(lambda: iter(rows))
        args = arguments(tmp_path, save_steps=4)
        return PSSTrainer(model=gpt2(), args=args, train_dataset=stream, pss_config=CONFIG)

    (whole := trainer()).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    (resumed := trainer()).train(resume_from_checkpoint=True)
    assert resumed.state.global_step == MAX_STEPS
    assert list(differences(weights_of(whole.model), weights_of(resumed.model))) == []


def test_a_head_that_is_tied_in_the_config_alone_resumes_to_the_bit(tmp_path: Path) -> None:
    """NVIDIA-NeMo/Automodel#2571: the resume rebuilt the head from the embedding."""

    def untied() -> nn.Module:
        set_seed(1)
        model = gpt2()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    assert resumed_differences(tmp_path, at=4, model=untied) == []


def test_early_stopping_resumes_with_the_option_of_transformers(tmp_path: Path) -> None:
    """huggingface/transformers#28544: each resume sets the patience counter to 0."""
    stopped = []
    for resume in (False, True):
        trainer = make_trainer(
            tmp_path,
            EAGER,
            max_steps=20,
            eval_rows=token_rows(4),
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            restore_callback_states_from_checkpoint=True,
        )
        trainer.add_callback(EachEvaluation([3.0] if resume else [2.0, 3.0, 3.0, 3.0]))
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        trainer.train(resume_from_checkpoint=resume or None)
        stopped.append((trainer.state.global_step, steps_of(events_of(tmp_path))))
        shutil.rmtree(tmp_path / "checkpoint-8")
    assert stopped[0] == stopped[1]
    assert stopped[0][0] == 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_resumed_lora_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """tloen/alpaca-lora#72: the loss was 0.82 at the checkpoint and 8.7 after the resume."""
    assert resumed_differences(tmp_path, at=4, model=adapted) == []


def test_a_new_learning_rate_that_a_resume_does_not_use_is_mentioned(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """huggingface/transformers#21399: the checkpoint's rate applied, without a word."""
    shutil.rmtree(run_dir / "checkpoint-8")
    warning = "The rate of this run, 0.0003, has no effect. To use it, set pss_lr_scale=1."
    train(run_dir, EAGER, resume=True, learning_rate=3e-4, save_strategy="no")
    assert warning in caplog.text
    caplog.clear()
    train(run_dir, EAGER, resume=True, save_strategy="no")
    assert "has no effect" not in caplog.text
    scaled = {"learning_rate": 3e-4, "pss_lr_scale": 1.0, "save_strategy": "no"}
    resumed = train(run_dir, EAGER, resume=True, **scaled)
    assert history(resumed)[4]["learning_rate"] == pytest.approx(3e-4 * 4 / 8)


def test_the_learning_rate_is_continuous_over_a_resume(two_saves: Path, tmp_path: Path) -> None:
    """huggingface/transformers#34053: the rate of the last step came twice."""
    whole = json.loads((two_saves / "checkpoint-8" / "trainer_state.json").read_text())
    resumed = train(tmp_path, EAGER, resume=str(two_saves / "checkpoint-4"))
    rates = [row["learning_rate"] for row in history(resumed) if "learning_rate" in row]
    assert rates == [row["learning_rate"] for row in whole["log_history"]]
    assert len(set(rates)) == MAX_STEPS


def test_a_bf16_muon_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """deepspeedai/DeepSpeed#8433: the momentum came back as float32 and met bfloat16."""

    def momenta(trainer: Any) -> dict[str, Tensor]:
        states = enumerate(trainer.optimizer.state.values())
        return {f"{i}.{key}": x for i, s in states for key, x in s.items()}

    options = {"pss_optim": "muon", "save_steps": 4, "trainer_class": PSSTrainer}
    whole = train(tmp_path / "whole", model=gpt2().bfloat16(), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    options["resume"] = checkpoint
    resumed = train(tmp_path / "resumed", model=gpt2().bfloat16(), **options)
    assert list(differences(weights_of(whole.model), weights_of(resumed.model))) == []
    assert list(differences(momenta(whole), momenta(resumed))) == []


# Signals


class SendInStep3(TrainerCallback):
    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self.signum)


def test_ctrl_c_saves_the_step(tmp_path: Path) -> None:
    """huggingface/transformers#35033: all since the last save was lost."""
    trainer = make_trainer(tmp_path, CONFIG)
    trainer.add_callback(SendInStep3(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert saved_in(tmp_path) == [3]


@pytest.mark.xfail(reason="the run exits with 143 and does not call the handler that was there")
def test_a_handler_that_the_program_had_is_called_after_the_save(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#1455: the Trainer replaced the script's own handler."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        trainer = make_trainer(tmp_path, CONFIG)
        trainer.add_callback(SendInStep3(signal.SIGTERM))
        with pytest.raises(SystemExit):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved_in(tmp_path) == [3]
    assert received == [signal.SIGTERM]
