"""Every rule of the table passes this battery; a new one is a row of `RULES`.

What NaN does: a gradient with NaN or inf is applied as it is, as torch's own optimizers apply it;
its parameter becomes NaN, and no other does, though equal shapes share a batch. Nothing is read
back to look for it: PSS holds such a step back before.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import differences
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_pss.errors import ConfigurationError
from hf_pss.optim import MatrixOptimizer
from hf_pss.optim.amuse import Amuse
from hf_pss.optim.rules import RULES, rule_named

# Largest difference of an entry, where a batch or a compiler adds in another order.
BATCH_TOLERANCE = 1e-5
COMPILE_TOLERANCE = 1e-6
BFLOAT16_TOLERANCE = 0.02  # relative to the distance gone

LR = 0.05
SHAPES = [(6, 4), (4, 6), (6, 4), (3, 5, 4), (1, 7), (7, 1)]
OTHER_SHAPES = [(9, 4), (6,)]
# Options without which part of a rule would never run here.
_SOFT = {"total_steps": 10, "hard_fraction": 0.2}
_NEEDED: dict[str, dict[str, Any]] = {"softmuon": _SOFT, "softsignum": _SOFT}

# A case is a class and a rule.
CASES: dict[str, tuple[type[MatrixOptimizer], str]] = {
    **{name: (MatrixOptimizer, name) for name in RULES},
    "amuse": (Amuse, "muon"),
}
# What counts steps or sums over them, and is part of the state.
COUNTERS = {"step", "lr_max", "weight_sum", "average_weight", "beta", "next_beta", "iteration"}

# By default the device decides in which type a rule iterates.
OPTIONS: dict[str, dict[str, Any]] = {
    case: {
        **_NEEDED.get(rule, {}),
        **({"dtype": "float32"} if "dtype" in rule_named(rule).defaults else {}),
    }
    for case, (_, rule) in CASES.items()
}

# Tracing takes seconds a case: the quick run has a plain rule, one with a closure, and AMUSE.
COMPILED_QUICKLY = {("muon", "one"), ("amuse", "one")}

on_each_case = pytest.mark.parametrize("case", CASES)
on_each_rule = pytest.mark.parametrize("rule", RULES)

Closure = Callable[[], Tensor]


class Problem:
    """Parameters, their optimizer, and a loss with another gradient at every step."""

    def __init__(
        self,
        case: str,
        *,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.matrices = parameters(shapes, dtype)
        self.others = parameters(OTHER_SHAPES, dtype, seed=1)
        self.optimizer = make(case, self.matrices, self.others, **options)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + number)
        self.optimizer.zero_grad()
        loss = torch.zeros(())
        for p in self.parameters:
            goal = torch.randn(p.shape, generator=generator).to(p.dtype)
            loss = loss + (p - goal).square().sum().float()
        loss.backward()
        return loss

    def run(self, *numbers: int) -> Problem:
        for number in numbers:
            self.optimizer.step(lambda number=number: self.backward(number))
        return self

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def make(
    case: str,
    matrices: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter] = (),
    **options: Any,
) -> MatrixOptimizer:
    cls, rule = CASES[case]
    groups: list[dict[str, Any]] = [
        {"params": list(matrices), "algo": rule, **OPTIONS[case], **options}
    ]
    if others:
        groups.append({"params": list(others), "algo": "adamw"})
    return cls(groups, lr=LR)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load as Trainer does: no class is unpickled."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def options_of(optimizer: MatrixOptimizer) -> list[dict[str, Any]]:
    left_out = {"params", *COUNTERS}
    return [{k: v for k, v in g.items() if k not in left_out} for g in optimizer.param_groups]


def largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in pairs)


# State


@on_each_case
def test_state_survives_a_file(case: str) -> None:
    state = Problem(case).run(1, 2, 3).optimizer.state_dict()
    other = Problem(case)
    other.optimizer.load_state_dict(through_file(state))
    assert not list(differences(state, other.optimizer.state_dict()))


@on_each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(case: str, dtype: torch.dtype) -> None:
    whole = Problem(case, dtype=dtype).run(*range(10))
    first = Problem(case, dtype=dtype).run(*range(5))
    second = Problem(case, dtype=dtype)
    for p, value in zip(second.parameters, first.values(), strict=True):
        p.data.copy_(value)
    second.optimizer.load_state_dict(through_file(first.optimizer.state_dict()))
    second.run(*range(5, 10))
    assert not list(differences(whole.values(), second.values()))
    assert not list(differences(whole.optimizer.state_dict(), second.optimizer.state_dict()))


@on_each_case
def test_two_runs_are_equal_to_the_bit(case: str) -> None:
    one, other = (Problem(case).run(*range(5)) for _ in range(2))
    assert not list(differences(one.values(), other.values()))


@on_each_case
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_identically(case: str, way: Callable[[Any], Any]) -> None:
    problem = Problem(case).run(0, 1)
    twin = way(problem)
    before = problem.values()
    twin.run(2, 3)
    assert not list(differences(before, problem.values()))
    assert not list(differences(problem.run(2, 3).values(), twin.values()))


@on_each_case
def test_accelerate_wraps_it(case: str) -> None:
    plain, wrapped = Problem(case).run(0), Problem(case).run(0)
    optimizer = Accelerator(cpu=True).prepare(wrapped.optimizer)
    for number in (1, 2):
        plain.run(number)
        wrapped.backward(number)
        # SpecMuon's loss: accelerate hands a closure on.
        optimizer.step(lambda number=number: wrapped.backward(number))
    assert not list(differences(plain.values(), wrapped.values()))


# A step


@on_each_case
def test_no_argument_changes(case: str) -> None:
    problem = Problem(case)
    loss = problem.backward(0)
    gradients = [p.grad for p in problem.parameters]
    before = [g.clone() for g in gradients]
    options = copy.deepcopy(options_of(problem.optimizer))
    problem.optimizer.step(lambda: loss)
    assert all(p.grad is g for p, g in zip(problem.parameters, gradients, strict=True))
    assert not list(differences(before, gradients))
    assert options_of(problem.optimizer) == options


@on_each_case
def test_the_closure_is_called_once_with_gradients_on(case: str) -> None:
    problem, calls = Problem(case), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return problem.backward(0)

    loss = problem.optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, Problem(case).backward(0))


@on_each_case
def test_empty_groups(case: str) -> None:
    matrices = parameters(SHAPES)
    optimizer = CASES[case][0](
        [
            {"params": [], "algo": CASES[case][1], **OPTIONS[case]},
            {"params": matrices, "algo": CASES[case][1], **OPTIONS[case]},
            {"params": [], "algo": "adamw"},
        ],
        lr=LR,
    )
    plain = make(case, twins := parameters(SHAPES))
    for p, q in zip(matrices, twins, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    for each in (optimizer, plain):
        each.step(lambda: torch.tensor(1.0))
    assert not list(differences([p.data for p in matrices], [p.data for p in twins]))


@on_each_case
def test_a_parameter_without_gradient_stays(case: str) -> None:
    problem = Problem(case)
    frozen, other = problem.matrices[0], problem.others[0]
    before = frozen.detach().clone(), other.detach().clone()
    problem.backward(0)
    frozen.grad = other.grad = None
    problem.optimizer.step(lambda: torch.tensor(1.0))
    assert torch.equal(frozen, before[0])
    assert torch.equal(other, before[1])
    assert not problem.optimizer.state[frozen]
    assert not problem.optimizer.state[other]


@on_each_case
@pytest.mark.parametrize("which", ["matrices", "others"])
def test_a_sparse_gradient_is_refused(case: str, which: str) -> None:
    problem = Problem(case)
    problem.backward(0)
    before = problem.values()
    p = getattr(problem, which)[0]
    p.grad = p.grad.to_sparse()
    with pytest.raises(ConfigurationError, match="sparse"):
        problem.optimizer.step(lambda: torch.tensor(1.0))
    assert not list(differences(before, problem.values()))


@on_each_case
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_parameter(case: str, value: float) -> None:
    clean, problem = Problem(case), Problem(case)
    clean.backward(0)
    problem.backward(0)
    broken = problem.matrices[0]
    broken.grad[0, 0] = value
    for each in (clean, problem):
        each.optimizer.step(lambda: torch.tensor(1.0))
    assert broken.isnan().all()
    rest = [(p, q) for p, q in zip(problem.parameters, clean.parameters, strict=True)][1:]
    assert largest([p for p, _ in rest], [q for _, q in rest]) <= BATCH_TOLERANCE


@on_each_case
def test_zero_gradients_only_decay(case: str) -> None:
    matrices = parameters(SHAPES)
    before = [p.detach().clone() for p in matrices]
    optimizer = make(case, matrices, weight_decay=0.5)
    for p in matrices:
        p.grad = torch.zeros_like(p)
    optimizer.step(lambda: torch.tensor(1.0))
    assert largest(matrices, [(1 - LR * 0.5) * w for w in before]) <= BATCH_TOLERANCE


@on_each_case
def test_a_rate_of_zero_moves_nothing(case: str) -> None:
    """Distributed checkpoints make such a step before they load."""
    problem = Problem(case)
    before = problem.values()
    for group in problem.optimizer.param_groups:
        group["lr"] = 0.0
    problem.run(0)
    assert not list(differences(before, problem.values()))


@on_each_case
def test_bfloat16_parameters(case: str) -> None:
    """One step from the same start: how far parameters rounded to 8 bits go astray."""
    low, full = Problem(case, dtype=torch.bfloat16, weight_decay=0.0), Problem(case)
    for p, q in zip(full.parameters, low.parameters, strict=True):
        p.data.copy_(q.detach())
    start = full.values()
    full.optimizer.param_groups[0]["weight_decay"] = 0.0
    low.run(0), full.run(0)
    assert all(p.dtype == torch.bfloat16 for p in low.parameters)
    for p, q, origin in zip(low.matrices, full.matrices, start, strict=False):
        # The weight is rounded to bfloat16 once, by at most 2⁻⁹ of it.
        rounding = 2**-8 * float(origin.abs().max() + LR)
        assert largest([p], [q]) <= rounding + BFLOAT16_TOLERANCE * largest([q], [origin])


# Schedulers and groups


@on_each_case
def test_a_scheduler_keeps_the_ratio_of_rates(case: str) -> None:
    problem = Problem(case, lr=0.2)
    scheduler = LambdaLR(problem.optimizer, lambda step: 1 / (1 + step))
    for number in range(3):
        problem.run(number)
        scheduler.step()
    assert [g["lr"] for g in problem.optimizer.param_groups] == [0.2 / 4, LR / 4]
    manual = Problem(case, lr=0.2)
    for number in range(3):
        for group, rate in zip(manual.optimizer.param_groups, (0.2, LR), strict=True):
            group["lr"] = rate / (1 + number)
        manual.run(number)
    assert not list(differences(problem.values(), manual.values()))


@on_each_case
def test_a_group_may_join_later(case: str) -> None:
    problem = Problem(case).run(0)
    late = parameters([(6, 4)], seed=2)[0]
    start = late.detach().clone()
    group = {"algo": CASES[case][1], **OPTIONS[case]}
    problem.optimizer.add_param_group({"params": [late], **group})
    problem.run(1)
    assert not torch.equal(late, start)
    assert {"lr", "weight_decay"} <= problem.optimizer.param_groups[-1].keys()
    with pytest.raises(ValueError, match="appear in more than one"):
        problem.optimizer.add_param_group({"params": [late], **group})


@on_each_case
@pytest.mark.parametrize(
    "group",
    [
        {"algo": "moun"},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"lr": -1.0},
        {"scale": "spectral"},
        {"no_such_option": 1},
    ],
)
def test_invalid_options_are_refused(case: str, group: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        CASES[case][0]([{"params": parameters([(4, 3)]), "algo": CASES[case][1], **group}], lr=LR)


@on_each_case
def test_a_vector_is_refused(case: str) -> None:
    with pytest.raises(ConfigurationError, match="adamw"):
        make(case, parameters([(5,)]))


# Stacks


@on_each_case
def test_a_stack_moves_as_its_matrices_do(case: str) -> None:
    stack = parameters([(3, 5, 4)])
    singles = [nn.Parameter(m.clone()) for m in stack[0].detach()]
    one, many = make(case, stack), make(case, singles)
    for number in range(5):
        (stack[0].grad,) = parameters([(3, 5, 4)], seed=10 + number)
        for single, gradient in zip(singles, stack[0].grad, strict=True):
            single.grad = gradient.clone()
        for each in (one, many):
            each.step(lambda: torch.tensor(1.0))
    assert largest(list(stack[0]), singles) <= BATCH_TOLERANCE


@on_each_rule
def test_a_matrix_does_not_depend_on_its_neighbours(rule: str) -> None:
    """Also the contract of a rule: pure, stateful tensors by their first dimension."""
    found = rule_named(rule)
    options = {
        **found.defaults,
        **OPTIONS[rule],
        "scale": "rms_match",
        "lr": LR,
        "loss": torch.tensor(1.0),
    }
    stacks = [parameters([(4, 6, 5)], seed=number)[0].detach() for number in range(3)]
    together: dict[str, Tensor] = {}
    alone: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for number, momenta in enumerate(stacks):
        given = {**options, "step": number + 1}
        kept = copy.deepcopy((momenta, together, given))
        directions, after = found.direction(momenta, together, given)
        assert not list(differences(kept, (momenta, together, given)))
        assert directions.shape == momenta.shape
        assert directions.dtype == torch.float32
        assert all(len(value) == 4 for value in after.values())
        for i in range(4):
            direction, alone[i] = found.direction(momenta[i : i + 1], alone[i], given)
            assert largest([direction[0]], [directions[i]]) <= BATCH_TOLERANCE
        together = after


# Compilation


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 compiles no step with a closure")
@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        pytest.param(case, shapes, id=f"{case}-{name}", marks=marks)
        for case in CASES
        for name, shapes in (("one", [(6, 4)]), ("all", SHAPES))
        for marks in ([] if (case, name) in COMPILED_QUICKLY else pytest.mark.slow,)
    ],
)
def test_a_compiled_step_is_the_same(case: str, shapes: list[tuple[int, ...]]) -> None:
    """The third step of three is in the soft phase of the rules that have one."""
    plain, compiled = Problem(case, shapes=shapes), Problem(case, shapes=shapes)
    loss = torch.tensor(1.0)
    torch._dynamo.reset()
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for number in range(3):
        plain.backward(number)
        compiled.backward(number)
        plain.optimizer.step(lambda: loss)
        step(lambda: loss)
    assert largest(plain.values(), compiled.values()) <= COMPILE_TOLERANCE


def test_the_check_can_fail() -> None:
    one, other = Problem("muon").run(0, 1), Problem("muon").run(0, 2)
    assert largest(one.values(), other.values()) > BATCH_TOLERANCE
    assert list(differences(one.values(), other.values()))
