"""Every option of PSS, once: `PSSConfig`, its presets, and the words each option may take."""

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

__all__ = ["PRESETS", "PSSConfig"]

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class PSSConfig:
    """Options of Parametric Singularity Smoothing; plain values, so that they survive CLI and YAML.

    Start from a preset and change what you need:

    >>> PSSConfig.preset("paper", threshold_ratio=3.0).threshold_ratio
    3.0

    Raises:
        ConfigurationError: An option is out of its range, or two of them contradict each other.
    """

    # docs/evidence, headline: the floor is what helps from random weights.
    detectors: tuple[DetectorName, ...] = field(
        default=("grad_norm_ratio", "stable_rank_floor"),
        metadata={
            "help": "What is watched; any of them may fire. An empty list only guards against "
            "non-finite steps."
        },
    )
    # The paper's. docs/evidence, variants: 1.5 is within the scatter.
    threshold_ratio: float = field(
        default=2.5,
        metadata={
            "help": "Fire when a norm exceeds this many times its moving average (tau; 2.5 in the "
            "paper)."
        },
    )
    # docs/evidence, variants: 0.03 fires at the same steps.
    baseline_alpha: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the newest value in the moving average (alpha; not stated in the "
            "paper)."
        },
    )
    # Not measured: long enough for a first average, short of the end of a warm-up.
    calibration_steps: int = field(
        default=20,
        metadata={
            "help": "Accepted values that a baseline must have seen before its detector may fire."
        },
    )
    # Not measured.
    patience_steps: int = field(
        default=50,
        metadata={
            "help": "After so many firings in a row the new level is accepted and learned afresh."
        },
    )
    # docs/evidence, variants: 0.8 is as good, 0.5 is worse by 0.11.
    floor_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Stable-rank floor (rho) in units of i.i.d. noise of the same shape, "
            "mn/(sqrt(m)+sqrt(n))^2; half of it where the weights look trained."
        },
    )
    # By reason: pretrained weights lie below noise, and are not to be changed at the start.
    floor_reference: Literal["start", "noise"] = field(
        default="start",
        metadata={
            "help": "start: no floor lies above rho times the matrix's own stable rank when PSS "
            "began (safe for pretrained weights); noise: the shape alone decides."
        },
    )
    # Not measured apart: docs/evidence, variants, has it at this value only.
    stable_rank_drop: float = field(
        default=0.5,
        metadata={
            "help": "stable_rank_drop fires below (1 - this) times the matrix's own moving average."
        },
    )
    # docs/evidence, early warnings: 1.3 warned before 4 of 4 explosions, and never on healthy runs.
    spectral_norm_ratio: float = field(
        default=1.3,
        metadata={
            "help": "spectral_norm_ratio fires above this many times the moving average of a "
            "matrix's own spectral norm: for Muon, whose gradients hardly spike."
        },
    )
    # docs/evidence, variants: 10 is worse by 0.11; 2 better by 0.08, at twice the cost.
    check_every_steps: int = field(
        default=5,
        metadata={
            "help": "Rhythm of the detectors that look at weights (stable_rank_…, "
            "spectral_norm_ratio), in optimizer steps."
        },
    )
    # docs/evidence, variants: no other function is better in all seeds.
    smoothing: SmoothingName = field(
        default="clip",
        metadata={
            "help": "Map on the dominant singular values when a norm or a stable-rank drop fires; "
            "the floor always caps at the level that restores it."
        },
    )
    # docs/experiments.md, harm to trained weights.
    anchor: Literal["healthy", "off"] = field(
        default="healthy",
        metadata={
            "help": "healthy: smoothing lowers no leading singular value below what the matrix had "
            "when it was last known to be healthy, so that a sound matrix is left alone; off: as "
            "published."
        },
    )
    # docs/experiments.md, harm to trained weights.
    trial: Literal["off", "spikes", "all"] = field(
        default="spikes",
        metadata={
            "help": "Try an intervention before it is kept: compute the loss of one micro-batch "
            "before and after it, and take it back if the loss rises. spikes: all but those of the "
            "stable-rank floor, which acts often; all: those, too; off: none."
        },
    )
    # docs/experiments.md, harm to trained weights.
    trial_margin_ratio: float = field(
        default=0.002,
        metadata={
            "help": "An intervention that is tried may raise the loss by this share of it, and is "
            "taken back if it raises it by more."
        },
    )
    # By cost; docs/experiments.md: at width 64 eight do what 32 do.
    max_rank: int = field(
        default=32,
        metadata={
            "help": "At most so many leading singular values of a matrix move in one intervention."
        },
    )
    # docs/evidence, variants: true is worse.
    keep_frobenius: bool = field(
        default=False,
        metadata={"help": "Rescale a smoothed matrix to the Frobenius norm it had."},
    )
    # docs/evidence, variants: the others are within the scatter, or worse.
    moments: Literal["keep", "reset", "project"] = field(
        default="keep",
        metadata={
            "help": "The optimizer's first moment of a smoothed matrix: keep it, set it to zero "
            "(reset), or take out of it what would grow the lowered values again (project)."
        },
    )
    # docs/evidence, variants: `fired` is worse by far.
    scope: Literal["all", "fired"] = field(
        default="all",
        metadata={
            "help": "Smooth all selected matrices, or those whose own reading fired (a detector "
            "that reads one number for the whole model always means all)."
        },
    )
    # As published. docs/evidence, variants: within the scatter; docs/experiments.md, LoRA: skip
    # is better without clipping.
    spike_update: Literal["apply", "skip"] = field(
        default="apply",
        metadata={
            "help": "On a gradient spike: let the optimizer step first and smooth after it, or "
            "smooth instead."
        },
    )
    # Not measured.
    cooldown_steps: int = field(
        default=10,
        metadata={
            "help": "Steps after an intervention during which norms and drops cause no other."
        },
    )
    max_interventions: int | None = field(
        default=None,
        metadata={"help": "Budget of interventions for the whole run; none by default."},
    )
    on_nonfinite: Literal["skip", "stop"] = field(
        default="skip",
        metadata={
            "help": "A step whose gradient holds NaN or inf: skip its update, or stop before it "
            "with an error."
        },
    )
    max_nonfinite_streak: int = field(
        default=100,
        metadata={
            "help": "Stop after so many non-finite steps in a row: such a run learns nothing."
        },
    )
    # By caution: going back changes what a run is trained on.
    on_failure: Literal["smooth", "rollback", "stop"] = field(
        default="smooth",
        metadata={
            "help": "Where interventions fail again and again: go on smoothing; roll back to the "
            "last healthy checkpoint and go on behind the batches that led there (one process and "
            "DDP); or stop with an error."
        },
    )
    # Not measured.
    failure_window_steps: int = field(
        default=50,
        metadata={
            "help": "An intervention has failed where another follows within so many steps, or the "
            "loss is not back after them."
        },
    )
    # Not measured.
    max_failed_interventions: int = field(
        default=3,
        metadata={"help": "So many failed interventions in a row are a failure."},
    )
    # Not measured.
    max_rollbacks: int = field(
        default=3,
        metadata={"help": "Roll back at most so often in one session, then stop."},
    )
    missing_state: Literal["refuse", "fresh"] = field(
        default="refuse",
        metadata={
            "help": "A checkpoint without a readable optimizer.pt or scheduler.pt: refuse to "
            "resume it, or begin that part anew."
        },
    )
    roles: tuple[Role, ...] = field(
        default=("attention", "mlp"),
        metadata={"help": "Which weight matrices are watched and smoothed."},
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Regular expressions on parameter names: matrices to add to the selection."
        },
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Regular expressions on parameter names: matrices to leave out."},
    )
    smooth_on_resume: bool = field(
        default=False,
        metadata={
            "help": "Smooth once, right after a checkpoint was loaded: to repair a run that has "
            "failed. What it saves is not smoothed again where it is resumed into the same "
            "output_dir. With the floor detector up to the floors (set floor_reference=noise, for "
            "the weights are damaged already), otherwise with `smoothing`."
        },
    )
    observe_only: bool = field(
        default=False,
        metadata={"help": "Notice and report, but never touch a weight or an update."},
    )
    health_every_steps: int = field(
        default=0,
        metadata={
            "help": "Write every matrix's stable rank, or all that `health` measures, to "
            "pss_health.jsonl at this rhythm; 0 is never, or with `health` every 10 steps (full: "
            "every 100)."
        },
    )
    health: Literal["off", "light", "standard", "full"] = field(
        default="off",
        metadata={
            "help": "Measure the model's health: light (norms and stable ranks), standard (updates "
            "and the optimizer too) or full (whole spectra too). It decides nothing."
        },
    )

    def __post_init__(self) -> None:
        given: object = self.health
        if given is False:  # what YAML makes of the bare word
            object.__setattr__(self, "health", "off")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is tuple:
                # YAML and argparse bring lists; a frozen record keeps tuples.
                object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
            if hint is bool:
                _check_truth(name, getattr(self, name))
            _check_choice(name, getattr(self, name), _words(hint))
        for name, (low, high) in _RANGES.items():
            _check_range(name, getattr(self, name), low, high)
        for name, minimum in _MINIMA.items():
            _check_count(name, getattr(self, name), minimum)
        _check_patterns("include", self.include)
        _check_patterns("exclude", self.exclude)
        if self.max_interventions is not None:
            _check_count("max_interventions", self.max_interventions, 0)
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
        for option in sorted(overrides):
            if option in _READERS and not _READERS[option] & set(config.detectors):
                _warn_once(
                    f"{option} has no effect with the detectors "
                    f"{', '.join(config.detectors) or 'none'}; only "
                    f"{', '.join(sorted(_READERS[option]))} read it."
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

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that JSON and YAML can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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

_NORMS = {"grad_norm_ratio", "matrix_grad_norm_ratio", "update_norm_ratio"}
_WEIGHTS = {"stable_rank_floor", "stable_rank_drop", "spectral_norm_ratio"}
_FLOOR = {"stable_rank_floor"}
_SPIKES = _NORMS | {"stable_rank_drop", "spectral_norm_ratio"}
# Options that only some detectors read: whoever sets one without them is told.
_READERS: Mapping[str, set[str]] = {
    "threshold_ratio": _NORMS,
    "baseline_alpha": _SPIKES,
    "calibration_steps": _SPIKES,
    "patience_steps": _SPIKES,
    "floor_ratio": _FLOOR,
    "floor_reference": _FLOOR,
    "stable_rank_drop": {"stable_rank_drop"},
    "spectral_norm_ratio": {"spectral_norm_ratio"},
    "check_every_steps": _WEIGHTS,
    "smoothing": _SPIKES,
    "anchor": _SPIKES,
    "scope": {"matrix_grad_norm_ratio", "stable_rank_drop", "spectral_norm_ratio"},
    "spike_update": {"grad_norm_ratio", "matrix_grad_norm_ratio"},
    "cooldown_steps": _SPIKES,
}
_ANY = sys.float_info.max
# name: (above, at most)
_RANGES = {
    "baseline_alpha": (0.0, 1.0),
    "threshold_ratio": (1.0, _ANY),
    "spectral_norm_ratio": (1.0, _ANY),
    "floor_ratio": (0.0, _ANY),
    "stable_rank_drop": (0.0, 0.99),
    "trial_margin_ratio": (0.0, _ANY),
}
_MINIMA = {
    "calibration_steps": 1,
    "patience_steps": 1,
    "check_every_steps": 1,
    "max_rank": 1,
    "cooldown_steps": 0,
    "max_nonfinite_streak": 1,
    "failure_window_steps": 1,
    "max_failed_interventions": 1,
    "max_rollbacks": 1,
    "health_every_steps": 0,
}


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


def _check_truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):  # the word "false" is true to Python
        raise ConfigurationError(f"{name} is true or false; you gave {value!r}.")


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
