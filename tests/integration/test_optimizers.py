"""``pss_optim`` in a Trainer: built, refused, announced, resumed, and under LoRA."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from helpers import (
    EAGER,
    MAX_STEPS,
    differences,
    events_of,
    gpt2,
    history,
    llama,
    make_trainer,
    mixtral,
    steps_of,
    token_rows,
    train,
    weights_of,
)
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_pss import (
    ConfigurationError,
    PSSCallback,
    PSSConfig,
    PSSTrainer,
    PSSTrainingArguments,
    select_matrices,
)
from hf_pss.models.distributed import Backend
from hf_pss.optim import RULES, build_optimizer, matrix_groups
from hf_pss.optim.layout import runs_of
from hf_pss.trainer.arguments import OptimizerName
from hf_pss.trainer.chosen_optimizer import read_options, refuse_two_optimizers
from hf_pss.trainer.resuming import saved_kind

HALF = MAX_STEPS // 2
NAMES = get_args(OptimizerName)
LOGGER = "hf_pss.trainer.optimizers"
TABLE_LOGGER = "hf_pss.optim.groups"


def arguments(folder: Path, **options: Any) -> PSSTrainingArguments:
    return PSSTrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


def chosen(folder: Path, name: str | None = "muon", **options: Any) -> Any:
    """Return a PSSTrainer with this optimizer; None is the Trainer's own AdamW."""
    return make_trainer(
        folder, trainer_class=PSSTrainer, cls=PSSTrainingArguments, pss_optim=name, **options
    )


