"""GGUF's quantized blocks as parts of a format: bits are moved, no value is computed.

    rows of blocks, uint8 [N, bytes]  -->  codes, (high,) scales, (mins,) (super, super_min)      as `formats` has them

The layouts are those of ggml: a block of 32 or 256 weights is a C struct, little endian. Its nibbles hold the first
half of 32 (or of 64) weights in the low bits and the second half in the high bits; here neighbours share a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bit_planes import pack, unpack
from .errors import ModelError
from .formats import FORMATS, Format

Take = Callable[[Tensor], Tensor]
"""From blocks, uint8 [blocks, bytes], to what one part holds of each, [blocks, columns]."""


@dataclass(frozen=True)
class Block:
    """size: weights. nbytes: of the struct. parts: how each part is taken out of blocks."""

    size: int
    nbytes: int
    parts: Mapping[str, Take]


def split(raw: Tensor, format: Format) -> tuple[Tensor, ...]:
    """The parts of rows of blocks, uint8 [..., N, bytes], in the order of `format.part_names`."""
    return tuple(read_part(raw, format, name) for name in format.part_names)


BYTES_AT_ONCE = 1 << 20
"""Bytes of blocks that are taken apart at once: what lies between file and part stays small."""


def read_part(raw: Tensor, format: Format, name: str) -> Tensor:
    """One part of rows of blocks, uint8 [..., N, bytes]. Raises ModelError where rows hold no whole blocks."""
    block = BLOCKS[format.name]
    row_bytes = raw.shape[-1]
    if raw.dtype != torch.uint8 or row_bytes % block.nbytes:
        kind = f"{str(raw.dtype).removeprefix('torch.')} rows of {row_bytes}"
        raise ModelError(f"{format.name}: expected uint8 rows of whole blocks of {block.nbytes} bytes, found {kind}")
    n, k = raw.shape[:-1].numel(), row_bytes // block.nbytes * block.size
    shape, dtype = format.part_shapes(n, k)[name]
    blocks = raw.reshape(-1, block.nbytes)
    columns = shape[1] // (row_bytes // block.nbytes)
    out = torch.empty((blocks.shape[0], columns), dtype=dtype)
    step = max(1, BYTES_AT_ONCE // block.nbytes)
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = block.parts[name](blocks[start : start + step])
    return out.reshape(*raw.shape[:-1], shape[1])


# --- fields of a block -----------------------------------------------------------------------------------------


def view_as(dtype: torch.dtype, start: int, count: int = 1) -> Take:
    """`count` numbers from byte `start` on."""
    return lambda blocks: blocks[:, start : start + count * dtype.itemsize].contiguous().view(dtype)


def nibbles(start: int, count: int, run: int) -> Take:
    """`count` bytes from `start` on: each `run` of them is 2 * run weights, first the low nibbles, then the high."""

    def take(blocks: Tensor) -> Tensor:
        halves = blocks[:, start : start + count].unflatten(1, (-1, run))
        return pack(torch.stack((halves & 15, halves >> 4), dim=2).flatten(1), 4)

    return take


def fifth_bits(start: int) -> Take:
    """q5_0, q5_1: bit i of 4 bytes belongs to weight i."""
    return lambda blocks: blocks[:, start : start + 4]


# --- K quants --------------------------------------------------------------------------------------------------


def six_bit_scales(blocks: Tensor) -> Tensor:
    """q4_k, q5_k: the lowest 6 bits of bytes 4-7 are scales 0-3; the low nibbles of 12-15 with 2 bits more, 4-7."""
    low, high = blocks[:, 4:8], blocks[:, 12:16]
    return torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=1)


def six_bit_mins(blocks: Tensor) -> Tensor:
    low, high = blocks[:, 8:12], blocks[:, 12:16]
    return torch.cat((low & 63, high >> 4 | low >> 6 << 4), dim=1)


def q5_k_high(blocks: Tensor) -> Tensor:
    """Bit g of byte i belongs to weight i of the g-th 32."""
    bits = unpack(blocks[:, 16:48], 1).unflatten(1, (32, 8))
    return pack(bits.transpose(1, 2).flatten(1), 1)


def q6_k_low(blocks: Tensor) -> Tensor:
    """Each 64 bytes are 128 weights, the first 64 in the low nibbles."""
    return nibbles(0, 128, run=64)(blocks)


def q6_k_high(blocks: Tensor) -> Tensor:
    """Each 32 bytes are 128 weights: bits 2g and 2g + 1 of byte i belong to weight i of the g-th 32."""
    bits = unpack(blocks[:, 128:192], 2).unflatten(1, (2, 32, 4))
    return pack(bits.transpose(2, 3).flatten(1), 2)


F16, I8 = torch.float16, torch.int8
SUPER = {"scales": six_bit_scales, "mins": six_bit_mins, "super": view_as(F16, 0), "super_min": view_as(F16, 2)}

BLOCKS: dict[str, Block] = {
    "q4_0": Block(32, 18, {"scales": view_as(F16, 0), "codes": nibbles(2, 16, run=16)}),
    "q4_1": Block(32, 20, {"scales": view_as(F16, 0), "mins": view_as(F16, 2), "codes": nibbles(4, 16, run=16)}),
    "q5_0": Block(32, 22, {"scales": view_as(F16, 0), "high": fifth_bits(2), "codes": nibbles(6, 16, run=16)}),
    "q5_1": Block(
        32,
        24,
        {"scales": view_as(F16, 0), "mins": view_as(F16, 2), "high": fifth_bits(4), "codes": nibbles(8, 16, run=16)},
    ),
    "q8_0": Block(32, 34, {"scales": view_as(F16, 0), "codes": view_as(I8, 2, 32)}),
    "q4_k": Block(256, 144, {**SUPER, "codes": nibbles(16, 128, run=32)}),
    "q5_k": Block(256, 176, {**SUPER, "high": q5_k_high, "codes": nibbles(48, 128, run=32)}),
    "q6_k": Block(
        256,
        210,
        {"codes": q6_k_low, "high": q6_k_high, "scales": view_as(I8, 192, 16), "super": view_as(F16, 208)},
    ),
}
"""The structs of ggml, by format."""


def format_of(quantization: str) -> Format | None:
    """The format of a tensor type as GGUF names it (Q4_1, Q6_K); None for one that is kept in no format here."""
    name = quantization.lower()
    return FORMATS[name] if name in BLOCKS else None
