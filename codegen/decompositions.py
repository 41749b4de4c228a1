"""Decompositions of our own: reductions as reductions of the last axis, of rows that a kernel can hold.

    amax(x, [0, 2])               -->  amax(flatten(permute(x, [1, 0, 2]), 1), [-1])
    softmax(x, 0)                 -->  transpose(softmax(transpose(x, 0, -1), -1), 0, -1)
    sum(x, [-1]), 32,000 columns  -->  sum(sum(unflatten(x, -1, [2, 16000]), [-1]), [-1])
    max(x, dim)                   -->  amax(x, [dim]), argmax(x, dim)

Each rule is called like the op that it replaces; NotImplemented leaves it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..compiler.graph import sizes
from .pointwise import MAX_COLUMNS
from .reductions import reduced_axes

aten = torch.ops.aten

Rule = Callable[..., Any]


# --- which calls are to be changed ---------------------------------------------------------------------------------


def needs_another_form(node: fx.Node) -> bool:
    """Whether an op with a kernel is asked for axes, or a length, that the kernel does not have."""
    if node.target not in (*OF_AXES, *OF_ONE_AXIS):
        return False
    shape = sizes(node.args[0])
    if node.target in OF_ONE_AXIS:
        dim = one_axis(node)
        return dim is None or not shape or dim % len(shape) != len(shape) - 1 or parts_of_row(shape[-1]) is not None
    axes = reduced_axes(node)
    return not shape or (len(shape) - 1 in axes and (len(axes) > 1 or parts_of_row(shape[-1]) is not None))


def one_axis(node: fx.Node) -> int | None:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")


def parts_of_row(length: sympy.Expr | int) -> tuple[int, int] | None:
    """Into how many parts of which length to cut a row that is longer than a kernel holds; None if it cannot be."""
    length = sympy.sympify(length)
    if not length.is_Integer or length <= MAX_COLUMNS:
        return None
    length = int(length)
    part = next(size for size in range(MAX_COLUMNS, 0, -1) if length % size == 0)
    return (length // part, part) if 1 < length // part <= MAX_COLUMNS else None


# --- reductions of several axes, and of long rows ------------------------------------------------------------------


def of_axes(target: Any) -> Rule:
    """A reduction of several axes with the last among them as one of the last alone."""

    def rule(x: Tensor, dim: Any = (), keepdim: bool = False, **named: Any) -> Tensor:
        if x.ndim == 0:
            return target(x.reshape(1), [0] if target in LISTS else 0, False, **named)
        dims = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
        axes = sorted(axis % x.ndim for axis in dims)
        parts = parts_of_row(x.shape[-1]) if isinstance(x.shape[-1], int) else None
        last = [-1] if target in LISTS else -1
        if axes == [x.ndim - 1] and parts is not None and not named:
            wide = x.float() if target in SUMS and x.dtype in (torch.bfloat16, torch.float16) else x
            result = target(target(wide.unflatten(-1, parts), last, False), last, keepdim)
            return result.to(x.dtype) if wide is not x else result
        if x.ndim - 1 not in axes or len(axes) == 1:
            return NotImplemented
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        rows = x.permute(*kept, *axes).flatten(len(kept))
        result = target(rows, last, False, **named)
        return result.reshape([1 if axis in axes else x.shape[axis] for axis in range(x.ndim)]) if keepdim else result

    return rule


def softmax_of(target: Any) -> Rule:
    """A softmax along another axis, or of long rows: then by its steps, in fp32 at least, rounded once."""

    def rule(x: Tensor, dim: int, *more: Any) -> Tensor:
        if x.ndim and dim % x.ndim != x.ndim - 1:
            return target(x.transpose(dim, -1), -1, *more).transpose(dim, -1)
        parts = parts_of_row(x.shape[-1]) if x.ndim and isinstance(x.shape[-1], int) else None
        if parts is None or any(more):
            return NotImplemented
        wide = x if x.dtype == torch.float64 else x.float()
        shifted = wide - wide.amax(-1, keepdim=True)
        total = shifted.exp().sum(-1, keepdim=True)
        return (shifted - total.log() if "log" in str(target) else shifted.exp() / total).to(x.dtype)

    return rule


def place_of(target: Any) -> Rule:
    """The place of the largest (or smallest) along another axis, or among all elements."""

    def rule(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if dim is None:
            place = target(x.reshape(-1), 0)
            return place.reshape([1] * x.ndim) if keepdim else place
        if x.ndim == 0:
            return target(x.reshape(1), 0)
        if dim % x.ndim == x.ndim - 1:
            return NotImplemented
        place = target(x.transpose(dim, -1), -1, True).transpose(dim, -1)
        return place if keepdim else place.squeeze(dim)

    return rule


def with_place(values: Any, places: Any) -> Rule:
    """`max` and `min` along an axis: the value, and where it stands."""
    return lambda x, dim, keepdim=False: (values(x, [dim], keepdim), places(x, dim, keepdim))


def of_all_elements(rows: Any) -> Rule:
    """A reduction of all elements as one of a single row."""
    return lambda x, **named: rows(x.reshape(-1), [0], False, **named)


# --- variance ------------------------------------------------------------------------------------------------------


def spread(x: Tensor, dim: Any, correction: float | None, keepdim: bool, root: bool) -> Tensor:
    """Variance, or its root: in two passes, in fp32 at least, and rounded once, as eager's."""
    dims = list(range(x.ndim)) if dim is None or dim == [] else dim
    wide = x if x.dtype == torch.float64 else x.float()
    distance = wide - wide.mean(dims, keepdim=True)
    freedom = max(math.prod(x.shape[axis] for axis in dims) - (1 if correction is None else correction), 0)
    result = (distance * distance).sum(dims, keepdim=keepdim) / freedom
    return (result.sqrt() if root else result).to(x.dtype)


