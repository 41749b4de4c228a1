"""A GGUF file as a source of tensors, and how its names and layouts map to those of a transformers model.

The reader, the dequantization and the name tables are those of the `gguf` package. What is written here is the layout
that llama.cpp's converter gave some tensors, undone as weight recipes.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import ModelError, one_line
from .formats import Format
from .gguf_blocks import format_of, read_part
from .quantized_weights import Dequantize
from .weights import Add, Concat, Constant, Reshape, Shape, Transpose, Weight, read

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PretrainedConfig

MAGIC = b"GGUF"


class Part(NamedTuple):
    """One part of a tensor that is kept in blocks."""

    tensor: str
    name: str
    shape: Shape
    dtype: torch.dtype


class GgufSource:
    """The tensors of a GGUF file under the file's own names, mapped into memory.

    What is kept in blocks of a known format is not one tensor but its parts: NAME.codes, NAME.scales, ... (see
    `stored`). Other tensors are fp32 when read.

    architecture: `general.architecture`, the family as llama.cpp names it.
    Raises ModelError where the file is missing, is no GGUF file, or is shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(len(MAGIC))
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}; check the path") from error
        if start != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: expected it to start with {MAGIC!r}, found {start!r}")
        try:
            self._reader = _header_reader()(path, mode="c")
            self.architecture = str(self.field("general.architecture", "unknown"))
        except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
            raise ModelError(
                f"{path} is truncated or damaged: expected what its header lists, found {path.stat().st_size} bytes "
                f"({one_line(error)}); get the file again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._parts = {
            f"{name}.{part}": Part(name, part, (*self._size(name)[:-2], *shape), dtype)
            for name in self._tensors
            if (known := self.format(name)) is not None
            for part, (shape, dtype) in known.part_shapes(*self._size(name)[-2:]).items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        return (*(name for name in self._tensors if self.format(name) is None), *self._parts)

    def field(self, key: str, default: Any = None) -> Any:
        """A scalar or text of the file's metadata."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def quantization(self, name: str) -> str:
        """The block format that the file keeps `name` in, as GGUF spells it: F32, F16, Q8_0, Q4_1, ..."""
        return self._tensors[name].tensor_type.name

    def format(self, name: str) -> Format | None:
        """The format of a tensor in blocks; None for floating point, and for blocks that are read as fp32."""
        return format_of(self.quantization(name))

    def stored(self, name: str) -> Weight | None:
        """The recipe for the tensor `name` of the file, in fp32; None where there is no such tensor."""
        if name not in self._tensors:
            return None
        found = self.format(name)
        if found is None:
            return read(self, name)
        parts = tuple(read(self, f"{name}.{part}") for part in found.part_names)
        return Dequantize(parts, found.name, self._size(name), torch.float32)

    def _size(self, name: str) -> Shape:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def shape(self, name: str) -> Shape:
        return self._parts[name].shape if name in self._parts else self._size(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name].dtype if name in self._parts else torch.float32

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        if name in self._parts:
            part = self._parts[name]
            stored = self._tensors[part.tensor]
            found = read_part(torch.from_numpy(stored.data), self.format(part.tensor), part.name)
            self._forget(stored)
            return found
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: {name} is stored as {self.quantization(name)}: {error}") from error
        return torch.from_numpy(values).reshape(self.shape(name))

    def _forget(self, tensor: ReaderTensor) -> None:
        """Drop the pages of a tensor that was read from this process: a part is a copy, and a file is read once."""
        pages = self._reader.data._mmap
        start = -(-tensor.data_offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_offset + int(tensor.n_bytes)) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED, start, length)


@cache
def _header_reader() -> type:
    """gguf's reader, stepping over arrays: slicing a vocabulary of 49,152 texts takes it 2 s, unused here."""
    from gguf import GGUFReader, GGUFValueType

    class HeaderReader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, length = struct.unpack_from("<IQ", self.data, orig_offs)
            end = orig_offs + struct.calcsize("<IQ")
            if item in self.gguf_scalar_to_np:
                end += length * self.gguf_scalar_to_np[item]().itemsize
            elif item == GGUFValueType.STRING:
                for _ in range(length):
                    end += 8 + struct.unpack_from("<Q", self.data, end)[0]
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return end - orig_offs, [self.data[orig_offs:end]], [0], [GGUFValueType.ARRAY, GGUFValueType(item)]

    return HeaderReader


Undo = Callable[[Weight, "PretrainedConfig"], Weight]


def unpermute_q(weight: Weight, config: PretrainedConfig) -> Weight:
    return _unpermute(weight, config.num_attention_heads)


def unpermute_k(weight: Weight, config: PretrainedConfig) -> Weight:
    return _unpermute(weight, config.num_key_value_heads)


def _unpermute(weight: Weight, heads: int) -> Weight:
    """Rope pairs beside each other --> one half of the head after the other, as transformers rotates them.

    [heads * (head_dim / 2) * 2, ...] --> [heads * 2 * (head_dim / 2), ...]
    """
    rows, *rest = weight.shape
    pairs = Reshape(weight, (heads, rows // heads // 2, 2, *rest))
    return Reshape(Transpose(pairs, (0, 2, 1, *range(3, 3 + len(rest)))), weight.shape)


def transposed(weight: Weight, config: PretrainedConfig) -> Weight:
    """GPT-2's Conv1D keeps [in, out]; the file keeps [out, in]."""
    return Transpose(weight, (1, 0))


def without_one(weight: Weight, config: PretrainedConfig) -> Weight:
    """A norm that multiplies by `1 + weight`: the file keeps the sum."""
    return Add(weight, Constant.of(torch.tensor(-1.0, dtype=weight.dtype)))


def interleaved_by_head(weight: Weight, config: PretrainedConfig) -> Weight:
    """Bloom: [3, heads, head_dim, ...] --> [heads, 3, head_dim, ...]."""
    rows, *rest = weight.shape
    split = Reshape(weight, (3, config.n_head, rows // 3 // config.n_head, *rest))
    return Reshape(Transpose(split, (1, 0, 2, *range(3, 3 + len(rest)))), weight.shape)


# What llama.cpp's converter did to the tensors of each architecture: (pattern over the file's names, how to undo it).
LAYOUTS: dict[str, tuple[tuple[str, Undo], ...]] = {
    "llama": ((r"\.attn_q\.", unpermute_q), (r"\.attn_k\.", unpermute_k)),
    "qwen2": (),
    "qwen2moe": (),
    "qwen3": (),
    "qwen3moe": (),
    "phi3": (),
    "stablelm": (),
    "starcoder2": (),
    "nemotron": ((r"norm\.weight$", without_one),),
    "gemma2": ((r"norm\.weight$", without_one),),
    "gemma3": ((r"norm\.weight$", without_one),),
    "gpt2": ((r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$", transposed),),
    "bloom": ((r"\.attn_qkv\.", interleaved_by_head),),
}


def check_architecture(source: GgufSource) -> None:
    """Raises ModelError for an architecture whose layout is not known here."""
    if source.architecture not in LAYOUTS:
        raise ModelError(
            f"{source.path}: unsupported architecture {source.architecture!r} in a GGUF file; "
            f"expected one of {', '.join(sorted(LAYOUTS))}"
        )


# Sizes that transformers' own tables do not take from the metadata of every architecture: config field -> key.
CONFIG_KEYS = {
    "head_dim": "attention.key_length",
    "n_positions": "context_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def complete_config(config: PretrainedConfig, source: GgufSource) -> None:
    """Set the sizes of `config` that the file states and transformers left at their defaults."""
    for name, key in CONFIG_KEYS.items():
        value = source.field(f"{source.architecture}.{key}")
        if value is not None and hasattr(config, name):
            setattr(config, name, int(value))


class GgufNames:
    """From the names of a transformers model to recipes over the tensors of its GGUF file."""

    def __init__(self, source: GgufSource, config: PretrainedConfig) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        check_architecture(source)
        self._source = source
        self._config = config
        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == source.architecture)
        self._map = get_tensor_name_map(architecture, config.num_hidden_layers)

    def recipe(self, name: str) -> Weight | None:
        """The recipe for the parameter `name`; None where the file does not hold it."""
        if merged := re.fullmatch(r"(.*\.experts)\.gate_up_proj", name):
            parts = [self._stored(f"{merged[1]}.{part}_proj", ".weight") for part in ("gate", "up")]
            return Concat(tuple(parts), dim=1) if all(parts) else None
        base, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return self._stored(name, ".weight")
        weight = self._stored(base, f".{kind}")
        if weight is not None and name.endswith("shared_expert_gate.weight") and len(weight.shape) == 1:
            return Reshape(weight, (1, *weight.shape))
        return weight

    def _stored(self, base: str, suffix: str) -> Weight | None:
        """The file's tensor for a module path, with what the converter did to it undone."""
        for path in _paths(base):
            stored = self._map.get_name(path)
            if stored is not None and (weight := self._source.stored(stored + suffix)) is not None:
                return self._undone(stored + suffix, weight)
        return None

    def _undone(self, name: str, weight: Weight) -> Weight:
        for pattern, undo in LAYOUTS[self._source.architecture]:
            if re.search(pattern, name):
                return undo(weight, self._config)
        return weight


def _paths(base: str) -> Iterator[str]:
    """`transformer.h.0.ln_1`, `h.0.ln_1`, ...: gguf's tables name some families without their outer module."""
    while base:
        yield base
        base = base.partition(".")[2]
