"""Health in W&B, TensorBoard and trackio, read back from the records of a Trainer's run."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers import events_of, gpt2, make_trainer, token_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments
from wandb_offline import finish_and_read

from hf_pss import PSSConfig
from hf_pss.detection.detectors import Judgement, Verdict
from hf_pss.detection.policy import Action, Decision
from hf_pss.records.events import Event, HealthReading, Intervention, MatrixChange
from hf_pss.trainer.tracker_content import ThinnedReadings, draw_heat_map, label_of
from hf_pss.trainer.trackers import TRACKERS, Trackers, WandbTracker, trackers_for

# TensorBoard's scalars; half a unit in the last place.
FLOAT32_ROUNDING = 2.0**-24
STEPS = 5
ALERT_STEP = 3
NAMES = ("transformer.h.0.attn.c_attn.weight[q]", "transformer.h.1.mlp.c_fc.weight")
TAGS = ("transformer.h.0.attn.c_attn.q", "transformer.h.1.mlp.c_fc")


def reading(step: int) -> HealthReading:
    """Return a reading whose second matrix is not finite at the last step."""
    broken = step == STEPS
    ranks = (8.0 - step, math.nan if broken else 4.0)
    return HealthReading(
        step=step,
        scalars={"stable_rank/min": min(ranks), "spike_score": math.inf if broken else 0.0},
        matrices={
            "stable_rank": dict(zip(NAMES, ranks, strict=True)),
            "grad_norm": {NAMES[0]: 0.5 * step},
        },
        spectra={
            NAMES[0]: (3.0, 2.0, 1.0, 0.0),
            NAMES[1]: (math.nan, math.inf) if broken else (2.0, 1.0),
        },
    )


def intervention(step: int = ALERT_STEP) -> Intervention:
    spike = Judgement(Verdict.SPIKE, "grad_norm_ratio", ("global",), 9.0, 1.0, 2.5)
    event = Event.of(spike, Decision(Action.ACT, "grad_norm_ratio"), step=step, loss=4.0)
    changes = (MatrixChange(NAMES[0], (16, 16), "smoothed", rank=2),)
    return Intervention(event=event, smoothing="clip", seconds=0.02, matrices=changes)


class Reporting(TrainerCallback):
    """Uses the trackers as PSSCallback does."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.trackers = Trackers(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trackers = trackers_for(args, self.trainer.callback_handler.callbacks)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trackers.report(reading(state.global_step))
        if state.global_step == ALERT_STEP:
            self.trackers.alert(intervention())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trackers.finish()


