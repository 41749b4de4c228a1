"""Evaluation of lazy weights: the tensor that a recipe describes, one part at a time.

    evaluate(Concat((Read("q"), Read("k")), dim=0), source)    # reads q into the result, then k

The peak is the result and one part of it: merging or packing never holds two copies of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import find
from .packed_words import PackWords, pack_words
from .quantized_weights import Dequantize, Quantize
from .weights import (
    Add,
    Call,
    Cast,
    Concat,
    Constant,
    Multiply,
    Pack,
    Read,
    Reshape,
    Slice,
    TensorSource,
    Transpose,
    Weight,
    type_text,
)


def evaluate(weight: Weight, source: TensorSource, out: Tensor | None = None) -> Tensor:
    """The tensor that `weight` describes; written into `out` when given.

    Without `out`, the result may share storage with the source or be a view: it is not to be written to, and it is
    contiguous only where the recipe ends in a Concat or a Pack. The peak is the result and one part of it.
    """
    if out is not None:
        if tuple(out.shape) != weight.shape:
            raise ValueError(f"expected an output of shape {list(weight.shape)}, found {list(out.shape)}")
        _write(weight, source, out)
        return out
    match weight:
        case Read():
            return _read(weight, source)
        case Constant():
            return weight.tensor
        case Cast() if not isinstance(weight.source, Concat | Pack | PackWords):
            return evaluate(weight.source, source).to(weight.dtype)
        case Reshape():
            return evaluate(weight.source, source).reshape(weight.shape)
        case Transpose():
            return evaluate(weight.source, source).permute(weight.dims)
        case Slice():
            return evaluate(weight.source, source).narrow(weight.dim, weight.start, weight.stop - weight.start)
        case Add():
            return evaluate(weight.left, source) + evaluate(weight.right, source)
        case Multiply():
            return evaluate(weight.left, source) * evaluate(weight.right, source)
        case Call():
            return _call(weight, source)
        case Dequantize():
            return find(weight.format).dequantize([evaluate(part, source) for part in weight.parts], weight.dtype)
        case Quantize():
            return _quantized_part(weight, source)
        case Concat() | Pack() | PackWords() | Cast():
            return evaluate(weight, source, torch.empty(weight.shape, dtype=weight.dtype))
    raise TypeError(f"expected a weight recipe, found {type(weight).__name__}")


def _read(weight: Read, source: TensorSource) -> Tensor:
    tensor = source.read(weight.name)
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        raise ValueError(f"expected {weight.name} to be {type_text(weight)}, found {type_text(tensor)}")
    return tensor


def _call(weight: Call, source: TensorSource) -> Tensor:
    namespace, name, overload = weight.op.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return function(*(evaluate(arg, source) if isinstance(arg, Weight) else arg for arg in weight.args))


def _quantized_part(weight: Quantize, source: TensorSource) -> Tensor:
    format = find(weight.format)
    return format.quantize(evaluate(weight.source, source).float())[format.part_names.index(weight.name)]


def _write(weight: Weight, source: TensorSource, out: Tensor) -> None:
    """Evaluate `weight` into `out`, of the same shape and possibly another dtype."""
    if isinstance(weight, Cast) and weight.dtype == out.dtype:
        weight = weight.source
    match weight:
        case Concat():
            start = 0
            for part in weight.sources:
                size = part.shape[weight.dim]
                _write(part, source, out.narrow(weight.dim, start, size))
                start += size
        case Pack():
            _pack_rows(weight.source, source, out, 0)
            if rest := weight.source.shape[0] % weight.block:
                out[-1, :, rest:].zero_()
        case PackWords():
            pack_words(evaluate(weight.source, source), weight, out)
        case _:
            out.copy_(evaluate(weight, source))


def _pack_rows(weight: Weight, source: TensorSource, out: Tensor, start: int) -> None:
    """Write the matrix into the panels of `out` [P, K, block] from row `start` on, a part of a concatenation at a time.

    Whole panels go in one copy: panel by panel takes 40 times as long.
    """
    if isinstance(weight, Concat) and weight.dim == 0:
        for part in weight.sources:
            _pack_rows(part, source, out, start)
            start += part.shape[0]
        return
    matrix = evaluate(weight, source)
    row, end, block = 0, matrix.shape[0], out.shape[2]
    while row < end:
        panel, inside = divmod(start + row, block)
        count = (end - row) // block
        if inside == 0 and count > 0:
            rows = count * block
            panels = matrix[row : row + rows].unflatten(0, (count, block))  # [count, block, K]
            out[panel : panel + count].copy_(panels.transpose(1, 2))
        else:
            rows = min(block - inside, end - row)
            out[panel, :, inside : inside + rows].copy_(matrix[row : row + rows].t())
        row += rows
