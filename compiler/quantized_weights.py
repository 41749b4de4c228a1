"""Recipes of quantized matrices: the parts of one as lazy weights, and row by row changes moved from values to parts.

    Concat((Dequantize((c0, s0), "q4_0"), Dequantize((c1, s1), "q4_0")))  -->  Concat((c0, c1)), Concat((s0, s1))

Every part of a format (codes, scales, ...) has the matrix's rows as its rows, so what only moves rows moves them in
each part alike: a merged QKV projection, or rows that a converter permuted, keep the blocks that the file has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .formats import find
from .weights import Cast, Concat, Reshape, Shape, Slice, Transpose, Weight, transposed, type_text


@dataclass(frozen=True, repr=False)
class Dequantize(Weight):
    """The values [N, K] that the parts of a quantized matrix stand for, computed as its format says."""

    parts: tuple[Weight, ...]
    format: str
    shape: Shape
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return self.parts

    def key(self) -> str:
        return f"dequantize({', '.join(part.key() for part in self.parts)}, {self.format}, {type_text(self)})"


@dataclass(frozen=True, repr=False)
class Quantize(Weight):
    """One part of `source` [N, K] rounded to a format: part `name` of those that `Format.quantize` gives."""

    source: Weight
    format: str
    name: str

    @property
    def shape(self) -> Shape:
        return find(self.format).part_shapes(*self.source.shape)[self.name][0]

    @property
    def dtype(self) -> torch.dtype:
        return find(self.format).part_shapes(*self.source.shape)[self.name][1]

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return (self.source,)

    def key(self) -> str:
        return f"quantize({self.source.key()}, {self.format}, {self.name})"


class NotStored(Exception):
    """A recipe does not take the rows of a quantized matrix as they are stored; the text says why."""


def rounded_parts(weight: Weight, format_name: str) -> tuple[Weight, ...]:
    """The parts of a matrix that the loader is to round to a format."""
    return tuple(Quantize(weight, format_name, name) for name in find(format_name).part_names)


def stored_parts(weight: Weight) -> tuple[str, tuple[Weight, ...]]:
    """The format that the rows of a matrix are stored in, and its parts as recipes.

    Raises NotStored where the recipe computes with values, or takes rows apart.
    """
    formats = formats_in(weight)
    if not formats:
        raise NotStored("it is not stored in a quantized format")
    if len(formats) > 1:
        raise NotStored(f"its rows are stored in several formats ({', '.join(formats)})")
    (name,) = formats
    return name, tuple(part_of(weight, place) for place in range(len(find(name).part_names)))


def formats_in(weight: Weight) -> tuple[str, ...]:
    """The quantized formats that a recipe reads, each once."""
    if isinstance(weight, Dequantize):
        return (weight.format,)
    return tuple(dict.fromkeys(name for source in weight.inputs for name in formats_in(source)))


def part_of(weight: Weight, place: int) -> Weight:
    """What a recipe does to the rows of a matrix, done to those of its part number `place`."""
    match weight:
        case Dequantize():
            return weight.parts[place]
        case Cast():
            return part_of(weight.source, place)
        case Reshape() if weight.shape[-1:] == weight.source.shape[-1:]:
            part = part_of(weight.source, place)
            return Reshape(part, (*weight.shape[:-1], part.shape[-1]))
        case Transpose(source=Transpose()):
            return part_of(transposed(weight.source, weight.dims), place)
        case Transpose() if weight.dims[-1] == len(weight.dims) - 1:
            return Transpose(part_of(weight.source, place), weight.dims)
        case Slice() if weight.dim != len(weight.shape) - 1:
            return Slice(part_of(weight.source, place), weight.dim, weight.start, weight.stop)
        case Concat() if weight.dim != len(weight.shape) - 1:
            if not all(map(formats_in, weight.sources)):
                raise NotStored("some of its rows are not stored in a quantized format")
            return Concat(tuple(part_of(source, place) for source in weight.sources), weight.dim)
    raise NotStored(f"{type(weight).__name__.lower()} takes the stored rows apart or computes with their values")
