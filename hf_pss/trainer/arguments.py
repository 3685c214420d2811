"""PSSTrainingArguments: TrainingArguments plus one flat ``pss_*`` argument for each PSS option.

`join_` corrects the defaults of a class that combines PSSTrainingArguments with another arguments
class. ``@dataclass`` takes each field from the first base class that has it, even when that class
only inherits the field. ``class MyConfig(PSSTrainingArguments, SFTConfig)`` would therefore take
``logging_steps`` from PSSTrainingArguments, which inherits it from TrainingArguments, and the
default that trl declares would be lost. With `join_`, each field keeps the default of the class
that declares it.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import types
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, Literal, Optional, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hf_pss.config import PSSConfig, RecoveryConfig, spelt_as_arguments
from hf_pss.errors import ConfigurationError
from hf_pss.trainer.optional import optional_part

logger = logging.getLogger(__name__)


def join_(cls: type[Any]) -> None:
    """Insert a dataclass that has the right defaults between a new class and its bases.

    The new class itself is unchanged, so it may be decorated with ``@dataclass`` or not.

    Args:
        cls: A new class with several dataclasses among its bases.
    """
    if "_is_joint" in vars(cls):  # this is the inserted class itself
        return
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": f"{cls.__qualname__}.bases",
        "__doc__": f"What {cls.__name__} inherits.",
        "__annotations__": {},
        "_is_joint": True,
    }
    inherited: dict[str, Field[Any]] = {}  # the fields that ``@dataclass`` would take
    declared: dict[str, tuple[Field[Any], Any]] = {}  # those of the class that declares them
    # The first base class that has a field wins, so it comes last.
    for base in filter(is_dataclass, reversed(cls.__mro__[1:])):
        inherited |= vars(base).get("__dataclass_fields__", {})
        own, hints = inspect.get_annotations(base), _hints(base)
        for one in fields(base):
            if one.name in own:
                declared[one.name] = one, hints.get(one.name, own[one.name])
    for name, (one, hint) in declared.items():
        if inherited[name] is not one:
            namespace["__annotations__"][name] = hint
            namespace[name] = copy.copy(one)
    joint = type(cls.__name__, cls.__bases__, namespace)
    cls.__bases__ = (dataclass(joint),)


def _hints(base: type[Any]) -> dict[str, Any]:
    # get_type_hints resolves the hints in the module of the class.
    try:
        return get_type_hints(base)
    except NameError:
        return {}


OptimizerName = Literal[
    "adamw", "muon", "normuon", "softmuon", "softsignum", "specmuon", "spectra", "amuse"
]


def _argument(option: Field[Any], hint: Any, default: str) -> tuple[str, Any, Any]:
    """Turn one option of PSSConfig into an argument whose default None keeps the preset's value."""
    shown = list(option.default) if isinstance(option.default, tuple) else option.default
    text = f"{option.metadata['help']} {default}: {shown}.".replace("%", "%%")
    if hint is bool:
        # The command line accepts a bool without a value only if the field has a bool default. No
        # preset sets a bool, so the default of PSSConfig is safe here.
        own = field(default=option.default, metadata={"help": text})
        return f"pss_{option.name}", bool, own
    if get_origin(hint) is tuple:
        hint = list[str]  # argparse and YAML produce lists; PSSConfig checks the entries
    elif get_origin(hint) is types.UnionType:
        hint = get_args(hint)[0]
    # HfArgumentParser understands Optional[...] but not the | operator of types.
    return f"pss_{option.name}", Optional[hint], field(default=None, metadata={"help": text})  # noqa: UP045


_Options = make_dataclass(
    "_Options",
    [
        _argument(option, get_type_hints(options)[option.name], default)
        for options, default in ((PSSConfig, "Preset anchored"), (RecoveryConfig, "Default"))
        for option in fields(options)
    ],
)


