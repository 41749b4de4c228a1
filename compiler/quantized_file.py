"""The file that `effc quantize` writes: one safetensors file with the parts of quantized matrices and all of a model.

    model.layers.0.mlp.up_proj.weight.codes, .scales, ..     parts, as `formats` has them
    model.norm.weight                                        what is not quantized
    files/config.json, files/tokenizer.json, ..              uint8: the small files of a Hugging Face folder

Metadata: "effc" is the version of this layout; "matrices" says per matrix its format, shape, and whether the model has
it transposed; "formats" describes each format, enough for a reader of a page (examples/read_quantized.py); "scheme" is
what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, ModelError, one_line
from .formats import Format, find
from .quantized_weights import Dequantize
from .safetensors_file import DTYPES
from .weights import Shape, Transpose, Weight, read

VERSION = "1"
FILES = "files/"


@dataclass(frozen=True)
class MatrixEntry:
    """How one matrix is kept. transposed: the model's parameter is [K, N]."""

    format: Format
    shape: Shape
    transposed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format.name, "shape": list(self.shape), "transposed": self.transposed}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> MatrixEntry:
        n, k = entry["shape"]
        return cls(find(entry["format"]), (int(n), int(k)), bool(entry["transposed"]))


def described(format: Format) -> dict[str, Any]:
    """What a reader has to know of a format: dtypes are those of the tensors."""
    return {
        "parts": list(format.part_names),
        "planes": list(format.planes),
        "group": format.group,
        "zero": format.zero,
        "super_block": format.super_block,
        "book": None if format.book is None else list(format.book),
    }


def metadata_of(matrices: Mapping[str, MatrixEntry], scheme: str) -> dict[str, str]:
    """The metadata of a file with these matrices."""
    formats = {entry.format.name: described(entry.format) for entry in matrices.values()}
    return {
        "effc": VERSION,
        "scheme": scheme,
        "matrices": json.dumps({name: entry.to_dict() for name, entry in matrices.items()}),
        "formats": json.dumps(formats),
    }


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, then JSON."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError:
        return False


class QuantizedSource:
    """The tensors of such a file, mapped into memory. Raises ModelError where it is damaged or another kind of file."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except Exception as error:
            raise ModelError(
                f"{path} is truncated or no safetensors file: {one_line(error)}; write it again"
            ) from error
        self._names = tuple(self._file.keys())
        metadata = self._file.metadata() or {}
        if metadata.get("effc") != VERSION:
            found = f"version {metadata['effc']}" if "effc" in metadata else "none"
            raise ModelError(
                f"{path}: expected a file that effc quantize wrote (metadata effc = {VERSION}), found {found}; models "
                "of Hugging Face are opened by their folder"
            )
        self.scheme = metadata.get("scheme", "")
        self.matrices = self._checked(metadata)

    def _checked(self, metadata: Mapping[str, str]) -> dict[str, MatrixEntry]:
        """What the metadata says of matrices, if this version means the same by it and the tensors fit."""
        try:
            formats = json.loads(metadata["formats"])
            matrices = {name: MatrixEntry.from_dict(row) for name, row in json.loads(metadata["matrices"]).items()}
            promised = {name: entry.format.part_shapes(*entry.shape) for name, entry in matrices.items()}
        except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
            raise ModelError(f"{self.path}: its metadata does not fit this version: {one_line(error)}") from error
        for name, entry in matrices.items():
            if formats.get(entry.format.name) != described(entry.format):
                raise ModelError(f"{self.path}: this version means something else by the format {entry.format.name}")
            for part, (shape, dtype) in promised[name].items():
                stored = f"{name}.{part}"
                found = (self.shape(stored), self.dtype(stored)) if stored in self._names else None
                if found != (shape, dtype):
                    raise ModelError(f"{self.path}: expected {stored} to be {dtype}{list(shape)}, found {found}")
        return matrices

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if not name.startswith(FILES))

    def shape(self, name: str) -> Shape:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._file.get_slice(name).get_dtype()]

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def stored(self, name: str) -> Weight | None:
        """The recipe for the tensor `name`: its values where it is quantized; None where there is no such tensor."""
        entry = self.matrices.get(name)
        if entry is None:
            return read(self, name) if name in self._names else None
        parts = tuple(read(self, f"{name}.{part}") for part in entry.format.part_names)
        values = Dequantize(parts, entry.format.name, entry.shape, torch.float32)
        return Transpose(values, (1, 0)) if entry.transposed else values

    def write_files(self, folder: Path) -> None:
        """The small files that the file holds, into a folder."""
        for name in self._names:
            if name.startswith(FILES):
                (folder / Path(name).name).write_bytes(self.read(name).numpy().tobytes())


def file_tensors(files: Mapping[str, bytes]) -> Iterable[tuple[str, Tensor]]:
    """Small files as tensors: name, uint8 bytes."""
    return (
        (f"{FILES}{name}", torch.frombuffer(bytearray(content), dtype=torch.uint8)) for name, content in files.items()
    )