def trained(folder: Path, name: str | None = "muon", *, resume: Any = None, **options: Any) -> Any:
    trainer = chosen(folder, name, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def resume_differences(whole: Any, resumed: Any) -> list[str]:
    """Compare two runs to the bit; the closing line counts only the steps since the resume."""
    last = f"checkpoint-{whole.state.global_step}"
    states = [
        torch.load(Path(trainer.args.output_dir, last, "optimizer.pt"), weights_only=True)
        for trainer in (whole, resumed)
    ]
    return [
        *differences(history(whole)[:-1], history(resumed)[:-1], "log"),
        *differences(weights_of(whole.model), weights_of(resumed.model), "model"),
        *differences(*states, "optimizer"),
    ]


def groups_of(trainer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = trainer.optimizer.param_groups
    return groups


def algos_of(trainer: Any) -> list[str | None]:
    return [group.get("algo") for group in groups_of(trainer)]


# ---- the options ----


def test_every_rule_can_be_chosen() -> None:
    assert set(NAMES) == {*RULES, "amuse", "adamw"}


@pytest.mark.parametrize(
    "text",
    [
        "momentum=0.9,scale=rms_match,nesterov=false,others_lr=1e-3",
        '{"momentum": 0.9, "scale": "rms_match", "nesterov": false, "others_lr": 1e-3}',
    ],
)
def test_options_are_read_from_words(text: str, tmp_path: Path) -> None:
    wanted = {"momentum": 0.9, "scale": "rms_match", "nesterov": False, "others_lr": 1e-3}
    assert read_options("muon", text) == wanted
    assert read_options("muon", wanted) == wanted
    words = ["--output_dir", str(tmp_path), "--pss_optim", "muon", "--pss_optim_args", text]
    (parsed,) = HfArgumentParser(PSSTrainingArguments).parse_args_into_dataclasses(words)
    assert parsed.optimizer_options() == wanted


def test_options_are_read_from_a_mapping_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    # YAML reads 3e-4, without a dot, as a word.
    path.write_text(
        f"output_dir: {tmp_path}\npss_optim: muon\npss_optim_args: {{others_lr: 3e-4}}\n"
    )
    assert yaml.safe_load(path.read_text())["pss_optim_args"] == {"others_lr": "3e-4"}
    (parsed,) = HfArgumentParser(PSSTrainingArguments).parse_yaml_file(str(path))
    assert parsed.optimizer_options() == {"others_lr": 3e-4}
    assert json.loads(parsed.to_json_string())["pss_optim_args"] == {"others_lr": "3e-4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pss_optim_args": "momentum=0.9"}, "give that, too"),
        ({"pss_optim": "moun"}, "muon or"),
        ({"pss_optim": "adamw", "pss_optim_args": "others_lr=1e-3"}, "It takes .*matrix_lr_ratio"),
        ({"pss_optim": "muon", "pss_optim_args": "matrix_lr_ratio=0.1"}, "no option"),
        ({"pss_optim": "muon", "pss_optim_args": "momentun=0.9"}, "Did you mean momentum"),
        ({"pss_optim": "muon", "pss_optim_args": "momentum"}, "name=value"),
        ({"pss_optim": "muon", "pss_optim_args": "momentum=much"}, "momentum is a number"),
        ({"pss_optim": "muon", "pss_optim_args": "nesterov=1"}, "true or false"),
        ({"pss_optim": "muon", "pss_optim_args": {"scale": 2}}, "scale is a word"),
        ({"pss_optim": "muon", "pss_optim_args": "lr=0.1"}, "comes from learning_rate"),
        ({"pss_optim": "muon", "pss_optim_args": "rho=2"}, "no option 'rho'"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_at_construction(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, **options)


# ---- what is built ----


def test_matrices_go_to_muon_and_the_rest_to_adamw(tmp_path: Path) -> None:
    trainer = chosen(
        tmp_path,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta2=0.99,
        pss_optim_args="others_lr=1e-3,momentum=0.9",
    )
    trainer.create_optimizer()
    matrices, decayed, plain = groups_of(trainer)
    assert algos_of(trainer) == ["muon", "adamw", "adamw"]
    model = trainer.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {names[id(p)].split(".", 3)[-1] for p in matrices["params"]}
    assert kinds == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    assert [matrices[k] for k in ("lr", "weight_decay", "momentum")] == [1e-2, 0.1, 0.9]
    assert [decayed[k] for k in ("lr", "weight_decay", "betas")] == [1e-3, 0.1, (0.9, 0.99)]
    assert [plain[k] for k in ("lr", "weight_decay")] == [1e-3, 0.0]
    # What the Trainer decays is what we decay.
    wanted = set(trainer.get_decay_parameter_names(model)) & set(names.values())  # once where tied
    both = {names[id(p)] for group in (matrices, decayed) for p in group["params"]}
    assert both == wanted
    assert all(p.ndim == 1 for p in plain["params"])


def test_adamw_at_a_ratio_of_1_is_the_trainers_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "weight_decay": 0.1, "max_grad_norm": 0.5}
    plain = trained(tmp_path / "plain", None, **options)
    assert type(plain.optimizer.optimizer) is torch.optim.AdamW
    ours = trained(tmp_path / "ours", "adamw", **options)
    assert list(differences(weights_of(plain.model), weights_of(ours.model))) == []
    other = trained(tmp_path / "other", "adamw", pss_optim_args="matrix_lr_ratio=0.5", **options)
    assert list(differences(weights_of(plain.model), weights_of(other.model)))


def test_adamw_at_a_ratio_is_adamw_with_two_rates(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "weight_decay": 0.1, "learning_rate": 1e-2}
    ours = trained(tmp_path / "a", "adamw", pss_optim_args="matrix_lr_ratio=0.125", **options)
    assert [group["initial_lr"] for group in groups_of(ours)] == [0.00125, 0.01, 0.01]
    twin = chosen(tmp_path / "b", None, **options)
    matrices = {view.parameter_name for view in select_matrices(twin.model).matrices}
    rates = [
        {
            "params": [parameter],
            "lr": 0.00125 if name in matrices else 0.01,
            "weight_decay": 0.1 if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in twin.model.named_parameters()
    ]
    twin.optimizer = torch.optim.AdamW(rates, fused=True)
    twin.train()
    assert list(differences(weights_of(twin.model), weights_of(ours.model))) == []


def test_a_ratio_of_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="above 0, such as"):
        build_optimizer(gpt2(), algo="adamw", matrix_lr_ratio=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_trains(name: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, name, save_strategy="no", learning_rate=1e-2, max_steps=20)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_callback_alone_refuses_it_and_names_the_mixin(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a", cls=PSSTrainingArguments, pss_optim="muon")
    assert type(plain) is Trainer
    with pytest.raises(ConfigurationError, match=r"pss_optim need.*\(PSSTrainerMixin, Trainer\)"):
        PSSCallback().attach(plain)


def test_a_plain_trainer_takes_the_factory(tmp_path: Path) -> None:
    options = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    model = gpt2()
    trainer = Trainer(
        model=model,
        args=make_trainer(tmp_path).args,
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(lambda: build_optimizer, {"algo": "muon", **options}),
    )
    trainer.train()
    assert "algo" in groups_of(trainer)[0]


def test_the_groups_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, TABLE_LOGGER):
        chosen(tmp_path).create_optimizer()
    (record,) = [r for r in caplog.records if r.name == TABLE_LOGGER]
    heading, *rows = record.getMessage().splitlines()
    assert heading.split() == ["algo", "parameters", "entries", "lr", "decay"]
    assert [line.split()[0] for line in rows] == ["muon", "adamw", "adamw"]


def test_muon_and_pss_work_together(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        pss_threshold_ratio=EAGER.threshold_ratio,
        pss_calibration_steps=1,
        pss_cooldown_steps=0,
    )
    assert steps_of(events_of(tmp_path))
    assert all(w.isfinite().all() for w in weights_of(trainer.model).values())


def test_the_length_of_the_run_is_told_to_rules_that_ask(tmp_path: Path) -> None:
    soft = trained(tmp_path / "a", "softmuon", save_strategy="no")
    assert groups_of(soft)[0]["total_steps"] == MAX_STEPS
    own = trained(tmp_path / "b", "softmuon", save_strategy="no", pss_optim_args="total_steps=99")
    assert groups_of(own)[0]["total_steps"] == 99
    amuse = trained(tmp_path / "c", "amuse", save_strategy="no", warmup_steps=3)
    assert {group["warmup_steps"] for group in groups_of(amuse)} == {3}


# ---- what is refused, and what is warned of ----


@pytest.mark.parametrize(
    ("options", "message"),
    [({"optim": "sgd"}, "optim=sgd"), ({"optim_args": "a=1"}, "optim_args=")],
)
def test_two_optimizers_in_the_arguments_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"twice.*{message}"):
        chosen(tmp_path, **options)


def test_two_optimizers_in_the_trainer_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, pss_optim="muon")
    model = gpt2()
    own = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigurationError, match="optimizers="):
        PSSTrainer(model=model, args=args, optimizers=(own, None))
    factory = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ConfigurationError, match="optimizer_cls_and_kwargs="):
        PSSTrainer(model=model, args=args, optimizer_cls_and_kwargs=factory)


