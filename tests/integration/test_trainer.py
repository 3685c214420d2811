"""PSSTrainer, the mixin and the attached callback; and what happens where they do not fit."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from helpers import (
    EAGER,
    OUT_OF_REACH,
    controller_of,
    differences,
    events_of,
    gpt2,
    history,
    make_trainer,
    run_differences,
    steps_of,
    token_rows,
    train,
    weights_of,
)
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from hf_pss import (
    ConfigurationError,
    IncompatibleVersionError,
    PSSCallback,
    PSSConfig,
    PSSController,
    PSSTrainer,
    PSSTrainerMixin,
    PSSTrainingArguments,
)
from hf_pss.trainer.backend_refusals import refuse_backends
from hf_pss.trainer.optimizers import OptimizerMixin
from hf_pss.trainer.optional import _PARTS, optional_part
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.safe_checkpoints import SafeCheckpointsMixin
from hf_pss.trainer.seams import PRIVATE_METHODS, check_methods
from hf_pss.trainer.throughput import ThroughputTrainerMixin


class Weighted(Trainer):
    """Somebody's trainer, with overrides of its own at the places that PSS overhears."""

    num_logs = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.num_logs += 1
        super().log({**logs, "mine": 1.0}, start_time)


class WeightedPSS(PSSTrainerMixin, Weighted):
    """The same with PSS mixed in."""


def test_swapping_the_class_name_is_enough(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=PSSTrainer)
    assert type(trainer.args) is TrainingArguments
    trainer.train()
    assert controller_of(trainer).config == PSSConfig()


def test_options_come_from_the_arguments(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, trainer_class=PSSTrainer, cls=PSSTrainingArguments, pss_preset="floor"
    )
    trainer.train()
    assert controller_of(trainer).config == PSSConfig.preset("floor")


def test_attaching_and_mixing_in_are_the_same_run(tmp_path: Path) -> None:
    attached = make_trainer(tmp_path / "attached", trainer_class=Weighted)
    PSSCallback(EAGER).attach(attached)
    attached.train()
    mixed = train(tmp_path / "mixed", EAGER, trainer_class=WeightedPSS)
    assert run_differences(attached, mixed) == []
    assert steps_of(events_of(tmp_path / "attached")) == steps_of(events_of(tmp_path / "mixed"))
    assert attached.num_logs == mixed.num_logs > 0
    assert all("mine" in line for line in attached.state.log_history)
    assert type(attached).__name__ == "Weighted"


def test_attached_and_never_triggered_is_the_trainers_own_run(tmp_path: Path) -> None:
    attached = make_trainer(tmp_path / "attached", trainer_class=Weighted)
    PSSCallback(OUT_OF_REACH["anchored"]).attach(attached)
    attached.train()
    assert run_differences(train(tmp_path / "own", trainer_class=Weighted), attached) == []


def test_attach_returns_the_callback(tmp_path: Path) -> None:
    callback = PSSCallback()
    trainer = make_trainer(tmp_path)
    assert callback.attach(trainer) is callback
    assert callback in trainer.callback_handler.callbacks


def test_a_callback_among_the_arguments_equals_pss_trainer(tmp_path: Path) -> None:
    model, args = gpt2(), make_trainer(tmp_path / "callback").args
    del model
    runs = []
    for name in ("callback", "late", "trainer"):
        if name == "trainer":
            trainer = make_trainer(tmp_path / name, EAGER)
        else:
            trainer = make_trainer(tmp_path / name)
            callback = PSSCallback(EAGER)
            if name == "late":
                trainer.add_callback(callback)
            else:
                set_seed(7)
                trainer = Trainer(
                    model=gpt2(),
                    args=args,
                    train_dataset=trainer.train_dataset,
                    callbacks=[callback],
                )
        trainer.train()
        assert type(trainer) is (PSSTrainer if name == "trainer" else Trainer)
        runs.append((history(trainer), weights_of(trainer.model), events_of(tmp_path / name)))
    assert runs[0][2]
    for other in runs[1:]:
        assert list(differences(runs[0][:2], other[:2])) == []
        assert steps_of(runs[0][2]) == steps_of(other[2])


def test_a_callback_without_a_trainer_says_what_to_do(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"callbacks=\[PSSCallback\(\)\]"):
        PSSCallback().on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model)


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    PSSCallback().attach(trainer)
    with pytest.raises(ConfigurationError, match="has a PSSCallback already"):
        PSSCallback().attach(trainer)
    with pytest.raises(ConfigurationError, match="has a PSSCallback already"):
        PSSCallback().attach(make_trainer(tmp_path, EAGER))


