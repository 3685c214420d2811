"""Read the loss and the unclipped gradient norm of a Trainer, which callbacks do not receive.

`PSSCallback` wraps three public methods on the instances while a run trains:

- ``Trainer.training_step`` returns the loss of each micro-batch.
- ``Accelerator.clip_grad_norm_`` returns the norm before clipping. The Trainer calls it once a
  step on every backend that PSS supports, also with ``max_grad_norm=0``.
- ``Trainer.log`` takes the numbers that PSS adds.

The trainer keeps its class. `PRIVATE_METHODS` lists the private methods that the mixins override.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import transformers
from transformers import Trainer, TrainerCallback

from hf_pss.errors import ConfigurationError, IncompatibleVersionError

if TYPE_CHECKING:  # a mixin may use everything that a Trainer has
    from transformers import Trainer as _Base
else:
    _Base = object

PRIVATE_METHODS: Mapping[str, tuple[tuple[str, ...], int | None]] = MappingProxyType(
    {
        "_save_checkpoint": (("self", "model", "trial"), 2),
        "_get_output_dir": (("self", "trial"), 1),
        "_maybe_log_save_evaluate": (("self",), None),
        "_finalize_training": (("self", "trial"), None),
        "_push_from_checkpoint": (("self", "checkpoint_folder"), 1),
        "_load_rng_state": (("self", "checkpoint"), 1),
        "_run_epoch": (("self",), None),
        "_load_optimizer_and_scheduler": (("self", "checkpoint"), 1),
        "_init_training_state": (
            ("self", "num_update_steps_per_epoch", "resume_from_checkpoint"),
            None,
        ),
        "_load_best_model": (("self",), 0),
    }
)
"""The private methods of Trainer that the mixins override, by name. Each entry holds the parameters
that the mixin relies on, and the number of arguments that the Trainer passes by position. The
number is None if it is not checked. The list was verified with transformers 5.3.0, 5.17.0, 5.23.0
and 5.24.0."""


class TrainerPart(_Base):
    """The base class of the mixins, which must stand to the left of a Trainer class.

    Raises:
        ConfigurationError: A subclass is defined that has a mixin to the right of a Trainer class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        in_front = cls.__mro__[: cls.__mro__.index(TrainerPart)]
        for place, other in enumerate(in_front):
            # The methods of that class would run instead of the methods of the mixin.
            if issubclass(other, Trainer) and not issubclass(other, TrainerPart):
                mixin = next(one for one in in_front[place:] if issubclass(one, TrainerPart))
                raise ConfigurationError(
                    f"{cls.__name__} has {mixin.__name__} to the right of {other.__name__}, where "
                    f"it has no effect: write class {cls.__name__}({mixin.__name__}, "
                    f"{other.__name__})."
                )


@contextmanager
def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Replace an instance's method by ``around(method, *args, **kwargs)`` within a ``with`` block.

    Args:
        owner: The instance. Its class does not change.
        name: The name of the method.
        around: A function that receives the method and its arguments, and returns the result.
    """
    wrapper = _Wrapper(owner, name, around)
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        wrapper.is_open = False
        # A block that was entered later may still be open, or another package may have wrapped
        # this wrapper. Until they end, it passes calls through.
        last = vars(owner).get(name)
        while isinstance(last, _Wrapper) and not last.is_open:
            last = last.before
        if last is not None:
            setattr(owner, name, last)
        else:
            vars(owner).pop(name, None)


class _Wrapper:
    """A wrapped method of one instance. It passes calls through if it is no longer open."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._method = getattr(owner, name)
        functools.update_wrapper(self, self._method, updated=())
        self._around, self.is_open = around, True
        self.before = vars(owner).get(name)
        """The instance's own attribute before it was wrapped, if it had one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_open:
            return self._around(self._method, *args, **kwargs)
        return self._method(*args, **kwargs)


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that is calling a callback, or None if no Trainer is calling it.

    A callback receives no reference to its Trainer, so this function searches the call stack.
    """
    for frame, _ in traceback.walk_stack(None):
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            handler = getattr(caller, "callback_handler", None)
            if handler is not None and any(one is callback for one in handler.callbacks):
                return caller
    return None


def folder_of(trainer: Trainer) -> str:
    """Return the folder of a run's checkpoints. Each trial of a search has its own."""
    if trainer.hp_search_backend is None:
        return str(trainer.args.output_dir)
    return str(trainer._get_output_dir(trainer._trial))


def link_loaded_moments(trainer: Trainer) -> None:
    """Make the moments of a checkpoint reachable before the first step.

    ZeRO stages 1 and 2 link the optimizer's state to the parameters only after a step.
    """
    link = getattr(
        getattr(trainer.optimizer, "optimizer", None), "_lazy_init_hp_params_optimizer_state", None
    )
    if link is not None:
        link()


def check_methods(trainer_class: type[Trainer], mixins: tuple[type, ...]) -> None:
    """Check that a Trainer class has the private methods that the mixins override.

    Args:
        trainer_class: The class of a trainer, with or without the mixins.
        mixins: The mixins. The check covers the classes that follow them in the
            method resolution order.

    Raises:
        IncompatibleVersionError: transformers lacks one of the methods, its method takes different
            arguments, or a class between the mixins and Trainer overrides the method so that the
            Trainer's call would fail.
    """
    of_mixins = {cls for mixin in mixins for cls in mixin.__mro__}
    behind = [c for c in trainer_class.__mro__ if c not in of_mixins and not issubclass(c, mixins)]
    for name, (wanted, num_by_position) in PRIVATE_METHODS.items():
        own = getattr(Trainer, name, None)
        found = inspect.signature(own).parameters if own is not None else {}
        # Some packages patch Trainer with wrappers that take any arguments.
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
        if own is None or not (takes_any or set(wanted) <= set(found)):
            has = f"takes ({', '.join(found)})" if own is not None else "does not exist"
            raise IncompatibleVersionError(
                f"Trainer.{name} {has}, but hf_pss {version('hf-pss')} needs it with "
                f"({', '.join(wanted)}). You have transformers {transformers.__version__}; "
                "install one that hf_pss was made for (5.3 or newer; tested with 5.23)."
            )
        owner = next((cls for cls in behind if name in vars(cls)), Trainer)
        method = getattr(owner, name)
        if owner is Trainer or num_by_position is None or _takes(method, num_by_position):
            continue
        raise IncompatibleVersionError(
            f"{owner.__module__}.{owner.__name__}.{name} takes "
            f"({', '.join(inspect.signature(method).parameters)}), and the Trainer of "
            f"transformers {transformers.__version__} calls it with ({', '.join(wanted)}). "
            f"Change {owner.__name__}.{name} so that it accepts these arguments."
        )


def _takes(method: Any, num_by_position: int) -> bool:
    """Return whether an unbound method takes `num_by_position` arguments after ``self``."""
    try:
        inspect.signature(method).bind(*[None] * (1 + num_by_position))
    except ValueError:  # a method written in C has no signature to check
        return True
    except TypeError:
        return not inspect.isroutine(method)
    return True
