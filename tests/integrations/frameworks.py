"""Test the integrations with the real frameworks, each in an environment of its own.

    python tests/integrations/frameworks.py lightning axolotl llamafactory ms-swift

An environment sees all packages of the interpreter that runs this script. What a framework needs
in another version comes from the package registry and lies in front; torch stays. The exit code is
1 if a framework cannot be installed or a test fails.

unsloth is missing, because it needs a GPU. sentence-transformers is one of the usual test
requirements, and tests/integration tests it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "versions"))
from matrix import empty_environment  # noqa: E402


@dataclass(frozen=True)
class Framework:
    """What to install, and the tests to run with it."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    has_requirements: bool = True
    """Whether pip installs all that the packages require."""
    stand_ins: tuple[str, ...] = ()
    """Packages that have no build for a CPU and that our tests do not use: empty modules."""


COMMAND_LINES = "tests/integrations/test_command_lines.py"
FRAMEWORKS = {
    "lightning": Framework(("lightning",), ("tests/integrations/test_lightning.py",)),
    # axolotl requires CUDA builds of several gigabytes. These packages are enough on a CPU.
    "axolotl": Framework(
        (
            *("axolotl", "transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "datasets==4.8.4"),
            *(
                "accelerate==1.13.0",
                "huggingface_hub==1.17.0",
                "tokenizers==0.23.1",
                "kernels<0.17",
                "kernels-data",
            ),
            *("addict", "art", "axolotl-contribs-lgpl", "axolotl-contribs-mit", "bitsandbytes"),
            *("colorama", "fastcore", "fire", "liger-kernel", "llvmlite", "numba", "posthog"),
            *("backoff", "evaluate", "optimum==1.16.2", "python-dotenv", "schedulefree"),
            *("sentencepiece", "termcolor", "torchao==0.17.0", "triton", "zstandard"),
            *("immutabledict", "langdetect", "nvidia-ml-py"),
        ),
        (COMMAND_LINES, "-k", "axolotl"),
        has_requirements=False,
    ),
    "llamafactory": Framework(
        ("llamafactory",),
        (COMMAND_LINES, "-k", "llamafactory"),
        stand_ins=("torchaudio", "torchvision"),
    ),
    "ms-swift": Framework(("ms-swift",), (COMMAND_LINES, "-k", "swift")),
}


def prepare(name: str, framework: Framework) -> Path:
    """Return the interpreter of an environment that has the framework."""
    python = empty_environment(f"framework-{name}")
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    words = ["install", "--upgrade", *framework.packages, f"torch=={version('torch')}"]
    if not framework.has_requirements:
        words = ["install", "--no-deps", *framework.packages]
    subprocess.run([*pip, *words], check=True)
    if framework.stand_ins:
        subprocess.run([*pip, "uninstall", "--yes", *framework.stand_ins], check=True)
        ours = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        folder = Path(subprocess.check_output(ours, text=True).strip())
        (folder / f"{framework.stand_ins[0]}.py").touch()
    return python


def is_good(name: str) -> bool:
    """Test a framework, and return whether its tests ran and passed."""
    framework = FRAMEWORKS[name]
    try:
        python = prepare(name, framework)
    except subprocess.CalledProcessError:
        return False
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *framework.tests]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_PSS_NEEDS_FRAMEWORK": "1"}
    return subprocess.run([python, *words], cwd=ROOT, env=environment).returncode == 0


if __name__ == "__main__":
    failed = [name for name in sys.argv[1:] or FRAMEWORKS if not is_good(name)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