# TrainingArguments is the last base class, so that its fields come first and the first positional
# argument is still output_dir.
@dataclass
class PSSTrainingArguments(_Options, TrainingArguments):  # type: ignore[misc, valid-type]
    """TrainingArguments with ``pss_preset`` and one ``pss_*`` argument for each option of PSS.

    A ``pss_*`` argument that you set overrides the preset. The others are None, which keeps the
    value of the preset:

    >>> arguments = PSSTrainingArguments(pss_preset="floor", pss_floor_ratio=0.8, use_cpu=True)
    >>> arguments.pss_config().floor_ratio
    0.8

    ``pss_optim`` trains the weight matrices with an orthogonalised optimizer, or with AdamW at a
    learning rate of their own, and all other parameters with AdamW. The other settings come from
    the usual arguments of `TrainingArguments`, such as ``learning_rate``, ``weight_decay`` and
    ``adam_beta1``.

    >>> PSSTrainingArguments(pss_optim="muon", pss_optim_args="momentum=0.9").optimizer_options()
    {'momentum': 0.9}

    HfArgumentParser and TrlParser read these arguments from the command line
    (``--pss_smoothing log``) and from YAML (``pss_smoothing: log``).

    You can combine this class with another arguments class, in either order. Each field then has
    the default of the first class in the inheritance order that declares it. For example,
    ``class MyConfig(PSSTrainingArguments, SFTConfig)`` keeps the defaults that SFTConfig declares,
    with or without ``@dataclass``.

    Raises:
        ConfigurationError: An option is out of range. The message lists the allowed values.
    """

    # PSSCallback sets this to True. It has no annotation, so that it does not become a field.
    pss_is_heard = False

    pss_preset: Literal["anchored", "floor", "paper"] = field(
        default="anchored",
        metadata={
            "help": "Starting point: anchored (safe for trained weights), floor (the stable-rank "
            "floor alone) or paper (as published, for random weights)."
        },
    )

    pss_optim: Optional[OptimizerName] = field(  # noqa: UP045 (HfArgumentParser)
        default=None,
        metadata={
            "help": "Train the weight matrices with muon or one of its family, or with adamw at a "
            "learning rate of their own, and everything else with AdamW. Default: --optim for "
            "everything."
        },
    )
    pss_optim_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of pss_optim: momentum=0.95,others_lr=3e-4 with muon, "
            "matrix_lr_ratio=0.125 with adamw; in YAML also a mapping. Default: none."
        },
    )

    pss_lr_scale: Optional[float] = field(  # noqa: UP045 (HfArgumentParser)
        default=None,
        metadata={
            "help": "Multiply all learning rates by this factor, also in a resumed run: its "
            "schedule continues from this launch's rates times the factor. Default: the given "
            "rates, and after a resume those of the checkpoint."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if sum(issubclass(base, TrainingArguments) for base in cls.__bases__) > 1:
            join_(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.pss_lr_scale
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale is not None and not (is_number and 0 < scale < math.inf):
            raise ConfigurationError(f"pss_lr_scale is a number above 0; you gave {scale!r}.")
        # Both reject an invalid option now rather than at the first step.
        config, recovery = self.pss_config(), self.recovery_config()
        if config.observe_only and recovery.on_failure != "smooth":
            raise ConfigurationError(
                "pss_observe_only leaves the run as it is, and pss_on_failure="
                f"{self.pss_on_failure!r} changes it: leave one of them out."
            )
        self.optimizer_options()

    def pss_config(self) -> PSSConfig:
        """Return the preset, changed by the options that were set."""
        with spelt_as_arguments(PSSConfig):
            return PSSConfig.preset(self.pss_preset, **self._given(PSSConfig))

    def recovery_config(self) -> RecoveryConfig:
        """Return the options for checkpoints and rollback. Unset options get their defaults."""
        with spelt_as_arguments(RecoveryConfig):
            return RecoveryConfig(**self._given(RecoveryConfig))

    def _given(self, options: type[Any]) -> dict[str, Any]:
        given = {option.name: getattr(self, f"pss_{option.name}") for option in fields(options)}
        return {name: value for name, value in given.items() if value is not None}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of warm-up steps. A Trainer calls this when it builds its schedule.

        If the Trainer does not use PSS, this method logs one warning that lists the ``pss_*``
        options that have no effect.
        """
        if not self.pss_is_heard:
            self.pss_is_heard = True
            self._warn_of_plain_trainer()
        steps: int = super().get_warmup_steps(num_training_steps)
        return steps

    def _warn_of_plain_trainer(self) -> None:
        given = [
            f"{option.name}={getattr(self, option.name)!r}"
            for option in fields(self)
            if option.name.startswith("pss_") and getattr(self, option.name) != option.default
        ]
        if given and self.process_index == 0:
            logger.warning(
                "%s: without effect, because this Trainer is not a PSSTrainer. Use PSSTrainer, "
                "class YourTrainer(PSSTrainerMixin, ...) or PSSCallback().attach(trainer).",
                ", ".join(given),
            )

    def optimizer_options(self) -> dict[str, Any]:
        """Check the options of ``pss_optim`` and return them.

        Raises:
            ConfigurationError: The optimizer does not have one of the options, or options were
                given without ``pss_optim``.
        """
        if self.pss_optim is None:
            if self.pss_optim_args:
                raise ConfigurationError(
                    "pss_optim_args are the options of pss_optim: give that, too, or leave them "
                    "out."
                )
            return {}
        if self.pss_optim not in get_args(OptimizerName):
            raise ConfigurationError(
                f"pss_optim may be {' or '.join(get_args(OptimizerName))}; you gave "
                f"{self.pss_optim!r}."
            )
        options: dict[str, Any] = optional_part("read_options")(self.pss_optim, self.pss_optim_args)
        return options
