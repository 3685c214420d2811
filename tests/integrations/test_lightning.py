"""PSSLightningCallback in the real Lightning, which has an environment of its own.

`make test-frameworks` runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_pages import needs_framework, snippets_of
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from hf_pss import ConfigurationError, PSSConfig, PSSController
from hf_pss.records.events import from_json_line

needs_framework("lightning")
import lightning  # noqa: E402

from hf_pss.integrations.lightning import PSSLightningCallback, default_callbacks  # noqa: E402

INTERVENES = PSSConfig.preset(floor_ratio=1.3, check_every_steps=1, calibration_steps=1)
NUM_BATCHES, ACCUMULATED, CLIP_AT = 16, 2, 0.1

pytestmark = pytest.mark.filterwarnings("default")


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, *, bad_batch: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.bad_batch = bad_batch

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch)[:, :-1], batch[:, 1:])
        return loss * torch.nan if index == self.bad_batch else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4 * NUM_BATCHES, 8, 16, generator=generator)
    return DataLoader(list(rows), batch_size=4)  # type: ignore[arg-type]


def fit(
    folder: Path, *callbacks: Any, module: Module | None = None, resume: Any = None, **options: Any
) -> Module:
    module = module or Module()
    trainer = lightning.Trainer(
        **{
            "max_epochs": 1,
            "accumulate_grad_batches": ACCUMULATED,
            "gradient_clip_val": CLIP_AT,
            **options,
        },
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return module


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return [name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)]


def by_hand() -> tuple[Module, PSSController]:
    """Train with PSSController, in the order in which Lightning trains."""
    module = Module()
    optimizer = module.configure_optimizers()
    pss = PSSController(module, INTERVENES, optimizer=optimizer)
    total = torch.tensor(0.0)
    for index, batch in enumerate(loader()):
        loss = module.training_step(batch, index) / ACCUMULATED
        loss.backward()
        total = total + loss.detach()
        if index % ACCUMULATED == ACCUMULATED - 1:
            norm = clip_grad_norm_(module.parameters(), CLIP_AT)
            pss.step(norm, update=optimizer.step, loss=total)
            optimizer.zero_grad()
            total = torch.tensor(0.0)
    return module, pss


def test_the_run_equals_the_controller_in_a_loop(tmp_path: Path) -> None:
    callback = PSSLightningCallback(INTERVENES)
    module = fit(tmp_path, callback)
    expected, pss = by_hand()
    assert callback.controller is not None
    assert callback.controller.state_dict() == pss.state_dict()
    assert callback.report is not None
    assert callback.report.scalars["interventions"] > 0
    assert differing(module, expected) == []
    [file] = tmp_path.rglob("pss_events.jsonl")
    records = [from_json_line(line) for line in file.read_text().splitlines()]
    assert records


def test_without_an_event_the_run_is_lightnings_own(tmp_path: Path) -> None:
    quiet = PSSConfig.preset("paper", threshold_ratio=1e9)
    module = fit(tmp_path / "with", PSSLightningCallback(quiet))
    assert differing(module, fit(tmp_path / "without")) == []


def test_a_run_resumes_as_without_an_interruption(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", PSSLightningCallback(INTERVENES), max_epochs=2)
    fit(tmp_path / "first", PSSLightningCallback(INTERVENES))
    [checkpoint] = (tmp_path / "first").rglob("*.ckpt")
    callback = PSSLightningCallback(INTERVENES)
    resumed = fit(tmp_path / "first", callback, max_epochs=2, resume=checkpoint)
    assert callback.controller is not None
    assert callback.controller.step_number == 2 * NUM_BATCHES // ACCUMULATED
    assert differing(resumed, whole) == []


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    callback = PSSLightningCallback()
    module = fit(tmp_path, callback, module=Module(bad_batch=5))
    assert callback.report is not None
    assert callback.report.scalars["nonfinite_steps"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    by_itself = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    with pytest.raises(ConfigurationError, match="automatic optimization"):
        fit(tmp_path, *default_callbacks(), module=module, **by_itself)


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    callback = PSSLightningCallback()
    assert callback.state_dict() == {}
    fit(tmp_path, callback)
    assert json.loads(json.dumps(callback.state_dict())) == callback.state_dict()


def test_the_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"module": Module(), "loader": loader(), "loss_of_a_batch": lambda: 0.0}
    for code in snippets_of("lightning"):
        exec(code, names)
    [callback] = [c for c in names["trainer"].callbacks if isinstance(c, PSSLightningCallback)]  # type: ignore[attr-defined]
    assert callback.controller is not None
    assert callback.controller.step_number == NUM_BATCHES


def test_options_that_are_no_config_are_refused_when_the_callback_is_built() -> None:
    with pytest.raises(ConfigurationError, match="The options of PSS are a PSSConfig"):
        PSSLightningCallback("floor")  # type: ignore[arg-type]
