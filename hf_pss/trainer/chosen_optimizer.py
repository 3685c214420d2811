"""Build and drive the optimizer that ``pss_optim`` names, and read its options."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_pss.errors import ConfigurationError, SelectionError, did_you_mean
from hf_pss.models.distributed import Replicas
from hf_pss.models.selection import canonical_name
from hf_pss.optim.groups import AMUSE, build_optimizer, known_options
from hf_pss.optim.optimizer import ADAMW
from hf_pss.optim.qk_clip import QKClip
from hf_pss.trainer.attention_maxima import AttentionMaxima, MeasureAttention
from hf_pss.trainer.schedule_free import unwrapped

logger = logging.getLogger(__name__)

Options: TypeAlias = dict[str, Any]

_REPLICATED = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)
_READ_LOSSES = ("specmuon",)
_FLAT_SCHEDULES = ("constant", "constant_with_warmup")

# An option that the trainer applies, because it needs the model's attention logits. The optimizer
# does not accept it.
QK_CLIP = "qk_clip"

# Options that TrainingArguments already provides, and the argument that sets each of them.
_ARGUMENTS: Mapping[str, str] = {
    "algo": "pss_optim",
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "no_decay": "the trainer's get_decay_parameter_names",
}


def read_options(algo: str, given: Mapping[str, Any] | str | None) -> Options:
    """Return the options of an optimizer in the form that `hf_pss.optim.build_optimizer` accepts.

    >>> read_options("muon", "momentum=0.9,scale=rms_match")
    {'momentum': 0.9, 'scale': 'rms_match'}

    Args:
        algo: The name of the optimizer.
        given: ``name=value`` pairs separated by commas, a JSON object, or a mapping.

    Raises:
        ConfigurationError: An option is unknown, an option is set by another argument, or a value
            has a different type from the default.
    """
    known = {name: v for name, v in known_options(algo).items() if name not in _ARGUMENTS}
    known[QK_CLIP] = None
    options = _pairs(given) if isinstance(given, str) else dict(given or {})
    for name in options:
        if name in _ARGUMENTS:
            raise ConfigurationError(
                f"pss_optim_args has no {name}: it comes from {_ARGUMENTS[name]}."
            )
        if name not in known:
            raise ConfigurationError(
                f"{algo} has no option {name!r}.{did_you_mean(name, known)} It takes "
                f"{', '.join(sorted(known))}."
            )
    return {name: _typed(name, value, known[name]) for name, value in options.items()}


def _pairs(text: str) -> Options:
    if isinstance(values := _value(text), dict):
        return values
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigurationError(
                f"pss_optim_args takes name=value with commas between; you gave {name.strip()!r}."
            )
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    try:
        return words[text] if text in words else json.loads(text)
    except ValueError:
        return text


# For the type of a default: its name in messages, and the types of the values that fit.
_KINDS: Mapping[type, tuple[str, tuple[type, ...]]] = {
    type(None): ("a number", (int, float, type(None))),
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str,)),
    tuple: ("a list", (tuple, list)),
}


def _typed(name: str, value: Any, default: Any) -> Any:
    """Check that a value has the type of the default. A default of None stands for a number."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _value(value)  # YAML reads 1e-3 as a string
    if isinstance(value, str) and isinstance(default, tuple):
        value = [value]
    kind, fitting = _KINDS[type(default)]
    # In Python, a bool is an int as well.
    if not isinstance(value, fitting) or isinstance(value, bool) != isinstance(default, bool):
        raise ConfigurationError(
            f"pss_optim_args: {name} is {kind}, by default {default!r}; you gave {value!r}."
        )
    make: Any = type(default)
    return make(value) if isinstance(default, float | tuple) else value


