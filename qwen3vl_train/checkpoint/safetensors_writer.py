"""Write and check safetensors files one tensor at a time: the library's own writer holds a file in memory, twice."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


def write_safetensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[Tensor], dtype: torch.dtype
) -> dict[str, int]:
    """Write tensors, converted to dtype, in the order of their shapes. Returns a checksum (CRC-32) of each by name.

    The iterable is asked for one tensor at a time.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    checksums = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tuple(tensor.shape) == tuple(shape), f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}"
            content = _bytes_of(tensor.detach().to("cpu", dtype))
            out.write(content)
            checksums[name] = zlib.crc32(content)
    return checksums


def check_safetensors(file: Path, checksums: Mapping[str, int]) -> None:
    """Read a file back. Raises RuntimeError where a tensor is not the one that was written, or is missing."""
    for name, checksum in checksums.items():
        with safe_open(file, framework="pt") as handle:  # anew for each: what is read stays mapped until it is closed
            written = name in handle.keys() and zlib.crc32(_bytes_of(handle.get_tensor(name)))  # noqa: SIM118
        if written != checksum:
            raise RuntimeError(f"{file.name}: {name} reads back different from what was written; check the disk")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
