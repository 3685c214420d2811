"""Hessian–vector products against the dense Hessian in float64."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from helpers import gpt2, token_rows
from hessian_cases import dense_hessian, network
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hf_pss.errors import ConfigurationError
from hf_pss.evidence.curvature import Hessian
from hf_pss.models.selection import named_parameters_canonical

# Of ‖Hv‖, over five networks and probes; the oracle has the same rounded weights.
TOLERANCES = {
    (torch.float64, "double_backward"): 1.2e-15,  # 4.5e-16
    (torch.float64, "differences"): 1.4e-10,  # 4.7e-11
    (torch.float32, "double_backward"): 3.6e-7,  # 1.3e-7
    (torch.float32, "differences"): 1.4e-4,  # 4.9e-5
    (torch.bfloat16, "double_backward"): 1.7e-2,  # 5.9e-3
    (torch.bfloat16, "differences"): 0.2,  # 7.7e-2
}
# Of ‖Hv‖ between eager attention and the math kernel of a one-block GPT-2 in float32.
ATTENTION_TOLERANCE = 2e-7  # 6.9e-8
# Of ‖Hv‖ between differences and double backward along a direction of high curvature, two blocks.
SHARP_TOLERANCE = 2e-3  # 7.3e-4


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def probe(hessian: Hessian, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(hessian.size, generator=generator, dtype=torch.float64).to(hessian.dtype)


@pytest.mark.parametrize(("dtype", "method"), TOLERANCES, ids=str)
def test_products_are_those_of_the_dense_hessian(dtype: torch.dtype, method: Any) -> None:
    for seed in range(5):
        model, loss = network(dtype, seed)
        exact, exact_loss = network(torch.float64, seed)
        exact.load_state_dict(model.state_dict())
        hessian = Hessian(loss, dict(model.named_parameters()), method=method)
        assert hessian.method == method
        v = probe(hessian, seed)
        found = hessian.product(v)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = dense_hessian(exact, exact_loss) @ v.double()
        assert relative_error(found, expected) <= TOLERANCES[dtype, method]


def test_the_check_can_fail() -> None:
    model, loss = network()
    hessian = Hessian(loss, dict(model.named_parameters()))
    v = probe(hessian)
    wrong = dense_hessian(model, loss) @ probe(hessian, 1)
    assert relative_error(hessian.product(v), wrong) > 0.1


def test_some_parameters_have_their_own_block() -> None:
    model, loss = network()
    named = dict(model.named_parameters())
    kept = {name: named[name] for name in ("2.weight", "0.bias")}
    sizes = [p.numel() for p in named.values()]
    places = dict(zip(named, torch.arange(sum(sizes)).split(sizes), strict=True))
    index = torch.cat([places[name] for name in kept])
    hessian = Hessian(loss, kept)
    v = probe(hessian)
    expected = dense_hessian(model, loss)[index][:, index] @ v
    tolerance = TOLERANCES[torch.float64, "double_backward"]
    assert relative_error(hessian.product(v), expected) <= tolerance
    assert {name: len(part) for name, part in hessian.split(v).items()} == {
        "2.weight": 12,
        "0.bias": 6,
    }


def test_fused_attention_is_replaced_by_its_mathematical_kernel() -> None:
    products = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = gpt2(attn_implementation=implementation).eval()
        rows = token_rows(4)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        hessian = Hessian(
            lambda model=model, batch=batch: model(**batch).loss,
            named_parameters_canonical(model),
        )
        assert hessian.method == "double_backward"
        products.append(hessian.product(probe(hessian)))
    assert relative_error(*products) <= ATTENTION_TOLERANCE


def test_differences_follow_the_sharpest_directions_of_a_model() -> None:
    """A step in proportion to ‖θ‖ is off by 0.75 here: it leaves the quadratic region."""
    torch.manual_seed(0)
    model = gpt2(num_layers=2, width=64).eval()
    batch = {key: torch.stack([row[key] for row in token_rows(4)]) for key in token_rows(1)[0]}
    named = named_parameters_canonical(model)
    exact = Hessian(lambda: model(**batch).loss, named)
    v = probe(exact)
    for _ in range(100):  # power iteration
        v = exact.product(v)
        v = v / v.norm()
    differences = Hessian(lambda: model(**batch).loss, named, method="differences")
    assert relative_error(differences.product(v), exact.product(v)) <= SHARP_TOLERANCE


class OnceOnly(torch.autograd.Function):
    """x² with a derivative that has none itself, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def test_what_cannot_be_differentiated_twice_is_differenced_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def loss() -> Tensor:
        return OnceOnly.apply(w).square().sum()  # w⁴

    with caplog.at_level(logging.WARNING, "hf_pss"):
        hessian = Hessian(loss, {"w": w})
    assert hessian.method == "differences"
    assert "differences of gradients" in caplog.text
    expected = 12 * w.detach().square()
    tolerance = TOLERANCES[torch.float64, "differences"]
    assert relative_error(hessian.product(torch.ones(3).double()), expected) <= tolerance
    with pytest.raises(RuntimeError, match="no second derivative"):
        Hessian(loss, {"w": w}, method="double_backward")


