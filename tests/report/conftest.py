from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = [
    f"transformer.h.{block}.{role}"
    for block in range(3)
    for role in ("attn.c_attn.weight[q]", "attn.c_proj.weight", "mlp.c_fc.weight")
]


def change(name: str = NAMES[0], **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [64, 64],
        "status": "smoothed",
        "rank": 2,
        "sigma_before": 4.0,
        "sigma_after": 1.0,
        "stable_rank_before": 1.5,
        "stable_rank_after": 6.0,
        **fields,
    }


def intervention(step: int, **fields: Any) -> dict[str, Any]:
    """Return a line of pss_events.jsonl; another ``kind`` makes it an unanswered event."""
    record = {
        "version": 1,
        "kind": "intervention",
        "trigger": "spike",
        "step": step,
        "detector": "grad_norm_ratio",
        "value": 5.0,
        "baseline": 1.0,
        "threshold": 2.5,
        "fired": ["global"],
        "new_level": [],
        "loss": 7.0,
        "decision": "act",
        "reason": "grad_norm_ratio",
        "smoothing": "clip",
        "seconds": 0.02,
        "matrices": [change()],
        **fields,
    }
    if record["kind"] != "intervention":
        for name in ("trigger", "smoothing", "seconds", "matrices"):
            del record[name]
    return record


@dataclass
class RunFiles:
    """Writes a run directory as the demo does, with the numbers a test asks for."""

    root: Path
    seeds: set[int] = field(default_factory=set)
    guards: list[str] = field(default_factory=list)

    def run(
        self,
        guard: str,
        final: float | None = 4.5,
        *,
        seed: int = 0,
        losses: Sequence[float | None] | None = None,
        norms: Sequence[float | None] | None = None,
        evals: Sequence[float | None] = (6.0, 5.0),
        events: Sequence[dict[str, Any]] = (),
        summary: dict[str, Any] | None = None,
        finished: bool = True,
    ) -> Path:
        folder = self.root / guard / f"seed-{seed}"
        folder.mkdir(parents=True)
        self.seeds.add(seed)
        self.guards += [] if guard in self.guards else [guard]
        losses = [7.0 - 0.05 * i for i in range(40)] if losses is None else losses
        norms = [1.0 + 0.1 * (i % 3) for i in range(len(losses))] if norms is None else norms
        rows: list[dict[str, Any]] = [
            {"step": i, "loss": loss, "grad_norm_preclip": norm, "baseline": 1.0, "threshold": 2.5}
            for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
        ]
        rows += [{"step": 20 * (i + 1), "eval_loss": loss} for i, loss in enumerate(evals)]
        lines(folder / "metrics.jsonl", rows)
        ranks = [
            {"step": s, "stable_rank": {n: 2.0 + i for i, n in enumerate(NAMES)}}
            for s in (0, 10, 20)
        ]
        lines(folder / "pss_health.jsonl", ranks)
        lines(folder / "pss_events.jsonl", list(events))
        if finished:
            record = {
                "status": "finished",
                "final_eval_loss": final,
                "num_steps": len(losses),
                "train_seconds": 50.0,
                "pss_seconds": 0.1,
                "num_interventions": len(events),
                "num_events": len(events),
                "num_nonfinite_steps": sum(loss is None for loss in losses),
            }
            record |= summary or {}
            (folder / "summary.json").write_text(json.dumps(record), encoding="utf-8")
        return folder

    def info(self, **fields: Any) -> Path:
        record = {
            "version": 1,
            "command": "hf-pss demo",
            "created": "2026-11-20T10:00:00+00:00",
            "status": "finished",
            "elapsed_seconds": 120.5,
            "model": {"params": 535168, "layers": 3},
            "data": "Python sources",
            "training": {"learning_rate": 0.003},
            "versions": {"torch": "2.13.0"},
            "machine": "2 cores",
            "unigram_entropy_nats": 6.4,
            "guards": self.guards,
            "seeds": sorted(self.seeds),
            **fields,
        }
        (self.root / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return self.root


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "out")


@pytest.fixture(scope="session")
def files_at() -> type[RunFiles]:
    return RunFiles


@pytest.fixture(scope="session")
def make_intervention() -> Callable[..., dict[str, Any]]:
    return intervention


@pytest.fixture
def make_change() -> Callable[..., dict[str, Any]]:
    return change


@pytest.fixture
def twins(files: RunFiles) -> Path:
    """A finished run of three guards, one seed."""
    files.run("plain", 4.8)
    files.run("paper", 4.6, events=[intervention(12)])
    files.run("floor", 4.3, events=[intervention(s, detector="floor") for s in (10, 20)])
    return files.info()
