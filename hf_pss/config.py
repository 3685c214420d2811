"""Define the options of PSS and of recovery, with their presets, limits and help texts."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from hf_pss.errors import ConfigurationError, did_you_mean

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
        default: The value if the user gives none.
        help: The text that ``--help`` prints.
        minimum: The smallest integer that is allowed. If the default is None, None is
            allowed as well.
        above: The number must be greater than this.
        at_most: The number must not be greater than this.
        read_by: The detectors that read the option. Without one of them it has no effect.
    """
    limits = {"minimum": minimum, "above": above, "at_most": at_most}
    return field(default=default, metadata={"help": help, "read_by": read_by, **limits})


class Options:
    """Base class of frozen dataclasses whose fields are made by `option`. It checks all values."""

    __slots__ = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):  # type: ignore[arg-type]
            name, hint = spec.name, hints[spec.name]
            if get_origin(hint) is tuple:
                # YAML and argparse produce lists, but a frozen dataclass needs tuples.
                object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
            value = getattr(self, name)
            is_missing = value is None and spec.default is None
            if not is_missing and (required := _requirement(value, hint, spec.metadata)):
                given = ", ".join(map(repr, value if isinstance(value, tuple) else (value,)))
                raise ConfigurationError(f"{name} {required}; you gave {given}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values that JSON and YAML can hold."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


_spelling: ContextVar[Callable[[str], str]] = ContextVar("spelling", default=str)


def spelt(warning: str) -> str:
    """Return a warning with its options as the user typed them; see `spelt_as_arguments`."""
    return _spelling.get()(warning)


@contextmanager
def spelt_as_arguments(kind: type[Options]) -> Iterator[None]:
    """Add ``pss_`` to options in errors and in texts of `spelt` while the block runs.

    An option is the first word of the text, or stands before ``=``, or has an underscore.

    Args:
        kind: The class of the options.
    """
    names = [spec.name for spec in fields(kind)]  # type: ignore[arg-type]
    long = {name for name in names if "_" in name} - set(get_args(DetectorName))
    either = "|".join(names)
    pattern = re.compile(rf"^(?:{either})\b|\b(?:{either})(?==)|\b(?:{'|'.join(sorted(long))})\b")
    add = partial(pattern.sub, r"pss_\g<0>")
    token = _spelling.set(add)
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(add(str(error))) from error
    finally:
        _spelling.reset(token)


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


# The detectors that read some of the options.
_NORMS = frozenset({"grad_norm_ratio", "matrix_grad_norm_ratio", "update_norm_ratio"})
_FLOOR = frozenset({"stable_rank_floor"})
_OWN = frozenset({"stable_rank_drop", "spectral_norm_ratio"})
_SPIKES = _NORMS | _OWN


@dataclass(frozen=True, slots=True)
class PSSConfig(Options):
    """Options of Parametric Singularity Smoothing, as plain values for the command line and YAML.

    Start from a preset and change the options that you need:

    >>> PSSConfig.preset("paper", threshold_ratio=3.0).threshold_ratio
    3.0

    Raises:
        ConfigurationError: An option is out of range, or two options contradict each other.
    """

    # docs/experiments.md: the floor prevents collapses without a spike, from random weights.
    detectors: tuple[DetectorName, ...] = option(
        ("grad_norm_ratio", "stable_rank_floor"),
        "Detectors that watch the run. Any of them may fire. An empty list only guards against "
        "non-finite steps.",
    )
    # The value of the 2024 submission. docs/experiments, variants: 1.5 is within the scatter.
    threshold_ratio: float = option(
        2.5,
        "Fire when a norm exceeds this many times its moving average (tau; 2.5 in the paper).",
        above=1.0,
        read_by=_NORMS,
    )
    # docs/experiments, variants: 0.03 fires at the same steps.
    baseline_alpha: float = option(
        0.1,
        "Weight of the newest value in the moving average (alpha; not stated in the paper).",
        above=0.0,
        at_most=1.0,
        read_by=_SPIKES,
    )
    # Not measured. The value is long enough for a first average and shorter than a usual warm-up.
    calibration_steps: int = option(
        20,
        "A detector may fire after its baseline has learned from this many accepted values.",
        minimum=1,
        read_by=_SPIKES,
    )
    # Not measured.
    patience_steps: int = option(
        50,
        "After this many firings in a row the detector accepts the new level as its baseline.",
        minimum=1,
        read_by=_SPIKES,
    )
    # docs/experiments, variants: 0.8 is as good, 0.5 is worse by 0.11.
    floor_ratio: float = option(
        1.0,
        "Stable-rank floor (rho) in units of the stable rank of i.i.d. noise of the same shape, "
        "mn/(sqrt(m)+sqrt(n))^2. Every floor is halved if the median stable rank is below 0.8 of "
        "noise, as in trained weights.",
        above=0.0,
        read_by=_FLOOR,
    )
    # Not measured. Pretrained weights have lower stable ranks than noise, and PSS must not change
    # them at the start.
    floor_reference: Literal["start", "noise"] = option(
        "start",
        "start: the floor is at most rho times the matrix's own stable rank at the start (safe for "
        "pretrained weights). noise: the floor depends on the shape alone.",
        read_by=_FLOOR,
    )
    # Not measured separately. docs/experiments, variants, uses only this value.
    stable_rank_drop: float = option(
        0.5,
        "stable_rank_drop fires if a matrix's stable rank falls below (1 - this) times its moving "
        "average.",
        above=0.0,
        at_most=0.99,
        read_by=frozenset({"stable_rank_drop"}),
    )
    # docs/experiments, early warnings: 1.3 warned before 4 of 4 explosions.
    spectral_norm_ratio: float = option(
        1.3,
        "spectral_norm_ratio fires above this many times the moving average of the matrix's "
        "spectral norm. It suits Muon, where gradient norms rarely spike.",
        above=1.0,
        read_by=frozenset({"spectral_norm_ratio"}),
    )
    # docs/experiments, variants: 10 is worse by 0.11. 2 is better by 0.08, but costs twice as much.
    check_every_steps: int = option(
        5,
        "Interval of the detectors that read weights (stable_rank_…, spectral_norm_ratio), in "
        "optimizer steps.",
        minimum=1,
        read_by=_FLOOR | _OWN,
    )
    # docs/experiments, variants: no other function is better in all seeds.
    smoothing: SmoothingName = option(
        "clip",
        "Smoothing function for the dominant singular values when a norm or a stable-rank drop "
        "fires. The floor always caps them at the level that restores it.",
        read_by=_SPIKES,
    )
    # docs/experiments.md, harm to trained weights.
    anchor: Literal["healthy", "off"] = option(
        "healthy",
        "healthy: smoothing lowers no leading singular value below its last healthy value, so a "
        "healthy matrix does not change. off: as published.",
        read_by=_SPIKES,
    )
    # docs/experiments.md, harm to trained weights.
    trial: Literal["off", "spikes", "all"] = option(
        "spikes",
        "Compute the loss of one micro-batch before and after an intervention, and undo the "
        "intervention if the loss rises. spikes: for all interventions but those of the "
        "stable-rank floor, which acts often. all: for all interventions. off: never.",
    )
    # docs/experiments.md, harm to trained weights.
    trial_margin_ratio: float = option(
        0.002,
        "A trial undoes an intervention that raises the loss by more than this share of it.",
        above=0.0,
    )
    # The value limits the cost. docs/experiments.md: at width 64, a rank of 8 works as well as 32.
    max_rank: int = option(
        32,
        "An intervention changes at most this many leading singular values of a matrix.",
        minimum=1,
    )
    # docs/experiments, variants: true is worse.
    keep_frobenius: bool = option(
        False,
        "Rescale a smoothed matrix to its Frobenius norm before smoothing.",
    )
    # docs/experiments, variants: the other values are within the scatter or worse.
    moments: Literal["keep", "reset", "project"] = option(
        "keep",
        "The optimizer's first moment of a smoothed matrix. keep: unchanged. reset: set to zero. "
        "project: remove the part that would raise the lowered singular values again.",
    )
    # docs/experiments, variants: `fired` is worse by far.
    scope: Literal["all", "fired"] = option(
        "all",
        "all: smooth all selected matrices. fired: only those whose own value fired. A detector of "
        "one number for the whole model always smooths all.",
        read_by=_OWN | {"matrix_grad_norm_ratio"},
    )
    # The default is as published. docs/experiments, variants: the difference is within the scatter.
    # docs/experiments.md, LoRA: skip is better without clipping.
    spike_update: Literal["apply", "skip"] = option(
        "apply",
        "On a gradient spike, apply: take the optimizer step and smooth after it. skip: smooth and "
        "skip the step.",
        read_by=frozenset({"grad_norm_ratio", "matrix_grad_norm_ratio"}),
    )
    # Not measured.
    cooldown_steps: int = option(
        10,
        "For this many steps after an intervention, norms and drops do not cause another one.",
        minimum=0,
        read_by=_SPIKES,
    )
    max_interventions: int | None = option(
        None,
        "Limit on the interventions of a run. By default there is none.",
        minimum=0,
    )
    on_nonfinite: Literal["skip", "stop"] = option(
        "skip",
        "If a gradient holds NaN or inf, skip: skip the update. stop: stop before it, with an "
        "error.",
    )
    max_nonfinite_streak: int = option(
        100,
        "Stop after this many non-finite steps in a row, because such a run learns nothing.",
        minimum=1,
    )
    roles: tuple[Role, ...] = option(
        ("attention", "mlp"),
        "The weight matrices that PSS watches and smooths.",
    )
    include: tuple[str, ...] = option(
        (),
        "Regular expressions for names of parameters to add to the selection.",
    )
    exclude: tuple[str, ...] = option(
        (),
        "Regular expressions for names of parameters to leave out.",
    )
    smooth_on_resume: bool = option(
        False,
        "Smooth once, directly after a checkpoint is loaded, to repair a failed run. Later resumes "
        "into the same output_dir do not smooth again. With the floor detector the weights are "
        "raised to the floors (set floor_reference=noise, because the weights are damaged), "
        "otherwise `smoothing` is applied.",
    )
    observe_only: bool = option(
        False,
        "Detect and report events, but never change a weight, an update or the way of saving.",
    )
    health_every_steps: int = option(
        0,
        "Write the stable rank of every matrix, or all metrics of `health`, to pss_health.jsonl "
        "once per this many steps. 0: never, or with `health` every 10 steps (full: every 100).",
        minimum=0,
    )
    health: Literal["off", "light", "standard", "full"] = option(
        "off",
        "Metrics of the model's health: light (norms and stable ranks), standard (also updates and "
        "the optimizer) or full (also whole spectra). They do not influence PSS.",
    )

    def __post_init__(self) -> None:
        given: object = self.health
        if given is False:  # YAML reads the bare word off as false
            object.__setattr__(self, "health", "off")
        Options.__post_init__(self)
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigurationError(
                        f"{name} holds {pattern!r}, which is not a regular expression: {error}."
                    ) from error
        if self.observe_only and self.smooth_on_resume:
            raise ConfigurationError(
                "observe_only changes no weight, and smooth_on_resume changes all: set one of them "
                "to false."
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
        for given in sorted(set(overrides) - known):
            bare = given.removeprefix("pss_")
            if bare in known:
                raise ConfigurationError(
                    f"PSSConfig has no option {given}. Its name here is {bare}, without pss_."
                )
            if bare in {spec.name for spec in fields(RecoveryConfig)}:
                raise ConfigurationError(
                    f"{given} is not an option of PSSConfig. Write RecoveryConfig({bare}=...) for "
                    f"PSSTrainer(recovery=...), or PSSTrainingArguments(pss_{bare}=...)."
                )
            hint = did_you_mean(bare, known) or f" It has {', '.join(sorted(known))}."
            raise ConfigurationError(f"PSS has no option {given}.{hint}")
        config = replace(cls(**PRESETS[name]), **overrides)
        for warning in config._without_effect(overrides):
            _warn_once(spelt(warning))
        return config

    def _without_effect(self, given: Collection[str]) -> Iterator[str]:
        """Yield a warning for each given option that has no effect."""
        if "trial_margin_ratio" in given and self.trial == "off":
            yield "trial_margin_ratio has no effect with trial='off'."
        if "trial" in given and self.trial == "spikes" and not self.reacts_to_spikes:
            yield "trial='spikes' has no effect on the stable-rank floor; trial='all' has."
        for spec in fields(self):
            readers = spec.metadata["read_by"]
            if spec.name in given and readers and readers.isdisjoint(self.detectors):
                yield (
                    f"{spec.name} has no effect with the detectors "
                    f"{', '.join(self.detectors) or 'none'}; only "
                    f"{', '.join(sorted(readers))} read it."
                )

    @property
    def reacts_to_spikes(self) -> bool:
        """Whether a detector responds with smoothing. The stable-rank floor only caps."""
        return not _SPIKES.isdisjoint(self.detectors)

    def describe(self) -> str:
        """Return the nearest preset and the options that differ from it.

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


def check_config(config: object) -> None:
    """Raise a `ConfigurationError` if the options are not a PSSConfig, such as a preset's name."""
    if not isinstance(config, PSSConfig):
        raise ConfigurationError(
            "The options of PSS are a PSSConfig, such as PSSConfig.preset('floor'); you gave "
            f"{config!r}."
        )


@dataclass(frozen=True, slots=True)
class RecoveryConfig(Options):
    """Options of `SafeCheckpointsMixin` and `RollbackMixin`. They do not depend on PSS.

    >>> RecoveryConfig(on_failure="rollback").max_rollbacks
    3

    Raises:
        ConfigurationError: An option is out of range.
    """

    # The default is cautious, because a rollback changes which batches a run is trained on.
    on_failure: Literal["smooth", "rollback", "stop"] = option(
        "smooth",
        "If interventions fail repeatedly, smooth: continue to smooth; rollback: return to the "
        "last healthy checkpoint and skip the batches after it (one process and DDP); stop: stop "
        "with an error.",
    )
    # Not measured.
    failure_window_steps: int = option(
        50,
        "An intervention has failed if another one follows within this many steps, or if the loss "
        "has not returned to its level after them.",
        minimum=1,
    )
    # Not measured.
    max_failed_interventions: int = option(
        3, "This many failed interventions in a row count as a failure of the run.", minimum=1
    )
    # Not measured.
    max_rollbacks: int = option(
        3, "Roll back at most this many times in one call of train(), then stop.", minimum=1
    )
    missing_state: Literal["refuse", "fresh"] = option(
        "refuse",
        "If optimizer.pt or scheduler.pt of a checkpoint is missing or unreadable, refuse: do not "
        "resume; fresh: resume and start that part from its initial state.",
    )


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "anchored": {},
        "floor": {"detectors": ("stable_rank_floor",)},
        "paper": {"detectors": ("grad_norm_ratio",), "anchor": "off", "trial": "off"},
    }
)
"""Named starting points. The defaults of `PSSConfig` are those of ``anchored``."""


@cache
def _warn_once(message: str) -> None:
    # A Trainer reads the configuration from its arguments more than once.
    logger.warning("%s", message)


def _words(hint: Any) -> tuple[str, ...]:
    """Return the words that ``Literal[...]`` or ``tuple[Literal[...], ...]`` allows, if any."""
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


def _requirement(value: Any, hint: Any, limits: Mapping[str, Any]) -> str | None:
    """Return what a value must be, or None if it is that."""
    words, minimum, low, high = _words(hint), limits["minimum"], limits["above"], limits["at_most"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and not isinstance(value, bool):  # Python treats "false" as true
        return "is true or false"
    if words and not set(value if isinstance(value, tuple) else (value,)) <= set(words):
        return f"may be {' or '.join(words)}"
    if low is not None and not (is_number and low < value <= high):  # NaN compares false
        at_most = "" if high == _ANY else f" and at most {high:g}"
        return f"must be a number above {low:g}{at_most}"
    if minimum is not None and not (is_number and isinstance(value, int) and value >= minimum):
        return f"must be a whole number of at least {minimum}"
    return None