@pytest.mark.parametrize("method", ["auto", "differences"])
def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_not(method: Any) -> None:
    """Parameters inside of a reentrant checkpoint get no gradient from autograd.grad: zeros."""
    model, _ = network()
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    named = dict(model.named_parameters())

    def loss(use_reentrant: bool) -> Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant).square().mean()

    plain = Hessian(lambda: model(x).square().mean(), named)
    v = probe(plain)
    found = Hessian(lambda: loss(False), named, method=method).product(v)
    tolerance = TOLERANCES[torch.float64, "differences"]
    assert relative_error(found, plain.product(v)) <= tolerance
    with pytest.raises(ConfigurationError, match="use_reentrant=False"):
        Hessian(lambda: loss(True), named, method=method).product(v)


def test_compiled_code_is_differenced() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    compiled = torch.compile(lambda: w.pow(4).sum(), backend="aot_eager")
    hessian = Hessian(compiled, {"w": w})
    assert hessian.method == "differences"
    tolerance = TOLERANCES[torch.float64, "differences"]
    expected = 12 * w.detach().square()
    assert relative_error(hessian.product(torch.ones(2).double()), expected) <= tolerance


@pytest.mark.parametrize("method", ["double_backward", "differences"])
def test_training_is_not_disturbed(method: Any) -> None:
    model, _ = network(torch.float32)
    dropout = nn.Dropout(0.5)
    x = torch.randn(16, 4)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    named = dict(model.named_parameters())
    hessian = Hessian(lambda: model(dropout(x)).square().mean(), named, method=method)
    u, v = probe(hessian, 1), probe(hessian, 2)
    # One dropout mask throughout, or H would be no symmetric matrix.
    left, right = float(u @ hessian.product(v)), float(v @ hessian.product(u))
    assert left == pytest.approx(right, abs=1e-3 * float(hessian.product(v).norm() * u.norm()))
    assert torch.equal(hessian.product(v), hessian.product(v))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_differences_break_no_graph_of_others() -> None:
    model, loss = network()
    named = dict(model.named_parameters())
    held = loss()
    differences = Hessian(loss, named, method="differences")
    exact = Hessian(loss, named)
    v = probe(exact)
    before = exact.product(v)
    differences.product(v)
    assert torch.equal(exact.product(v), before)
    held.backward()


def test_parameters_are_put_back_when_the_loss_raises() -> None:
    w = nn.Parameter(torch.tensor([0.1, 0.2]))

    def loss() -> Tensor:
        if float(w.detach()[0]) != float(torch.tensor(0.1)):
            raise KeyError("moved")
        return w.sum()

    with pytest.raises(KeyError, match="moved"):
        Hessian(loss, {"w": w}, method="differences").product(torch.ones(2))
    assert w.tolist() == torch.tensor([0.1, 0.2]).tolist()


@pytest.mark.parametrize("method", ["double_backward", "differences"])
def test_linear_and_unused_parameters_have_no_curvature(method: Any) -> None:
    a, b, c = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    named = {"a": a, "b": b, "c": c}
    hessian = Hessian(lambda: a.sum() + b.square().sum(), named, method=method)
    found = hessian.split(hessian.product(torch.ones(6, dtype=torch.float64)))
    assert found["a"].tolist() == [0, 0]
    assert found["b"].tolist() == pytest.approx([2, 2], abs=1e-9)
    assert found["c"].tolist() == [0, 0]
    flat = Hessian(lambda: a.sum(), {"a": a}, method=method)
    assert flat.product(torch.ones(2, dtype=torch.float64)).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["double_backward", "differences"])
def test_a_broken_loss_gives_nan_and_no_error(bad: float, method: Any) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    found = Hessian(lambda: (w**2 * bad).sum(), {"w": w}, method=method).product(torch.ones(2))
    assert not bool(found.isfinite().any())


def test_an_update_in_between_is_noticed() -> None:
    w = nn.Parameter(torch.ones(2))
    hessian = Hessian(lambda: (w**3).sum(), {"w": w})
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hessian.product(torch.ones(2))


def test_arguments_without_meaning() -> None:
    w, frozen = nn.Parameter(torch.ones(2)), torch.ones(2)
    with pytest.raises(ConfigurationError, match="no parameters"):
        Hessian(lambda: w.sum(), {})
    with pytest.raises(ConfigurationError, match="'frozen'"):
        Hessian(lambda: w.sum(), {"w": w, "frozen": frozen})
    with pytest.raises(ConfigurationError, match="as 'a' and as 'b'"):
        Hessian(lambda: w.sum(), {"a": w, "b": w})
    with pytest.raises(ConfigurationError, match="one number"):
        Hessian(lambda: w * 2, {"w": w})
    with pytest.raises(ConfigurationError, match="one number"):
        Hessian(lambda: frozen.sum(), {"w": w})
