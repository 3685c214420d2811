"""Python processes that begin with all imports done.

Importing torch, transformers and Accelerate takes seconds, and that is most of what a test costs
that starts a process. `start` and `start_ranks` ask a server for a fork instead: the server has
imported everything and runs nothing. Each session of pytest (each worker of xdist) starts a server
when it first needs one. The program then runs as under ``python``: with its own arguments,
environment and folder, the signals' default dispositions, and the interpreter's ordinary end.

``preloaded.py serve FOLDER`` is that server. ``preloaded.py WORDS…`` stands in for ``python``
where a launcher starts ``python`` by itself (see `as_python`).
"""

from __future__ import annotations

import atexit
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = [
    "PATIENCE_SECONDS",
    "Process",
    "Ranks",
    "as_python",
    "children_of",
    "is_running",
    "start",
    "start_ranks",
    "wait_until",
]

# Far more than anything needs: who waits longer does not wait for a slow machine.
PATIENCE_SECONDS = 240.0
# What the other ranks may take to end when one has failed.
GRACE_SECONDS = 20.0

_FOLDER_VARIABLE = "HF_PSS_TESTS_SERVER"
_SOCKET, _PYTHON = "socket", "python"
_POLL_SECONDS = 0.01
# And all of hf_pss.
_IMPORTED = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "accelerate.commands.launch",
    "datasets",
    "peft",
    "helpers",
)


class Process:
    """A program in a fork of the server: as `subprocess.Popen`, as far as tests need it.

    It leads a process group; who leaves its context, or calls `end`, kills what is left of that.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.args = [str(word) for word in words]
        self.returncode: int | None = None
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]
        numbers = [file.fileno() for file in self._files]
        self._connection = _ask(_server(), self.args, env or os.environ, cwd, numbers, sys.path)
        self.pid = _number(self._connection)

    @property
    def output(self) -> str:
        """What it has printed so far; not to be asked after `end`."""
        return _read(self._files[0])

    @property
    def errors(self) -> str:
        """What it has complained so far; not to be asked after `end`."""
        return _read(self._files[1])

    def poll(self) -> int | None:
        """Return the exit code, minus the signal where one ended it; None while it runs."""
        return self._look(0.0)

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """Return the exit code when there is one."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout, stderr=self.errors.encode())
        return code

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, str]:
        """Wait; return what it has printed and what it has complained."""
        self.wait(timeout)
        return self.output, self.errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill its process group, whatever is left of it."""
        self.poll()
        self._connection.shutdown(socket.SHUT_WR)
        while self._connection.recv(64):
            pass  # until the server has done it
        for resource in (self._connection, *self._files):
            resource.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
            self.returncode = _number(self._connection)
        return self.returncode


class Ranks:
    """Processes that find each other as under torchrun, and are ended together as by it."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes
        self.returncode: int | None = None
        """Of the first rank that failed, or 0."""

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, str]:
        """Wait for all; return what they have printed and complained, rank after rank."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                break
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.processes[0].args, timeout)
            time.sleep(_POLL_SECONDS)
        self.returncode = failed[0] if failed else 0
        if failed:
            self._end_others()
        printed = "".join(process.output for process in self.processes)
        errors = "".join(process.errors for process in self.processes)
        ends = (f"rank {i}: exit code {one.wait()}\n" for i, one in enumerate(self.processes))
        return printed, errors + "".join(ends)

    def _end_others(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def start(
    *words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Process:
    """Run ``python *words``, a script or ``-m module``, in a fork of the server.

    Args:
        words: What ``python`` would be given.
        env: Its whole environment; this process's when None.
        cwd: Its folder; this process's when None.
    """
    return Process(words, env=env, cwd=cwd)


@contextmanager
def start_ranks(
    num_ranks: int, *words: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Ranks]:
    """Run ``python *words`` once a rank; all are ended with the context."""
    from torch.distributed import TCPStore

    # Not rank 0's, as under torchrun: so its port cannot be taken by somebody else meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
    with ExitStack() as stack:
        processes = []
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = {**(env or os.environ), **shared, **own}
            processes.append(stack.enter_context(start(*words, env=given)))
        yield Ranks(processes)


def as_python() -> str:
    """Return a program to be called in ``python``'s place; its processes are forks, too.

    ``torchrun`` calls what the variable PYTHON_EXEC names.
    """
    return os.path.join(_server(), _PYTHON)


def wait_until(is_true: Callable[[], bool], complaint: str) -> None:
    """Wait for something that will come, however slow the machine is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def children_of(parent: int) -> list[int]:
    """Return the processes that this one has started and not waited for (Linux)."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8")
    return [int(word) for word in found.split()]


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended yet (Linux)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1]
    except OSError:
        return False
    return state.split()[0] != "Z"


def _read(file: IO[bytes]) -> str:
    # Not by `read`: that would move the place at which the program writes.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


def _number(connection: socket.socket) -> int:
    """Read one line of a server's answer, and nothing behind it."""
    line = b""
    while not line.endswith(b"\n"):
        read = connection.recv(1)
        assert read, "the server of preloaded processes is gone"
        line += read
    return int(line)


