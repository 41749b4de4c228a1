"""Emitters of the ops that make elements from nothing or from elsewhere: arange, full, flip, roll, pad, cat."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx
from torch.utils._sympy.functions import Mod

from ..compiler.graph import dtype_of, size_expr, sizes
from .domain import NoKernel
from .kernel import TL_TYPES
from .pointwise import RowKernel, Value, conjunction
from .pointwise_ops import aten, compute_type, emits, operand
from .views import Index, reshape_index


@emits(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    if any(isinstance(bound, float) for bound in node.args):
        raise NoKernel("an arange over floats has no kernel")
    bounds = [size_expr(bound) for bound in node.args]
    start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
    step = bounds[2] if len(bounds) > 2 else sympy.Integer(1)
    place, dtype = start + index[0] * step, TL_TYPES[compute_type(dtype_of(node))]
    text = kernel.index_text(place)
    if index[0].free_symbols:
        return kernel.let(node, f"({text}).to({dtype})")
    return kernel.let(node, f"tl.full([1, 1], {text}, {dtype})")


@emits(
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.scalar_tensor.default,
)
def full(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    name = node.target._schema.name.split("::")[1]
    if "ones" in name or "zeros" in name:
        fill: Any = 1 if "ones" in name else 0
    else:
        fill = node.args[0] if name == "scalar_tensor" else node.args[2 if name == "new_full" else 1]
    text = kernel.argument(fill, index)
    return kernel.let(node, f"tl.full([1, 1], {text}, {TL_TYPES[compute_type(dtype_of(node))]})")


@emits(aten.flip.default)
def flip(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    shape = sizes(node)
    flipped = {dim % len(shape) for dim in node.args[1]}
    here = (size - 1 - place if dim in flipped else place for dim, (place, size) in enumerate(zip(index, shape)))
    return kernel.value(node.args[0], tuple(here))


@emits(aten.roll.default)
def roll(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Elements move on by `shift` places and enter again at the front."""
    source, shifts = node.args[:2]
    dims = node.args[2] if len(node.args) > 2 else ()
    shifts, dims = ([x] if isinstance(x, int | fx.Node) else x for x in (shifts, dims))
    if not all(isinstance(shift, int) for shift in shifts):
        raise NoKernel("a roll by a number that is known only at run time has no kernel")
    shape, place = sizes(source), list(index)
    if not dims:
        count = sympy.prod(shape)
        (flat,) = reshape_index((count,), shape, index)
        return kernel.value(source, reshape_index(shape, (count,), (rolled(flat, shifts[0], count),)))
    for shift, dim in zip(shifts, dims):
        place[dim] = rolled(place[dim], shift, shape[dim])
    return kernel.value(source, tuple(place))


def rolled(place: sympy.Expr, shift: int, size: sympy.Expr) -> sympy.Expr:
    """Where the element at a place comes from: (place - shift) % size, of a number that is never below 0."""
    if size.is_Integer:
        shift %= int(size)
    return Mod(place + shift * (size - 1) if shift > 0 else place - shift, size)


@emits(aten.constant_pad_nd.default)
def constant_pad(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Lanes outside of the source are masked off and take the fill; a negative pad cuts."""
    x, pads = node.args[:2]
    fill = node.args[2] if len(node.args) > 2 else 0
    before = [size_expr(pad) for pad in reversed(pads[::2])]
    first = len(index) - len(before)
    here, terms = list(index[:first]), []
    for place, pad, size, padded in zip(index[first:], before, sizes(x)[first:], sizes(node)[first:]):
        here.append(place - pad)
        terms += [] if pad.is_nonpositive else [bound_text(kernel, place >= pad)]
        terms += [] if (padded - pad - size).is_nonpositive else [bound_text(kernel, place < pad + size)]
    kernel.condition += terms
    value = operand(kernel, x, tuple(here), dtype_of(node))
    del kernel.condition[len(kernel.condition) - len(terms) :]
    text = kernel.argument(fill, index)
    return kernel.let(node, f"tl.where({conjunction(terms)}, {value}, {text})" if terms else value)


@emits(aten.cat.default)
def cat(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Each lane takes its value from the part that its index falls into; the others are masked off."""
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)
    parts = [part for part in node.args[0] if len(sizes(part)) == len(index) and sizes(part)[dim] != 0]
    if not parts:
        raise NoKernel("a cat of empty tensors has no kernel")
    at, start, result = index[dim], sympy.Integer(0), ""
    for position, part in enumerate(parts):
        end = start + sizes(part)[dim]
        bounds = [at >= start if position else sympy.true, at < end if position < len(parts) - 1 else sympy.true]
        here = (*index[:dim], at - start, *index[dim + 1 :])
        start = end
        if sympy.false in bounds:
            continue
        terms = [bound_text(kernel, bound) for bound in bounds if bound != sympy.true]
        kernel.condition += terms
        value = operand(kernel, part, here, dtype_of(node))
        del kernel.condition[len(kernel.condition) - len(terms) :]
        result = f"tl.where({conjunction(terms)}, {value}, {result})" if result and terms else value
    return kernel.let(node, result)


def bound_text(kernel: RowKernel, bound: sympy.Basic) -> str:
    return f"({kernel.index_text(bound.lhs)} {bound.rel_op} {kernel.index_text(bound.rhs)})"
