"""A step without an event reads from the device no more often than the plain Trainer's does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EAGER, OUT_OF_REACH, make_trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback

from hf_pss import PSSConfig

_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.numpy,
    Tensor.cpu,
    torch.equal,
    torch.allclose,
    torch.nonzero,
}


class HostReads(TorchFunctionMode):
    """Counts the calls that would make a GPU's host wait, on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._on_host: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A device object is where a tensor lives already, here always the CPU; the word is meant.
        to_host = func is Tensor.to and any(isinstance(x, str) and x == "cpu" for x in args[1:])
        made_on_host = args and any(args[0] is tensor for tensor in self._on_host)
        self.count += (func in _READS or to_host) and not made_on_host
        result = func(*args, **(kwargs or {}))
        if func is torch.tensor and "device" not in (kwargs or {}):
            self._on_host = [*self._on_host[-8:], result]  # reading it makes no GPU's host wait
        return result


class CountSteps(TrainerCallback):
    """Reads in each step, logging and saving included."""

    def __init__(self, reads: HostReads) -> None:
        self.reads, self.steps, self._before = reads, [], 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._close()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        self.steps.append(self.reads.count - self._before)
        self._before = self.reads.count


def reads_per_step(folder: Path, pss: PSSConfig | None, **options: Any) -> list[int]:
    trainer = make_trainer(folder, pss, save_strategy="no", **options)
    with HostReads() as reads:
        counter = CountSteps(reads)
        trainer.add_callback(counter)
        trainer.train()
    return counter.steps[1:]  # before the first step lies the start


# Observing checks the floor in every step, with one read. A matrix that may be on either side of
# its floor needs a second read. The evidence of the first spike needs five. Events need none.
@pytest.mark.parametrize(("preset", "reads"), [("paper", {0}), ("observe only", {1, 2, 6, 7})])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}])
def test_a_logged_step_needs_no_read_but_that_of_its_check(
    preset: str, reads: set[int], options: dict[str, Any], tmp_path: Path
) -> None:
    plain = reads_per_step(tmp_path, None, **options)
    assert len(plain) == 8
    assert min(plain) >= 2  # the loss and the norm: the counter sees the Trainer's own
    pss = reads_per_step(tmp_path, OUT_OF_REACH[preset], **options)
    extra = [b - a for a, b in zip(plain, pss, strict=True)]
    assert set(extra) <= reads
    assert sum(each > 2 for each in extra) <= 1


def test_a_step_that_is_not_logged_needs_one_for_the_norm(tmp_path: Path) -> None:
    plain = reads_per_step(tmp_path, None, logging_steps=5)
    pss = reads_per_step(tmp_path, OUT_OF_REACH["paper"], logging_steps=5)
    extra = [b - a for a, b in zip(plain, pss, strict=True)]
    assert extra == [1, 1, 1, 1, 0, 1, 1, 1]


def test_the_floor_needs_one_for_each_check(tmp_path: Path) -> None:
    plain = reads_per_step(tmp_path, None)
    config = PSSConfig.preset("floor", floor_ratio=1e-6, check_every_steps=3)
    extra = [b - a for a, b in zip(plain, reads_per_step(tmp_path, config), strict=True)]
    assert extra == [0, 0, 1, 0, 0, 1, 0, 0]


def test_an_intervention_is_seen_by_the_counter(tmp_path: Path) -> None:
    plain, pss = reads_per_step(tmp_path, None), reads_per_step(tmp_path, EAGER)
    assert max(b - a for a, b in zip(plain, pss, strict=True)) > 0


def test_health_reads_residuals_in_each_step_and_two_things_in_a_reading(tmp_path: Path) -> None:
    """Of residuals, on a CPU alone, one a group of matrices and round; `test_tracked` has a GPU."""
    config = OUT_OF_REACH["paper"]
    watched = replace(config, health="light", health_every_steps=4)
    plain, health = reads_per_step(tmp_path, config), reads_per_step(tmp_path, watched)
    extra = [b - a for a, b in zip(plain, health, strict=True)]
    num_groups, num_further_rounds = 2, 2
    residuals = num_groups * num_further_rounds
    readings = [extra.pop(7), extra.pop(3)]
    assert max(extra) <= residuals
    assert max(readings) <= residuals + 2  # the spectra and the gradients' norms


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("logging_steps", "not_logged"), [(1, 0), (5, 7)])
def test_a_gpu_waits_once_more_in_each_step_that_is_not_logged(
    logging_steps: int, not_logged: int, tmp_path: Path
) -> None:
    def waits(pss: PSSConfig | None) -> int:
        trainer: Trainer = make_trainer(
            tmp_path, pss, save_strategy="no", use_cpu=False, logging_steps=logging_steps
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(w.message) for w in caught)

    waits(None)  # the first run also loads kernels
    plain, pss = waits(None), waits(OUT_OF_REACH["paper"])
    assert 0 < pss <= plain + not_logged