def _ask(
    folder: str,
    words: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    files: Sequence[int],
    path: Sequence[str],
) -> socket.socket:
    """Ask for a process; return the connection, which will tell its id and its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, _SOCKET))
    socket.send_fds(connection, [b"+"], files)
    wanted = {
        "words": list(words),
        "env": {**env, _FOLDER_VARIABLE: folder},
        "cwd": str(cwd or Path.cwd()),
        "path": list(path),
    }
    connection.sendall(json.dumps(wanted).encode() + b"\n")
    return connection


_servers: dict[int, str] = {}


def _server() -> str:
    """Return the folder of this process's server, and start that when first asked."""
    if os.getpid() not in _servers:
        folder = tempfile.TemporaryDirectory(prefix="hf_pss-tests-")
        stand_in = Path(folder.name, _PYTHON)
        stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$@"\n')
        stand_in.chmod(0o700)
        here = str(Path(__file__).parent)
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", folder.name],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([here, *sys.path]),
            },
            stdin=subprocess.PIPE,  # ends with this process, however that ends
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the server of processes did not begin"

        def end() -> None:
            process.communicate()
            folder.cleanup()

        atexit.register(end)
        _servers[os.getpid()] = folder.name
    return _servers[os.getpid()]


# What the server and its forks do


class _Child:
    """A fork, as the server sees it; it lives no longer than the connection it was asked by."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid, self.is_running = connection, pid, True
        self._tell(pid)

    def look(self) -> None:
        """Tell the exit code when there is one; its id stays taken, so that `end` ends no other."""
        if not self.is_running:
            return
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            self.is_running = False
            has_exited = found.si_code == os.CLD_EXITED
            self._tell(found.si_status if has_exited else -found.si_status)

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.connection.close()

    def _tell(self, number: int) -> None:
        with suppress(OSError):  # whoever asked is gone
            self.connection.sendall(f"{number}\n".encode())


def _serve(folder: str) -> dict[str, Any]:
    """Fork for every request, and return it in the fork alone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, _SOCKET))
    listener.listen()
    os.write(1, b"ready\n")
    children: dict[socket.socket, _Child] = {}
    while True:
        patience = _POLL_SECONDS if any(c.is_running for c in children.values()) else None
        readable = select.select([sys.stdin, listener, *children], [], [], patience)[0]
        for child in children.values():
            child.look()
        if sys.stdin in readable:
            for child in children.values():
                child.end()
            raise SystemExit
        for connection in [one for one in readable if one in children]:
            children.pop(connection).end()
        if listener in readable:
            connection, _ = listener.accept()
            _, files, _, _ = socket.recv_fds(connection, 1, 2)
            request: dict[str, Any] = json.loads(connection.makefile().readline())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
                pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                for one in (listener, connection, *children):
                    one.close()
                _become(request, files)
                return request
            with suppress(PermissionError):  # the fork was faster, and runs a program already
                os.setpgid(pid, pid)
            for file in files:
                os.close(file)
            children[connection] = _Child(connection, pid)


def _become(request: Mapping[str, Any], files: Sequence[int]) -> None:
    """Make this fork what a new process would be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for target, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed()
    if "HF_DATASETS_CACHE" in os.environ:  # was read when it was imported
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])


def _run(request: Mapping[str, Any]) -> None:
    words, path = request["words"], request["path"]
    path += [folder for folder in sys.path if folder not in path]
    words = words[1:] if words[0] == "-u" else words
    if words[0] == "-m":
        sys.path[:] = [request["cwd"], *path]
        sys.argv[:] = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(words[0]).resolve().parent), *path]
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


def _preload() -> None:
    import gc
    import importlib
    import pkgutil

    import hf_pss

    every = (module.name for module in pkgutil.walk_packages(hf_pss.__path__, "hf_pss."))
    # Some of the others need a framework that is not installed.
    own = (name for name in every if not name.startswith("hf_pss.integrations."))
    for name in (*_IMPORTED, *own):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collector would copy what is shared


def _stand_in(words: Sequence[str]) -> NoReturn:
    """Have the server run ``python *words``, and end as that does."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    connection = _ask(os.environ[_FOLDER_VARIABLE], words, os.environ, None, (1, 2), path)
    _number(connection)
    code = _number(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        _stand_in(sys.argv[1:])
    _preload()
    _run(_serve(sys.argv[2]))
