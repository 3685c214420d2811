"""Train many tiny runs, some of which fail on purpose, and store their logs with labels.

Each run is a real training by `transformers.Trainer`, or by a trainer of trl. A run is named by the
kind of its task, its scenario and a seed. The scenario changes the run at a known step, and an
independent check of the dense losses and of an evaluation on fixed data gives the label. Nothing of
`hf_pss` is imported here. See ``labelled_logs/README.md``.

A run that is already stored is not repeated. Each run is written when it ends.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from labelled_tasks import TASKS, Batch, Task, damaged
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

FOLDER = Path(__file__).parent / "labelled_logs"
# The order is part of the rule of the split: add new names at the end only.
KINDS = (*TASKS, "dpo", "grpo")
SCENARIOS = (
    "ordinary",
    "small_batch",
    "slow_warmup",
    "late_plateau",
    "cosine",
    "label_noise",
    "skipped_step",
    "harder_data",
    "rate_jump",
    "rate_from_start",
    "nan",
    "spike_batch",
    "spike_update",
    "spike_poison",
    "spike_late",
    "collapse_stuck",
    "collapse_dead",
    "slow_decay",
    "slow_ascent",
    "rate_explosion",
)
_SOUND = SCENARIOS[:8]
# The loss of a policy shows no other failure than NaN.
_OF_GRPO = (*_SOUND[:5], "skipped_step", "nan")
_QUICK = ("regression", "regression_20", "diffusion", "ctc", "contrastive")
_NUM_EVALUATIONS = 12

Hook = Callable[[int, nn.Module], None]


def part_of(kind: str, scenario: str, seed: int) -> str:
    """Return the part of a run. Kinds and scenarios alternate like the fields of a chessboard."""
    number = KINDS.index(kind) + SCENARIOS.index(scenario) + seed
    return ("tune", "report")[number % 2]


def _nothing(step: int, model: nn.Module) -> None:
    pass


@dataclass
class Plan:
    """What is done to one run. Steps count from 1."""

    num_steps: int
    at: int | None = None
    """The first step whose batch, gradient or update is changed."""
    rate: Callable[[int], float] = lambda step: 1.0
    batch_size: int | None = None
    hard_from: int | None = None
    flip: float = 0.0
    clip: float = 1.0
    nan_filter: bool = True
    damaged: frozenset[int] = frozenset()
    lost: Callable[[int], bool] = lambda step: False
    """Whether the loss of a step becomes NaN."""
    skipped: Callable[[int], bool] = lambda step: False
    """Whether the gradient overflows and the update of a step is left out, as with fp16."""
    on_gradient: Hook = _nothing
    on_update: Hook = _nothing
    done: str = ""
    may_smooth: bool = False
    """Whether the damage comes from too large an update of the weights."""


# Scenarios ----------------------------------------------------------------------------------------


@torch.no_grad()
def _perturb(model: nn.Module, size: float, seed: int) -> None:
    """Add noise to each matrix, as large as `size` times the matrix, as a wild update does."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim >= 2:
            noise = torch.randn(weight.shape, generator=generator)
            weight += size * noise * weight.norm() / math.sqrt(weight.numel())


@torch.no_grad()
def _scale(model: nn.Module, factor: float) -> None:
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight *= factor


@torch.no_grad()
def _scale_gradient(model: nn.Module, factor: float) -> None:
    for weight in model.parameters():
        if weight.grad is not None:
            weight.grad *= factor


def _only(steps: frozenset[int] | set[int], act: Callable[[nn.Module], None]) -> Hook:
    return lambda step, model: act(model) if step in steps else None


def _since(at: int, act: Callable[[nn.Module], None]) -> Hook:
    return lambda step, model: act(model) if step >= at else None


def planned(kind: str, scenario: str, seed: int) -> Plan:
    """Draw the length, the step and the size of a scenario from the name of the run."""
    draw = random.Random(f"{kind}/{scenario}/{seed}")
    num_steps = 120 if kind == "grpo" else draw.choice((200, 240, 300))
    at = draw.randrange(round(0.4 * num_steps), round(0.65 * num_steps))
    plan = Plan(num_steps, at, nan_filter=draw.random() < 0.75)
    _MAKERS[scenario](plan, draw, kind)
    return plan


