"""Planes of codes in the order in which kernels take them: panels of rows, four bytes of one row to a word.

A plane of width w, of a matrix [N, K], in panels of `block` rows and steps of `group` weights along K:

    PackWords(plane)[panel, word, row, byte]        a step has R = group * w / 32 words

Byte b of word r of a step holds, from the lowest bits up, its weights 4 * (r + R * i) + b for i = 0, 1, ... 8 / w - 1.
So one shift and one mask make words of four codes that follow each other along K, which is what instructions that
multiply and add four bytes take; with w = 8 words are just that. Rows past N and weights past K are zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .bit_planes import unpack
from .weights import Shape, Weight

WORD = 4
"""Bytes in a word."""


@dataclass(frozen=True, repr=False)
class PackWords(Weight):
    """The plane `source` [N, K * width / 8] as words, see above."""

    source: Weight
    width: int
    group: int
    block: int

    def __post_init__(self) -> None:
        if self.group * self.width % (8 * WORD):
            raise ValueError(f"expected groups of whole words, found {self.group} codes of {self.width} bits")

    @property
    def shape(self) -> Shape:
        rows, columns = self.source.shape
        steps = math.ceil(columns * 8 // self.width / self.group)
        return (math.ceil(rows / self.block), steps * self.group * self.width // (8 * WORD), self.block, WORD)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return (self.source,)

    def key(self) -> str:
        return f"pack_words({self.source.key()}, {self.width}, {self.group}, {self.block})"


ROWS_AT_ONCE = 1 << 12


def pack_words(plane: Tensor, recipe: PackWords, out: Tensor) -> None:
    """Write the plane [N, K * width / 8] into `out`, of the recipe's shape; some panels at a time."""
    count = max(1, ROWS_AT_ONCE // recipe.block)
    for panel in range(0, out.shape[0], count):
        rows = plane[panel * recipe.block : (panel + count) * recipe.block]
        columns = in_words(rows, recipe.width, recipe.group)  # [rows, words, byte]
        if missing := -len(columns) % recipe.block:
            columns = torch.cat([columns, columns.new_zeros(missing, *columns.shape[1:])])
        out[panel : panel + count].copy_(columns.unflatten(0, (-1, recipe.block)).transpose(1, 2))


def in_words(rows: Tensor, width: int, group: int) -> Tensor:
    """[N, K * width / 8] --> [N, words, 4], each row in the order of words."""
    codes = rows if width == 8 else unpack(rows, width)
    if missing := -codes.shape[1] % group:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts = codes.view(len(codes), codes.shape[1] // group, 8 // width, group * width // (8 * WORD), WORD)
    words = parts[:, :, 0].clone() if width < 8 else parts[:, :, 0]
    for position in range(1, 8 // width):
        words |= parts[:, :, position] << position * width
    return words.reshape(len(codes), -1, WORD)