def test_deepspeed_is_refused_with_what_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = chosen(tmp_path)
    kind = property(lambda self: DistributedType.DEEPSPEED)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
    with pytest.raises(ConfigurationError, match=r"flat.*FSDP2"):
        refuse_two_optimizers(trainer)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def loaded_again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    again: PreTrainedModel = type(model).from_pretrained(folder)
    return again


def test_full_fine_tuning_of_loaded_weights_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded_again(gpt2(), tmp_path / "model")
    chosen(tmp_path, model=model).create_optimizer()
    (warning,) = warnings_of(caplog)
    assert "2605.10468" in warning
    assert str(tmp_path / "model") in warning
    # Fresh weights have the same name, and what is said is true of them as well.
    assert "If Adam has trained these weights" in warning


@pytest.mark.parametrize("kind", ["fresh", "trainer", "adamw", "run", "lora"])
def test_nothing_else_is_warned_of(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt2()
    if kind != "fresh":
        model = loaded_again(model, tmp_path / "model")
    if kind == "run":
        (tmp_path / "model" / "trainer_state.json").write_text("{}")
    if kind == "lora":
        model = lora(model)
    name = {"trainer": None, "adamw": "adamw"}.get(kind, "muon")
    chosen(tmp_path, name, model=model).create_optimizer()
    assert warnings_of(caplog) == []


# ---- LoRA ----


def lora(model: PreTrainedModel, **options: Any) -> Any:
    is_gpt2 = model.config.model_type == "gpt2"
    targets = ["c_attn", "c_fc"] if is_gpt2 else ["q_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=is_gpt2, **options)
    )


@pytest.mark.parametrize("base", [gpt2, llama])
def test_both_factors_of_an_adapter_are_matrices(base: Any, tmp_path: Path) -> None:
    trainer = chosen(tmp_path, model=lora(base()))
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    (group,) = groups_of(trainer)
    found = {names[id(p)] for p in group["params"]}
    assert group["algo"] == "muon"
    assert found == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in found} == {"lora_A", "lora_B"}


