"""Run the integration tests and the invariants with other releases of transformers.

    python tests/versions/matrix.py 5.3.0 5.17.0 newest

Each release gets a virtual environment of its own, inside that of the interpreter that runs this
script. It sees all packages of that one, torch among them; what the release needs besides or in
another version, huggingface_hub first of all, comes from the package registry and lies in front:
about 120 MB each. Processes that tests start run in it, too. The exit code is 1 where any fails.

torch stays the same unless another is asked for: but for an index of CPU builds (PIP_INDEX_URL)
that is a wheel for CUDA, which runs on a CPU as well, and takes gigabytes:

    python tests/versions/matrix.py --torch 2.9.1 newest
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "versions"
NEWEST = "newest"
TESTS = ("tests/integration", "tests/invariants")
MARKS = "not slow and not bench and not gpu"


def empty_environment(name: str) -> Path:
    """Return the interpreter of an environment that sees the packages of this one."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
    ours = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.check_output([python, *ours], text=True).strip())
    # Behind its own packages; addsitedir, so that editable installs are found as well.
    shared = sysconfig.get_path("purelib")
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    return python


def environment(transformers: str, torch: str | None) -> Path:
    """Return the interpreter of an environment that has these releases; made where it is not."""
    name = f"transformers-{transformers}" + (f"-torch-{torch}" if torch else "")
    python = empty_environment(name)
    # trl and peft follow transformers, so the newest release is tested with theirs.
    is_newest = transformers == NEWEST
    wanted = ["transformers", "trl", "peft"] if is_newest else [f"transformers=={transformers}"]
    wanted += [f"torch=={torch}"] if torch else []
    pip = ("-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check")
    subprocess.run([python, *pip, *wanted], check=True)
    return python


def run(python: Path, rest: list[str]) -> bool:
    """Say which releases are tested, and test them."""
    say = "import torch, transformers; print(f'transformers {transformers.__version__}, '"
    say += " f'torch {torch.__version__}', flush=True)"
    subprocess.run([python, "-c", say], check=True)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKS, *TESTS, *rest]
    return subprocess.run([python, *words], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Test every release, also where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("transformers", nargs="+", help="5.3.0, say, or newest")
    parser.add_argument("--torch", help="a release of torch besides")
    parser.add_argument(
        "--pytest", nargs=argparse.REMAINDER, default=[], help="all that follows is for pytest"
    )
    options = parser.parse_args()
    passed = {
        one: run(environment(one, options.torch), options.pytest) for one in options.transformers
    }
    failed = [one for one, is_good in passed.items() if not is_good]
    if failed:
        sys.stderr.write(f"failed with transformers {', '.join(failed)}\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
