"""Write a safetensors file a tensor at a time: no more of it is in memory than what is being made.

    8 bytes: length of the header | JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {...}} | the tensors

The widest dtypes come first, as safetensors itself sorts them, so that each tensor starts at a multiple of its size.
The header is written last: before that, the file is none that loads.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .files import write_atomically
from .weights import Shape

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""As safetensors spells them."""
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """Tensors that are made together. kept: name -> shape and dtype; make: gives them in that order."""

    kept: Mapping[str, tuple[Shape, torch.dtype]]
    make: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.kept.values())


Progress = Callable[[int, int], None]
"""Called with the bytes that are written and those there will be."""


def write_safetensors(
    path: Path, tensors: Iterable[Written], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write the file under a temporary name and rename it when it is whole and on disk.

    Raises CacheError where the folder cannot be written to; whatever `make` raises leaves no file either.
    """
    groups = list(tensors)
    header, offsets = header_of(groups, metadata)
    total = sum(group.nbytes for group in groups)

    def write(file: IO[bytes]) -> None:
        allow_as_usual(file)
        done = 0
        for group in groups:
            for (name, (shape, dtype)), tensor in zip(group.kept.items(), group.make(), strict=True):
                if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    raise ValueError(f"{name}: promised {dtype}{list(shape)}, made {tensor.dtype}{list(tensor.shape)}")
                file.seek(len(header) + offsets[name])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            done += group.nbytes
            if progress is not None:
                progress(done, total)
        file.truncate(len(header) + total)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(header)

    write_atomically(path, write)


def header_of(groups: Sequence[Written], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length before it, and where each tensor begins behind it."""
    every = [(name, shape, dtype) for group in groups for name, (shape, dtype) in group.kept.items()]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape, dtype in sorted(every, key=lambda entry: -entry[2].itemsize):
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SPELLED[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def allow_as_usual(file: IO[bytes]) -> None:
    """Temporary files are private; this one becomes a file like others."""
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(file.fileno(), 0o666 & ~mask)
