"""Quantization in the op vocabulary: values that stand for parts in memory, which kernels never make.

    linear(x, W)  -->  linear(fake_quantize(x, "int8_g32"), dequantize([codes, scales, mins], "q4_1", dtype))

A linear reads the parts in place of the values, and its cost is that of the parts.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx

from .activation_formats import dequantize_rows, find_activation, quantize_rows
from .formats import find
from .graph import sizes
from .vocabulary import Cost, define, like, nbytes, numel, streamed


def dequantize_shape(parts: list[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    codes = parts[0]
    return codes.new_empty((*codes.shape[:-1], find(format).columns(codes.shape[-1])), dtype=dtype)


def bytes_of_parts(node: fx.Node) -> sympy.Expr:
    return sum(nbytes(part) for part in node.args[0])


@define(
    "dequantize(Tensor[] parts, str format, ScalarType dtype) -> Tensor",
    shape=dequantize_shape,
    cost=lambda node: streamed(node, 2 * numel(node)),
    kept=bytes_of_parts,
)
def dequantize(parts: list[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    """The values of a matrix that is kept in a format: parts as `formats` has them -> [N, K] in `dtype`."""
    return find(format).dequantize(parts, dtype)


def bytes_of_codes(node: fx.Node) -> sympy.Expr:
    """Of an activation as a kernel reads it: codes of one byte, scales in fp32."""
    x, format = node.args[0], find_activation(node.args[1])
    *rows, k = sizes(x)
    return sympy.prod(rows) * (k + 4 * sympy.ceiling(k / (format.group or k)))


@define(
    "fake_quantize(Tensor x, str format) -> Tensor",
    shape=like,
    cost=lambda node: Cost(4 * numel(node), nbytes(node.args[0]) + bytes_of_codes(node)),
    kept=bytes_of_codes,
)
def fake_quantize(x: Tensor, format: str) -> Tensor:
    """What x [..., K] becomes when it is quantized, as `activation_formats` has it -> [..., K] in x's dtype.

    The codes times their scales round to x's dtype here; a kernel that sums over the codes does not.
    """
    found = find_activation(format)
    return dequantize_rows(*quantize_rows(x, found), found).to(x.dtype)
