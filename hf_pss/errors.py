"""Errors of hf_pss. Each one is a `PSSError` and also the builtin error that a caller expects."""


class PSSError(Exception):
    """Base of every error that hf_pss raises on purpose."""


class ConfigurationError(PSSError, ValueError):
    """An option, or a combination of options, is invalid; the message names valid ones."""


class ElsewhereError(PSSError, RuntimeError):
    """Another rank of a distributed run has failed, so this one stops instead of waiting for it."""


class SelectionError(PSSError, ValueError):
    """A pattern matches no weight matrix, or a model has no matrix to watch."""


class NonFiniteError(PSSError, ArithmeticError):
    """A gradient, loss or matrix holds NaN or inf where only finite numbers are valid."""


class StateError(PSSError, ValueError):
    """A saved state is truncated, of another version, or of another model."""


class TrainingFailedError(PSSError, RuntimeError):
    """Interventions did not help, and the run stops, as configured or for lack of a checkpoint."""


class IncompatibleVersionError(PSSError, RuntimeError):
    """A private method of transformers that hf_pss depends on has changed."""
