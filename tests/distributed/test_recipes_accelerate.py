"""The files of recipes/accelerate: each is read by Accelerate, and starts the ranks it says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import events_of, steps_of
from launching import TIMEOUT_SECONDS, WORKER, environment
from preloaded import as_python, start

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# The worker's backend that a file must end in, whatever the worker is told.
BACKENDS = {
    "single": ("one", "Backend"),
    "ddp": ("ddp", "Replicated"),
    "fsdp2": ("fsdp2-launched", "Sharded"),
    "zero2": ("zero-launched", "Zero"),
    "zero3": ("zero-launched", "Zero"),
}
OPTIONS = json.dumps(
    {
        "name": "floor",
        "floor_ratio": 1.2,
        "check_every_steps": 2,
        "floor_reference": "noise",
    }
)


def launcher(name: str, *flags: str) -> list[str]:
    """Return what ``python`` is given."""
    return [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FOLDER / f"{name}.yaml"),
        *flags,
        str(WORKER),
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def three_steps(backend: str, folder: Path) -> list[str]:
    return [backend, str(folder), "--options", OPTIONS, "--trainer", '{"max_steps": 3}']


def preloaded_ranks(backend: str) -> dict[str, str]:
    """Return the environment of a launcher whose ranks are to have all imports done."""
    return {**environment(backend), "PYTHON_EXEC": as_python()}


def outcomes(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("name", FILES)
def test_accelerate_knows_every_key(name: str) -> None:
    """It refuses a file with one that it does not know."""
    text = (FOLDER / name).read_text()
    said, config = yaml.safe_load(text), load_config_from_file(str(FOLDER / name))
    assert config.num_processes == said["num_processes"]
    assert config.distributed_type.value == said["distributed_type"]
    assert text.count("#") >= 3, "commented for whoever copies it"


# The quick run starts DeepSpeed's launcher here, and torch's in tests/recipes/test_pretrain.py.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "zero3" else pytest.mark.slow) for name in BACKENDS],
)
def test_it_starts_its_ranks(name: str, tmp_path: Path) -> None:
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; `make test` installs it")
    backend, expected = BACKENDS[name]
    port = ("--main_process_port", str(free_port())) if name != "single" else ()
    words = [*launcher(name, *port), *three_steps(backend, tmp_path)]
    if name == "ddp":  # the program itself, nothing preloaded
        done = subprocess.run(
            [sys.executable, *words],
            env=environment(backend),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        returncode, errors = done.returncode, done.stderr
    else:
        with start(*words, env=preloaded_ranks(backend)) as process:
            _, errors = process.communicate(TIMEOUT_SECONDS)
            returncode = process.wait()
    assert returncode == 0, errors[-3000:]
    found = outcomes(tmp_path)
    assert len(found) == (1 if name == "single" else 2)
    assert {one["backend"] for one in found} == {expected}
    assert {one["error"] for one in found} == {None}
    assert len({one["digest"] for one in found}) == 1
    assert steps_of(events_of(tmp_path)) == [2]


def test_two_nodes_meet_and_agree(tmp_path: Path) -> None:
    """Two launchers on the loopback, one rank each; they meet by torchrun's rendezvous."""
    port = str(free_port())
    with ExitStack() as stack:
        nodes = []
        for rank in range(2):
            flags = ("--machine_rank", str(rank), "--main_process_port", port)
            words = [*launcher("two_nodes", *flags), *three_steps("ddp", tmp_path)]
            nodes.append(stack.enter_context(start(*words, env=preloaded_ranks("ddp"))))
        errors = [node.communicate(TIMEOUT_SECONDS)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:]
    one, other = outcomes(tmp_path)
    assert one["digest"] == other["digest"]
    assert one["history"] == other["history"]
    assert steps_of(events_of(tmp_path)) == [2]