def train(folder: Path, tracker: str) -> tuple[Trainer, Reporting]:
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[tracker],
        use_cpu=True,
        disable_tqdm=True,
        project="pss",
        trackio_space_id=None,  # 5.3 would send it to a Space of the hub
    )
    callback = Reporting()
    trainer = Trainer(gpt2(), args, train_dataset=token_rows(), callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    return trainer, callback


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_LOG_MODEL", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield tmp_path
    if wandb.run is not None:
        wandb.finish()


def test_wandb(offline: Path) -> None:
    train(offline, "wandb")
    found = finish_and_read()

    ranks = found.column(f"pss_health/stable_rank/{TAGS[0]}")
    assert ranks == [(step, 8.0 - step) for step in range(1, STEPS + 1)]
    assert math.isnan(found.column(f"pss_health/stable_rank/{TAGS[1]}")[-1][1])
    assert found.column("pss/spike_score")[-1] == (STEPS, math.inf)
    assert [n for _, n in found.column("pss/nonfinite_spectra")] == [0, 0, 0, 0, 1]
    # The Trainer's own rows are all there, on the same axis and in order.
    assert [step for step, _ in found.column("train/loss")] == list(range(1, STEPS + 1))
    steps = [row["train/global_step"] for row in found.history]
    assert steps == sorted(steps)

    histogram = found.history_of(f"pss_spectra/{TAGS[0]}")
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 4
    assert [n for key, n in _sums(found.history, TAGS[1])] == [2] * (STEPS - 1)  # none of NaN

    table = found.table("pss/table")
    assert table["columns"] == ["step", "matrix", "stable_rank", "grad_norm"]
    assert table["data"][0] == [1, NAMES[0], 7.0, 0.5]
    assert len(table["data"]) == 2 * STEPS
    assert found.image("pss/heat_map").startswith(b"\x89PNG")
    # With the 4th reading, in case the run is killed, and at the end.
    assert found.column("pss/heat_map._type") == [(4, "image-file"), (STEPS, "image-file")]

    ((title, text, level),) = found.alerts
    assert title == "PSS, step 3: spike, smoothed"
    assert "9 × its average of 1 (limit 2.5 ×)" in text
    assert "smoothing (clip) changed 1 of 1 matrix" in text
    assert "lower the learning rate" in text
    assert level == "WARN"


def _sums(history: list[dict[str, Any]], tag: str) -> list[tuple[str, int]]:
    key = f"pss_spectra/{tag}.values"
    return [(key, sum(row[key])) for row in history if key in row]


def test_tensorboard(offline: Path) -> None:
    train(offline, "tensorboard")
    (folder,) = (offline / "run" / "runs").iterdir()
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()

    ranks = found.Scalars(f"pss_health/stable_rank/{TAGS[0]}")
    assert [(x.step, x.value) for x in ranks] == [(s, 8.0 - s) for s in range(1, STEPS + 1)]
    assert math.isnan(found.Scalars(f"pss_health/stable_rank/{TAGS[1]}")[-1].value)
    assert found.Scalars("pss/spike_score")[-1].value == math.inf
    assert [x.step for x in found.Scalars("train/loss")] == list(range(1, STEPS + 1))

    histogram = found.Histograms(f"pss_spectra/{TAGS[0]}")[-1].histogram_value
    assert (histogram.num, histogram.max) == (4, 3.0)
    assert len(found.Histograms(f"pss_spectra/{TAGS[1]}")) == STEPS - 1
    picture = found.Images("pss/heat_map")[-1]
    assert picture.width > 300
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    table = _text(found, "pss/table")
    assert table.splitlines()[0] == "| step | matrix | stable_rank | grad_norm |"
    assert f"| 1 | {NAMES[0]} | 7.00 | 0.500 |" in table
    assert f"| 5 | {NAMES[1]} | nan |  |" in table
    assert "lower the learning rate" in _text(found, "pss/alerts")


def _text(found: EventAccumulator, tag: str) -> str:
    return str(found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode())


@pytest.fixture
def trackio_home(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("trackio")
    # Trackio reads TRACKIO_DIR once, at its import, and copies the value.
    home = offline / "trackio"
    for name, module in tuple(sys.modules.items()):
        for variable, folder in (("TRACKIO_DIR", home), ("MEDIA_DIR", home / "media")):
            if name.startswith("trackio") and variable in vars(module):
                monkeypatch.setattr(module, variable, folder)
    return home


def read_trackio(home: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    (path,) = home.glob("pss*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
        return rows, database.execute("select title, text, level from alerts").fetchall()


def test_trackio(offline: Path, trackio_home: Path) -> None:
    train(offline, "trackio")
    rows, alerts = read_trackio(trackio_home)
    key = f"pss_health/stable_rank/{TAGS[0]}"
    ranks = [(row["train/global_step"], row[key]) for row in rows if key in row]
    assert ranks == [(step, 8.0 - step) for step in range(1, STEPS + 1)]
    assert [row["pss/spike_score"] for row in rows if "pss/spike_score" in row][-1] == "Infinity"
    histogram = next(row[f"pss_spectra/{TAGS[0]}"] for row in rows if key in row)
    assert histogram["_type"] == "trackio.histogram"
    assert sum(histogram["values"]) == 4
    last = [row for row in rows if "pss/table" in row][-1]
    assert last["pss/table"]["_value"][0]["matrix"] == NAMES[0]
    assert len(last["pss/table"]["_value"]) == 2 * STEPS
    assert last["pss/heat_map"]["_type"] == "trackio.image"
    pictures = sorted(path.read_bytes() for path in trackio_home.glob("media/**/*.png"))
    assert [picture[:4] for picture in pictures] == [b"\x89PNG"] * 2  # 4th reading, and the end
    ((title, text, level),) = alerts
    assert (title, level) == ("PSS, step 3: spike, smoothed", "warn")
    assert "lower the learning rate" in text


def test_readings_and_interventions_of_pss_reach_all_three(
    offline: Path, trackio_home: Path
) -> None:
    """A whole run has real readings, and the alert of a real spike that PSS smoothed."""
    config = PSSConfig.preset(
        "paper", threshold_ratio=3.0, calibration_steps=2, health="full", health_every_steps=2
    )
    trainer = make_trainer(
        offline / "run",
        config,
        report_to=list(TRACKERS),
        project="pss",
        trackio_space_id=None,
        save_strategy="no",
    )
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda g: g * (100.0 if trainer.state.global_step == 4 else 1.0))
    trainer.train()
    (acted,) = [e for e in events_of(offline / "run") if e["kind"] == "intervention"]
    assert acted["step"] == 5
    files = (offline / "run" / "pss_health.jsonl").read_text().splitlines()
    (matrix, _), *_ = (ranks := json.loads(files[-1])["stable_rank"]).items()
    assert [json.loads(line)["step"] for line in files] == [2, 4, 6, 8]
    tags = {label_of(name): value for name, value in ranks.items()}
    assert len(tags) == 6

    found = finish_and_read()
    assert {t: found.column(f"pss_health/stable_rank/{t}")[-1] for t in tags} == {
        tag: (8, value) for tag, value in tags.items()
    }
    assert [step for step, _ in found.column("pss/stable_rank/min")] == [2, 4, 6, 8]
    assert [step for step, _ in found.column("train/pss/grad_norm_preclip")] == list(range(1, 9))
    assert all(sum(found.history_of(f"pss_spectra/{tag}")["values"]) == 16 for tag in tags)
    table = found.table("pss/table")
    assert "stable_rank" in table["columns"]
    assert {(row[0], row[1]) for row in table["data"]} >= {(s, matrix) for s in (2, 4, 6, 8)}
    assert found.image("pss/heat_map").startswith(b"\x89PNG")
    ((title, text, _),) = found.alerts
    assert title == "PSS, step 5: spike, smoothed"
    assert "smoothing (clip) changed 6 of 6 matrices" in text

    (folder,) = (offline / "run" / "runs").iterdir()
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    for tag, value in tags.items():
        last = board.Scalars(f"pss_health/stable_rank/{tag}")[-1]
        assert (last.step, last.value) == (8, pytest.approx(value, rel=FLOAT32_ROUNDING))
        assert board.Histograms(f"pss_spectra/{tag}")[-1].histogram_value.num == 16
    assert board.Images("pss/heat_map")[-1].step == 8
    assert f"| 8 | {matrix} |" in _text(board, "pss/table")
    assert text in _text(board, "pss/alerts")

    rows, alerts = read_trackio(trackio_home)
    read = [row for row in rows if f"pss_health/stable_rank/{label_of(matrix)}" in row]
    assert [row["train/global_step"] for row in read] == [2, 4, 6, 8]
    assert {tag: read[-1][f"pss_health/stable_rank/{tag}"] for tag in tags} == tags
    assert all(sum(read[-1][f"pss_spectra/{tag}"]["values"]) == 16 for tag in tags)
    shown = [row for row in rows if "pss/table" in row][-1]
    assert shown["pss/table"]["_value"][0]["matrix"] == matrix
    assert shown["pss/heat_map"]["_type"] == "trackio.image"
    assert [(one[0], one[1]) for one in alerts] == [(title, text)]


def test_the_heat_map_shows_the_fall(offline: Path) -> None:
    readings = ThinnedReadings()
    assert draw_heat_map(readings) is None
    for step in range(1, 30):
        readings.add(
            HealthReading(step=step, matrices={"stable_rank": {NAMES[0]: 2.0**-step, NAMES[1]: 1}})
        )
    picture = draw_heat_map(readings)
    assert picture is not None
    assert picture.shape[2] == 3
    first_block = picture[picture.shape[0] // 3].tolist()
    assert len({tuple(pixel) for pixel in first_block}) >= 29  # a colour a step


def test_a_tracker_that_raises_is_one_warning(
    offline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def raises(self: WandbTracker, row: dict[str, Any], step: int) -> None:
        calls.append(step)
        raise RuntimeError("the server is gone")

    monkeypatch.setattr(WandbTracker, "_log", raises)
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        trainer, callback = train(offline, "wandb")
    assert trainer.state.global_step == STEPS
    assert calls == [1]
    assert not callback.trackers
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("hf_pss")]
    assert len(warnings) == 1
    assert "wandb: RuntimeError: the server is gone. Training continues" in warnings[0]


def test_a_run_that_is_closed_is_one_warning(
    offline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.init(project="pss")
    args = TrainingArguments(output_dir=str(offline), report_to=["wandb"], use_cpu=True)
    trackers = trackers_for(args)
    trackers.report(reading(1))
    wandb.finish()
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        trackers.report(reading(2))
        trackers.alert(intervention())
        trackers.finish()
    assert len([r for r in caplog.records if r.name.startswith("hf_pss")]) == 1
    assert not trackers


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_no_open_run_is_one_warning(
    tracker: str, offline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(tracker)
    args = TrainingArguments(output_dir=str(offline), report_to=[tracker], use_cpu=True)
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        assert not trackers_for(args)
    assert [f"stops reporting to {tracker}" in r.getMessage() for r in caplog.records] == [True]


def test_tensorboard_without_the_trainers_writer_has_its_own_folder(offline: Path) -> None:
    args = TrainingArguments(output_dir=str(offline), report_to=["tensorboard"], use_cpu=True)
    trackers = trackers_for(args)
    trackers.report(reading(1))
    trackers.finish()
    found = EventAccumulator(str(offline / "runs" / "pss")).Reload()
    assert found.Scalars("pss/stable_rank/min")[0].value == 4.0


def test_without_trackers_nothing_is_kept(offline: Path) -> None:
    args = TrainingArguments(output_dir=str(offline), report_to="none", use_cpu=True)
    trackers = trackers_for(args)
    trackers.report(reading(1))
    trackers.alert(intervention())
    trackers.finish()
    assert not trackers
    assert set(TRACKERS) == {"wandb", "tensorboard", "trackio"}


def test_without_matplotlib_the_table_is_logged(
    offline: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(history: Any) -> None:
        raise ImportError("matplotlib is not installed.")

    monkeypatch.setattr("hf_pss.trainer.trackers.draw_heat_map", missing)
    with caplog.at_level(logging.WARNING, logger="hf_pss"):
        train(offline, "wandb")
    found = finish_and_read()
    assert len(found.table("pss/table")["data"]) == 2 * STEPS
    assert not any(key.startswith("pss/heat_map") for row in found.history for key in row)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("hf_pss")] == [
        "PSS draws no heat map in this run: matplotlib is not installed. The table has its numbers."
    ]
