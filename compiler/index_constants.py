"""Buffers of a model as functions of their indices: triangles, bands and ALiBi, told from their values.

[[1, 0, 0],
 [1, 1, 0],         is   0 <= i - j < 2
 [0, 1, 1]]

[H, n, n] with slope[h] * (j - i) or -inf   is   where(i - j >= 0, slope[h] * j + ..., -inf)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor, fx

from .graph import sizes
from .index_values import IndexFunction, Value, as_dtype, choose, constant_of, nonnegative

if TYPE_CHECKING:
    from .index_algebra import Inference

MAX_RUNS = 4
"""A band has few values along the diagonals; a table of relative positions, which has many, is no band."""


def constant_function(x: Inference, node: fx.Node, tensor: Tensor) -> IndexFunction | None:
    """The index function that a buffer holds, or None if it is none that is known."""
    if tensor.numel() == 0 or tensor.is_complex():
        return None
    if bool((tensor == tensor.flatten()[0]).all()):
        value = as_dtype(constant_of(tensor.flatten()[0].item()), tensor.dtype == torch.bool)
        return IndexFunction(sizes(node), lambda *i: value)
    if tensor.ndim < 2 or 1 in tensor.shape[-2:]:
        return None
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    if bool((matrices == matrices[0]).all()):
        banded = band(matrices[0])
        return banded and IndexFunction(sizes(node), lambda *i: banded(i[-2] - i[-1]))
    if tensor.dtype in (torch.float32, torch.float64) and len(matrices) == tensor.shape[-3]:
        return alibi(x, node, matrices)
    return None


def band(matrix: Tensor) -> Callable[[sympy.Expr], Value] | None:
    """The element of a matrix as a function of row - column; None if it is none, or has more than `MAX_RUNS` values."""
    if not torch.equal(matrix[1:, 1:], matrix[:-1, :-1]):
        return None
    diagonals = torch.cat((matrix[0].flip(0), matrix[1:, 0]))  # row - column from 1 - columns to rows - 1
    changes = (torch.nonzero(diagonals[1:] != diagonals[:-1]).flatten() + 1).tolist()
    if len(changes) >= MAX_RUNS:
        return None
    boolean = matrix.dtype == torch.bool
    values = [as_dtype(constant_of(diagonals[start].item()), boolean) for start in (0, *changes)]

    def at(distance: sympy.Expr) -> Value:
        result = values[0]
        for start, value in zip(changes, values[1:]):
            result = choose(nonnegative(distance - (start + 1 - matrix.shape[1])), value, result)
        return result

    return at


def alibi(x: Inference, node: fx.Node, matrices: Tensor) -> IndexFunction | None:
    """slope[h] * j + offset(h, i), up to float rounding, inside of a band that all heads share; else the lowest value.

    The offsets, which a softmax over j does not see, have no table: a use of them cannot be written as text.
    """
    inside = matrices[0] != matrices.min()
    if not torch.equal(matrices != matrices.min(), inside.expand_as(matrices)):
        inside = torch.ones_like(inside)
    visible = band(inside)
    if visible is None or not bool(inside[:, 0].all()) or not bool(inside[-1, -2:].all()):
        return None
    slopes = matrices[:, -1, -1] - matrices[:, -1, -2]
    expected = slopes[:, None, None] * torch.arange(matrices.shape[-1]) + matrices[:, :, :1]
    error = torch.where(inside, matrices - expected, 0.0).abs().max()
    if not bool(error <= 4 * torch.finfo(matrices.dtype).eps * expected.abs().max()):
        return None
    slope = x.infer(x.table(node, "slopes", slopes))
    offset = sympy.Function(f"{node.name}_offset", real=True)
    lowest = constant_of(matrices.min().item())

    def at(*i: sympy.Expr) -> Value:
        return choose(visible(i[-2] - i[-1]), slope.at(i[-3]) * i[-1] + offset(i[-3], i[-2]), lowest)

    return IndexFunction(sizes(node), at)
