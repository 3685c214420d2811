"""Detect from the weights alone that the learning rate was too high from the beginning.

The loss of such a run still falls, only by less, so the log does not show the harm. But if the
network began from noise, its stable ranks fall farther within the first hundred steps than in a
sound run. We chose the following rule. For each matrix of the repeated blocks, divide the stable
rank by the stable rank of noise of the same shape. The rule is met if the median of these shares is
below `LOW_SHARE` in a checkpoint of the first `_EARLY_STEPS` steps.

We measured the lowest share of each run with GPT-2 (2 layers, width 64, AdamW, 240 steps, a
checkpoint every 20 steps, seeds 0 to 9). At a learning rate of 3e-3 it was 0.195 to 0.308. At 1e-2
it was 0.100 to 0.184, and in 9 of 10 runs it was below a sixth. The share follows the harm rather
than the rate. At 5e-3, the four runs below a sixth ended 0.16 to 0.32 nats above the runs at 3e-3.
The six other runs had shares of 0.187 to 0.265 and ended at most 0.05 nats above.

The rule also holds at widths 128 and 256 and with 6 layers. It missed two Llama runs at 1e-2, whose
shares were 0.207 and 0.228. One run at 1e-2 that it found was hardly worse. Pretrained weights have
lower stable ranks by nature, and larger networks and longer runs may have them as well, so the rule
is not applied to these.
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
# The largest allowed size of the smaller side of a matrix.
_WIDEST = 256
_FEWEST_MATRICES = 8
# If a network has learned nothing, its first loss is at least the entropy minus this number.
_WITHIN_NATS = 0.1


def early_damage(
    log: RunLog,
    reports: Sequence[CheckpointReport],
    unigram_entropy: float,
    found: RunFailure | None = None,
) -> RunFailure | None:
    """Apply the rule to a run that began from noise. The cost is negligible.

    Args:
        log: The log of the run. If the first loss is below the entropy, the weights were already
            trained or the loss was logged too late. In that case the function returns None.
        reports: The reports on all checkpoints. Only checkpoints that could be measured count.
        unigram_entropy: The unigram entropy of the training text in nats.
        found: The failure that the log shows. A rise in the first steps may itself be the result of
            earlier harm, so the rule is applied to the checkpoints before it.
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
    """Return the median ratio of a block matrix's stable rank to the stable rank of noise.

    The result is None if the checkpoint has too few matrices, or if a matrix is larger than those
    for which the rule was measured.
    """
    matrices = () if report.inspection is None else report.inspection.matrices
    blocks = [one.health for one in matrices if one.health.place.block is not None]
    if len(blocks) < _FEWEST_MATRICES or max(min(one.shape) for one in blocks) > _WIDEST:
        return None
    shares = [one.stable_rank / one.noise for one in blocks]
    return statistics.median(shares) if all(map(math.isfinite, shares)) else None
