"""Every option of PSS, once: `PSSConfig`, its presets, and the words that each option may take."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from hf_pss.errors import ConfigurationError

__all__ = ["PRESETS", "Options", "PSSConfig", "option"]

logger = logging.getLogger(__name__)

_ANY = sys.float_info.max


def option(
    default: Any,
    help: str,
    *,
    minimum: int | None = None,
    above: float | None = None,
    at_most: float = _ANY,
    read_by: frozenset[str] | None = None,
) -> Any:
    """Return a dataclass field with its help text and its limits.

    Args:
        default: The value where the user gives none.
        help: What ``--help`` prints.
        minimum: Smallest whole number that is allowed; None where a count may be absent, too.
        above: The number must be greater than this.
        at_most: The number may be at most this.
        read_by: Detectors that read the option. Without one of them it has no effect.
    """
    limits = {"minimum": minimum, "above": above, "at_most": at_most, "read_by": read_by}
    return field(default=default, metadata={"help": help, **limits})


class Options:
    """Base of frozen dataclasses whose fields are `option`: it refuses bad values when built."""

    __slots__ = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):  # type: ignore[arg-type]
            name, hint, limits = spec.name, hints[spec.name], spec.metadata
            if get_origin(hint) is tuple:
                # YAML and argparse bring lists; a frozen record keeps tuples.
                object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
            value = getattr(self, name)
            if hint is bool and not isinstance(value, bool):  # the word "false" is true to Python
                raise ConfigurationError(f"{name} is true or false; you gave {value!r}.")
            _check_choice(name, value, _words(hint))
            if limits["above"] is not None:
                _check_range(name, value, limits["above"], limits["at_most"])
            if limits["minimum"] is not None and not (value is None and spec.default is None):
                _check_count(name, value, limits["minimum"])

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that JSON and YAML can hold."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


DetectorName = Literal[
    "grad_norm_ratio",
    "matrix_grad_norm_ratio",
    "update_norm_ratio",
    "stable_rank_floor",
    "stable_rank_drop",
    "spectral_norm_ratio",
]
SmoothingName = Literal["clip", "log", "softplus", "convolution", "softmax", "hammer", "polar"]
Role = Literal["attention", "mlp"]


# What some options are read by.
_NORMS = frozenset({"grad_norm_ratio", "matrix_grad_norm_ratio", "update_norm_ratio"})
_FLOOR = frozenset({"stable_rank_floor"})
_OWN = frozenset({"stable_rank_drop", "spectral_norm_ratio"})
_SPIKES = _NORMS | _OWN


@dataclass(frozen=True, slots=True)
class PSSConfig(Options):
    """Options of Parametric Singularity Smoothing; plain values, so that they survive CLI and YAML.

    Start from a preset and change what you need:

    >>> PSSConfig.preset("paper", threshold_ratio=3.0).threshold_ratio
    3.0

    Raises:
        ConfigurationError: An option is out of its range, or two of them contradict each other.
    """

    # docs/evidence, headline: the floor is what helps from random weights.
    detectors: tuple[DetectorName, ...] = option(
        ("grad_norm_ratio", "stable_rank_floor"),
        "What is watched; any of them may fire. An empty list only guards against "
        "non-finite steps.",
    )
    # The paper's. docs/evidence, variants: 1.5 is within the scatter.
    threshold_ratio: float = option(
        2.5,
        "Fire when a norm exceeds this many times its moving average (tau; 2.5 in the paper).",
        above=1.0,
        read_by=_NORMS,
    )
    # docs/evidence, variants: 0.03 fires at the same steps.
    baseline_alpha: float = option(
        0.1,
        "Weight of the newest value in the moving average (alpha; not stated in the paper).",
        above=0.0,
        at_most=1.0,
        read_by=_SPIKES,
    )
    # Not measured: long enough for a first average, short of the end of a warm-up.
    calibration_steps: int = option(
        20,
        "Accepted values that a baseline must have seen before its detector may fire.",
        minimum=1,
        read_by=_SPIKES,
    )
    # Not measured.
    patience_steps: int = option(
        50,
        "After so many firings in a row the new level is accepted and learned afresh.",
        minimum=1,
        read_by=_SPIKES,
    )
    # docs/evidence, variants: 0.8 is as good, 0.5 is worse by 0.11.
    floor_ratio: float = option(
        1.0,
        "Stable-rank floor (rho) in units of i.i.d. noise of the same shape, "
        "mn/(sqrt(m)+sqrt(n))^2; half of it where the weights look trained.",
        above=0.0,
        read_by=_FLOOR,
    )
    # By reason: pretrained weights lie below noise, and are not to be changed at the start.
    floor_reference: Literal["start", "noise"] = option(
        "start",
        "start: no floor lies above rho times the matrix's own stable rank when PSS "
        "began (safe for pretrained weights); noise: the shape alone decides.",
        read_by=_FLOOR,
    )
    # Not measured apart: docs/evidence, variants, has it at this value only.
    stable_rank_drop: float = option(
        0.5,
        "stable_rank_drop fires below (1 - this) times the matrix's own moving average.",
        above=0.0,
        at_most=0.99,
        read_by=frozenset({"stable_rank_drop"}),
    )
    # docs/evidence, early warnings: 1.3 warned before 4 of 4 explosions, and never on healthy runs.
    spectral_norm_ratio: float = option(
        1.3,
        "spectral_norm_ratio fires above this many times the moving average of a "
        "matrix's own spectral norm: for Muon, whose gradients hardly spike.",
        above=1.0,
        read_by=frozenset({"spectral_norm_ratio"}),
    )
    # docs/evidence, variants: 10 is worse by 0.11; 2 better by 0.08, at twice the cost.
    check_every_steps: int = option(
        5,
        "Rhythm of the detectors that look at weights (stable_rank_…, "
        "spectral_norm_ratio), in optimizer steps.",
        minimum=1,
        read_by=_FLOOR | _OWN,
    )
    # docs/evidence, variants: no other function is better in all seeds.
    smoothing: SmoothingName = option(
        "clip",
        "Map on the dominant singular values when a norm or a stable-rank drop fires; "
        "the floor always caps at the level that restores it.",
        read_by=_SPIKES,
    )
    # docs/experiments.md, harm to trained weights.
    anchor: Literal["healthy", "off"] = option(
        "healthy",
        "healthy: smoothing lowers no leading singular value below what the matrix had "
        "when it was last known to be healthy, so that a sound matrix is left alone; off: as "
        "published.",
        read_by=_SPIKES,
    )
    # docs/experiments.md, harm to trained weights.
    trial: Literal["off", "spikes", "all"] = option(
        "spikes",
        "Try an intervention before it is kept: compute the loss of one micro-batch "
        "before and after it, and take it back if the loss rises. spikes: all but those of the "
        "stable-rank floor, which acts often; all: those, too; off: none.",
    )
    # docs/experiments.md, harm to trained weights.
    trial_margin_ratio: float = option(
        0.002,
        "An intervention that is tried may raise the loss by this share of it, and is "
        "taken back if it raises it by more.",
        above=0.0,
    )
    # By cost; docs/experiments.md: at width 64 eight do what 32 do.
    max_rank: int = option(
        32,
        "At most so many leading singular values of a matrix move in one intervention.",
        minimum=1,
    )
    # docs/evidence, variants: true is worse.
    keep_frobenius: bool = option(
        False,
        "Rescale a smoothed matrix to the Frobenius norm it had.",
    )
    # docs/evidence, variants: the others are within the scatter, or worse.
    moments: Literal["keep", "reset", "project"] = option(
        "keep",
        "The optimizer's first moment of a smoothed matrix: keep it, set it to zero "
        "(reset), or take out of it what would grow the lowered values again (project).",
    )
    # docs/evidence, variants: `fired` is worse by far.
    scope: Literal["all", "fired"] = option(
        "all",
        "Smooth all selected matrices, or those whose own reading fired (a detector "
        "that reads one number for the whole model always means all).",
        read_by=_OWN | {"matrix_grad_norm_ratio"},
    )
    # As published. docs/evidence, variants: within the scatter; docs/experiments.md, LoRA: skip
    # is better without clipping.
    spike_update: Literal["apply", "skip"] = option(
        "apply",
        "On a gradient spike: let the optimizer step first and smooth after it, or smooth instead.",
        read_by=frozenset({"grad_norm_ratio", "matrix_grad_norm_ratio"}),
    )
    # Not measured.
    cooldown_steps: int = option(
        10,
        "Steps after an intervention during which norms and drops cause no other.",
        minimum=0,
        read_by=_SPIKES,
    )
    max_interventions: int | None = option(
        None,
        "Budget of interventions for the whole run; none by default.",
        minimum=0,
    )
    on_nonfinite: Literal["skip", "stop"] = option(
        "skip",
        "A step whose gradient holds NaN or inf: skip its update, or stop before it with an error.",
    )
    max_nonfinite_streak: int = option(
        100,
        "Stop after so many non-finite steps in a row: such a run learns nothing.",
        minimum=1,
    )
    roles: tuple[Role, ...] = option(
        ("attention", "mlp"),
        "Which weight matrices are watched and smoothed.",
    )
    include: tuple[str, ...] = option(
        (),
        "Regular expressions on parameter names: matrices to add to the selection.",
    )
    exclude: tuple[str, ...] = option(
        (),
        "Regular expressions on parameter names: matrices to leave out.",
    )
    smooth_on_resume: bool = option(
        False,
        "Smooth once, right after a checkpoint was loaded: to repair a run that has "
        "failed. What it saves is not smoothed again where it is resumed into the same "
        "output_dir. With the floor detector up to the floors (set floor_reference=noise, for "
        "the weights are damaged already), otherwise with `smoothing`.",
    )
    observe_only: bool = option(
        False,
        "Notice and report, but never touch a weight or an update.",
    )
    health_every_steps: int = option(
        0,
        "Write every matrix's stable rank, or all that `health` measures, to "
        "pss_health.jsonl at this rhythm; 0 is never, or with `health` every 10 steps (full: "
        "every 100).",
        minimum=0,
    )
    health: Literal["off", "light", "standard", "full"] = option(
        "off",
        "Measure the model's health: light (norms and stable ranks), standard (updates "
        "and the optimizer too) or full (whole spectra too). It decides nothing.",
    )

    def __post_init__(self) -> None:
        given: object = self.health
        if given is False:  # YAML reads the bare word off as false
            object.__setattr__(self, "health", "off")
        Options.__post_init__(self)
        _check_patterns("include", self.include)
        _check_patterns("exclude", self.exclude)
        if self.observe_only and self.smooth_on_resume:
            raise ConfigurationError(
                "observe_only touches no weight, and smooth_on_resume smooths them all: set one of "
                "them to false."
            )

    @classmethod
    def preset(cls, name: str = "anchored", **overrides: Any) -> Self:
        """Return the named preset with the given options changed.

        Args:
            name: One of `PRESETS`: ``anchored`` (the default, safe for trained weights), ``floor``
                (the stable-rank floor alone) or ``paper`` (as published, for random weights).
            overrides: Options of this class that differ from the preset.

        Raises:
            ConfigurationError: The name or an option is unknown, or a value is out of range.
        """
        if name not in PRESETS:
            raise ConfigurationError(
                f"You asked for the preset {name!r}; choose one of {', '.join(PRESETS)}."
            )
        known = {spec.name for spec in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ConfigurationError(
                f"PSS has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        config = replace(cls(**PRESETS[name]), **overrides)
        if "trial_margin_ratio" in overrides and config.trial == "off":
            _warn_once("trial_margin_ratio has no effect with trial='off'.")
        if overrides.get("trial") == "spikes" and not config.reacts_to_spikes:
            _warn_once("trial='spikes' has no effect on the stable-rank floor; trial='all' has.")
        for spec in fields(cls):
            readers = spec.metadata["read_by"]
            if spec.name in overrides and readers and readers.isdisjoint(config.detectors):
                _warn_once(
                    f"{spec.name} has no effect with the detectors "
                    f"{', '.join(config.detectors) or 'none'}; only "
                    f"{', '.join(sorted(readers))} read it."
                )
        return config

    @property
    def reacts_to_spikes(self) -> bool:
        """Whether some detector calls for smoothing; the stable-rank floor calls for a cap."""
        return not _SPIKES.isdisjoint(self.detectors)

    def describe(self) -> str:
        """Name the preset with the fewest other options, and these.

        >>> PSSConfig.preset("paper", threshold_ratio=3.0).describe()
        'preset paper with threshold_ratio=3.0'
        """
        given = self.to_dict()
        changes = {}
        for name in PRESETS:
            preset = type(self).preset(name).to_dict()
            changes[name] = [f"{k}={v!r}" for k, v in given.items() if v != preset[k]]
        nearest = min(changes, key=lambda name: len(changes[name]))
        others = ", ".join(changes[nearest])
        return f"preset {nearest} with {others}" if others else f"preset {nearest}"


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "anchored": MappingProxyType({}),
        "floor": MappingProxyType({"detectors": ("stable_rank_floor",)}),
        "paper": MappingProxyType(
            {"detectors": ("grad_norm_ratio",), "anchor": "off", "trial": "off"}
        ),
    }
)
"""Named starting points; the options' own defaults are those of ``anchored``."""


@cache
def _warn_once(message: str) -> None:
    # A Trainer asks for its arguments' configuration more than once.
    logger.warning("%s", message)


def _words(hint: Any) -> tuple[str, ...]:
    """Return the words that ``Literal[...]`` or ``tuple[Literal[...], ...]`` allows, or none."""
    literal = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return get_args(literal) if get_origin(literal) is Literal else ()


def _as_tuple(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigurationError(f"{name} is a list of words; you gave {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    given = value if isinstance(value, tuple) else (value,)
    if choices and not set(given) <= set(choices):
        raise ConfigurationError(
            f"{name} may be {' or '.join(choices)}; you gave {', '.join(map(repr, given))}."
        )


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low < value <= high):  # NaN compares false and is refused with the rest
        allowed = f"above {low:g}" if high == _ANY else f"above {low:g} and at most {high:g}"
        raise ConfigurationError(f"{name} must be a number {allowed}; you gave {value!r}.")


def _check_patterns(name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(
                f"{name} holds {pattern!r}, which is no regular expression: {error}."
            ) from error


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigurationError(
            f"{name} must be a whole number of at least {minimum}; you gave {value!r}."
        )