def _sound(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.at = None


def _small_batch(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.at, plan.batch_size = None, TASKS[kind].small_batch if kind in TASKS else 2
    plan.rate = lambda step: 0.5


def _slow_warmup(plan: Plan, draw: random.Random, kind: str) -> None:
    warmup = round(draw.uniform(0.5, 0.8) * plan.num_steps)
    plan.at, plan.rate = None, lambda step: min(1.0, step / warmup)
    plan.done = f"the rate rises until step {warmup}"


def _late_plateau(plan: Plan, draw: random.Random, kind: str) -> None:
    begin = round(draw.uniform(0.4, 0.5) * plan.num_steps)
    plan.at, plan.rate = None, lambda step: 1.0 if step < begin else 0.01
    plan.done = f"from step {begin} on the rate is a hundredth, so the loss hardly moves"


def _cosine(plan: Plan, draw: random.Random, kind: str) -> None:
    steps = plan.num_steps
    plan.at, plan.rate = None, lambda step: 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)


def _label_noise(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.at, plan.flip = None, draw.uniform(0.2, 0.4)
    plan.done = f"{plan.flip:.0%} of the labels are random"


def _skipped_step(plan: Plan, draw: random.Random, kind: str) -> None:
    where = draw.choice(("first", "middle", "middle", "last"))
    at = {"first": 1, "last": plan.num_steps}.get(where, plan.at)
    plan.at, plan.skipped = at, lambda step: step == at
    if where == "middle" and plan.nan_filter and draw.random() < 0.5:
        plan.lost = lambda step: step == at
    plan.done = f"the gradient of step {at} overflows and its update is left out"


def _harder_data(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.hard_from = plan.at
    plan.done = f"from step {plan.at} on the data are harder"


def _rate_jump(plan: Plan, draw: random.Random, kind: str) -> None:
    at, factor = plan.at, draw.choice((30.0, 100.0))
    plan.rate, plan.may_smooth = lambda step: factor if step >= at else 1.0, True
    plan.done = f"from step {at} on the rate is {factor:g} times higher"


def _rate_explosion(plan: Plan, draw: random.Random, kind: str) -> None:
    at = plan.at
    plan.rate, plan.clip, plan.may_smooth = lambda step: 1000.0 if step >= at else 1.0, 0.0, True
    plan.done = f"from step {at} on the rate is 1,000 times higher, without clipping"


def _rate_from_start(plan: Plan, draw: random.Random, kind: str) -> None:
    factor = draw.choice((60.0, 200.0))
    plan.at, plan.rate, plan.may_smooth = 1, lambda step: factor, True
    plan.done = f"the rate is {factor:g} times too high from the first step on"


def _nan(plan: Plan, draw: random.Random, kind: str) -> None:
    at, how = plan.at, draw.choice(("weights", "batches", "gradients"))
    if how == "weights":

        @torch.no_grad()
        def spoil(model: nn.Module) -> None:
            for weight in model.parameters():
                weight[..., 0] = torch.nan

        plan.on_update = _only({at}, spoil)
        plan.done = f"after step {at} weights are NaN"
    elif how == "batches":
        plan.lost = lambda step: step >= at
        plan.done = f"from step {at} on the loss of each batch is NaN"
    else:
        plan.skipped = lambda step: step >= at
        plan.done = f"from step {at} on each gradient overflows and each update is left out"


def _spike_batch(plan: Plan, draw: random.Random, kind: str) -> None:
    length = draw.choice((1, 2, 4))
    plan.damaged = frozenset(range(plan.at, plan.at + length))
    plan.clip = draw.choice((0.0, 1.0))
    plan.done = f"{length} damaged batches from step {plan.at} on"


def _spike_update(plan: Plan, draw: random.Random, kind: str) -> None:
    size = draw.choice((2.0, 4.0))
    plan.on_update = _only({plan.at}, lambda model: _perturb(model, size, plan.at))
    plan.may_smooth = True
    plan.done = f"the update of step {plan.at} adds noise of {size:g} times each matrix"


def _spike_poison(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.clip, plan.may_smooth = 0.0, True
    at = plan.at
    plan.on_gradient = _only({at}, lambda model: _scale_gradient(model, -1e6))
    plan.rate = lambda step: 5.0 if step == at else 1.0
    plan.done = (
        f"the gradient of step {at} is a million times too large, and AdamW keeps its square"
    )


def _spike_late(plan: Plan, draw: random.Random, kind: str) -> None:
    size, at = draw.choice((2.0, 4.0)), round(draw.uniform(0.55, 0.75) * plan.num_steps)
    plan.at, plan.may_smooth = at, True
    plan.on_update = _only({at}, lambda model: _perturb(model, size, at))
    plan.rate = lambda step: 1.0 if step <= at else 0.005
    plan.done = (
        f"the update of step {at} adds noise of {size:g} times each matrix, then the rate is low"
    )


def _collapse_stuck(plan: Plan, draw: random.Random, kind: str) -> None:
    plan.at, plan.rate = 1, lambda step: 1e-5
    plan.done = "the rate is so low that nothing is learned"


def _collapse_dead(plan: Plan, draw: random.Random, kind: str) -> None:
    at = plan.at
    plan.on_update = _since(at, lambda model: _scale(model, 0.02))
    plan.done = f"after each update from step {at} on all matrices are set close to 0"


def _slow_decay(plan: Plan, draw: random.Random, kind: str) -> None:
    factor = draw.choice((0.9, 0.93, 0.96))
    plan.on_update, plan.may_smooth = _since(plan.at, lambda model: _scale(model, factor)), False
    plan.done = f"from step {plan.at} on each update shrinks all matrices by {1 - factor:.1%}"


def _slow_ascent(plan: Plan, draw: random.Random, kind: str) -> None:
    at, factor = plan.at, draw.choice((0.1, 0.3))
    plan.on_gradient = _since(at, lambda model: _scale_gradient(model, -1.0))
    plan.rate = lambda step: factor if step >= at else 1.0
    plan.done = f"from step {at} on the sign of the gradient is wrong"


_MAKERS: dict[str, Callable[[Plan, random.Random, str], None]] = {
    "ordinary": _sound,
    "small_batch": _small_batch,
    "slow_warmup": _slow_warmup,
    "late_plateau": _late_plateau,
    "cosine": _cosine,
    "label_noise": _label_noise,
    "skipped_step": _skipped_step,
    "harder_data": _harder_data,
    "rate_jump": _rate_jump,
    "rate_from_start": _rate_from_start,
    "nan": _nan,
    "spike_batch": _spike_batch,
    "spike_update": _spike_update,
    "spike_poison": _spike_poison,
    "spike_late": _spike_late,
    "collapse_stuck": _collapse_stuck,
    "collapse_dead": _collapse_dead,
    "slow_decay": _slow_decay,
    "slow_ascent": _slow_ascent,
    "rate_explosion": _rate_explosion,
}


# Training -----------------------------------------------------------------------------------------


@dataclass
class Readings:
    """What one run has shown. The losses are those of single steps and may be NaN."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


class _Watched:
    """A part of a trainer that follows a plan and records the loss of each step as it is."""

    plan: Plan
    readings: Readings

    @property
    def this_step(self) -> int:
        return self.state.global_step + 1

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        chosen = self.optimizer if optimizer is None else optimizer
        rate = self.plan.rate
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda done: rate(done + 1))
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.this_step
        if step in self.plan.damaged and isinstance(inputs, dict) and "input_ids" in inputs:
            inputs = damaged(inputs, torch.Generator().manual_seed(step))
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.plan.lost(step):
            loss = loss * torch.nan
            _scale_gradient(model, torch.nan)
        if self.plan.skipped(step):
            _scale_gradient(model, torch.inf)
        self.plan.on_gradient(step, model)
        self.readings.losses.append(float(loss))
        return loss

    def evaluated(self) -> float:
        raise NotImplementedError


class _Follows(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        plan = trainer.plan
        every = max(1, plan.num_steps // _NUM_EVALUATIONS)
        self._evaluated = {1, plan.at, *range(every, plan.num_steps + 1, every)}

    def _evaluate(self, step: int, model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            value = self._trainer.evaluated()
        model.train()
        self._trainer.readings.evaluations.append((step, value))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self._evaluated:
            self._evaluate(state.global_step, model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        if self._trainer.plan.skipped(state.global_step + 1):
            model.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self._trainer.plan.on_update(state.global_step, model)
        if state.global_step == self._trainer.plan.num_steps:
            self._evaluate(state.global_step, model)


class _OfTask(_Watched, Trainer):
    """A Trainer whose batches come from a task."""

    def __init__(self, task: Task, plan: Plan, seed: int, **options: Any) -> None:
        self.task, self.plan, self.data_seed = task, plan, seed
        self.readings = Readings()
        super().__init__(model=task.model(), train_dataset=[{"index": 0.0}] * 64, **options)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.task.loss(model, self._batch())

    def _batch(self) -> Batch:
        step, plan = self.this_step, self.plan
        generator = torch.Generator().manual_seed(1_000_003 * (self.data_seed + 1) + step)
        is_hard = plan.hard_from is not None and step >= plan.hard_from
        size = plan.batch_size or self.task.batch_size
        batch = self.task.draw(generator, size, is_hard, plan.flip)
        return damaged(batch, generator) if step in plan.damaged else batch

    def evaluated(self) -> float:
        """Return the mean loss on fixed batches of the size in training."""
        is_hard = self.plan.hard_from is not None
        found = []
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            batch = self.task.draw(generator, max(8, self.task.batch_size), is_hard, 0.0)
            found.append(float(self.task.loss(self.model, batch)))
        return statistics.fmean(found)


def _options(plan: Plan, folder: str, rate: float) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": plan.num_steps,
        "learning_rate": rate,
        "max_grad_norm": plan.clip,
        "logging_steps": 1,
        "logging_nan_inf_filter": plan.nan_filter,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }


def _trainer_of(kind: str, plan: Plan, seed: int, folder: str) -> Any:
    if kind == "dpo":
        return _dpo(plan, seed, folder)
    if kind == "grpo":
        return _grpo(plan, seed, folder)
    task = TASKS[kind]
    args = TrainingArguments(
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        **_options(plan, folder, task.rate),
    )
    return _OfTask(task, plan, seed, args=args)


# Trainers of trl ----------------------------------------------------------------------------------

_NUM_WORDS = 30


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(_NUM_WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def _small_gpt2(num_layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=_NUM_WORDS + 2,
            n_positions=64,
            n_embd=32,
            n_layer=num_layers,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def _preferences(
    plan: Plan, seed: int, size: int, *, hard: bool = False
) -> Iterator[dict[str, str]]:
    """Yield pairs of answers. The chosen answer has more words of the first half."""
    draw = random.Random(f"preferences {seed} {size}")
    for number in range(plan.num_steps * size):
        step = number // size + 1
        is_hard = hard or (plan.hard_from is not None and step >= plan.hard_from)
        share = 0.6 if is_hard else 0.8

        def answer(share: float) -> str:
            half = _NUM_WORDS // 2
            words = [
                draw.randrange(half) + (half if draw.random() > share else 0) for _ in range(8)
            ]
            return " ".join(f"w{word}" for word in words)

        pair = [" " + answer(share), " " + answer(1 - share)]
        if draw.random() < plan.flip:
            pair.reverse()
        yield {"prompt": answer(0.5), "chosen": pair[0], "rejected": pair[1]}


def _dpo(plan: Plan, seed: int, folder: str) -> Any:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class Preferring(_Watched, DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def evaluated(self) -> float:
            if not hasattr(self, "fixed"):
                self.fixed = list(self.get_eval_dataloader())
            losses = [self.compute_loss(self.model, self._prepare_inputs(b)) for b in self.fixed]
            return statistics.fmean(map(float, losses))

    size = plan.batch_size or 4
    args = DPOConfig(
        per_device_train_batch_size=size,
        per_device_eval_batch_size=16,
        bf16=False,
        gradient_checkpointing=False,
        **_options(plan, folder, 5e-4),
    )
    model = _small_gpt2(1)
    Preferring.plan, Preferring.readings = plan, Readings()
    fixed = Plan(4, flip=0.0)
    return Preferring(
        model=model,
        ref_model=copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list(list(_preferences(plan, seed, size))),
        eval_dataset=Dataset.from_list(
            list(_preferences(fixed, 99, 16, hard=plan.hard_from is not None))
        ),
        processing_class=_tokenizer(),
    )


def _grpo(plan: Plan, seed: int, folder: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rewards: list[float] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        """Return the share of words of the first half, in quarters, so that groups may tie."""
        found = []
        for text in completions:
            words = [int(word[1:]) for word in text.split() if word.startswith("w")]
            share = sum(word < _NUM_WORDS // 2 for word in words) / max(1, len(words))
            found.append(round(4 * share) / 4)
        rewards.append(statistics.fmean(found))
        return found

    class Rewarded(_Watched, GRPOTrainer):
        def evaluated(self) -> float:
            """Return minus the mean reward of the last steps."""
            return -statistics.fmean(rewards[-12:] or [0.5])

    size = 4 if plan.batch_size else 8
    args = GRPOConfig(
        per_device_train_batch_size=size,
        num_generations=size,
        max_completion_length=8,
        bf16=False,
        gradient_checkpointing=False,
        **_options(plan, folder, 1e-3),
    )
    prompts = [{"prompt": f"w{i % _NUM_WORDS} w{(7 * i) % _NUM_WORDS}"} for i in range(64)]
    Rewarded.plan, Rewarded.readings = plan, Readings()
    return Rewarded(
        model=_small_gpt2(2),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=_tokenizer(),
    )


# Labels -------------------------------------------------------------------------------------------


def _median(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return statistics.median(finite) if finite else math.nan


@dataclass(frozen=True)
class Evidence:
    """Numbers of the check. All but `noise` and `peak` come from the evaluation on fixed data."""

    begin: float
    before: float
    """The evaluation just before the change, or the lowest one if nothing was changed."""
    end: float
    lost: float
    """The part of the descent that is lost at the end: 0 for none, 1 for all, more if worse."""
    peak: float
    """How far the losses rise within ten steps of the change, in parts of the descent."""
    jump: float
    """How much of the whole rise of the losses is there five steps after the change."""
    risen: float
    """How far the losses of the last 20 steps lie above those before, in parts of the descent."""
    falling: float
    """How far the losses fall over the last quarter, in parts of `risen`."""
    noise: float
    """The median distance of a loss from its neighbours' median, in parts of the descent."""

    def words(self) -> dict[str, float | None]:
        return {
            name: float(f"{value:.4g}") if math.isfinite(value) else None
            for name in self.__slots__
            if (value := getattr(self, name)) is not None
        }

    __slots__ = (
        "before",
        "begin",
        "end",
        "falling",
        "jump",
        "lost",
        "noise",
        "peak",
        "risen",
    )


def evidence_of(readings: Readings, plan: Plan) -> Evidence:
    losses, at = readings.losses, plan.at
    begin, end = readings.evaluations[0][1], readings.evaluations[-1][1]
    finite = [v for step, v in readings.evaluations if math.isfinite(v)]
    if at is None or at == 1:
        before = min(finite)
        known = losses
    else:
        before = next(value for step, value in reversed(readings.evaluations) if step < at)
        known = losses[: at - 1]
    descent = max(begin - before, 1e-12)
    level = _median(known[-25:])
    near = [v for v in losses[(at or 1) - 1 :][:10] if math.isfinite(v)]
    last = losses[-20:]
    risen = (_median(last) - level) / descent
    quarter = losses[-max(20, len(losses) // 4) :][:20]
    after = _median(losses[(at or 1) :][:5]) - level
    distances = [
        abs(value - _median(known[max(0, i - 12) : i + 13]))
        for i, value in enumerate(known)
        if math.isfinite(value)
    ]
    return Evidence(
        begin=begin,
        before=before,
        end=end,
        lost=(end - before) / descent,
        peak=(max(near) - level) / descent if near else math.nan,
        jump=after / (risen * descent) if risen else math.nan,
        risen=risen,
        falling=(_median(quarter) - _median(last)) / (abs(risen) * descent) if risen else 0.0,
        noise=_median(distances) / descent,
    )


@dataclass(frozen=True)
class Label:
    """The truth about a run."""

    verdict: str
    began: int | None = None
    """The first step whose batch or update did the damage."""
    tolerance: int = 0
    accepted: tuple[str, ...] = ()
    """The words of `hf_pss.rescue.diagnosis` that are right; none for a run without a failure."""
    may_go_back: bool = False
    may_smooth: bool = False
    counts: bool = True
    why: str = ""


def _ambiguous(why: str) -> Label:
    return Label("ambiguous", counts=False, why=why)


def label_of(kind: str, scenario: str, plan: Plan, readings: Readings) -> Label:
    """Give a label if what was done and what the check shows agree, and else call it ambiguous."""
    shown = evidence_of(readings, plan)
    if scenario == "nan":
        accepted = ("non_finite",)
        return Label("non_finite", plan.at, 2, accepted, may_go_back=True, why=plan.done)
    if scenario in _SOUND:
        return _sound_label(kind, plan, readings, shown)
    if not all(map(math.isfinite, readings.losses[-20:])) or not math.isfinite(shown.end):
        return Label(
            "diverged",
            plan.at,
            20,
            ("non_finite", "spike", "slow_damage"),
            may_go_back=plan.at != 1,
            may_smooth=plan.may_smooth,
            why=f"{plan.done}; the losses end as NaN or inf",
        )
    judge = {
        "rate_jump": _diverged_label,
        "rate_explosion": _diverged_label,
        "rate_from_start": _from_start_label,
        "collapse_stuck": _stuck_label,
        "collapse_dead": _dead_label,
        "slow_decay": _slow_label,
        "slow_ascent": _slow_label,
    }.get(scenario, _spike_label)
    return judge(plan, shown)


def _sound_label(kind: str, plan: Plan, readings: Readings, shown: Evidence) -> Label:
    lowest = min(v for _, v in readings.evaluations)
    descent = shown.begin - lowest
    if kind == "grpo":
        return (
            Label("sound", why="the mean reward did not fall")
            if shown.end <= -0.45
            else (_ambiguous("the mean reward fell"))
        )
    if plan.hard_from is not None and shown.risen > 0.3 and shown.falling < 0.25:
        return _ambiguous("only the data explain that the loss stays higher")
    if descent <= 0.02 * abs(shown.begin):
        return _ambiguous("the run has learned next to nothing")
    if shown.end - lowest > 0.15 * descent:
        return _ambiguous("the run lost more than 15 % of what it had learned")
    return Label("sound", why=plan.done or "nothing was done to the run")


def _spike_label(plan: Plan, shown: Evidence) -> Label:
    if not shown.peak > max(6 * shown.noise, 0.1):
        return _ambiguous("the rise of the losses is hidden by their noise")
    common = {"began": plan.at, "tolerance": 3, "why": plan.done}
    if shown.lost <= 0.15 and shown.risen <= max(0.15, 2 * shown.noise):
        return Label("spike_recovered", **common)
    if shown.lost < 0.3 or shown.risen < max(0.25, 2 * shown.noise):
        return _ambiguous("the run has recovered in part")
    if shown.falling > 0.35:
        return _ambiguous("the run is still recovering at its end")
    return Label(
        "spike_lasting",
        accepted=("spike", "collapse"),
        may_go_back=True,
        may_smooth=plan.may_smooth,
        **common,
    )


def _diverged_label(plan: Plan, shown: Evidence) -> Label:
    if shown.lost <= 0.15 and shown.peak > max(6 * shown.noise, 0.3):
        return Label("spike_recovered", plan.at, 3, why=f"{plan.done}, and the run gets over it")
    if shown.lost < 0.4 or shown.risen < max(0.4, 3 * shown.noise):
        return _ambiguous("the run survives the high rate, or it is not clear")
    return Label(
        "diverged",
        plan.at,
        15,
        ("spike", "slow_damage", "collapse"),
        may_go_back=True,
        may_smooth=True,
        why=plan.done,
    )


def _from_start_label(plan: Plan, shown: Evidence) -> Label:
    scale = max(abs(shown.begin), 1e-12)
    if shown.end > 1.3 * shown.begin:
        accepted = ("spike", "slow_damage", "collapse")
        return Label("diverged", 1, 30, accepted, may_smooth=True, why=plan.done)
    if shown.begin - shown.end < 0.05 * scale:
        return Label("collapse", 1, 30, ("collapse", "spike", "slow_damage"), why=plan.done)
    return _ambiguous("a rate that is too high from the start shows only beside another run")


def _stuck_label(plan: Plan, shown: Evidence) -> Label:
    if abs(shown.begin - shown.end) > 0.02 * abs(shown.begin):
        return _ambiguous("the run has learned a little")
    return Label("collapse", 1, 5, ("collapse",), why=plan.done)


def _dead_label(plan: Plan, shown: Evidence) -> Label:
    if shown.lost < 0.5 or shown.risen < max(0.5, 3 * shown.noise):
        return _ambiguous("most of what was learned is still there")
    accepted = ("collapse", "spike", "slow_damage")
    return Label("collapse", plan.at, 5, accepted, may_go_back=True, why=plan.done)


def _slow_label(plan: Plan, shown: Evidence) -> Label:
    if shown.lost < 0.2 or shown.risen < max(0.2, 3 * shown.noise):
        return _ambiguous("the rise is too small to be seen")
    if shown.jump > 0.5:
        return _ambiguous("the rise is not slow")
    accepted = ("slow_damage", "collapse")
    return Label("slow_damage", plan.at, 40, accepted, may_go_back=True, why=plan.done)


# Files --------------------------------------------------------------------------------------------


def _rounded(values: list[float], digits: int) -> list[float]:
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else v for v in values]


def trained(kind: str, scenario: str, seed: int) -> dict[str, Any]:
    """Train one run and return its row."""
    plan = planned(kind, scenario, seed)
    set_seed(1000 + seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_of(kind, plan, seed, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Follows(trainer))
        trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    readings = trainer.readings
    assert len(rows) == len(readings.losses) == plan.num_steps
    row = {
        "name": f"{kind}/{scenario}/{seed}",
        "kind": kind,
        "scenario": scenario,
        "seed": seed,
        "part": part_of(kind, scenario, seed),
        "at": plan.at,
        "done": plan.done,
        "nan_filter": plan.nan_filter,
        "vocab_size": TASKS[kind].vocab_size if kind in TASKS else _NUM_WORDS + 2,
        "steps_per_epoch": round(rows[-1]["step"] / rows[-1]["epoch"]),
        "loss": _rounded(readings.losses, 5),
        "grad_norm": _rounded([float(row["grad_norm"]) for row in rows], 4),
        "learning_rate": _rounded([row["learning_rate"] for row in rows], 5),
        "logged": _rounded([row["loss"] for row in rows], 5) if scenario in _CHECKED else None,
        "evaluations": [
            [step, value]
            for (step, _), value in zip(
                readings.evaluations,
                _rounded([value for _, value in readings.evaluations], 5),
                strict=True,
            )
        ],
    }
    return labelled(row)


def labelled(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the label that follows from its numbers."""
    kind, scenario = row["kind"], row["scenario"]
    plan = planned(kind, scenario, row["seed"])
    readings = Readings(row["loss"], [(step, value) for step, value in row["evaluations"]])
    label = label_of(kind, scenario, plan, readings)
    return {
        **row,
        "evidence": evidence_of(readings, plan).words(),
        "label": {name: getattr(label, name) for name in Label.__dataclass_fields__},
    }


# For these scenarios the Trainer's own log is stored too. It shows that `labelled.logged` does what
# the Trainer does.
_CHECKED = ("nan", "skipped_step")


def _path(kind: str) -> Path:
    return FOLDER / f"{kind}.jsonl.gz"


def stored(kind: str) -> list[dict[str, Any]]:
    """Return the rows of a kind that are in the file."""
    path = _path(kind)
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _store(kind: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    FOLDER.mkdir(exist_ok=True)
    staged = _path(kind).with_suffix(".new")
    staged.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(staged, _path(kind))


def _wanted(kinds: list[str], scenarios: list[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yield the runs: all scenarios for the quick kinds, a third of them for the slow kinds."""
    for seed, scenario, kind in itertools.product(range(seeds), scenarios, kinds):
        number = KINDS.index(kind) + SCENARIOS.index(scenario)
        if kind == "grpo":
            is_wanted = scenario in _OF_GRPO
        else:
            is_wanted = kind in _QUICK or (number + seed) % 3 == 0
        if is_wanted:
            yield kind, scenario, seed


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after this")
    parser.add_argument("--relabel", action="store_true", help="only label the stored runs again")
    options = parser.parse_args()
    if options.relabel:
        for kind in options.kinds:
            _store(kind, [labelled(row) for row in stored(kind)])
        return
    torch.set_num_threads(1)
    begun = time.monotonic()
    known = {row["name"] for kind in options.kinds for row in stored(kind)}
    for kind, scenario, seed in _wanted(options.kinds, options.scenarios, options.seeds):
        if f"{kind}/{scenario}/{seed}" in known or time.monotonic() - begun > options.seconds:
            continue
        since = time.monotonic()
        row = trained(kind, scenario, seed)
        _store(kind, [*stored(kind), row])
        label = row["label"]
        sys.stdout.write(
            f"{row['name']:40} {label['verdict']:16} {time.monotonic() - since:5.1f} s "
            f"{json.dumps(row['evidence'])} {label['why']}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
