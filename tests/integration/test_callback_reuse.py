"""PSSCallback and its Trainer over several runs: unwrapped, reused, replaced, copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EAGER,
    OUT_OF_REACH,
    arguments,
    differences,
    events_of,
    gpt2,
    history,
    run_differences,
    steps_of,
    token_rows,
    weights_of,
)
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer_utils import HPSearchBackend

from hf_pss import ConfigurationError, PSSCallback, PSSConfig, PSSTrainer, RecoveryConfig
from hf_pss.trainer.rollback import RollbackMixin
from hf_pss.trainer.seams import wrapped

# It keeps a batch, hooks into attention and reads gradients. An exception must not leave these.
EVERYTHING = PSSConfig.preset(
    "anchored",
    threshold_ratio=1.0001,
    calibration_steps=1,
    cooldown_steps=0,
    floor_ratio=1.3,
    check_every_steps=1,
    health="full",
    health_every_steps=2,
)
WRAPPED = ("training_step", "log", "compute_loss")
EVENTS = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_save",
)


def build(
    folder: Path, *callbacks: Any, trainer_class: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    set_seed(7)
    return trainer_class(
        model=gpt2(),
        args=arguments(folder, **options),
        train_dataset=token_rows(),
        callbacks=list(callbacks),
    )


def left_behind(trainer: Trainer) -> list[str]:
    """Return the wrapped methods, and the hooks that are still on the model."""
    found = [name for name in WRAPPED if name in vars(trainer)]
    found += [name for name in vars(trainer.accelerator) if name == "clip_grad_norm_"]
    for name, module in trainer.model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found += [f"hook of {name}" for one in hooks if one]
    return found


def step_differences(one: Trainer, other: Trainer) -> list[str]:
    """Compare two runs without the summary, in which the Trainer counts interrupted steps, too."""
    logs = [[line for line in history(trainer) if "loss" in line] for trainer in (one, other)]
    return [
        *differences(*logs, "log"),
        *differences(weights_of(one.model), weights_of(other.model), "model"),
    ]


class Raises(TrainerCallback):
    """Raises in one event of one step, as a user's callback with a bug does."""

    def __init__(self, event: str, step: int) -> None:
        self.step, self.is_armed = step, True
        setattr(self, event, self._raise)

    def _raise(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        if self.is_armed and state.global_step == self.step:
            self.is_armed = False
            raise ValueError("a bug in a callback")


# ---- one trainer after its run ----


def test_a_trainer_has_its_own_methods_after_each_run(tmp_path: Path) -> None:
    trainer = build(tmp_path / "a", PSSCallback(EAGER))
    trainer.train()
    assert left_behind(trainer) == []
    assert type(trainer) is Trainer
    assert pickle.loads(pickle.dumps(type(trainer))) is Trainer
    first = steps_of(events_of(tmp_path / "a"))
    trainer.train()
    assert left_behind(trainer) == []
    assert trainer.state.global_step == 8
    assert steps_of(events_of(tmp_path / "a"))
    assert first


FOUR_STEPS = {"save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}


class Adder:
    def add(self, number: int) -> int:
        return number + 1


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("has_own", [False, True])
def test_wrappers_that_end_in_any_order_leave_the_method_as_it_was(
    order: tuple[int, ...], has_own: bool
) -> None:
    adder = Adder()
    if has_own:
        adder.add = own = lambda number: number + 10  # type: ignore[method-assign]
    plain = adder.add(0)
    blocks = [
        wrapped(adder, "add", lambda add, number, by=by: add(number) + by) for by in (100, 200, 400)
    ]
    for block in blocks:
        block.__enter__()
    left = 700
    for place in order:
        assert adder.add(0) == plain + left
        blocks[place].__exit__(None, None, None)
        left -= 100 * 2**place
    assert vars(adder) == ({"add": own} if has_own else {})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, dict[str, Any]]:
    """A run without an exception, and the weights that it began with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = build(folder, PSSCallback(EVERYTHING), **FOUR_STEPS)
    start = weights_of(trainer.model)
    trainer.train()
    return trainer, start


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_within_a_step_leaves_nothing_for_the_next_run(
    event: str, undisturbed: tuple[Trainer, dict[str, Any]], tmp_path: Path
) -> None:
    expected, start = undisturbed
    trainer = build(tmp_path, PSSCallback(EVERYTHING), Raises(event, 2), **FOUR_STEPS)
    with pytest.raises(ValueError, match="a bug"):
        trainer.train()
    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    trainer.optimizer = trainer.lr_scheduler = None
    set_seed(7)
    trainer.train()
    assert left_behind(trainer) == []
    assert step_differences(expected, trainer) == []


def test_a_trainer_can_be_copied_after_its_run(tmp_path: Path) -> None:
    """The copy trains with a callback of its own.

    Its trajectory is not compared: also a plain Trainer's copy has an optimizer whose ``step``,
    which torch's scheduler has wrapped, still updates the weights of the original.
    """
    trainer = build(tmp_path, PSSCallback(EAGER))
    trainer.train()
    other = copy.deepcopy(trainer)
    assert PSSCallback.of(other) is not PSSCallback.of(trainer)
    before = PSSCallback.of(trainer).controller
    other.train()
    assert PSSCallback.of(trainer).controller is before
    assert left_behind(trainer) == left_behind(other) == []


def test_a_batch_that_does_not_fit_begins_the_run_again(tmp_path: Path) -> None:
    class RunsOutOfMemory(Raises):
        def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.is_armed and state.global_step == self.step:
                self.is_armed = False
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    trainer = build(
        tmp_path,
        PSSCallback(EAGER),
        RunsOutOfMemory("on_step_end", 3),
        auto_find_batch_size=True,
    )
    trainer.train()
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == PSSCallback.of(trainer).controller.step_number == 8
    steps = [event["step"] for event in events_of(tmp_path)]
    assert steps == sorted(set(steps))
    assert left_behind(trainer) == []


@pytest.mark.parametrize("trainer_class", [Trainer, PSSTrainer])
def test_trials_of_a_hyperparameter_search_each_build_their_accelerator(
    trainer_class: type[Trainer], tmp_path: Path
) -> None:
    class Trial(dict[str, Any]):
        def __init__(self, number: int) -> None:
            self.number, self.params = number, self

    set_seed(7)
    trainer = trainer_class(
        model_init=lambda trial=None: gpt2(),
        args=arguments(tmp_path, save_steps=4),
        train_dataset=token_rows(),
        callbacks=[PSSCallback(EAGER)],
    )
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: {"learning_rate": 1e-3 * (trial.number + 1)}
    trainer.compute_objective = lambda metrics: 0.0
    for number in range(2):
        trainer.train(trial=Trial(number))
        assert left_behind(trainer) == []
        assert steps_of(events_of(tmp_path / f"run-{number}"))
    assert events_of(tmp_path / "run-0") != []  # the second trial has left them alone
    assert list(tmp_path.glob("pss_*")) == []
    saved = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/checkpoint-*"))
    assert saved == [f"run-{run}/checkpoint-{step}" for run in (0, 1) for step in (4, 8)]


# ---- callbacks that are shared, replaced, refused ----


def test_two_trainers_train_in_turns(tmp_path: Path) -> None:
    """A run within a step of another one, each with its callback."""
    expected = build(tmp_path / "expected", PSSCallback(EAGER))
    expected.train()

    class TrainsAnother(TrainerCallback):
        inner: Trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                randomness = torch.random.get_rng_state()
                self.inner = build(tmp_path / "inner", PSSCallback(EAGER))
                self.inner.train()
                torch.random.set_rng_state(randomness)

    outer_callback = TrainsAnother()
    outer = build(tmp_path / "outer", PSSCallback(EAGER), outer_callback)
    outer.train()
    assert run_differences(expected, outer) == []
    assert run_differences(expected, outer_callback.inner) == []


def test_one_callback_serves_trainers_one_after_the_other(tmp_path: Path) -> None:
    callback = PSSCallback(EAGER)
    first = build(tmp_path / "first", callback)
    first.train()
    second = build(tmp_path / "second", callback)
    second.train()
    assert run_differences(first, second) == []
    kept = [
        [(event["step"], event["kind"], event["value"]) for event in events_of(tmp_path / name)]
        for name in ("first", "second")
    ]
    assert kept[0] == kept[1] != []
    assert left_behind(first) == left_behind(second) == []


def test_a_callback_forgets_the_rollback_of_another_trainer(tmp_path: Path) -> None:
    class RollbackTrainer(RollbackMixin, Trainer):
        pass

    class Breaks(TrainerCallback):
        is_done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and not self.is_done:
                self.is_done = True
                with torch.no_grad():
                    kwargs["model"].transformer.wte.weight[0, 0] = float("nan")

    callback = PSSCallback(OUT_OF_REACH["paper"])
    first = build(
        tmp_path / "first", callback, Breaks(), trainer_class=RollbackTrainer, save_steps=2
    )
    first.recovery = RecoveryConfig(on_failure="rollback")
    first.train()
    kept = events_of(tmp_path / "first")
    assert "roll_back" in {event["decision"] for event in kept}
    second = build(tmp_path / "second", callback)
    callback.config = EAGER
    second.train()
    assert steps_of(events_of(tmp_path / "second"))
    assert events_of(tmp_path / "first") == kept


def test_a_callback_takes_the_place_of_one_that_was_removed(tmp_path: Path) -> None:
    trainer = build(tmp_path, PSSCallback(EAGER))
    trainer.train()
    trainer.remove_callback(PSSCallback)
    other = PSSCallback(OUT_OF_REACH["paper"])
    trainer.add_callback(other)
    trainer.train()
    assert PSSCallback.of(trainer) is other
    assert events_of(tmp_path) == []


def test_the_class_stands_for_a_callback_with_the_default_options(tmp_path: Path) -> None:
    trainer = build(tmp_path, PSSCallback)
    trainer.train()
    assert PSSCallback.of(trainer).controller.config == PSSConfig()


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has a PSSCallback already"):
        build(tmp_path, PSSCallback(EAGER), PSSCallback(EAGER))
    trainer = build(tmp_path, PSSCallback(EAGER))
    with pytest.raises(ConfigurationError, match="has a PSSCallback already"):
        PSSCallback(EAGER).attach(trainer)
    trainer.add_callback(PSSCallback(EAGER))
    with pytest.raises(ConfigurationError, match="has a PSSCallback already"):
        trainer.train()


def test_a_callback_outside_of_a_trainer_is_refused(tmp_path: Path) -> None:
    callback, model = PSSCallback(EAGER), gpt2()
    args = arguments(tmp_path)
    callback.on_init_end(args, TrainerState(), TrainerControl())
    with pytest.raises(ConfigurationError, match="cannot find the Trainer"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)


# ---- a resume that restores callbacks ----


def resumed_with_restored_callbacks(
    folder: Path, add: Callable[[Trainer], Any]
) -> tuple[Trainer, Path]:
    build(folder, PSSCallback(EAGER), save_steps=4).train()
    trainer = build(folder, save_steps=4, restore_callback_states_from_checkpoint=True)
    add(trainer)
    return trainer, folder / "checkpoint-4"


def test_a_resume_that_restores_callbacks_keeps_the_options(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", PSSCallback(EAGER), save_steps=4)
    whole.train()
    callback = PSSCallback(EAGER)
    resumed, checkpoint = resumed_with_restored_callbacks(tmp_path / "resumed", callback.attach)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert PSSCallback.of(resumed) is callback
    assert callback.controller.config == EAGER
    assert step_differences(whole, resumed) == []
    assert steps_of(events_of(tmp_path / "whole")) == steps_of(events_of(tmp_path / "resumed"))
    assert left_behind(resumed) == []


def test_a_replaced_callback_that_never_joined_is_refused(tmp_path: Path) -> None:
    """The Trainer makes a new one without the options, and no one has a reference to the first."""

    def add(trainer: Trainer) -> None:
        trainer.add_callback(PSSCallback(EAGER))

    trainer, checkpoint = resumed_with_restored_callbacks(tmp_path, add)
    with pytest.raises(ConfigurationError, match="restore_callback_states_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# ---- trainers that override wrapped methods ----


class OverridesAll(Trainer):
    """A user's subclass that counts its calls."""

    num_steps = num_logs = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.num_steps += 1
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.num_logs += 1
        logs["num_logs"] = self.num_logs
        super().log(logs, *args, **kwargs)


class ClipsInGroups(Trainer):
    """Clips embeddings and the rest apart, and returns the norm of all."""

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            groups["wte" in name].append(parameter)
        norms = [self.accelerator.clip_grad_norm_(group, 0.1) for group in groups.values()]
        return torch.stack(norms).norm()


class ReturnsNoNorm(Trainer):
    """Clips and returns nothing, so that the Trainer measures again after clipping."""

    def _clip_grad_norm(self, model: nn.Module) -> None:
        self.accelerator.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize("trainer_class", [OverridesAll, ClipsInGroups, ReturnsNoNorm])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "unclipped", "accumulated"],
)
def test_a_subclass_keeps_its_overrides_and_pss_reads_the_norm_before_clipping(
    trainer_class: type[Trainer], options: dict[str, Any], tmp_path: Path
) -> None:
    first_norm = build(tmp_path / "norm", max_steps=1, **options)
    first_norm.train()
    plain = build(tmp_path / "plain", trainer_class=trainer_class, **options)
    plain.train()
    called = build(
        tmp_path / "called",
        PSSCallback(OUT_OF_REACH["paper"]),
        trainer_class=trainer_class,
        **options,
    )
    called.train()
    assert run_differences(plain, called) == []
    read = called.state.log_history[0]["pss/grad_norm_preclip"]
    # Two orders of summation in float32.
    assert read == pytest.approx(first_norm.state.log_history[0]["grad_norm"], rel=1e-6)


def test_a_subclass_that_does_not_clip_through_accelerate_is_refused(tmp_path: Path) -> None:
    class ClipsAlone(Trainer):
        def _clip_grad_norm(self, model: nn.Module) -> Tensor:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    trainer = build(tmp_path, PSSCallback(EAGER), trainer_class=ClipsAlone)
    with pytest.raises(ConfigurationError, match="received no gradient norm"):
        trainer.train()
