"""The options of an orthogonalised optimizer, from a word, a mapping or the arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from hf_pss.errors import ConfigurationError
from hf_pss.optim.groups import known_options

__all__ = ["QK_CLIP", "OptimizerName", "read_options"]

OptimizerName = Literal["muon", "normuon", "softmuon", "softsignum", "specmuon", "spectra", "amuse"]
Options: TypeAlias = dict[str, Any]

QK_CLIP = "qk_clip"
"""The one option that the optimizer itself does not take: it needs the attention of a model."""

# What TrainingArguments has a place for is said there, once.
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
    """Return the options of an optimizer as `hf_pss.optim.build_optimizer` takes them.

    >>> read_options("muon", "momentum=0.9,scale=rms_match")
    {'momentum': 0.9, 'scale': 'rms_match'}

    Args:
        algo: The optimizer.
        given: ``name=value`` with commas between, JSON, or a mapping.

    Raises:
        ConfigurationError: An option that is unknown or stands elsewhere, or a value of another
            kind than the default.
    """
    known = _known_options(algo)
    options = _pairs(given) if isinstance(given, str) else dict(given or {})
    for name in options:
        if name in _ARGUMENTS:
            raise ConfigurationError(
                f"pss_optim_args has no {name}: it comes from {_ARGUMENTS[name]}."
            )
        if name not in known:
            nearest = get_close_matches(name, known, n=3, cutoff=0.6)
            asked = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
            raise ConfigurationError(
                f"{algo} has no option {name!r}.{asked} It takes {', '.join(sorted(known))}."
            )
    return {name: _typed(name, value, known[name]) for name, value in options.items()}


def _known_options(algo: str) -> Options:
    known = {name: v for name, v in known_options(algo).items() if name not in _ARGUMENTS}
    return known | {QK_CLIP: None}


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


def _typed(name: str, value: Any, default: Any) -> Any:
    """Check a value against the kind of the default; where that is None, a number is meant."""
    if isinstance(value, str) and not isinstance(default, str):
        value = _value(value)  # YAML reads 1e-3 as a word
    if default is None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_right = value is None or is_number
    elif isinstance(default, bool) or isinstance(value, bool):
        is_right = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float):
        is_right = isinstance(value, (int, float))
        value = float(value) if is_right else value
    elif isinstance(default, (tuple, list)):
        value = [value] if isinstance(value, str) else value
        is_right = isinstance(value, (tuple, list))
        value = tuple(value) if is_right else value
    else:
        is_right = isinstance(value, type(default))
    if not is_right:
        raise ConfigurationError(
            f"pss_optim_args: {name} is {_kind(default)}, by default {default!r}; you gave "
            f"{value!r}."
        )
    return value


def _kind(default: Any) -> str:
    words = {
        type(None): "a number",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
    }
    return words.get(type(default), "a list")
