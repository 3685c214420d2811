"""The errors of hf_pss. Each is a `PSSError` and also the built-in error that a caller expects."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


class PSSError(Exception):
    """Base class of every error that hf_pss raises deliberately."""


class ConfigurationError(PSSError, ValueError):
    """An option or a combination of options is invalid. The message names valid ones."""


class ElsewhereError(PSSError, RuntimeError):
    """Another rank of a distributed run has failed, so this rank stops instead of waiting."""


class SelectionError(PSSError, ValueError):
    """A pattern matches no weight matrix, or a model has no matrix to watch."""


class NonFiniteError(PSSError, ArithmeticError):
    """A gradient, loss or matrix holds NaN or inf where only finite numbers are valid."""


class StateError(PSSError, ValueError):
    """A saved state is truncated, has a different version, or belongs to a different model."""


class TrainingFailedError(PSSError, RuntimeError):
    """Interventions failed, and the run stops because it is configured to or cannot roll back."""


class IncompatibleVersionError(PSSError, RuntimeError):
    """A private method of transformers that hf_pss depends on has changed."""


def how_to_install(*packages: str) -> str:
    """Return the command that installs packages of an extra.

    The command names the packages, because ``hf-pss[...]`` installs nothing if you run a clone.

    >>> how_to_install("matplotlib", "jinja2")
    'Run `pip install matplotlib jinja2`.'
    """
    return f"Run `pip install {' '.join(packages)}`."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that offers the known words closest to `name`; empty if none is close.

    >>> did_you_mean("spike_updates", ["spike_update", "roles"])
    ' Did you mean spike_update?'
    """
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a `ConfigurationError` with the choices if the value of an option is none of them."""
    if value not in choices:
        raise ConfigurationError(f"You gave {name}={value!r}; choose one of {', '.join(choices)}.")
