"""The evidence of a step that spiked: the numbers of each matrix, and the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_pss.detection.state import (
    number_of,
    read_integer,
    read_list,
    read_mapping,
    read_object,
    read_text,
)
from hf_pss.records.strict_json import finite_or_none, parse_object

_WHAT = "the evidence of a spike"


@dataclass(frozen=True, slots=True)
class SpikeEvidence:
    """What was measured in a step that spiked or was not finite, before its update."""

    step: int
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each of ``grad_norm``, ``spectral_norm`` and ``stable_rank``, one number for each matrix
    by name. It is empty if the gradient was not finite."""
    indices: tuple[int, ...] | None = None
    """The rows of the training data set in this step, over all ranks. None if they are unknown."""
    why_unknown: str = ""
    """The reason why the rows are unknown, or an empty text."""
    texts: tuple[str, ...] = ()
    """The start of the text of the first rows, if the trainer has a tokenizer."""


def spike_line(evidence: SpikeEvidence) -> str:
    """Return one line of strict JSON, null for NaN and inf.

    >>> parse_spike(spike_line(SpikeEvidence(7, indices=(1, 2))).encode()).indices
    (1, 2)
    """
    row = {
        "step": evidence.step,
        "matrices": {
            metric: {name: finite_or_none(value) for name, value in by.items()}
            for metric, by in evidence.matrices.items()
        },
        "indices": None if evidence.indices is None else list(evidence.indices),
        "why_unknown": evidence.why_unknown,
        "texts": list(evidence.texts),
    }
    return json.dumps(row, allow_nan=False)


def parse_spike(line: bytes) -> SpikeEvidence:
    """Return the evidence of a line. A value that is not a number becomes NaN.

    Raises:
        StateError: The line is malformed.
    """
    names = ("step", "matrices", "indices", "why_unknown", "texts")
    row = read_object(parse_object(line, what=_WHAT), names, _WHAT)
    matrices = {
        metric: {
            name: math.nan if (n := number_of(value)) is None else n
            for name, value in read_mapping(by, f"{metric!r} of {_WHAT}").items()
        }
        for metric, by in read_mapping(row["matrices"], f"'matrices' of {_WHAT}").items()
    }
    indices = row["indices"]
    return SpikeEvidence(
        step=read_integer(row["step"], f"'step' of {_WHAT}"),
        matrices=matrices,
        indices=None
        if indices is None
        else tuple(read_integer(i, f"an index of {_WHAT}") for i in read_list(indices, _WHAT)),
        why_unknown=read_text(row["why_unknown"], f"'why_unknown' of {_WHAT}"),
        texts=tuple(read_text(t, f"a text of {_WHAT}") for t in read_list(row["texts"], _WHAT)),
    )
