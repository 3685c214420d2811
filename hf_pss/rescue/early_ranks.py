"""Find a learning rate that was too high from the beginning, from the weights alone.

The loss of such a run falls all the time, only less, so the log does not show the harm. But within
the first hundred steps the stable ranks of a network that began from noise fall farther than in a
sound run. Our rule: in a checkpoint of the first `_EARLY_STEPS` steps, the median over the matrices
of the repeated blocks of (stable rank) / (stable rank of noise of the shape) is below `LOW_SHARE`.

Measured (GPT-2, 2 layers × 64, AdamW, 240 steps, a checkpoint every 20, seeds 0 to 9), the lowest
such share of a run: 0.195 to 0.308 at 3e-3; 0.100 to 0.184 at 1e-2, 9 of 10 below a sixth. The
share follows the harm rather than the rate: at 5e-3 the four runs below a sixth ended 0.16 to 0.32
nats above 3e-3, the six others (0.187 to 0.265) at most 0.05. The rule holds at widths 128 and 256
and with 6 layers. It missed Llama at 1e-2 (0.207 and 0.228), and one 1e-2 run that it found was
hardly worse. Pretrained weights lie lower by nature, and so may larger networks and longer runs, so
these are not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from hf_pss.rescue.candidates import CheckpointReport
from hf_pss.rescue.diagnosis import RunFailure
from hf_pss.runs.log import RunLog

__all__ = ["LOW_SHARE", "early_damage", "noise_share"]

LOW_SHARE = 1 / 6
_EARLY_STEPS = 1000
_RISES = ("spike", "slow_damage")
# The smaller side of a matrix.
_WIDEST = 256
_FEWEST_MATRICES = 8
# A network that has learned nothing has a first loss of at least the entropy less this.
_WITHIN_NATS = 0.1


def early_damage(
    log: RunLog,
    reports: Sequence[CheckpointReport],
    unigram_entropy: float,
    found: RunFailure | None = None,
) -> RunFailure | None:
    """Judge the weights of a run that began from noise. Cost: negligible.

    Args:
        log: The run's log. A first loss below the entropy is of trained weights, or was logged too
            late, and then nothing is judged.
        reports: All checkpoints. Only those that could be measured count.
        unigram_entropy: In nats.
        found: The failure that the log shows. A rise in these first steps may itself be the result
            of an earlier harm, so then the checkpoints before it are judged.
    """
    if found is not None and (found.kind not in _RISES or found.onset_step > _EARLY_STEPS):
        return None
    rows = log.training
    loss = rows[0].loss if rows else None
    if loss is None or not loss >= unigram_entropy - _WITHIN_NATS:
        return None
    last = _EARLY_STEPS if found is None else found.onset_step - 1
    early = [one for one in reports if one.step <= last and one.problem is None]
    shares = [(one.step, share) for one in early if (share := noise_share(one)) is not None]
    low = [(step, share) for step, share in sorted(shares) if share < LOW_SHARE]
    if not low:
        return None
    step, share = low[0]
    least = min(share for _, share in low)
    rates = [row.learning_rate for row in log.rows if row.learning_rate is not None]
    finite = [rate for rate in rates if math.isfinite(rate)]
    peak = f" ({max(finite):.2g} at its peak)" if finite else ""
    return RunFailure(
        kind="slow_damage",
        onset_step=1,
        noticed_step=step,
        text=f"The loss does not show it, but the weights do: at step {step} the median matrix of "
        f"the blocks had {share:.1%} of the stable rank of noise of its shape, at the lowest "
        f"{least:.1%}. In sound runs of small networks it stays above {LOW_SHARE:.1%}. The likely "
        f"cause is a learning rate that was too high from the beginning{peak}.",
    )


def noise_share(report: CheckpointReport) -> float | None:
    """Return the median over a checkpoint's blocks of stable rank / that of noise.

    None for too few matrices, or for matrices larger than those that the rule was measured on.
    """
    matrices = () if report.inspection is None else report.inspection.matrices
    blocks = [one.health for one in matrices if one.health.place.block is not None]
    if len(blocks) < _FEWEST_MATRICES or max(min(one.shape) for one in blocks) > _WIDEST:
        return None
    shares = [one.stable_rank / one.noise for one in blocks]
    return statistics.median(shares) if all(map(math.isfinite, shares)) else None
