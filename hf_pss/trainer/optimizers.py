"""Build, save and resume the optimizer that ``pss_optim`` names, inside a Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from hf_pss.errors import ConfigurationError
from hf_pss.models.distributed import Replicas
from hf_pss.models.selection import canonical_name
from hf_pss.optim import MatrixOptimizer, build_optimizer
from hf_pss.optim.groups import AMUSE, known_options
from hf_pss.optim.optimizer import ADAMW
from hf_pss.optim.qk_clip import QKClip
from hf_pss.trainer.arguments import QK_CLIP, PSSTrainingArguments
from hf_pss.trainer.attention_maxima import AttentionMaxima, MeasureAttention
from hf_pss.trainer.optimizer_resume import Kind, kind_of, move_to_, saved_kind
from hf_pss.trainer.rates import refuse_own_schedule, scale_of, schedule_in, set_base_rates_
from hf_pss.trainer.schedule_free import unwrapped

__all__ = ["OptimizerMixin", "refuse_two_optimizers"]

logger = logging.getLogger(__name__)

_REPLICATED = (
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)
_READ_LOSSES = ("specmuon",)
_FLAT_SCHEDULES = ("constant", "constant_with_warmup")


class OptimizerMixin:
    """Mixin that adds ``pss_optim`` and ``pss_lr_scale``. It does not need PSS.

    List it to the left of a Trainer class. It builds the optimizer that ``pss_optim`` names, and
    multiplies the rates of the schedule by ``pss_lr_scale``.

    The state of an optimizer is loaded only into an optimizer of the same kind. The checkpoint may
    come from a different kind, for example from AdamW if the run uses Muon. Then a resume takes the
    weights, the position of the schedule and the position in the data, and logs a warning. The
    momentum and the second moments start fresh.
    """

    _step_loss: Tensor | None = None
    _num_steps: int | None = None
    _qk_clip: QKClip | None = None
    _given_rates: list[float] | None = None
    """The base rates of the schedule when it was built, one for each parameter group."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and afterwards restore transformers' attention functions, even after an exception.

        Raises:
            ConfigurationError: ``pss_lr_scale`` was given, and the schedule cannot be scaled.
        """
        refuse_own_schedule(self)
        # The list is created here and filled later, because under DeepSpeed a shallow copy of the
        # trainer builds the schedule.
        self._given_rates = []
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            for callback in _meters(self):
                callback.stop()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer that ``pss_optim`` names, unless the trainer already has one."""
        trainer: Any = self
        chosen = _chosen(trainer.args)
        if trainer.optimizer is None and chosen is not None:
            given = next(iter((*args, *kwargs.values())), None)
            model = trainer.model if given is None else given
            decayed = set(map(canonical_name, trainer.get_decay_parameter_names(model)))
            trainer.optimizer = _build(model, trainer.args, decayed=decayed)
            if trainer.accelerator.distributed_type in _REPLICATED:
                trainer.optimizer.share_work_(Replicas())
            self._qk_clip = _clip_attention(trainer, model)
            _warn_of_mismatch(trainer, model, chosen)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build and scale the schedule, and set the length of the run in the optimizer."""
        trainer: Any = self
        if _chosen(trainer.args) is not None:
            num_training_steps = args[0] if args else kwargs["num_training_steps"]
            self._num_steps = num_training_steps
            _warn_of_two_schedules(trainer)
            _set_length_(trainer.optimizer, trainer.args, num_training_steps)
        scheduler = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        if (scale := scale_of(self)) is not None:
            given = self._given_rates = [] if self._given_rates is None else self._given_rates
            given[:] = map(float, schedule_in(scheduler).base_lrs)
            set_base_rates_(scheduler, [rate * scale for rate in given])
        return scheduler

    def rescale_rates_(self, checkpoint: str) -> None:
        """Give a resumed schedule the rates of this run, multiplied by ``pss_lr_scale``.

        Without ``pss_lr_scale``, the rates of the checkpoint apply, as in a plain Trainer. If every
        resume uses the same factor, it is applied only once and not once per resume.
        """
        trainer: Any = self
        scale, given = scale_of(self), self._given_rates
        if scale is None or given is None:
            return
        wanted = [rate * scale for rate in given]
        loaded = set_base_rates_(trainer.lr_scheduler, wanted)
        for group, rate in zip(trainer.optimizer.param_groups, given, strict=True):
            group["initial_lr"] = rate  # a second train() builds its schedule from this rate
        if loaded != wanted:
            shown = [", ".join(f"{x:.3g}" for x in dict.fromkeys(r)) for r in (wanted, loaded)]
            _warn(
                self,
                "pss_lr_scale=%g: the schedule continues from a base rate of %s. The checkpoint %s "
                "has %s.",
                scale,
                shown[0],
                checkpoint,
                shown[1],
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, and pass the loss of the step to a rule that needs it."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        if _chosen(trainer.args) in _READ_LOSSES:
            self._step_loss = loss.mean() + (0.0 if self._step_loss is None else self._step_loss)
            if trainer.accelerator.sync_gradients:
                # All ranks use the mean, because replicas must stay equal. It stays on the device.
                mean = trainer.accelerator.reduce(self._step_loss, reduction="mean")
                unwrapped(trainer.optimizer).loss, self._step_loss = mean, None
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the numbers of QK-clip since the last training log, with one device read, and log."""
        if self._qk_clip is not None and "loss" in logs:
            logs.update({f"pss/{k}": value for k, value in self._qk_clip.scalars().items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        kinds = _other_kinds(self, checkpoint)
        if kinds is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            if checkpoint is not None and _chosen(self.args) is not None:  # type: ignore[attr-defined]
                _warn_of_older_options(self, checkpoint)
                _set_total_steps_again_(self, checkpoint, self._num_steps)
            return
        path = Path(str(checkpoint), SCHEDULER_NAME)
        move_to_(self.lr_scheduler, torch.load(path, map_location="cpu", weights_only=True))  # type: ignore[attr-defined]
        theirs, ours = map(_described, kinds)
        _warn(
            self,
            "%s was written by %s, and this run trains with %s. The weights, the position of the "
            "schedule and the position in the data are loaded. The optimizer's state starts fresh.",
            checkpoint,
            theirs,
            ours,
        )


def refuse_two_optimizers(trainer: Trainer) -> None:
    """Raise an error for options that contradict ``pss_optim``, before training begins.

    Raises:
        ConfigurationError: The trainer has a second optimizer, or it runs under DeepSpeed.
    """
    arguments = trainer.args
    chosen = _chosen(arguments)
    if chosen is None:
        return
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


def _chosen(arguments: Any) -> str | None:
    return arguments.pss_optim if isinstance(arguments, PSSTrainingArguments) else None


def _build(
    model: nn.Module, arguments: PSSTrainingArguments, *, decayed: set[str]
) -> MatrixOptimizer:
    names = {canonical_name(name) for name, _ in model.named_parameters()}
    options = arguments.optimizer_options()
    options.pop(QK_CLIP, None)
    # Some rules require total_steps. create_scheduler sets the real number later.
    asks = "total_steps" in known_options(str(arguments.pss_optim))
    unknown_yet = {"total_steps": 1} if asks and "total_steps" not in options else {}
    return build_optimizer(
        model,
        algo=str(arguments.pss_optim),
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        no_decay=names - decayed,
        **unknown_yet,
        **options,
    )


def _meters(trainer: Any) -> list[MeasureAttention]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, MeasureAttention)]


