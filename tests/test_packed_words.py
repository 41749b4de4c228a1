"""Planes of codes in words: every weight is where the layout says, what is past the matrix is zero."""

from __future__ import annotations

import pytest
import sympy
import torch
from effc.codegen.kernel import Buffer, PackedWords
from effc.compiler.bit_planes import pack, unpack
from effc.compiler.evaluate import evaluate
from effc.compiler.packed_words import PackWords
from effc.compiler.sources import ModuleSource
from effc.compiler.weights import Concat, Constant
from torch import Tensor, nn


def packed(plane: Tensor, *sizes: int) -> Tensor:
    return evaluate(PackWords(Constant.of(plane), *sizes), ModuleSource(nn.Module()))


@pytest.mark.parametrize("width", [8, 4, 2, 1])
@pytest.mark.parametrize(("n", "k", "group", "block"), [(5, 40, 32, 4), (16, 64, 64, 16), (33, 136, 128, 32)])
def test_every_weight_is_where_the_layout_says(width: int, n: int, k: int, group: int, block: int) -> None:
    codes = torch.randint(0, 1 << width, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    plane = pack(codes, width) if width < 8 else codes
    assert torch.equal(unpack(plane, width) if width < 8 else plane, codes)
    words = packed(plane, width, group, block)
    layout = PackedWords(Buffer("w", sympy.Integer(words.numel()), torch.uint8, "weight"), (n, k), width, group, block)
    assert words.shape == (-(-n // block), layout.steps * layout.words, block, 4)
    flat = words.flatten()
    found = torch.empty_like(codes)
    for row in range(n):
        for column in range(k):
            byte, lowest = layout.place(sympy.Integer(column))
            element = int(layout.element((sympy.Integer(row), byte)))
            found[row, column] = flat[element] >> int(lowest) & (1 << width) - 1
    assert torch.equal(found, codes)
    assert int(bits(flat).sum()) == int(bits(codes).sum())


def bits(values: Tensor) -> Tensor:
    return sum(values.flatten() >> place & 1 for place in range(8))


def test_halves_of_a_gated_weight_begin_with_a_panel_of_their_own() -> None:
    gate, up = torch.randint(0, 256, (2, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = Concat(tuple(PackWords(Constant.of(half), 4, 32, 4) for half in (gate, up)))
    both = evaluate(recipe, ModuleSource(nn.Module()))
    assert torch.equal(both, torch.cat([packed(half, 4, 32, 4) for half in (gate, up)]))


def test_groups_hold_whole_words() -> None:
    with pytest.raises(ValueError, match="16 codes of 1 bits"):
        PackWords(Constant.of(torch.zeros(4, 4, dtype=torch.uint8)), 1, 16, 4)
