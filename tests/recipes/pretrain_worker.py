"""One rank of `hf-pss train`, which writes down the blocks that it was given."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_pss.cli import training
from hf_pss.cli.app import app


class Recording(training._TextTrainer):
    blocks: list[list[int]]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.blocks.extend(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def main(folder: Path, words: list[str]) -> None:
    Recording.blocks = []
    training._TextTrainer = Recording  # type: ignore[misc]
    try:
        app(["train", *words, "--output_dir", str(folder / "out")])
    except SystemExit as end:
        code = int(end.code or 0)
    outcome = {"code": code, "blocks": Recording.blocks}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    # Gloo's destructor joins a thread that may wait for the interpreter's lock, which that thread's
    # joiner holds (torch 2.13): seen once in about ten runs. So leave without any destructor.
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