def _clip_attention(trainer: Any, model: nn.Module) -> QKClip | None:
    """Attach QK-clip to the optimizer if ``qk_clip`` was given."""
    for callback in _meters(trainer):  # an earlier callback would keep its model alive
        callback.stop()
        trainer.remove_callback(callback)
    threshold = trainer.args.optimizer_options().get(QK_CLIP)
    if not threshold:
        return None
    if trainer.args.pss_optim == AMUSE:
        raise ConfigurationError(
            "amuse keeps an average of past weights in addition to the weights it trains, and "
            "qk_clip scales only the trained weights: use another optimizer, or leave qk_clip out."
        )
    maxima = AttentionMaxima(model)
    clip = QKClip(maxima.attentions, maxima.take, threshold=threshold)
    clip.attach(trainer.optimizer)
    trainer.add_callback(MeasureAttention(maxima))
    if trainer.is_world_process_zero():
        logger.info(
            "qk_clip keeps attention logits at %g in %d modules, %s and so on.",
            threshold,
            len(maxima.attentions),
            maxima.attentions[0].name,
        )
    return clip


def _set_length_(optimizer: Any, arguments: PSSTrainingArguments, num_steps: int) -> None:
    """Set the length of the run in the parameter groups, unless the user has set it."""
    options = arguments.optimizer_options()
    num_warmup_steps = arguments.get_warmup_steps(num_steps)
    # AMUSE's curve starts at the second step of warm-up.
    wanted = {
        "total_steps": num_steps,
        "warmup_steps": num_warmup_steps if num_warmup_steps > 1 else 0,
    }
    for group in optimizer.param_groups:
        group.update({k: v for k, v in wanted.items() if k in group and k not in options})


