"""Spell an einsum of two tensors as a product of matrices.

    einsum("bqhd,bkhd->bhqk", [q, k])   -->   matmul(permute(q, [0, 2, 1, 3]), permute(k, [0, 2, 3, 1]))

One that sums over several dimensions, or that has more than one of its own dimensions in an operand, is left alone.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.pattern import any_, op
from ..compiler.rewrite import Match, Rule

aten = torch.ops.aten

EINSUM = op(aten.einsum.default, any_("equation"), [any_("left"), any_("right")])


def to_matmul(match: Match) -> fx.Node | None:
    inputs, arrow, result = match["equation"].replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if not arrow or not (left + right + result).isalpha():
        return match.decline(f"{match['equation']!r} leaves dimensions to be inferred")
    if any(len(set(letters)) != len(letters) for letters in (left, right, result)):
        return match.decline(f"{match['equation']!r} takes a diagonal")
    batch = [letter for letter in result if letter in left and letter in right]
    summed = [letter for letter in left if letter in right and letter not in result]
    rows, columns = ([x for x in own if x not in other] for own, other in ((left, right), (right, left)))
    if not len(rows) == len(columns) == len(summed) == 1 or not set(rows + columns) <= set(result):
        return match.decline(f"{match['equation']!r} is not a product of matrices")
    product = match.call(
        aten.matmul.default,
        permuted(match, match["left"], left, [*batch, *rows, *summed]),
        permuted(match, match["right"], right, [*batch, *summed, *columns]),
    )
    return permuted(match, product, [*batch, *rows, *columns], result)


def permuted(match: Match, x: fx.Node, letters: str | list[str], wanted: str | list[str]) -> fx.Node:
    dims = [letters.index(letter) for letter in wanted]
    return x if dims == sorted(dims) else match.call(aten.permute.default, x, dims)


RULE = Rule("einsum", EINSUM, to_matmul)
