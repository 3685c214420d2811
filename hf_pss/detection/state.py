"""Strict readers of saved JSON. An unexpected value raises a `StateError` that names it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

from hf_pss.errors import StateError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_REMEDY = "Use one that this version of hf_pss wrote."


def check_version(state: object, version: int, what: str) -> None:
    """Reject a state that is not a JSON object, or that a different version wrote.

    Call this before `read_object`. A state of a different version has different keys, but the
    message about its version is more helpful.

    Args:
        state: Parsed JSON, which is not trusted.
        version: The only version that the caller understands.
        what: How the message names the state, for example ``"the state of detector
            'grad_norm_ratio'"``.

    Raises:
        StateError: The state is not an object, or ``state["version"]`` is not ``version``.
    """
    found = read_mapping(state, what).get("version")
    if type(found) is not int or found != version:
        raise StateError(f"The version of {what} is {found!r}; you need {version}. {_REMEDY}")


def read_object(value: object, keys: Collection[str], what: str) -> dict[str, object]:
    """Return `value` as a dict that has exactly the given keys.

    Raises:
        StateError: `value` is not an object, a key is missing, or a key is unknown.
    """
    found = read_mapping(value, what)
    if missing := sorted(set(keys) - set(found)):
        raise StateError(f"You gave {what} without {_listed(missing)}: it is truncated. {_REMEDY}")
    if unknown := sorted(set(found) - set(keys)):
        raise StateError(f"You gave {what} with unknown keys {_listed(unknown)}. {_REMEDY}")
    return found


def read_mapping(value: object, what: str) -> dict[str, object]:
    """Return `value` as a dict with any string keys, or raise `StateError`."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    raise _unlike(value, what, "a JSON object")


def read_number(value: object, what: str, *, minimum: float = -math.inf) -> float:
    """Return a finite JSON number that is at least `minimum` as a float, or raise `StateError`."""
    number = number_of(value)
    if number is not None and math.isfinite(number) and number >= minimum:
        return number
    at_least = "" if minimum == -math.inf else f" >= {minimum}"
    raise _unlike(value, what, f"a finite number{at_least}")


def read_integer(value: object, what: str, *, minimum: int = 0) -> int:
    """Return a JSON integer from `minimum` to 2⁶³ - 1, or raise `StateError`."""
    if type(value) is int and minimum <= value < 2**63:
        return value
    raise _unlike(value, what, f"an integer >= {minimum}")


def read_bool(value: object, what: str) -> bool:
    """Return a JSON boolean, or raise `StateError`."""
    if isinstance(value, bool):
        return value
    raise _unlike(value, what, "true or false")


def read_text(value: object, what: str) -> str:
    """Return a JSON string, or raise `StateError`."""
    if isinstance(value, str):
        return value
    raise _unlike(value, what, "a string")


def read_list(value: object, what: str) -> list[object]:
    """Return a JSON array, or raise `StateError`."""
    if isinstance(value, list):
        return value
    raise _unlike(value, what, "an array")


def number_of(value: object) -> float | None:
    """Return a JSON number as a float, or inf if it overflows. Return None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _unlike(value: object, what: str, form: str) -> StateError:
    return StateError(f"You gave {value!r:.80} as {what}; it must be {form}. {_REMEDY}")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
