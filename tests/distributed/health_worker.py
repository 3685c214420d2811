"""The worker, where every metric of rank 1 that decomposes, or looks at tokens, may raise."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
from worker import main

from hf_pss.health import meter, update_metrics
from hf_pss.health import spectrum_metrics as spectra

BROKEN = "--broken"


def fail(*args: object, **kwargs: object) -> NoReturn:
    raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]


if __name__ == "__main__":
    if BROKEN in sys.argv:
        sys.argv.remove(BROKEN)
        if os.environ.get("RANK") == "1":
            spectra.unit_scaled = fail  # type: ignore[attr-defined]
            spectra.leading_triplets = fail  # type: ignore[attr-defined]
            update_metrics.SpectralEdgeMeter._project = fail  # type: ignore[method-assign]
            meter.spectral_alignment = fail  # type: ignore[attr-defined]
    main()
