"""Files that survive, on file systems of every kind; signals, in processes of every kind."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_pss.runs import checkpoint as marker
from hf_pss.runs.checkpoint import changed_files
from hf_pss.runs.folder import sync_tree
from hf_pss.trainer.stop_signals import DelayedSignals

NOBODY = 65534


def exit_of_child(work: Callable[[], None]) -> int:
    """Return how a forked child ended: its exit code, or -n where signal n ended it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes writable files alone")
def test_a_file_that_may_not_be_written_is_brought_to_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "modeling_custom.py"
    path.write_text("pass")
    path.chmod(0o444)

    def sync() -> None:
        if os.geteuid() == 0:  # who may write everything
            os.setuid(NOBODY)
        try:
            sync_tree(tmp_path)
        except OSError:
            os._exit(1)

    tmp_path.chmod(0o755)
    for above in list(tmp_path.parents)[:3]:  # of pytest, which are for their owner alone
        above.chmod(0o755)
    assert exit_of_child(sync) == 0


@pytest.mark.parametrize(
    ("code", "is_harmless"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_file_system_that_syncs_no_folders_is_taken_as_it_is(
    code: int, is_harmless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    if is_harmless:
        sync_tree(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output"):
            sync_tree(tmp_path)


def test_json_of_any_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert changed_files(tmp_path, {path.name: 3}) == {}
    monkeypatch.setattr(marker, "MAX_INDEX_BYTES", 8)
    assert changed_files(tmp_path, {path.name: 3}) == {path.name: "is damaged JSON"}


def test_a_forked_child_ends_at_its_first_sigterm() -> None:
    with DelayedSignals((signal.SIGTERM, signal.SIGINT)) as wish:
        assert exit_of_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert wish.signum == 0


def test_a_forked_child_waits_for_its_second_ctrl_c(caplog: pytest.LogCaptureFixture) -> None:
    """A terminal sends the first to all; without its loader's workers a run could save nothing."""
    read, write = os.pipe()

    def told() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.write(write, str(len(caplog.records)).encode())
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(7)

    with DelayedSignals((signal.SIGTERM, signal.SIGINT)):
        assert exit_of_child(told) == 7
    os.close(write)
    assert os.read(read, 9) == b"0"
