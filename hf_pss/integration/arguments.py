"""PSSTrainingArguments: TrainingArguments and every option of PSS as a flat ``pss_*`` argument."""

from __future__ import annotations

import logging
import math
import types
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, Literal, Optional, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.integration.combining import join_
from hf_pss.integration.optimizer_options import OptimizerName, read_options

__all__ = ["PSSTrainingArguments"]

logger = logging.getLogger(__name__)


def _argument(option: Field[Any], hint: Any) -> tuple[str, Any, Any]:
    """Turn one option of PSSConfig into an argument whose default, None, means the preset's."""
    shown = list(option.default) if isinstance(option.default, tuple) else option.default
    text = f"{option.metadata['help']} Preset anchored: {shown}.".replace("%", "%%")
    if hint is bool:
        # Only a bool with a default is a flag that needs no value; no preset sets one.
        own = field(default=option.default, metadata={"help": text})
        return f"pss_{option.name}", bool, own
    if get_origin(hint) is tuple:
        hint = list[str]  # argparse and YAML bring lists; PSSConfig checks the words
    elif get_origin(hint) is types.UnionType:
        hint = get_args(hint)[0]
    # HfArgumentParser reads Optional[...], not the | of types.
    return f"pss_{option.name}", Optional[hint], field(default=None, metadata={"help": text})  # noqa: UP045


_HINTS = get_type_hints(PSSConfig)
_Options = make_dataclass(
    "_Options", [_argument(option, _HINTS[option.name]) for option in fields(PSSConfig)]
)


# TrainingArguments is the last base: so its fields come first, and `("out")` is still the folder.
@dataclass
class PSSTrainingArguments(_Options, TrainingArguments):  # type: ignore[misc, valid-type]
    """TrainingArguments with ``pss_preset`` and one ``pss_*`` argument for each option of PSS.

    A ``pss_*`` argument that you set overrides the preset; the others, None, leave it as it is:

    >>> arguments = PSSTrainingArguments(pss_preset="floor", pss_floor_ratio=0.8, use_cpu=True)
    >>> arguments.pss_config().floor_ratio
    0.8

    ``pss_optim`` trains the weight matrices with an orthogonalised optimizer and all else with
    AdamW; `TrainingArguments` says the rest, as it does for AdamW: ``learning_rate``,
    ``weight_decay``, ``adam_beta1``.

    >>> PSSTrainingArguments(pss_optim="muon", pss_optim_args="momentum=0.9").optimizer_options()
    {'momentum': 0.9}

    They work from the command line (``--pss_smoothing log``) and from YAML
    (``pss_smoothing: log``) through HfArgumentParser and TrlParser.

    Combined with another arguments class, in either order, each field has the default of the first
    class in the order of inheritance that declares it: SFTConfig's own in
    ``class MyConfig(PSSTrainingArguments, SFTConfig)``, with ``@dataclass`` or without.

    Raises:
        ConfigurationError: An option is out of range; the message says what is allowed.
    """

    # Not annotated, so that it is no field: set by the trainer that PSS is in.
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
            "help": "Train the weight matrices with muon or one of its family, everything else "
            "with AdamW. Default: what --optim says, for everything."
        },
    )
    pss_optim_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of pss_optim: momentum=0.95,others_lr=3e-4; in YAML also a mapping. "
            "Default: none."
        },
    )

    pss_lr_scale: Optional[float] = field(  # noqa: UP045 (HfArgumentParser)
        default=None,
        metadata={
            "help": "Factor on every learning rate that is given. A resumed run obeys it, too: its "
            "schedule goes on from the rates of this launch, times this. Default: the rates as "
            "they are given, and after a resume those of the checkpoint, scaled or not."
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
        self.pss_config()  # refuse a bad option now, not at the first step
        self.optimizer_options()

    def pss_config(self) -> PSSConfig:
        """Return the preset with the options that were set."""
        given = {option.name: getattr(self, f"pss_{option.name}") for option in fields(PSSConfig)}
        return PSSConfig.preset(
            self.pss_preset, **{name: value for name, value in given.items() if value is not None}
        )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of warm-up, which a Trainer asks for when it builds its schedule.

        A Trainer without PSS gives itself away by that: then one warning says which options have
        no effect.
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
        """Return the options of ``pss_optim``, checked.

        Raises:
            ConfigurationError: An option that the optimizer has not, or none was chosen.
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
        return read_options(self.pss_optim, self.pss_optim_args)