def spreads(root: bool) -> Sequence[Rule]:
    """The overloads `correction`, `dim` and `default` of var, or of std."""
    return (
        lambda x, dim=None, correction=None, keepdim=False: spread(x, dim, correction, keepdim, root),
        lambda x, dim, unbiased=True, keepdim=False: spread(x, dim, int(unbiased), keepdim, root),
        lambda x, unbiased=True: spread(x.reshape(-1), [0], int(unbiased), False, root),
    )


# --- the table -----------------------------------------------------------------------------------------------------

LISTS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
"""Reductions that take a list of axes; others take one."""

SUMS = LISTS[:2]
OF_AXES = (*LISTS, aten.any.dim, aten.all.dim)
OF_ONE_AXIS = (
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.argmax.default,
    aten.argmin.default,
)

OWN: dict[Any, Rule] = {
    **{target: of_axes(target) for target in OF_AXES},
    **{target: softmax_of(target) for target in OF_ONE_AXIS[:4]},
    **{target: place_of(target) for target in OF_ONE_AXIS[4:]},
    aten.max.dim: with_place(aten.amax, aten.argmax),
    aten.min.dim: with_place(aten.amin, aten.argmin),
    aten.aminmax.default: lambda x, *, dim=None, keepdim=False: tuple(
        each(x, [] if dim is None else [dim], keepdim) for each in (aten.amin, aten.amax)
    ),
    aten.sum.default: of_all_elements(aten.sum.dim_IntList),
    aten.mean.default: of_all_elements(aten.mean.dim),
    aten.max.default: of_all_elements(aten.amax),
    aten.min.default: of_all_elements(aten.amin),
    aten.any.default: lambda x: aten.any.dim(x.reshape(-1), 0),
    aten.all.default: lambda x: aten.all.dim(x.reshape(-1), 0),
    **dict(zip((aten.var.correction, aten.var.dim, aten.var.default), spreads(root=False))),
    **dict(zip((aten.std.correction, aten.std.dim, aten.std.default), spreads(root=True))),
}
"""Rules by op. Those of `OF_AXES` and `OF_ONE_AXIS` have kernels, for some of their calls."""