def test_pss_trainer_takes_a_callback_of_its_own(tmp_path: Path) -> None:
    args = make_trainer(tmp_path).args
    model = make_trainer(tmp_path).model
    trainer = PSSTrainer(model=model, args=args, callbacks=[PSSCallback(EAGER)])
    listeners = [c for c in trainer.callback_handler.callbacks if isinstance(c, PSSCallback)]
    assert [c.config for c in listeners] == [EAGER]
    with pytest.raises(ConfigurationError, match="both pss_config and a PSSCallback"):
        PSSTrainer(model=model, args=args, callbacks=[PSSCallback()], pss_config=EAGER)


@pytest.mark.parametrize("name", _PARTS)
def test_every_optional_part_is_there(name: str) -> None:
    assert optional_part(name).__name__ == name


# ---- private seams of transformers ----


class OtherSignature(Trainer):
    """As if a later release named no checkpoint to load the random state from."""

    def _load_rng_state(self) -> None:
        return None


class OtherSignaturePSS(PSSTrainerMixin, OtherSignature):
    """The same with PSS mixed in."""


def test_the_private_methods_are_there() -> None:
    for cls in (Trainer, PSSTrainer, WeightedPSS):
        check_methods(cls, (RollbackMixin, OptimizerMixin))


def test_no_other_private_method_of_trainer_is_overridden() -> None:
    ours = [cls for cls in PSSTrainer.__mro__ if cls.__module__.startswith("hf_pss")]
    overridden = {
        name
        for cls in ours
        for name in vars(cls)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert overridden == set(PRIVATE_METHODS)
    assert len(overridden) <= 10


def test_another_signature_is_refused_with_the_versions(tmp_path: Path) -> None:
    message = (
        rf"OtherSignature\._load_rng_state takes \(self\).*{transformers.__version__} calls "
        r"it with \(self, checkpoint\)\. Change OtherSignature"
    )
    with pytest.raises(IncompatibleVersionError, match=message):
        make_trainer(tmp_path, EAGER, trainer_class=OtherSignaturePSS)


@pytest.mark.parametrize("name", ["_save_checkpoint", "_run_epoch"])
def test_a_missing_seam_is_refused_with_the_versions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, name)
    message = rf"{name} does not exist.*transformers {transformers.__version__}"
    with pytest.raises(IncompatibleVersionError, match=message):
        make_trainer(tmp_path, EAGER)


def test_another_release_is_told_from_a_class_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_load_rng_state", OtherSignature._load_rng_state)
    with pytest.raises(IncompatibleVersionError, match="install one that hf_pss was made for"):
        make_trainer(tmp_path, EAGER)


def test_the_mixin_to_the_right_of_a_trainer_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"class Wrong\(PSSTrainerMixin, Trainer\)"):

        class Wrong(Trainer, PSSTrainerMixin):
            pass

    with pytest.raises(ConfigurationError, match="to the right of Weighted"):
        type("Wrong", (Weighted, PSSTrainer), {})

    for mixin in (SafeCheckpointsMixin, RollbackMixin, OptimizerMixin, ThroughputTrainerMixin):
        with pytest.raises(ConfigurationError, match=rf"Wrong\({mixin.__name__}, Weighted\)"):
            type("Wrong", (Weighted, mixin), {})

    class Right(WeightedPSS):
        pass

    class Beside(PSSTrainer, ThroughputTrainerMixin):
        pass

    class Alone(PSSTrainerMixin):
        pass

    class Later(Alone, Weighted):
        pass

    assert Beside.__mro__.index(ThroughputTrainerMixin) < Beside.__mro__.index(Trainer)
    assert Right.__mro__.index(PSSTrainerMixin) < Right.__mro__.index(Weighted)
    assert Later.__mro__.index(PSSTrainerMixin) < Later.__mro__.index(Weighted)


# ---- what the Trainer's options do ----


def test_the_norm_is_the_one_before_clipping(tmp_path: Path) -> None:
    free = train(tmp_path / "free", OUT_OF_REACH["paper"], max_grad_norm=0.0, save_strategy="no")
    for clipping in (1e-3, 1e9):
        trainer = train(
            tmp_path / str(clipping),
            OUT_OF_REACH["paper"],
            max_grad_norm=clipping,
            save_strategy="no",
        )
        first, wanted = trainer.state.log_history[0], free.state.log_history[0]
        assert first["pss/grad_norm_preclip"] == first["grad_norm"] == wanted["grad_norm"]


def test_the_matrix_ratio_sees_norms_as_before_clipping(tmp_path: Path) -> None:
    config = PSSConfig.preset("paper", detectors=("matrix_grad_norm_ratio",))
    levels = []
    for clipping in (0.0, 1e-2):
        folder = tmp_path / str(clipping)
        trainer = train(folder, config, max_grad_norm=clipping, max_steps=1, save_strategy="no")
        detectors = controller_of(trainer).state_dict()["detectors"]["detectors"]
        baselines = detectors["matrix_grad_norm_ratio"]["baselines"]
        levels.append({name: state["level"] for name, state in baselines.items()})
    # Clipping by 1e-2 and back is two roundings of float32; measured 2.9e-7.
    assert levels[0] == pytest.approx(levels[1], rel=8e-7)