def _set_total_steps_again_(trainer: Any, checkpoint: str, num_steps: int | None) -> None:
    """Set the length of this run again, because a checkpoint has replaced it."""
    wanted = trainer.args.optimizer_options().get("total_steps", num_steps)
    for group in trainer.optimizer.param_groups:
        before = group.get("total_steps", wanted)
        if wanted is None or before == wanted:
            continue
        group["total_steps"] = wanted
        _warn(
            trainer,
            "%s was written with total_steps=%s, and this run has %s, which decides where the soft "
            "steps begin.",
            checkpoint,
            before,
            wanted,
        )


def _warn(trainer: Any, message: str, *values: Any) -> None:
    if trainer.is_world_process_zero():
        logger.warning(message, *values)


def _warn_of_two_schedules(trainer: Any) -> None:
    given = trainer.args.lr_scheduler_type
    kind = str(getattr(given, "value", given))
    if trainer.args.pss_optim == "amuse" and kind not in _FLAT_SCHEDULES:
        _warn(
            trainer,
            "amuse averages weights instead of lowering the learning rate, but lr_scheduler_type="
            "%s also lowers it. Choose %s.",
            kind,
            " or ".join(_FLAT_SCHEDULES),
        )


def _warn_of_mismatch(trainer: Any, model: nn.Module, chosen: str) -> None:
    """Warn if the run tunes all weights of a model that may be pretrained."""
    source = getattr(model, "name_or_path", "")
    is_adapted = getattr(model, "peft_config", None) is not None
    # A folder with a trainer state comes from an earlier run of the user.
    is_own_run = bool(source) and Path(source, "trainer_state.json").is_file()
    if source and not is_adapted and not is_own_run:
        _warn(
            trainer,
            "%s tunes all weights of a model that was made from %s. If Adam has trained these "
            "weights, use LoRA or leave pss_optim out: full fine-tuning with Muon damages them, "
            "while LoRA with Muon does as well as with Adam (arXiv 2605.10468). If only the "
            "configuration is from there, ignore this.",
            chosen,
            source,
        )


def _other_kinds(trainer: Any, checkpoint: str | None) -> tuple[Kind, Kind] | None:
    """Return the optimizer kinds of the checkpoint and the trainer, or None if they are equal."""
    if checkpoint is None or trainer.is_deepspeed_enabled:
        return None
    if not Path(checkpoint, SCHEDULER_NAME).is_file():
        return None  # without scheduler.pt the Trainer loads neither state
    theirs, ours = saved_kind(Path(checkpoint)), kind_of(trainer.optimizer.param_groups)
    if theirs is None or theirs == ours or not any((*theirs, *ours)):
        return None  # if neither optimizer has rules, the check of the Trainer decides
    return theirs, ours


def _warn_of_older_options(trainer: Any, checkpoint: str) -> None:
    """Warn if the loaded state has replaced an option by a different value."""
    given = trainer.args.optimizer_options()
    given.pop("total_steps", None)  # `_set_total_steps_again_` sets it
    given.pop(QK_CLIP, None)  # the state does not contain it
    if trainer.args.pss_lr_scale is not None:
        given.pop("others_lr", None)  # pss_lr_scale restores the rates of this run
    groups = trainer.optimizer.param_groups
    for name, value in given.items():
        if name == "others_lr":  # the schedule starts from it
            loaded = [group.get("initial_lr") for group in groups if group["algo"] == ADAMW]
        else:
            loaded = [group[name] for group in groups if name in group]
        if any(_plain(one) != _plain(value) for one in loaded):
            _warn(
                trainer,
                "%s was written with %s=%s, which stays in effect: %s in pss_optim_args is "
                "ignored.",
                checkpoint,
                name,
                loaded[0],
                value,
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _described(kind: Kind) -> str:
    rules = list(dict.fromkeys(rule for rule in kind if rule is not None))
    return f"groups of {' and '.join(rules)}" if rules else "an optimizer of another package"