def test_factors_of_experts_are_taken_apart_as_peft_puts_them_together() -> None:
    torch.manual_seed(0)
    where = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    model = get_peft_model(mixtral(), LoraConfig(r=2, lora_alpha=2, **where))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    (group,) = matrix_groups(model)
    left, right = (
        [runs.flatten(1, 2) for runs in runs_of(parameter.detach(), layout)]
        for parameter, layout in zip(group["params"], group["layouts"], strict=True)
    )
    assert [tuple(a.shape) for a in right] == [(1, 2, 24)] * 3
    products = torch.cat([b.mT @ a for b, a in zip(left, right, strict=True)])
    (wrapper,) = (module for module in model.modules() if hasattr(module, "get_delta_weight"))
    wanted = wrapper.get_delta_weight("default")
    wanted = wanted if wanted.shape == products.shape else wanted.mT
    # Two orders of summing two terms in float32; measured 1.2e-7.
    assert torch.allclose(products, wanted, rtol=0, atol=3e-7)


def test_modules_to_save_are_moved_by_what_they_are(tmp_path: Path) -> None:
    trainer = chosen(tmp_path, model=lora(llama(), modules_to_save=["lm_head", "up_proj"]))
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    by_algo = {
        algo: {names[id(p)] for g in groups_of(trainer) if g["algo"] == algo for p in g["params"]}
        for algo in ("muon", "adamw")
    }
    assert any("up_proj" in name for name in by_algo["muon"])
    assert all("lm_head" in name for name in by_algo["adamw"])


def test_lora_with_muon_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = loaded_again(llama(), tmp_path / "model")
    whole = trained(tmp_path / "whole", model=lora(start), save_steps=HALF, learning_rate=1e-2)
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    again = lora(type(start).from_pretrained(tmp_path / "model"))
    resumed = trained(
        tmp_path / "resumed",
        model=again,
        save_steps=HALF,
        learning_rate=1e-2,
        resume=str(tmp_path / "whole" / f"checkpoint-{HALF}"),
    )
    assert resume_differences(whole, resumed) == []


