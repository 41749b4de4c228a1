"""The index function of each op that the algebra knows: one handler per op, in `HANDLERS`.

A handler takes the `Inference` that asks, the node and its arguments by name, and gives the node's `IndexFunction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy import Piecewise
from sympy.core.function import AppliedUndef
from torch import fx

from .graph import dtype_of, is_tensor, size_expr, sizes
from .index_values import (
    ROUNDINGS,
    IndexFunction,
    NotInferred,
    Value,
    as_dtype,
    choose,
    constant_of,
    equal,
    is_truth,
    less,
    less_equal,
    nonnegative,
    number,
    over_branches,
    reshape_groups,
    rounded,
    truth,
)

if TYPE_CHECKING:
    from .index_algebra import Inference

aten = torch.ops.aten

Handler = Callable[..., IndexFunction]
HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def pointwise(function: Callable[..., Value], *targets: Any) -> None:
    """Ops that apply `function` to the broadcast elements of their tensor and number arguments.

    In half precision, tensors are rounded before and the result after, as eager does.
    """

    def handler(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
        if named.pop("alpha", 1) != 1:
            raise NotInferred(node, f"{node.target} with another alpha")
        dtype = dtype_of(node)
        half = dtype in ROUNDINGS
        operands = [(x.operand(value, node), half and is_tensor(value)) for value in named.values()]

        def at(*i: sympy.Expr) -> Value:
            values = [operand.read(i) for operand, _ in operands]
            if not half:
                return function(*values)
            inner = (
                rounded(value, dtype) if tensor and not is_truth(value) else value
                for value, (_, tensor) in zip(values, operands)
            )
            return rounded(number(function(*inner)), dtype)

        return IndexFunction(sizes(node), at)

    handles(*targets)(handler)


def numeric(function: Callable[..., Value]) -> Callable[..., Value]:
    return lambda *values: function(*map(number, values))


pointwise(numeric(lambda a, b: a + b), aten.add.Tensor, aten.add.Scalar)
pointwise(numeric(lambda a, b: a - b), aten.sub.Tensor, aten.sub.Scalar)
pointwise(numeric(lambda a, b: b - a), aten.rsub.Tensor, aten.rsub.Scalar)
pointwise(numeric(lambda a, b: a * b), aten.mul.Tensor, aten.mul.Scalar)
pointwise(numeric(lambda a, b: a / b), aten.div.Tensor, aten.div.Scalar)
pointwise(numeric(lambda a: -a), aten.neg.default)
pointwise(numeric(sympy.Abs), aten.abs.default)
largest, smallest = over_branches(sympy.Max), over_branches(sympy.Min)
pointwise(numeric(largest), aten.maximum.default, aten.clamp_min.default)
pointwise(numeric(smallest), aten.minimum.default, aten.clamp_max.default)
pointwise(numeric(less_equal), aten.le.Tensor, aten.le.Scalar)
pointwise(numeric(less), aten.lt.Tensor, aten.lt.Scalar)
pointwise(numeric(lambda a, b: less_equal(b, a)), aten.ge.Tensor, aten.ge.Scalar)
pointwise(numeric(lambda a, b: less(b, a)), aten.gt.Tensor, aten.gt.Scalar)
pointwise(numeric(equal), aten.eq.Tensor, aten.eq.Scalar)
pointwise(numeric(lambda a, b: sympy.Not(equal(a, b))), aten.ne.Tensor, aten.ne.Scalar)
pointwise(lambda a, b: sympy.And(truth(a), truth(b)), aten.logical_and.default)
pointwise(lambda a, b: sympy.Or(truth(a), truth(b)), aten.logical_or.default)
pointwise(lambda a: sympy.Not(truth(a)), aten.logical_not.default)
pointwise(
    lambda condition, a, b: choose(truth(condition), a, b),
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
)
pointwise(lambda x, mask, value: choose(truth(mask), value, x), aten.masked_fill.Scalar, aten.masked_fill.Tensor)


@handles(aten.clamp.default)
def clamp(x: Inference, node: fx.Node, min: Any, max: Any, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    low, high = (bound if bound is None else constant_of(bound) for bound in (min, max))

    def at(*i: sympy.Expr) -> Value:
        value = number(inner.at(*i))
        value = value if low is None else largest(value, low)
        return value if high is None else smallest(value, high)

    return IndexFunction(sizes(node), at)


@handles(aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode)
@handles(aten.remainder.Scalar, aten.remainder.Tensor)
def whole_division(x: Inference, node: fx.Node, rounding_mode: str = "floor", **named: Any) -> IndexFunction:
    """x // n and x % n of whole numbers."""
    left, right = (x.operand(value, node) for value in named.values())
    size = right.at() if right.shape == () else None
    if size is None or not (size.is_Integer and size > 0) or rounding_mode != "floor":
        raise NotInferred(node, "the divisor is not a positive whole number, or the quotient is not rounded down")
    place = "remainder" in node.target.name()

    def at(*i: sympy.Expr) -> Value:
        value = number(left.read(i))
        if not value.is_integer:
            raise NotInferred(node, f"{value} is not known to be whole")
        return x.divmod(value, size)[place]

    return IndexFunction(sizes(node), at)


