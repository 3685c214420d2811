"""The demo in a process of its own: ``demo_process.py OUT LIBRARY RECIPE OPTIONS [real]``.

RECIPE and OPTIONS are JSON. The demo's runs are forks, which need no imports and read the small
library. With ``real`` the demo starts its runs as usual.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from multiprocessing import get_context
from pathlib import Path

from hf_pss.detection.explosion import ExplosionRule
from hf_pss.evidence import demo, runner
from hf_pss.evidence.recipes import Recipe


def main(out: Path, library: str, recipe: str, options: str, *real: str) -> None:
    paths = {**sysconfig.get_paths(), "stdlib": library}
    sysconfig.get_paths = lambda: paths  # type: ignore[assignment]
    if not real:
        runner.get_context = lambda _: get_context("fork")  # type: ignore[assignment]
    fields = json.loads(recipe)
    explosion = ExplosionRule(**fields.pop("explosion"))
    status = demo.run_demo(Recipe(**fields, explosion=explosion), out, **json.loads(options))
    sys.stdout.write(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