# ---- checkpoints ----


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_exact(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trained(tmp_path / "whole", name, save_steps=HALF, weight_decay=0.1)
    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    resumed = trained(
        tmp_path / "resumed", name, save_steps=HALF, weight_decay=0.1, resume=str(checkpoint)
    )
    assert resume_differences(whole, resumed) == []
    assert "starts fresh" not in caplog.text


def test_heads_are_moved_and_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By head to the bit; from or to the other setting as from another optimizer."""
    options = {"save_steps": HALF, "pss_optim_args": "per_head=true"}
    whole = trained(tmp_path / "whole", "normuon", **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{HALF}")
    resumed = trained(tmp_path / "resumed", "normuon", **options, resume=checkpoint)
    assert resume_differences(whole, resumed) == []
    assert "starts fresh" not in caplog.text
    trained(tmp_path / "other", "normuon", save_steps=HALF, resume=checkpoint)
    (warning,) = [w for w in warnings_of(caplog) if "starts fresh" in w]
    theirs, ours = warning.split("and this run trains with")
    assert "by head" in theirs
    assert "by head" not in ours
    plain = str(tmp_path / "other" / f"checkpoint-{MAX_STEPS}")
    longer = {**options, "max_steps": MAX_STEPS + 1}
    trained(tmp_path / "back", "normuon", **longer, resume=plain)
    assert caplog.text.count("starts fresh") == 2


def test_qk_clip_is_of_the_run_and_no_part_of_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_steps": HALF, "pss_optim_args": "qk_clip=0.001"}
    whole = trained(tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{HALF}")
    resumed = trained(tmp_path / "resumed", **options, resume=checkpoint)
    assert resume_differences(whole, resumed) == []
    other = trained(tmp_path / "other", save_steps=HALF, resume=checkpoint)
    assert differences(weights_of(whole.model), weights_of(other.model), "model")
    assert "is ignored" not in caplog.text


@pytest.mark.parametrize(
    ("first", "second"), [(None, "muon"), ("muon", None), ("muon", "spectra"), ("muon", "amuse")]
)
def test_a_checkpoint_of_another_kind_gives_all_but_the_optimizers_state(
    first: str | None, second: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"warmup_steps": 2, "save_steps": HALF, "learning_rate": 3e-3}
    whole = trained(tmp_path / "first", first, **options)
    checkpoint = tmp_path / "first" / f"checkpoint-{HALF}"
    rate = 1e-3  # the rates are the new optimizer's, the place on the curve is the old one's
    wanted = trained(tmp_path / "wanted", second, **{**options, "learning_rate": rate})
    with caplog.at_level(logging.WARNING, LOGGER):
        resumed = trained(
            tmp_path / "second",
            second,
            resume=str(checkpoint),
            **{**options, "learning_rate": rate},
        )
    (warning,) = [w for w in warnings_of(caplog) if "starts fresh" in w]
    assert str(checkpoint) in warning
    assert resumed.state.global_step == MAX_STEPS
    rates = [line["learning_rate"] for line in history(resumed) if "learning_rate" in line]
    uninterrupted = [line["learning_rate"] for line in history(wanted) if "learning_rate" in line]
    assert rates[HALF:] == uninterrupted[HALF:]
    assert algos_of(resumed) == algos_of(wanted)
    # The first loss after the checkpoint is of its weights and of the batch that came next.
    losses = [line["loss"] for line in history(resumed) if "loss" in line]
    assert (
        losses[: HALF + 1]
        == [line["loss"] for line in history(whole) if "loss" in line][: HALF + 1]
    )


def test_options_of_a_checkpoint_go_on_and_new_ones_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, save_steps=HALF, pss_optim_args="momentum=0.9")
    checkpoint = str(tmp_path / f"checkpoint-{HALF}")
    resumed = trained(
        tmp_path, save_steps=HALF, pss_optim_args="momentum=0.8,scale=rms_match", resume=checkpoint
    )
    assert groups_of(resumed)[0]["momentum"] == 0.9
    (warning,) = [w for w in warnings_of(caplog) if "which stays in effect" in w]
    assert "momentum=0.9" in warning


def test_another_rate_of_the_rest_is_announced_as_without_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, save_steps=HALF, pss_optim_args="others_lr=1e-3")
    checkpoint = str(tmp_path / f"checkpoint-{HALF}")
    for rate, num_warnings in ((1e-3, 0), (2e-3, 1)):
        caplog.clear()
        options = {"save_steps": HALF, "pss_optim_args": f"others_lr={rate}"}
        resumed = trained(tmp_path, resume=checkpoint, **options)
        assert {group["initial_lr"] for group in groups_of(resumed)[1:]} == {1e-3}
        assert len([w for w in warnings_of(caplog) if "others_lr=0.001" in w]) == num_warnings


def test_another_selection_of_matrices_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, save_steps=HALF)
    checkpoint = str(tmp_path / f"checkpoint-{HALF}")
    resumed = trained(
        tmp_path, save_steps=HALF, pss_optim_args={"exclude": ["c_fc"]}, resume=checkpoint
    )
    assert resumed.state.global_step == MAX_STEPS
    (warning,) = [w for w in warnings_of(caplog) if "starts fresh" in w]
    num_matrices = len(groups_of(resumed)[0]["params"])
    assert f"with groups of muon ({num_matrices} parameters in" in warning


def test_the_length_of_a_run_is_that_of_the_resumed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, "softmuon", save_steps=HALF)
    checkpoint = str(tmp_path / f"checkpoint-{HALF}")
    for options, wanted in (({}, 2 * MAX_STEPS), ({"pss_optim_args": "total_steps=99"}, 99)):
        caplog.clear()
        longer = {"save_strategy": "no", "max_steps": 2 * MAX_STEPS, **options}
        resumed = trained(tmp_path, "softmuon", resume=checkpoint, **longer)
        assert groups_of(resumed)[0]["total_steps"] == wanted
        (warning,) = [w for w in warnings_of(caplog) if "total_steps" in w]
        assert f"total_steps={MAX_STEPS}, and this run has {wanted}" in warning


def test_the_warm_up_of_an_average_stays_that_of_the_checkpoint(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "constant_with_warmup", "save_steps": HALF}
    trained(tmp_path, "amuse", warmup_steps=3, **options)
    checkpoint = str(tmp_path / f"checkpoint-{HALF}")
    resumed = trained(tmp_path, "amuse", warmup_steps=2, resume=checkpoint, **options)
    assert {group["warmup_steps"] for group in groups_of(resumed)} == {3}


def test_only_the_first_rank_warns_and_shows_the_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, num_records in ((0, 3), (1, 0)):
        caplog.clear()
        name = str(tmp_path / "model")
        trainer = chosen(tmp_path, "amuse", model=loaded_again(gpt2(), Path(name)))
        # Rank 1 as each of the two that are asked knows it.
        monkeypatch.setattr(Backend, "rank", rank)
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda rank=rank: rank == 0)
        with caplog.at_level(logging.INFO, "hf_pss"):
            trainer.create_optimizer()
            trainer.create_scheduler(10)
        assert len([r for r in caplog.records if "optim" in r.name]) == num_records


def test_a_schedule_beside_averaging_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("constant_with_warmup", "cosine"):
        trainer = chosen(tmp_path, "amuse", lr_scheduler_type=kind)
        trainer.create_optimizer()
        trainer.create_scheduler(10)
    (warning,) = warnings_of(caplog)
    assert "lr_scheduler_type=cosine" in warning


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9 of its own doing
def test_the_kind_is_read_from_every_form_of_a_checkpoint(tmp_path: Path) -> None:
    """As one process, FSDP2 with full and FSDP2 with sharded state dicts write it."""
    groups = [{"params": ["a"], "algo": "muon", "lr": 0.1}, {"params": ["b"], "algo": "adamw"}]
    state = {"state": {"a": {"momentum_buffer": torch.ones(2, 2)}}, "param_groups": groups}
    for name in ("optimizer.pt", "optimizer.bin"):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / name)
        assert saved_kind(tmp_path / name) == ("muon (1 parameter)", "adamw (1 parameter)")
    save({"optimizer": state}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    assert saved_kind(tmp_path) == ("muon (1 parameter)", "adamw (1 parameter)")
    groups[0]["train_mode"] = True
    save({"optimizer": state}, checkpoint_id=tmp_path / "other" / "optimizer_0", no_dist=True)
    assert saved_kind(tmp_path / "other") == (
        "schedule-free muon (1 parameter)",
        "adamw (1 parameter)",
    )
    assert saved_kind(tmp_path / "nothing") is None


def test_other_peoples_optimizers_are_loaded_by_the_trainer(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", PSSConfig.preset("paper"), save_steps=HALF, optim="sgd")
    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    resumed = train(
        tmp_path / "resumed",
        PSSConfig.preset("paper"),
        save_steps=HALF,
        optim="sgd",
        resume=str(checkpoint),
    )
    assert resume_differences(whole, resumed) == []


def test_pss_trainer_resumes_from_the_checkpoint_of_another_optimizer(tmp_path: Path) -> None:
    trained(tmp_path / "first", save_steps=HALF)
    checkpoint = str(tmp_path / "first" / f"checkpoint-{HALF}")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make_trainer(tmp_path / "bare").train(resume_from_checkpoint=checkpoint)
    resumed = make_trainer(tmp_path / "resumed", PSSConfig())
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == MAX_STEPS


def test_plain_arguments_choose_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=PSSTrainer)
    assert type(trainer.args) is TrainingArguments
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
