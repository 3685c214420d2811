"""Errors of hf_pss: every one is a `PSSError` and also the builtin error a caller would expect."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "ElsewhereError",
    "IncompatibleVersionError",
    "NonFiniteError",
    "PSSError",
    "SelectionError",
    "StateError",
    "TrainingFailedError",
]


class PSSError(Exception):
    """Base of every error that hf_pss raises on purpose."""


class ConfigurationError(PSSError, ValueError):
    """An option, or a combination of options, has no meaning; the message says what is allowed."""


class ElsewhereError(PSSError, RuntimeError):
    """Another rank of a distributed run has failed; this one ends with it instead of waiting."""


class SelectionError(PSSError, ValueError):
    """A pattern matches no weight matrix, or a model holds none to watch."""


class NonFiniteError(PSSError, ArithmeticError):
    """A gradient, loss or matrix holds NaN or inf where only finite numbers have a meaning."""


class StateError(PSSError, ValueError):
    """A saved state is truncated, of another version, or of another model."""


class TrainingFailedError(PSSError, RuntimeError):
    """Interventions did not help, and the run was to stop then, or cannot go back any further."""


class IncompatibleVersionError(PSSError, RuntimeError):
    """A private seam of transformers that hf_pss stands on has moved."""
