"""Queries, keys and values as attention takes them, [B, H, S, D], from the views that models make of them."""

from __future__ import annotations

from itertools import permutations

import sympy
import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.graph import dtype_of, sizes
from ..compiler.index_algebra import Inference, NotInferred
from ..compiler.pattern import CASTS
from ..compiler.rewrite import Match

aten = torch.ops.aten

REPEATS = frozenset({aten.expand.default, aten.repeat_interleave.self_int})
OF_EACH_HEAD = CASTS | {torch.ops.effc.rope.default, torch.ops.effc.rms_norm.default}
"""Ops that do with each head [T, D] of their first argument what they do with any other."""
VIEWS = REPEATS | {aten.permute.default, aten.reshape.default, aten.slice.Tensor, aten.unsqueeze.default}


def size_of(match: Match, node: fx.Node, dim: int) -> int | fx.Node:
    """A size as an argument of a call."""
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else match.call(aten.sym_size.int, node, dim)


def untransposed(match: Match, transposed: fx.Node) -> fx.Node:
    """[..., D, T] --> [..., T, D], by taking a permutation back where there is one."""
    rank = len(sizes(transposed))
    dims = [*range(rank - 2), rank - 1, rank - 2]
    source = transposed
    if transposed.target == aten.permute.default:
        inner = [dim % rank for dim in transposed.args[1]]
        source, dims = transposed.args[0], [inner[dim] for dim in dims]
    return source if dims == sorted(dims) else match.call(aten.permute.default, source, dims)


def not_widened(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`x` before it was cast from `dtype` to fp32, which attention computes in anyway."""
    widened = x.target in CASTS and dtype_of(x) == torch.float32 and dtype_of(x.args[0]) == dtype
    return x.args[0] if widened else x


# --- batch and heads in one dimension --------------------------------------------------------------------------------


def split_source(x: fx.Node) -> fx.Node | None:
    """The node [B, H, S, D] that `x` [B * H, S, D] is a reshape of."""
    if x.target != aten.reshape.default:
        return None
    source = x.args[0]
    shape, before = sizes(x), sizes(source)
    return source if len(before) == 4 and len(shape) == 3 and before[2:] == shape[1:] else None


def split_heads(match: Match, x: fx.Node, like: fx.Node) -> fx.Node:
    """[B * H, S, D] --> [B, H, S, D], with the batch and heads of `like` [B, H, ...]."""
    source = split_source(x)
    if source is not None and sizes(source)[:2] == sizes(like)[:2]:
        return source
    shape = [*(size_of(match, like, dim) for dim in (0, 1)), *(size_of(match, x, dim) for dim in (1, 2))]
    base = x.args[0] if x.target == aten.reshape.default else x
    return match.call(aten.reshape.default, base, shape)


def with_heads(match: Match, q: fx.Node, *others: fx.Node) -> list[fx.Node]:
    """Tensors of rank 3 as [B, H, S, D]; with one head where batch and heads cannot be told apart.

    `others` have the leading size of `q`, or 1.
    """
    like = split_source(q)
    if like is None:
        return [match.call(aten.unsqueeze.default, x, 1) for x in (q, *others)]
    merged = sizes(q)[0]
    split = [split_heads(match, x, like) if len(sizes(x)) == 3 and sizes(x)[0] == merged else x for x in others]
    return [like, *split]


# --- heads that are shared -------------------------------------------------------------------------------------------


def grouped_heads(match: Match, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values without the repeats that give each query head its own: [B, H, T, D] --> [B, G, T, D].

    rope(permute(reshape(expand(k [B, T, G, 1, D], [B, T, G, H / G, D]))), cos, sin)

        -->  rope(permute(reshape(k [B, T, G, 1, D], [B, T, G, D])), cos, sin)
    """
    few_k, few_v = shared_heads(match, k), shared_heads(match, v)
    return (few_k, few_v) if sizes(few_k)[1] == sizes(few_v)[1] else (k, v)


def shared_heads(match: Match, x: fx.Node) -> fx.Node:
    """The node [B, G, T, D] of which `x` [B, H, T, D] repeats each head for a group of neighbouring heads; else `x`."""
    if x.target in OF_EACH_HEAD:
        few = shared_heads(match, x.args[0])
        return x if few is x.args[0] else match.call(x.target, few, *x.args[1:], **x.kwargs)
    source, repeated, found = x, False, None
    while source.op == "call_function" and source.target in VIEWS:
        repeated = repeated or source.target in REPEATS
        source = source.args[0]
        axes = axes_of_shared_heads(x, source) if repeated else None
        if axes == (0, 1, 2, 3) and len(sizes(source)) == 4:
            return source
        found = found or (axes and (source, axes))
    return with_axes(match, *found) if found else x


def axes_of_shared_heads(x: fx.Node, source: fx.Node) -> tuple[int, ...] | None:
    """Which axes of `source` are those of few [B, G, T, D], with x[b, h, t, d] == few[b, h // (H / G), t, d]; or None.

    Its other axes have a size of 1.
    """
    shape, available = sizes(x), sizes(source)
    inference = Inference(opaque=(source,))
    try:
        function = inference.infer(x)
    except NotInferred:
        return None
    b, h, t, d = (inference.index(name, size) for name, size in zip("bhtd", shape))
    element = function.at(b, h, t, d)
    if not isinstance(element, sympy.Function):
        return None
    for axes in permutations(range(len(available)), 4):
        few = tuple(available[axis] for axis in axes)
        whole = (few[0], *few[2:]) == (shape[0], *shape[2:]) and (shape[1] / few[1]).is_Integer
        if not whole or any(size != 1 for axis, size in enumerate(available) if axis not in axes):
            continue
        group = inference.divmod(h, shape[1] / few[1])[0]
        if tuple(element.args[axis] for axis in axes) == (b, group, t, d):
            return axes
    return None


def with_axes(match: Match, source: fx.Node, axes: tuple[int, ...]) -> fx.Node:
    """`source` with these axes in this order; the others have a size of 1."""
    kept = sorted(axes)
    if len(kept) < len(sizes(source)):
        source = match.call(aten.reshape.default, source, [size_of(match, source, axis) for axis in kept])
    order = [kept.index(axis) for axis in axes]
    return source if order == sorted(order) else match.call(aten.permute.default, source, order)
