"""One optimizer for a whole model: a rule moves its weight matrices, and AdamW moves the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from hf_pss.errors import ConfigurationError, check_choice
from hf_pss.models.distributed import (
    ComputedTensor,
    Ranks,
    Shards,
    Sharing,
    local,
    shards_of,
)
from hf_pss.optim.layout import WHOLE, directions_of
from hf_pss.optim.rules import RULES, UPDATE_SCALES, State, rule_named

ADAMW = "adamw"

# The number of elements that a rank takes from gradient to weight at once. This bounds the memory
# of a step. On a CPU it keeps the data in the cache.
_AT_ONCE = 2**28
_ON_A_CPU = 2**22


class MatrixOptimizer(Optimizer):
    """Moves weight matrices by a rule of `RULES`, and all other parameters by AdamW.

    The momentum is M ← μ M + (1 − μ) G. With Nesterov, U = μ M + (1 − μ) G, and otherwise U = M. A
    matrix then moves by

        W ← (1 − η λ) W − η D(U),

    where D is the rule's direction, including its update scale. The rule treats each part of a
    fused projection, and each expert of a stack, as a separate matrix. It reads a transposed
    (Conv1D) weight by its true outputs and inputs. Matrices of equal shape share one batched call.
    With ``algo="muon"``, ``schedule="keller"`` and ``scale="aspect_clamped"`` this is
    ``torch.optim.Muon``, apart from fused projections.

    Each parameter group belongs to one rule or to AdamW. `build_optimizer` makes the groups of a
    model. A group of ``algo="adamw"`` reads ``lr``, ``betas``, ``eps`` and ``weight_decay``. A
    group of a rule reads all options except ``betas`` and ``eps``. It also reads the options of the
    rule and ``layouts``, which has one `Layout` for each parameter.

    Parameters may be DTensors of FSDP2 or HSDP. One rank then gathers each matrix,
    computes its direction and sends the other ranks their rows. `share_work_` divides the
    work of DDP in the same way.

    Args:
        params: Parameter groups, each with ``algo``.
        lr: η.
        momentum: μ.
        nesterov: Whether U contains the current gradient, as in the formula above.
        weight_decay: λ, which is decoupled.
        cautious: Decay only those entries of matrices that the update moves towards zero, so that
            decay never works against the update (Chen et al. 2025, arXiv 2510.12402).
        scale: A row of `UPDATE_SCALES`.
        betas: The betas of AdamW.
        eps: The ε of AdamW.

    Attributes:
        loss: The loss of the step, for rules that read it. It is the closure's result, or the value
            that the training loop sets before each step.

    Raises:
        ConfigurationError: A name is unknown, a number is out of range, a parameter in a rule's
            group is not a matrix, or the rule does not have an option.
    """

    loss: Tensor | float | None
    _own: Mapping[str, Any] = MappingProxyType({})
    """The entries that a subclass adds to its groups, with their defaults."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        cautious: bool = False,
        scale: str = "rms_match",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.loss = None
        self._reset_sharing()
        defaults = {
            "algo": ADAMW,
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "scale": scale,
            "betas": tuple(betas),
            "eps": eps,
            "layouts": None,
        }
        super().__init__(params, {**defaults, **self._own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with the defaults of its rule.

        Raises:
            ConfigurationError: See `MatrixOptimizer`.
        """
        algo = param_group.get("algo", ADAMW)
        check_choice("algo", algo, (*RULES, ADAMW))
        own = {} if algo == ADAMW else rule_named(algo).defaults
        unknown = param_group.keys() - self.defaults.keys() - own.keys() - {"params", "initial_lr"}
        if unknown:
            raise ConfigurationError(
                f"{algo} has no option {', '.join(sorted(unknown))}; its options "
                f"are {', '.join(own) or 'none'}."
            )
        group = {**own, **param_group}
        super().add_param_group(group)
        try:
            _complete_(group)
        except ConfigurationError:
            self.param_groups.pop()
            raise

    def share_work_(self, sharing: Sharing) -> None:
        """Divide the work on whole parameters over ranks. For DDP, pass `Replicas`."""
        self._sharing[None] = sharing

    def _reset_sharing(self) -> None:
        # The keys are the ranks that parameters are split over, or None for whole parameters.
        self._sharing: dict[Ranks | None, Sharing] = {None: Sharing()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a loaded state. None of these holds process groups."""
        super().__setstate__(state)
        if "_sharing" not in self.__dict__:  # a loaded state keeps the groups in use
            self.loss = None
            self._reset_sharing()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The rules' states keep their dtype, whatever the parameters' dtype is.

        ``per_head`` may divide a parameter into different matrices than in the saved run. In that
        case the momentum of the parameter continues, and the rule's state of each matrix restarts.

        Raises:
            ValueError: The state belongs to an optimizer with different groups.
        """
        models = [group["layouts"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        groups = zip(self.param_groups, models, state_dict["param_groups"], strict=True)
        for group, layouts, given in groups:
            both = zip(group["params"], group["layouts"] or (), layouts or (), strict=False)
            redivided = {p for p, before, now in both if _parts(before) != _parts(now)}
            # Keep the model's layouts, because distributed checkpoints lose empty tuples.
            group["layouts"] = layouts
            for parameter, key in zip(group["params"], given["params"], strict=True):
                saved = state_dict["state"].get(key, {})
                for name in filter(_is_of_a_rule, saved):
                    if parameter in redivided:
                        del self.state[parameter][name]  # it belongs to different matrices
                    else:
                        self.state[parameter][name] = saved[name].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step and return the closure's result.

        If the gradient of a matrix contains NaN or inf, that matrix becomes NaN. All other matrices
        are updated as usual. The caller must skip such a step, as PSS does. Parameters without a
        gradient are not changed.

        Raises:
            ConfigurationError: A gradient is sparse.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            self.loss = result.detach() if isinstance(result, Tensor) else result
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise ConfigurationError(
                "A gradient is sparse, which momentum does not support: build the embedding with "
                "sparse=False."
            )
        for group in self.param_groups:
            held = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            if held:
                move = self._step_others if group["algo"] == ADAMW else self._step_matrices
                move(group, held)
        self.loss = None  # it is not valid for the next step
        return result

    # ---- matrices ----

    def _step_matrices(self, group: dict[str, Any], held: Sequence[int]) -> None:
        params: list[Tensor] = group["params"]
        step = max([self._count_on(params[i]) for i in held])
        alike: dict[tuple[Ranks | None, torch.device, torch.dtype], list[int]] = {}
        for i in held:
            key = shards_of(params[i]), params[i].device, params[i].dtype
            alike.setdefault(key, []).append(i)
        for (ranks, device, _), places in alike.items():
            if ranks is not None and ranks not in self._sharing:
                self._sharing[ranks] = Shards(ranks)
            sharing = self._sharing[ranks]
            is_alone_on_a_cpu = device.type == "cpu" and type(sharing) is Sharing
            limit = _ON_A_CPU if is_alone_on_a_cpu else _AT_ONCE * sharing.num_shares
            for chunk in _chunks(places, params, limit):
                self._step_shared(group, chunk, sharing, step)

    def _step_shared(
        self, group: dict[str, Any], places: Sequence[int], sharing: Sharing, step: int
    ) -> None:
        params = [group["params"][i] for i in places]
        own = {name: value for name, value in group.items() if name != "params"}
        options = {**own, "step": step, "loss": self.loss}

        layouts = [group["layouts"][i] for i in places]
        states = [self._rule_state(parameter) for parameter in params]
        rule = rule_named(group["algo"])

        def compute(whole: Mapping[int, Tensor]) -> dict[int, ComputedTensor]:
            return directions_of(whole, layouts, states, rule, options)

        moved = sharing.compute(params, self._updates(group, params), compute)
        for parameter, result in zip(params, moved, strict=True):
            self.state[parameter].update(result.state)
        self._move_(params, [result.tensor for result in moved], group)

    def _updates(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
        """Update the momentum, and return this rank's rows of the rule's input."""
        mu = group["momentum"]
        momenta = [local(self._stored(p, "momentum_buffer")) for p in params]
        gradients = [local(p.grad) for p in params if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - mu)
        if not group["nesterov"]:
            return momenta
        return list(torch._foreach_lerp(gradients, momenta, mu))

    def _move_(
        self, params: Sequence[Tensor], directions: Sequence[Tensor], group: dict[str, Any]
    ) -> None:
        """Apply W ← (1 − η λ) W − η D to this rank's rows."""
        weights = [local(p) for p in params]
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            for weight, direction in zip(weights, directions, strict=True):
                weight.sub_(weight * (weight * direction > 0), alpha=decay)
        elif decay:
            torch._foreach_mul_(weights, 1 - decay)
        torch._foreach_add_(weights, list(directions), alpha=-lr)

    def _rule_state(self, parameter: Tensor) -> State:
        return {n: value for n, value in self.state[parameter].items() if _is_of_a_rule(n)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count_on(self, parameter: Tensor) -> int:
        # The count is on the host, so a rule that needs it does not wait for the device.
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)).cpu() + 1
        return int(state["step"])

    # ---- other parameters ----

    def _step_others(self, group: dict[str, Any], held: Sequence[int]) -> None:
        params = [group["params"][i] for i in held]
        for parameter in params:
            state = self.state[parameter]
            count = state.get("step", torch.zeros((), dtype=torch.float32))
            state["step"] = count.to(parameter.device)  # the fused kernel needs it there
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            [local(self._stored(p, "exp_avg")) for p in params],
            [local(self._stored(p, "exp_avg_sq")) for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _stored(
        self, parameter: Tensor, name: str, start: Callable[[Tensor], Tensor] = torch.zeros_like
    ) -> Tensor:
        """Return a tensor of a parameter's state, which starts as a function of the parameter."""
        state = self.state[parameter]
        if name not in state:
            state[name] = start(parameter.detach())
        found: Tensor = state[name]
        return found


def _chunks(places: Sequence[int], params: Sequence[Tensor], limit: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    num_elements = 0
    for place in places:
        num_elements += params[place].numel()
        if chunk and num_elements > limit:
            yield chunk
            chunk, num_elements = [], params[place].numel()
        chunk.append(place)
    yield chunk


def _parts(layout: Sequence[Any]) -> list[list[int]]:
    return [list(part) for part in layout[1]] if len(layout) > 1 else []


def _is_of_a_rule(name: str) -> bool:
    """Return whether a state belongs to a rule: its name ends in a dot and a part's number."""
    return "." in name


def _complete_(group: dict[str, Any]) -> None:
    """Check a group's options, and add missing layouts.

    Raises:
        ConfigurationError: See `MatrixOptimizer`.
    """
    for name, value in (
        ("momentum", group["momentum"]),
        ("beta1", group["betas"][0]),
        ("beta2", group["betas"][1]),
    ):
        if not 0 <= value < 1:
            raise ConfigurationError(f"{name} must be at least 0 and below 1; you gave {value!r}.")
    if not (group["lr"] >= 0 and group["weight_decay"] >= 0 and group["eps"] > 0):
        raise ConfigurationError(
            f"You gave lr={group['lr']}, weight_decay={group['weight_decay']}, "
            f"eps={group['eps']}; the first two must be 0 or more, and eps above 0."
        )
    if group["algo"] == ADAMW:
        return
    check_choice("scale", group["scale"], UPDATE_SCALES)
    rule_named(group["algo"]).check(group)
    group["layouts"] = list(group["layouts"] or [WHOLE] * len(group["params"]))
    if len(group["layouts"]) != len(group["params"]):
        raise ConfigurationError(
            f"A group needs one layout for each parameter; you gave {len(group['layouts'])} "
            f"layouts for {len(group['params'])} parameters."
        )
    for parameter in group["params"]:
        if parameter.ndim not in (2, 3) or 0 in parameter.shape:
            raise ConfigurationError(
                f"{group['algo']} moves matrices and stacks of them; a parameter of shape "
                f"{tuple(parameter.shape)} belongs in a group with algo='adamw'."
            )
