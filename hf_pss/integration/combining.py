"""One arguments class made of several: each field keeps the default of the class that declares it.

``@dataclass`` takes a field from the first base class that has it, inherited or not. In
``class MyConfig(PSSTrainingArguments, SFTConfig)`` it takes ``logging_steps`` from the former,
which only inherits it from TrainingArguments, and trl's own default is lost.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

__all__ = ["join_"]


def join_(cls: type[Any]) -> None:
    """Put a dataclass with the right defaults between a new class and its bases.

    The class itself stays as it was written, so ``@dataclass`` may follow, or be forgotten.

    Args:
        cls: A new class with several dataclasses among its bases.
    """
    if "_is_joint" in vars(cls):  # the one in between
        return
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": f"{cls.__qualname__}.bases",
        "__doc__": f"What {cls.__name__} inherits.",
        "__annotations__": {},
        "_is_joint": True,
    }
    for name, (declared, hint) in _declared_fields(cls).items():
        if _inherited_field(cls, name) is not declared:
            namespace["__annotations__"][name] = hint
            namespace[name] = copy.copy(declared)
    joint = type(cls.__name__, cls.__bases__, namespace)
    cls.__bases__ = (dataclass(joint),)


def _declared_fields(cls: type[Any]) -> dict[str, tuple[Field[Any], Any]]:
    """Return each field as the first class that declares it has it, and its type."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    for base in cls.__mro__[1:]:
        if not is_dataclass(base):
            continue
        own, hints = inspect.get_annotations(base), _hints(base)
        for field in fields(base):
            if field.name in own:
                found.setdefault(field.name, (field, hints.get(field.name, own[field.name])))
    return found


def _inherited_field(cls: type[Any], name: str) -> Field[Any] | None:
    """Return the field that ``@dataclass`` takes: of the first base class that has it."""
    for base in cls.__mro__[1:]:
        found: Field[Any] | None = vars(base).get("__dataclass_fields__", {}).get(name)
        if found is not None:
            return found
    return None


def _hints(base: type[Any]) -> dict[str, Any]:
    # Resolved where they were written: in another module a name may mean nothing.
    try:
        return get_type_hints(base)
    except NameError:
        return {}
