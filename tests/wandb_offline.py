"""Read what an offline W&B run recorded: LevelDB log blocks of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
# ':W&B', magic and version; also the size of a chunk's header.
_HEADER = 7
_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Recorded:
    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)

    def column(self, key: str) -> list[tuple[int, Any]]:
        """(train/global_step, value) of every row that holds the key, in the file's order."""
        return [(row["train/global_step"], row[key]) for row in self.history if key in row]

    def table(self, key: str) -> dict[str, Any]:
        path = self.folder / "files" / self.history_of(key)["path"]
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def image(self, key: str) -> bytes:
        return (self.folder / "files" / self.history_of(key)["path"]).read_bytes()

    def history_of(self, key: str) -> dict[str, Any]:
        """Return the last value of a rich type, put together again from its parts."""
        rows = [row for row in self.history if any(k.startswith(f"{key}.") for k in row)]
        return {
            k.removeprefix(f"{key}."): v for k, v in rows[-1].items() if k.startswith(f"{key}.")
        }


def finish_and_read() -> Recorded:
    """Finish this process's run and read it."""
    assert wandb.run is not None
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    (path,) = folder.glob("run-*.wandb")
    # W&B's service goes on writing when `finish` has returned.
    deadline = time.monotonic() + _SECONDS
    while not any(record.WhichOneof("record_type") == "exit" for record in _records(path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = Recorded(path.parent)
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.history.append({_key(i): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            found.summary.update({_key(i): json.loads(i.value_json) for i in record.summary.update})
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
    return found


def _records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, payload = _HEADER, b""
    while offset + _HEADER <= len(data):
        left = _BLOCK - offset % _BLOCK
        if left < _HEADER:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + _HEADER])
        if kind == 0 and length == 0:
            offset += left
            continue
        if offset + _HEADER + length > len(data):
            return  # it is being written
        payload += data[offset + _HEADER : offset + _HEADER + length]
        offset += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
