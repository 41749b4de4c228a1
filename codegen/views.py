"""Views as arithmetic: how a view moves a layout, and where an element of a view comes from.

Each view op has one row in `LAYOUTS` (strides in, strides out; None when the view needs a copy) and one in
`INDICES` (the index of an element of the view --> its index in the source), so that a view costs a kernel nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from ..compiler.graph import is_tensor, size_expr, sizes
from .kernel import Layout, contiguous_strides

aten = torch.ops.aten
Index = tuple[sympy.Expr, ...]
ONE, ZERO = sympy.Integer(1), sympy.Integer(0)


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    return a == b or sympy.expand(a - b) == 0


def is_view(node: Any) -> bool:
    """Whether a node only looks at another tensor."""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.target in INDICES and is_tensor(node)):
        return False
    return node.target is not operator.getitem or node.args[0].target in SPLITS


def view_source(node: fx.Node) -> fx.Node:
    """The tensor that a view looks at; a getitem looks through the split that it takes a part of."""
    source = node.args[0]
    return source.args[0] if node.target is operator.getitem else source


def view_layout(node: fx.Node, source: Layout) -> Layout | None:
    """The layout of a view of `source`, or None if its elements are not evenly strided."""
    return LAYOUTS[node.target](node, source)


def view_index(node: fx.Node, index: Index) -> Index:
    """The index into `view_source(node)` of the element at `index` of the view."""
    return INDICES[node.target](node, index)


# --- helpers ---------------------------------------------------------------------------------------------------


def axis(node: fx.Node, position: int, default: int = 0, rank: int | None = None) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    rank = len(sizes(view_source(node))) if rank is None else rank
    return dim % max(rank, 1)


def slice_start(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """Start and step of an `aten.slice` or `aten.narrow`, with a negative start counted from the end."""
    dim = axis(node, 1)
    start = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1  # narrow takes a length, and no step
    start = ZERO if start is None else size_expr(start)
    if start.is_negative:
        start = start + sizes(view_source(node))[dim]
        start = ZERO if start.is_negative else start
    return start, size_expr(step)


def split_start(node: fx.Node) -> tuple[int, sympy.Expr]:
    """Axis and first element of the part that `getitem(split(x, ...), i)` takes."""
    split, part = node.args
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    dim = dim % len(sizes(split.args[0]))
    return dim, sum((sizes(value)[dim] for value in split.meta["val"][:part]), ZERO)


def reshape_strides(old: Index, strides: Index, new: Index) -> Index | None:
    """Strides of a tensor viewed with other sizes, from the last axis to the first; None if it needs a copy.

    The same walk as `at::detail::computeStride`: runs of axes that are contiguous among themselves are cut anew.
    """
    result = [ONE] * len(new)
    cursor = len(new) - 1
    base = strides[-1] if strides else ONE
    run = taken = ONE
    for dim in range(len(old) - 1, -1, -1):
        run = run * old[dim]
        joins = dim > 0 and (old[dim - 1] == 1 or same(strides[dim - 1], run * base))
        if joins:
            continue
        while cursor >= 0 and (not same(taken, run) or new[cursor] == 1):
            result[cursor] = taken * base
            taken = taken * new[cursor]
            cursor -= 1
        if not same(taken, run):
            return None
        if dim > 0:
            base, run, taken = strides[dim - 1], ONE, ONE
    if any(size != 1 for size in new[: cursor + 1]):
        return None
    return tuple(result)


def reshape_index(old: Index, new: Index, index: Index) -> Index:
    """Index into sizes `old` of the element at `index` of sizes `new`, axis group by axis group.

    Axes are grouped from the left until both sides hold as many elements, so that axes that a reshape leaves alone
    keep their own index and only split or merged ones are divided. Where the old axes hold a multiple of the new
    ones, it is the new ones that lack an axis.
    """
    result: list[sympy.Expr] = []
    i = j = 0
    while i < len(old) or j < len(new):
        end_i, end_j = min(i + 1, len(old)), min(j + 1, len(new))
        while True:
            ratio = sympy.cancel(sympy.prod(old[i:end_i]) / sympy.prod(new[j:end_j]))
            if ratio == 1:
                break
            if end_j < len(new) and (end_i == len(old) or sympy.denom(ratio) == 1):
                end_j += 1
            elif end_i < len(old):
                end_i += 1
            else:
                i = j = 0
                result, end_i, end_j = [], len(old), len(new)
                break
        linear = sum((a * b for a, b in zip(index[j:end_j], contiguous_strides(new[j:end_j]))), ZERO)
        group = old[i:end_i]
        for position, (size, stride) in enumerate(zip(group, contiguous_strides(group))):
            if size == 1:
                result.append(ZERO)
                continue
            element = linear if stride == 1 else FloorDiv(linear, stride)
            leading = all(other == 1 for other in group[:position])
            result.append(element if leading else Mod(element, size))
        i, j = end_i, end_j
    return tuple(result)


# --- one row per view op -----------------------------------------------------------------------------------------


def reshape_layout(node: fx.Node, source: Layout) -> Layout | None:
    new = sizes(node)
    strides = reshape_strides(source.sizes, source.strides, new)
    return None if strides is None else replace(source, sizes=new, strides=strides)


def permutation(node: fx.Node) -> list[int]:
    rank = len(sizes(node))
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]
    order = list(range(rank))
    if rank > 1:
        first, second = (0, 1) if node.target is aten.t.default else (node.args[1] % rank, node.args[2] % rank)
        order[first], order[second] = order[second], order[first]
    return order


def permute_layout(node: fx.Node, source: Layout) -> Layout:
    order = permutation(node)
    return replace(source, sizes=tuple(source.sizes[i] for i in order), strides=tuple(source.strides[i] for i in order))


def permute_index(node: fx.Node, index: Index) -> Index:
    result = [ZERO] * len(index)
    for position, dim in enumerate(permutation(node)):
        result[dim] = index[position]
    return tuple(result)


def unsqueeze_layout(node: fx.Node, source: Layout) -> Layout:
    dim = axis(node, 1, rank=len(source.sizes) + 1)
    return replace(
        source,
        sizes=(*source.sizes[:dim], ONE, *source.sizes[dim:]),
        strides=(*source.strides[:dim], ZERO, *source.strides[dim:]),
    )


def unsqueeze_index(node: fx.Node, index: Index) -> Index:
    dim = axis(node, 1, rank=len(index))
    return (*index[:dim], *index[dim + 1 :])


def squeezed(node: fx.Node) -> list[int]:
    source = sizes(node.args[0])
    if node.target is aten.squeeze.default:
        return [dim for dim, size in enumerate(source) if size == 1]
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    return [dim % len(source) for dim in dims if source and source[dim] == 1]


def squeeze_layout(node: fx.Node, source: Layout) -> Layout:
    gone = squeezed(node)
    keep = [dim for dim in range(len(source.sizes)) if dim not in gone]
    return replace(source, sizes=tuple(source.sizes[i] for i in keep), strides=tuple(source.strides[i] for i in keep))


def squeeze_index(node: fx.Node, index: Index) -> Index:
    result = list(index)
    for dim in sorted(squeezed(node)):
        result.insert(dim, ZERO)
    return tuple(result)


def expand_layout(node: fx.Node, source: Layout) -> Layout:
    new = sizes(node)
    added = len(new) - len(source.sizes)
    strides = [ZERO] * added
    for old, size, stride in zip(source.sizes, new[added:], source.strides):
        strides.append(ZERO if old == 1 and size != 1 else stride)
    return replace(source, sizes=new, strides=tuple(strides))


def expand_index(node: fx.Node, index: Index) -> Index:
    return broadcast_index(sizes(node.args[0]), index)


def broadcast_index(source: Index, index: Index) -> Index:
    """Index into a tensor of sizes `source` that is broadcast to the axes of `index`."""
    tail = index[len(index) - len(source) :]
    return tuple(ZERO if size == 1 else position for size, position in zip(source, tail))


def repeat_index(node: fx.Node, index: Index) -> Index:
    """Copies of the whole stand one after another; axes that the source lacks count copies only."""
    source = sizes(node.args[0])
    tail = index[len(index) - len(source) :]
    return tuple(
        position if size == length else ZERO if size == 1 else Mod(position, size)
        for position, size, length in zip(tail, source, sizes(node)[len(index) - len(source) :])
    )


def repeat_interleave_index(node: fx.Node, index: Index) -> Index:
    """Copies of an element stand next to each other; without a dim, of the flattened source."""
    source, count = sizes(node.args[0]), size_expr(node.args[1])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dim is None:
        return reshape_index(source, (sympy.prod(source),), (FloorDiv(index[0], count),))
    dim %= len(index)
    return (*index[:dim], FloorDiv(index[dim], count), *index[dim + 1 :])


def no_layout(node: fx.Node, source: Layout) -> None:
    return None


def slice_layout(node: fx.Node, source: Layout) -> Layout:
    dim = axis(node, 1)
    start, step = slice_start(node)
    strides = list(source.strides)
    offset = source.offset + start * strides[dim]
    strides[dim] = strides[dim] * step
    return replace(source, offset=offset, sizes=sizes(node), strides=tuple(strides))


def slice_index(node: fx.Node, index: Index) -> Index:
    dim = axis(node, 1)
    start, step = slice_start(node)
    return (*index[:dim], start + index[dim] * step, *index[dim + 1 :])


def selected(node: fx.Node) -> tuple[int, sympy.Expr]:
    source = sizes(node.args[0])
    dim, position = node.args[1] % len(source), size_expr(node.args[2])
    return dim, position + source[dim] if position.is_negative else position


def select_layout(node: fx.Node, source: Layout) -> Layout:
    dim, position = selected(node)
    return replace(
        source,
        offset=source.offset + position * source.strides[dim],
        sizes=(*source.sizes[:dim], *source.sizes[dim + 1 :]),
        strides=(*source.strides[:dim], *source.strides[dim + 1 :]),
    )


def select_index(node: fx.Node, index: Index) -> Index:
    dim, position = selected(node)
    return (*index[:dim], position, *index[dim:])


def part_layout(node: fx.Node, source: Layout) -> Layout:
    dim, start = split_start(node)
    return replace(source, offset=source.offset + start * source.strides[dim], sizes=sizes(node))


def part_index(node: fx.Node, index: Index) -> Index:
    dim, start = split_start(node)
    return (*index[:dim], start + index[dim], *index[dim + 1 :])


def reshaped_index(node: fx.Node, index: Index) -> Index:
    return reshape_index(sizes(node.args[0]), sizes(node), index)


def same_layout(node: fx.Node, source: Layout) -> Layout:
    return source


def same_index(node: fx.Node, index: Index) -> Index:
    return index


RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)

LAYOUTS: dict[Any, Callable[[fx.Node, Layout], Layout | None]] = {
    **dict.fromkeys(RESHAPES, reshape_layout),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), permute_layout),
    aten.unsqueeze.default: unsqueeze_layout,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze_layout),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), expand_layout),
    **dict.fromkeys((aten.repeat.default, aten.repeat_interleave.self_int), no_layout),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), slice_layout),
    aten.select.int: select_layout,
    operator.getitem: part_layout,
    **dict.fromkeys((aten.alias.default, aten.detach.default), same_layout),
}

INDICES: dict[Any, Callable[[fx.Node, Index], Index]] = {
    **dict.fromkeys(RESHAPES, reshaped_index),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), permute_index),
    aten.unsqueeze.default: unsqueeze_index,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze_index),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), expand_index),
    aten.repeat.default: repeat_index,
    aten.repeat_interleave.self_int: repeat_interleave_index,
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), slice_index),
    aten.select.int: select_index,
    operator.getitem: part_index,
    **dict.fromkeys((aten.alias.default, aten.detach.default), same_index),
}

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
"""Ops whose parts are taken by `getitem`: views when they cut an axis."""