@handles(aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.bitwise_or.Tensor, aten.__or__.Tensor)
@handles(aten.bitwise_not.default, aten.bitwise_and.Scalar, aten.bitwise_or.Scalar)
def bitwise(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    if dtype_of(node) != torch.bool:
        raise NotInferred(node, "it works on the bits of integers")
    operands = [x.operand(value, node) for value in named.values()]
    name = node.target.name()
    function = sympy.And if "and" in name else sympy.Or if "or" in name else sympy.Not
    return IndexFunction(sizes(node), lambda *i: function(*(truth(operand.read(i)) for operand in operands)))


@handles(aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default)
@handles(aten.contiguous.default, aten.dropout.default)
def same_elements(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    if named.get("train"):
        raise NotInferred(node, "dropout in training mode is random")
    return x.infer(next(iter(named.values())))


@handles(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
def to_dtype(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    source = next(iter(named.values()))
    before, after = dtype_of(source), dtype_of(node)
    inner = x.infer(source)
    if before.is_floating_point and not after.is_floating_point and after != torch.bool:
        raise NotInferred(node, f"it rounds {before} to {after}")
    narrows = before != after and after.itemsize < 8

    def at(*i: sympy.Expr) -> Value:
        value = as_dtype(inner.at(*i), after == torch.bool)
        return rounded(value, after) if narrows and not is_truth(value) else value

    return IndexFunction(inner.shape, at)


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    start, step = size_expr(named.get("start", 0)), size_expr(named.get("step", 1))
    if dtype_of(node).is_floating_point and dtype_of(node).itemsize < 4:
        raise NotInferred(node, f"it counts in {dtype_of(node)}")
    return IndexFunction(sizes(node), lambda i: start + step * i)


@handles(aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)
def full(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    value = x.operand(named.get("fill_value", named.get("s")), node).at()
    value = as_dtype(value, dtype_of(node) == torch.bool)
    value = value if is_truth(value) else rounded(value, dtype_of(node))
    return IndexFunction(sizes(node), lambda *i: value)


@handles(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    value = as_dtype(sympy.Integer(1), dtype_of(node) == torch.bool)
    return IndexFunction(sizes(node), lambda *i: value)


@handles(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    value = as_dtype(sympy.Integer(0), dtype_of(node) == torch.bool)
    return IndexFunction(sizes(node), lambda *i: value)


@handles(aten.tril.default)
def tril(x: Inference, node: fx.Node, diagonal: Any, **named: Any) -> IndexFunction:
    return triangle(x, node, next(iter(named.values())), lambda row, column: row - column + size_expr(diagonal))


@handles(aten.triu.default)
def triu(x: Inference, node: fx.Node, diagonal: Any, **named: Any) -> IndexFunction:
    return triangle(x, node, next(iter(named.values())), lambda row, column: column - row - size_expr(diagonal))


def triangle(x: Inference, node: fx.Node, source: fx.Node, distance: Callable[..., sympy.Expr]) -> IndexFunction:
    inner = x.infer(source)
    zero = as_dtype(sympy.Integer(0), dtype_of(node) == torch.bool)
    return IndexFunction(inner.shape, lambda *i: choose(nonnegative(distance(i[-2], i[-1])), inner.at(*i), zero))


@handles(aten.cumsum.default)
def cumsum(x: Inference, node: fx.Node, dim: int, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    axis = dim % len(inner.shape)

    def at(*i: sympy.Expr) -> Value:
        j = sympy.Dummy("j", integer=True, nonnegative=True)
        term = number(inner.at(*i[:axis], j, *i[axis + 1 :]))
        return term * (i[axis] + 1) if not term.has(j) else x.unknown(node, "it counts along its input").at(*i)

    return IndexFunction(inner.shape, at)


@handles(aten.sum.dim_IntList)
def sum_over(x: Inference, node: fx.Node, dim: Sequence[int], keepdim: bool, **named: Any) -> IndexFunction:
    """Of what is the same along the dimension."""
    inner = x.infer(next(iter(named.values())))
    if dim is None or len(dim) != 1:
        raise NotInferred(node, "it adds up over several dimensions")
    axis = dim[0] % len(inner.shape)
    j = x.index(f"{node.name}_j", inner.shape[axis])

    def at(*i: sympy.Expr) -> Value:
        behind = i[axis + 1 :] if keepdim else i[axis:]
        term = inner.at(*i[:axis], j, *behind)
        term = number(x.decide(term) if is_truth(term) else term)
        return x.unknown(node, "it adds up along its input").at(*i) if term.has(j) else term * inner.shape[axis]

    return IndexFunction(sizes(node), at)


@handles(aten.diff.default)
def diff(x: Inference, node: fx.Node, n: int, dim: int, prepend: Any, append: Any, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    axis = dim % len(inner.shape)
    before = x.infer(prepend) if prepend is not None else None
    if n != 1 or append is not None or (before is not None and before.shape[axis] != 1):
        raise NotInferred(node, "a repeated diff, or one with more than one element around it")

    def element(i: Sequence[sympy.Expr], shift: int) -> sympy.Expr:
        return number(inner.at(*i[:axis], i[axis] + shift, *i[axis + 1 :]))

    def at(*i: sympy.Expr) -> Value:
        if before is None:
            return sympy.expand(element(i, 1) - element(i, 0))
        zero = (*i[:axis], sympy.Integer(0), *i[axis + 1 :])
        first = sympy.expand(element(zero, 0) - number(before.at(*zero)))
        other = sympy.expand(element(i, 0) - element(i, -1))
        return first if first == other else Piecewise((first, sympy.Eq(i[axis], 0)), (other, True))

    return IndexFunction(sizes(node), at)


def reads_a_tensor(function: IndexFunction) -> bool:
    """Whether elements are more than arithmetic on their indices."""
    return bool(function.at(*sympy.symbols(f"i:{len(function.shape)}", integer=True)).atoms(AppliedUndef))


@handles(aten.cat.default)
def cat(x: Inference, node: fx.Node, tensors: Sequence[fx.Node], dim: int) -> IndexFunction:
    parts = [x.infer(tensor) for tensor in tensors]
    axis = dim % len(parts[0].shape)
    if dtype_of(node).is_floating_point and any(map(reads_a_tensor, parts)):
        return x.unknown(node, "it joins tensors")

    def at(*i: sympy.Expr) -> Value:
        start, value = sum((part.shape[axis] for part in parts), sympy.Integer(0)), None
        for part in reversed(parts):
            start = start - part.shape[axis]
            element = part.at(*i[:axis], i[axis] - start, *i[axis + 1 :])
            value = element if value is None else choose(less(i[axis], start + part.shape[axis]), element, value)
        return value

    return IndexFunction(sizes(node), at)


# --- views -----------------------------------------------------------------------------------------------------------


@handles(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
@handles(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints)
def reshape(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    """Dimensions are split and merged; index by index within each run of dimensions with as many elements."""
    inner = x.infer(next(iter(named.values())))
    shape = sizes(node)
    groups = reshape_groups(inner.shape, shape)
    if groups is None:
        raise NotInferred(node, f"cannot follow the view of {list(inner.shape)} as {list(shape)}")

    def at(*i: sympy.Expr) -> Value:
        own: list[sympy.Expr] = [sympy.Integer(0)] * len(inner.shape)
        for old, new in groups:
            flat = sympy.Integer(0)
            for dim in new:
                flat = flat * shape[dim] + i[dim]
            for dim in reversed(old[1:]):
                if inner.shape[dim] != 1:
                    flat, own[dim] = x.divmod(flat, inner.shape[dim])
            if old and inner.shape[old[0]] != 1:
                own[old[0]] = flat
        return inner.at(*own)

    return IndexFunction(shape, at)


@handles(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    return IndexFunction(sizes(node), lambda *i: inner.read(i))


@handles(aten.permute.default)
def permute(x: Inference, node: fx.Node, dims: Sequence[int], **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    place = {dim % len(dims): position for position, dim in enumerate(dims)}
    return IndexFunction(sizes(node), lambda *i: inner.at(*(i[place[dim]] for dim in range(len(dims)))))


@handles(aten.transpose.int)
def transpose(x: Inference, node: fx.Node, dim0: int, dim1: int, **named: Any) -> IndexFunction:
    dims = list(range(len(sizes(node))))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(x, node, dims, **named)


@handles(aten.t.default)
def matrix_transpose(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    return transpose(x, node, -1, -2, **named)


@handles(aten.slice.Tensor)
def slice_(x: Inference, node: fx.Node, dim: int, start: Any, end: Any, step: Any, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    axis, first, stride = dim % len(inner.shape), size_expr(start or 0), size_expr(step)
    if first.is_negative:
        first = first + inner.shape[axis]

    def at(*i: sympy.Expr) -> Value:
        return inner.at(*i[:axis], first + stride * i[axis], *i[axis + 1 :])

    return IndexFunction(sizes(node), at)


@handles(aten.select.int)
def select(x: Inference, node: fx.Node, dim: int, index: Any, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    axis, place = dim % len(inner.shape), size_expr(index)
    if place.is_negative:
        place = place + inner.shape[axis]
    return IndexFunction(sizes(node), lambda *i: inner.at(*i[:axis], place, *i[axis:]))


@handles(aten.index.Tensor)
def index(x: Inference, node: fx.Node, indices: Sequence[Any], **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    if any(place is None or dtype_of(place) in (torch.bool, torch.uint8) for place in indices):
        raise NotInferred(node, "it is indexed by a mask, or not from the first dimension on")
    places = [x.infer(place) for place in indices]
    rank = max(len(place.shape) for place in places)

    def at(*i: sympy.Expr) -> Value:
        return inner.at(*(number(place.read(i[:rank])) for place in places), *i[rank:])

    return IndexFunction(sizes(node), at)


@handles(aten.repeat_interleave.self_int)
def repeat_interleave(x: Inference, node: fx.Node, repeats: Any, dim: Any, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))
    if dim is None:
        raise NotInferred(node, "it flattens its input")
    axis, count = dim % len(inner.shape), size_expr(repeats)
    return IndexFunction(sizes(node), lambda *i: inner.read((*i[:axis], x.divmod(i[axis], count)[0], *i[axis + 1 :])))


@handles(aten.repeat.default)
def repeat(x: Inference, node: fx.Node, **named: Any) -> IndexFunction:
    inner = x.infer(next(iter(named.values())))

    def at(*i: sympy.Expr) -> Value:
        own = i[len(i) - len(inner.shape) :]
        return inner.read(tuple(x.divmod(place, size)[1] for place, size in zip(own, inner.shape)))

    return IndexFunction(sizes(node), at)
