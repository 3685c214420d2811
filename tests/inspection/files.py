"""Write .safetensors files byte by byte: valid files beyond the memory, and damaged files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(
    start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8"
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def write_large(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> Path:
    """Write tensors that share memory, so the file is large and the process small."""
    header, reached, held = {}, 0, list(tensors)
    for name, tensor in held:
        stop = reached + tensor.numel() * tensor.itemsize
        header[name] = entry(reached, stop, list(tensor.shape), CODES[tensor.dtype])
        reached = stop
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for _, tensor in held:
            stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
    return path


def gpt2_xl(dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, Tensor]]:
    """The 1.56 · 10⁹ numbers of GPT-2 XL; blocks share their values."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).to(dtype)

    d = 1600
    shapes = {"attn.c_attn": 3 * d, "attn.c_proj": d, "mlp.c_fc": 4 * d}
    block = {f"{kind}.weight": noise(d, width) for kind, width in shapes.items()}
    block["mlp.c_proj.weight"] = noise(4 * d, d)
    block |= {"ln_1.weight": noise(d), "mlp.c_fc.bias": noise(4 * d)}
    tensors = [("wte.weight", noise(50257, d)), ("wpe.weight", noise(1024, d))]
    return tensors + [(f"h.{i}.{kind}", one) for i in range(48) for kind, one in block.items()]
