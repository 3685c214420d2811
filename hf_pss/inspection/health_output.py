"""An inspection as tables for a terminal, the worst matrices first, and as strict JSON."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from hf_pss.health.verdicts import is_ill
from hf_pss.inspection.matrices import SMALL
from hf_pss.inspection.matrix_survey import ChangedMatrix, Inspection, JudgedMatrix, SeriesRow
from hf_pss.records.strict_json import finite_or_none, visible
from hf_pss.view.numbers import plural, significant
from hf_pss.view.tables import lean_table

SCHEMA_VERSION = 1

_STYLES = {"non_finite": "bold red", "zero": "red", "vanished": "red"}
_MOST_UNREAD = 3


def render_inspection(inspection: Inspection, *, num_lines: int) -> RenderableType:
    """Return a table of the worst matrices, and below it a line with the first reason of each.

    Args:
        inspection: The checkpoint's health.
        num_lines: Largest number of matrices to show.
    """
    return Group(*_summary(inspection), *_worst(inspection, num_lines), *_notes(inspection))


def render_changes(changes: Sequence[ChangedMatrix], *, num_lines: int) -> RenderableType:
    """Return a table of the changes, before → after, with the largest first."""
    prefix = _common_prefix([change.name for change in changes])
    lines = (
        (
            _short(change.name, prefix),
            _arrow(change, "sigma1"),
            _arrow(change, "stable_rank"),
            significant(change.relative_change),
        )
        for change in changes[:num_lines]
    )
    table = lean_table(["matrix"], ["σ₁", "stable rank", "‖ΔW‖/‖W‖"], rows=lines)
    hidden = len(changes) - num_lines
    more = [Text(f"{hidden:,} more; --lines shows them.", style="dim")] if hidden > 0 else []
    return Group(Text("Changes, the largest first:"), table, *more)


def render_series(rows: Sequence[SeriesRow]) -> RenderableType:
    """Return a table with one line per checkpoint, in the given order."""
    numbers = ["stable rank", "lowest", "σ₁", "largest", "not finite", "findings"]
    table = lean_table(["checkpoint"], numbers)
    for row in rows:
        ranks = (row.median_stable_rank, row.lowest_stable_rank)
        shown = map(significant, (*ranks, row.median_sigma1, row.largest_sigma1))
        counts = (f"{row.num_nonfinite:,}", f"{row.num_findings:,}")
        style = "bold red" if row.num_nonfinite else ""
        table.add_row(Text(visible(row.path.name)), *shown, *counts, style=style)
    return Group(Text("Over the checkpoints; stable rank and σ₁ are medians:"), table)


def _summary(inspection: Inspection) -> Iterator[Text]:
    checkpoint = inspection.checkpoint
    kind = f"{visible(checkpoint.model_type)}, " if checkpoint.model_type else ""
    yield Text(
        f"{visible(checkpoint.path)}: {kind}{len(inspection.matrices):,} matrices in "
        f"{len(checkpoint.tensors):,} tensors, {checkpoint.num_bytes / 2**20:,.1f} MiB"
    )
    bad = sum(one.health.num_nonfinite > 0 for one in inspection.matrices)
    counts = f"Findings: {inspection.num_findings:,}. Remarks: {inspection.num_remarks:,}."
    if inspection.is_finite:
        yield Text(f"Every number that was read is finite. {counts}")
    else:
        yield Text(
            f"NOT FINITE: NaN or inf in {plural(bad, 'matrix', 'matrices')} and "
            f"{plural(len(inspection.bad_others), 'other tensor', 'other tensors')}. {counts}",
            style="bold red",
        )
    for entry, num_bad in inspection.bad_others:
        yield Text(
            f"  {visible(entry.name)}: {num_bad:,} of {math.prod(entry.shape):,} numbers",
            style="red",
        )


def _worst(inspection: Inspection, num_lines: int) -> Iterator[RenderableType]:
    if not inspection.matrices:
        return
    table = lean_table(["matrix"], ["shape", "σ₁", "stable rank", "of noise"])
    prefix = _common_prefix([one.health.name for one in inspection.matrices])
    reasons = []
    for one in inspection.matrices[:num_lines]:
        health, name = one.health, _short(one.health.name, prefix)
        worst = one.findings[0] if is_ill(one.findings) else None
        style = _STYLES.get(worst.kind, "yellow") if worst else ""
        table.add_row(
            Text(name, style=style),
            "×".join(map(str, health.shape)),
            significant(health.sigma1),
            significant(health.stable_rank),
            _percent(health.stable_rank / health.noise),
        )
        if one.findings:
            reasons.append(Text(f"{name}: {_why(one)}", style=style))
    yield table
    hidden = len(inspection.matrices) - num_lines
    if hidden > 0:
        yield Text(f"{hidden:,} more; --lines shows them, --json has all.", style="dim")
    # A column beside the numbers would leave 20 of 80 characters for the reasons.
    yield from [Text("Why, the worst first:"), *reasons] if reasons else []


def _notes(inspection: Inspection) -> Iterator[Text]:
    reasons = Counter(reason for _, reason in inspection.unread)
    for reason, count in reasons.most_common(_MOST_UNREAD):
        yield Text(f"Not read: {count:,} tensors ({reason}).", style="yellow")
    searched = Counter(reason for _, reason in inspection.others if reason != SMALL)
    for reason, count in searched.most_common(_MOST_UNREAD):
        what = plural(count, "tensor", "tensors")
        yield Text(f"Searched for NaN and inf only: {what} ({reason}).", style="dim")
    notes = Counter(one.health.source.note for one in inspection.matrices if one.health.source.note)
    for note, count in notes.items():
        yield Text(f"{count:,} matrices: {note}.", style="dim")


def _why(one: JudgedMatrix) -> str:
    hidden = len(one.findings) - 1
    return one.findings[0].text + (f" ({hidden} more)" if hidden else "")


def _common_prefix(names: Sequence[str]) -> str:
    """Return the complete parts that all names begin with, without the stack of a block's number.

    >>> _common_prefix(["transformer.h.0.w", "transformer.h.1.w"])
    'transformer.'
    """
    if len(names) < 2:
        return ""
    split = [name.split(".")[:-1] for name in (min(names), max(names))]  # the two least alike
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(*split, strict=False))
    common = [part for part, _ in pairs]
    numbered = any(name.split(".")[len(common)].isdigit() for name in names)
    return "".join(f"{part}." for part in (common[:-1] if numbered else common))


def _short(name: str, prefix: str) -> str:
    return visible(name.removeprefix(prefix).replace(".weight", ""))


def _arrow(change: ChangedMatrix, what: str) -> str:
    sides = (change.before, change.after)
    return " → ".join(
        "missing" if side is None else significant(float(getattr(side, what))) for side in sides
    )


def _percent(ratio: float) -> str:
    return f"{ratio:.2%}" if math.isfinite(ratio) else "–"


def write_json(
    stream: TextIO,
    inspection: Inspection,
    *,
    other: Inspection | None = None,
    changes: Sequence[ChangedMatrix] = (),
    rows: Sequence[SeriesRow] = (),
) -> None:
    """Write an inspection as JSON and a newline. NaN and inf become null.

    The worst matrices come first, and the findings name those that are not finite. Only one
    spectrum at a time is in memory as a list.

    Args:
        stream: Receives the text.
        inspection: The first checkpoint.
        other: The checkpoint to compare it with.
        changes: Changes from `inspection` to `other`.
        rows: Rows of a series that `inspection` begins and `other` ends.
    """
    data: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "path": str(inspection.checkpoint.path),
        "model_type": inspection.checkpoint.model_type,
        "method": "exact" if inspection.exact else "quick",
        "finite": inspection.is_finite,
        "num_tensors": len(inspection.checkpoint.tensors),
        "num_bytes": inspection.checkpoint.num_bytes,
        "num_findings": inspection.num_findings,
        "num_remarks": inspection.num_remarks,
        "matrices": [_matrix(one) for one in inspection.matrices],
        "non_finite_tensors": [
            {"name": entry.name, "num_nonfinite": num_bad}
            for entry, num_bad in inspection.bad_others
        ],
        "unread_tensors": [
            {"name": entry.name, "reason": reason} for entry, reason in inspection.unread
        ],
    }
    if other is not None:
        data["compared_with"] = str(other.checkpoint.path)
        data["compared_finite"] = other.is_finite
        data["changes"] = [_change(change) for change in changes]
    if rows:
        data["series"] = [_fields(row, *asdict(row)) for row in rows]
    json.dump(data, stream, allow_nan=False, default=_plain)
    stream.write("\n")


def _matrix(judged: JudgedMatrix) -> dict[str, Any]:
    health = judged.health
    row: dict[str, Any] = {
        "name": health.name,
        "kind": health.place.kind,
        "block": health.place.block,
        "shape": list(health.shape),
        "dtype": health.source.entry.dtype,
        **_fields(health, "sigma1", "frobenius", "stable_rank"),
        "noise_stable_rank": health.noise,
        "num_nonfinite": health.num_nonfinite,
        "findings": [_fields(found, "kind", "text", "is_remark") for found in judged.findings],
    }
    if health.source.note:
        row["note"] = health.source.note
    if health.spectrum is not None:
        row |= _fields(health, "effective_rank")
        row["singular_values"] = health.spectrum
    return row


def _change(change: ChangedMatrix) -> dict[str, Any]:
    sides = {"before": change.before, "after": change.after}
    brief = ("sigma1", "stable_rank", "num_nonfinite")
    return {
        "name": change.name,
        **{side: None if one is None else _fields(one, *brief) for side, one in sides.items()},
        **_fields(change, "sigma1_ratio", "stable_rank_ratio", "relative_change"),
    }


def _fields(record: object, *names: str) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in names}
    return {n: finite_or_none(v) if isinstance(v, float) else v for n, v in values.items()}


def _plain(value: Path | array[float]) -> str | list[float | None]:
    return str(value) if isinstance(value, Path) else [finite_or_none(x) for x in value]