@pytest.mark.parametrize("policy", ["apply", "skip"])
def test_a_spikes_update_is_applied_or_left_out(policy: str, tmp_path: Path) -> None:
    config = PSSConfig.preset(
        "paper", threshold_ratio=1.0001, calibration_steps=1, cooldown_steps=0, spike_update=policy
    )
    trainer = make_trainer(tmp_path, config, save_strategy="no")
    moved: dict[int, set[str]] = {}
    last = weights_of(trainer.model)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal last
            now = weights_of(kwargs["model"])
            moved[state.global_step] = {n for n in now if not torch.equal(now[n], last[n])}
            last = now

    trainer.add_callback(Watch())
    trainer.train()
    acted = steps_of(events_of(tmp_path))
    assert acted
    matrices = {v.parameter_name for v in controller_of(trainer).selection.matrices}
    for step, names in moved.items():
        if step in acted:
            assert matrices <= names
            assert (names == matrices) is (policy == "skip")
        else:
            assert "transformer.wte.weight" in names


def test_evaluation_logs_carry_no_training_numbers(tmp_path: Path) -> None:
    trainer = train(tmp_path, EAGER, save_strategy="no")
    trainer.evaluate(eval_dataset=trainer.train_dataset)
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluations) == 1
    assert not any(key.startswith("pss/") for line in evaluations for key in line)


def test_training_twice_with_one_trainer_starts_afresh(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EAGER, save_strategy="no")
    trainer.train()
    trainer.train()
    assert controller_of(trainer).step_number == 8
    assert trainer.state.log_history[0]["pss/interventions"] == 0


def test_the_same_seed_gives_the_same_interventions(tmp_path: Path) -> None:
    one, two = (train(tmp_path / name, EAGER) for name in ("one", "two"))
    assert run_differences(one, two) == []
    assert list(differences(history(one), history(two))) == []


def test_options_given_twice_must_agree(tmp_path: Path) -> None:
    args = PSSTrainingArguments(str(tmp_path), use_cpu=True, pss_on_nonfinite="stop")
    rows = token_rows(4)
    trainer = PSSTrainer(gpt2(), args, train_dataset=rows, pss_config=PSSConfig.preset("floor"))
    with pytest.raises(ConfigurationError, match="options twice"):
        trainer.train()


@pytest.mark.parametrize("config", ["floor", {"max_rank": 3}])
def test_options_of_another_type_are_refused(config: object, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigurationError, match=r"PSSConfig\.preset"):
        PSSTrainer(gpt2(), args, train_dataset=token_rows(4), pss_config=config)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = gpt2()
    with pytest.raises(ConfigurationError, match="meta device"):
        PSSController(model)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_a_backend_that_flattens_matrices_is_refused(kind: DistributedType, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=Trainer)
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = kind, SimpleNamespace(fsdp_version=1)
    try:
        with pytest.raises(ConfigurationError, match="flattens weight matrices"):
            PSSCallback().attach(trainer)
    finally:
        state.distributed_type, state.fsdp_plugin = DistributedType.NO, None


def test_deepspeed_without_zero_is_refused() -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=0))
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    with pytest.raises(ConfigurationError, match="ZeRO stage 0"):
        refuse_backends(SimpleNamespace(accelerator=accelerator))


class OldEngine:
    """What DeepSpeed before 0.19 makes of a NaN: an update, and a norm of -1."""

    def __init__(self, *, steps: bool) -> None:
        self.steps = steps

    def was_step_applied(self) -> bool:
        return self.steps


@pytest.mark.parametrize("steps", [True, False])
def test_a_masked_norm_of_deepspeed_is_inf(steps: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EAGER)
    callback = PSSCallback.of(trainer)
    trainer.train()
    state = trainer.accelerator.state
    trainer.model_wrapped = OldEngine(steps=steps)
    callback._trainer, state.distributed_type = trainer, DistributedType.DEEPSPEED
    try:
        for norm, expected in ((2.0, 2.0), (-1.0, math.inf)):
            callback.on_step_begin(trainer.args, trainer.state, trainer.control)
            parameters = trainer.model.parameters()
            callback._around_clipping(lambda parameters, norm=norm: norm, parameters)
            readings = callback._readings
            assert (readings.grad_norm, readings.update_is_discarded) == (expected, not steps)
    finally:
        state.distributed_type = DistributedType.NO
