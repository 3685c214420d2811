"""Load the parts of the trainer that a plain run does not need, when an option asks for them."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

_PARTS = {
    "ChosenOptimizer": "chosen_optimizer",  # pss_optim
    "read_options": "chosen_optimizer",
    "refuse_two_optimizers": "chosen_optimizer",
    "attention_watch": "attention_maxima",  # health="full"
    "trackers_for": "trackers",  # the first event or health reading
    "evidence_of": "spike_batches",  # the first spike
    "summary_table": "health_summary",  # the end of a run with health readings
}


def optional_part(name: str) -> Any:
    """Return a class or a function by its name, and import its module if necessary."""
    return resolve_name(f"hf_pss.trainer.{_PARTS[name]}:{name}")