def refuse_two_optimizers(trainer: Trainer) -> None:
    """Raise an error for options that contradict ``pss_optim``, before training begins.

    Raises:
        ConfigurationError: The trainer has a second optimizer, or it runs under DeepSpeed.
    """
    arguments = trainer.args
    chosen = arguments.pss_optim
    others = {
        "optimizers=": trainer.optimizer is not None,
        "optimizer_cls_and_kwargs=": trainer.optimizer_cls_and_kwargs is not None,
        f"optim={getattr(arguments.optim, 'value', arguments.optim)}": (
            arguments.optim != TrainingArguments.default_optim
        ),
        "optim_args=": arguments.optim_args is not None,
    }
    if given := [name for name, is_given in others.items() if is_given]:
        raise ConfigurationError(
            f"You chose the optimizer twice, with pss_optim={chosen} and with {given[0]}: leave "
            "one of them out."
        )
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigurationError(
            f"pss_optim={chosen} needs matrices, but DeepSpeed passes flat one-dimensional pieces "
            "to this optimizer. Use DDP or FSDP2 (fsdp_config: {version: 2}), or DeepSpeed's own "
            "Muon, whose reported gradient norm shows no spikes."
        )


class ChosenOptimizer:
    """The optimizer that ``pss_optim`` names, in one trainer.

    Args:
        trainer: A trainer whose arguments have ``pss_optim``.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._loss: Tensor | None = None
        self._num_steps: int | None = None
        self._qk_clip: QKClip | None = None
        self._meter: MeasureAttention | None = None

    @property
    def _options(self) -> Options:
        options: Options = self._trainer.args.optimizer_options()
        return options

    # ---- building ----

    def build(self, model: nn.Module) -> None:
        """Give the trainer its optimizer for a model, with QK-clip if ``qk_clip`` was given.

        Raises:
            SelectionError: The model has no matrix that could be selected, or a pattern matches
                none.
        """
        trainer, args, options = self._trainer, self._trainer.args, self._options
        names = {canonical_name(name) for name, _ in model.named_parameters()}
        threshold = options.pop(QK_CLIP, None)
        # Some rules require total_steps. `set_length` sets the real number later.
        if "total_steps" in known_options(args.pss_optim):
            options.setdefault("total_steps", 1)
        try:
            trainer.optimizer = build_optimizer(
                model,
                algo=args.pss_optim,
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                no_decay=names - set(map(canonical_name, trainer.get_decay_parameter_names(model))),
                **options,
            )
        except SelectionError as error:
            raise SelectionError(
                f"pss_optim={args.pss_optim!r}, with its options in pss_optim_args: {error}"
            ) from error
        if trainer.accelerator.distributed_type in _REPLICATED:
            trainer.optimizer.share_work_(Replicas())
        self._clip_attention(model, threshold)
        self._warn_of_mismatch(model)

    def _clip_attention(self, model: nn.Module, threshold: float | None) -> None:
        if self._meter is not None:  # an earlier callback would keep its model alive
            self.stop_measuring()
            self._trainer.remove_callback(self._meter)
        self._meter = self._qk_clip = None
        if not threshold:
            return
        if self._trainer.args.pss_optim == AMUSE:
            raise ConfigurationError(
                "amuse keeps an average of past weights in addition to the weights it trains, and "
                "qk_clip scales only the trained weights: use another optimizer, or leave qk_clip "
                "out."
            )
        maxima = AttentionMaxima(model)
        self._qk_clip = QKClip(maxima.attentions, maxima.take, threshold=threshold)
        self._qk_clip.attach(self._trainer.optimizer)
        self._meter = MeasureAttention(maxima)
        self._trainer.add_callback(self._meter)
        if self._trainer.is_world_process_zero():
            logger.info(
                "qk_clip keeps attention logits at %g in %d modules, %s and so on.",
                threshold,
                len(maxima.attentions),
                maxima.attentions[0].name,
            )

    def _warn_of_mismatch(self, model: nn.Module) -> None:
        """Warn if the run tunes all weights of a model that Adam may have trained."""
        if self._trainer.args.pss_optim == ADAMW:
            return
        source = getattr(model, "name_or_path", "")
        is_adapted = getattr(model, "peft_config", None) is not None
        # A folder with a trainer state comes from an earlier run of the user.
        if source and not is_adapted and not Path(source, "trainer_state.json").is_file():
            self._warn(
                "%s tunes all weights of a model that was made from %s. If Adam has trained these "
                "weights, use LoRA or leave pss_optim out: full fine-tuning with Muon damages "
                "them, while LoRA with Muon does as well as with Adam (arXiv 2605.10468). If only "
                "the configuration is from there, ignore this.",
                self._trainer.args.pss_optim,
                source,
            )

    def set_length(self, num_steps: int) -> None:
        """Set the length of the run in the parameter groups, unless the user has set it."""
        args, options = self._trainer.args, self._options
        self._num_steps = num_steps
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if args.pss_optim == AMUSE and kind not in _FLAT_SCHEDULES:
            self._warn(
                "amuse averages weights instead of lowering the learning rate, but "
                "lr_scheduler_type=%s also lowers it. Choose %s.",
                kind,
                " or ".join(_FLAT_SCHEDULES),
            )
        warmup = args.get_warmup_steps(num_steps)
        # AMUSE's curve starts at the second step of warm-up.
        wanted = {"total_steps": num_steps, "warmup_steps": warmup if warmup > 1 else 0}
        for group in self._trainer.optimizer.param_groups:
            group.update({k: v for k, v in wanted.items() if k in group and k not in options})

    # ---- training ----

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, and pass the sum to a rule that needs it."""
        accelerator = self._trainer.accelerator
        if self._trainer.args.pss_optim not in _READ_LOSSES:
            return
        self._loss = loss.mean() + (0.0 if self._loss is None else self._loss)
        if accelerator.sync_gradients:
            # All ranks use the mean, because replicas must stay equal. It stays on the device.
            mean = accelerator.reduce(self._loss, reduction="mean")
            unwrapped(self._trainer.optimizer).loss, self._loss = mean, None

    def scalars(self) -> dict[str, float]:
        """Return the numbers of QK-clip since the last call, with one device read."""
        numbers = self._qk_clip.scalars() if self._qk_clip is not None else {}
        return {f"pss/{name}": value for name, value in numbers.items()}

    def stop_measuring(self) -> None:
        """Restore transformers' attention functions."""
        if self._meter is not None:
            self._meter.stop()

    # ---- resuming ----

    def after_loading(self, checkpoint: str) -> None:
        """Set the length of this run again, and warn if the state has replaced other options."""
        groups, given = self._trainer.optimizer.param_groups, self._options
        given.pop(QK_CLIP, None)  # the state does not contain it
        total_steps = given.pop("total_steps", self._num_steps)
        if self._trainer.args.pss_lr_scale is not None:
            given.pop("others_lr", None)  # pss_lr_scale restores the rates of this run
        for name, value in given.items():
            if name == "others_lr":  # the schedule starts from it
                loaded = [group.get("initial_lr") for group in groups if group["algo"] == ADAMW]
            else:
                loaded = [group[name] for group in groups if name in group]
            if any(_plain(one) != _plain(value) for one in loaded):
                self._warn(
                    "%s was written with %s=%s, which stays in effect: %s in pss_optim_args is "
                    "ignored.",
                    checkpoint,
                    name,
                    loaded[0],
                    value,
                )
        for group in groups:
            before = group.get("total_steps", total_steps)
            if total_steps is not None and before != total_steps:
                group["total_steps"] = total_steps
                self._warn(
                    "%s was written with total_steps=%s, and this run has %s, which decides where "
                    "the soft steps begin.",
                    checkpoint,
                    before,
                    total_steps,
                )

    def _warn(self, message: str, *values: Any) -> None:
        if self._trainer.is_world_process_zero():
            logger.warning(message, *values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
