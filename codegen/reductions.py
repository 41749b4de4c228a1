"""Reductions and norms as Triton code: more rows of `pointwise.EMITTERS`.

A kernel that reduces the last axis holds whole rows: one tile of BLOCK_R rows and all columns. One that reduces other
axes has a lane for each result, and loops.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers effc's)
from ..compiler.graph import dtype_of, sizes
from .domain import COL, NoKernel
from .kernel import TL_TYPES
from .pointwise import RowKernel, Value
from .pointwise_ops import compute_type, emits, operand
from .views import Index, broadcast_index, reshape_index

aten = torch.ops.aten
effc = torch.ops.effc


def reduced_axes(node: fx.Node) -> list[int]:
    """The axes that a reduction runs over, from the front."""
    rank = len(sizes(node.args[0]))
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return sorted(dim % max(rank, 1) for dim in dims) or list(range(rank))


def reduced_axis(node: fx.Node) -> None:
    axes = reduced_axes(node)
    if axes != [len(sizes(node.args[0])) - 1]:
        raise NoKernel(f"a reduction over axes {axes} has no kernel; the last axis alone has, and all but the last")


def reduces_columns(node: fx.Node) -> bool:
    """Whether a reduction leaves the last axis: its kernel runs over the results and loops over what they reduce."""
    if node.target not in COLUMN_REDUCTIONS or dtype_of(node.args[0]) not in COLUMN_REDUCTIONS[node.target]:
        return False
    rank = len(sizes(node.args[0]))
    return rank > 1 and rank - 1 not in reduced_axes(node)


def row_values(kernel: RowKernel, node: fx.Node, index: Index, wide: torch.dtype | None = None) -> str:
    """The whole row that the element at `index` of `node` reduces or normalizes, in the type to compute in."""
    x = node.args[0]
    leading = index[: len(sizes(x)) - 1]
    places = [*kernel.condition, *(str(symbol) for axis in leading for symbol in axis.free_symbols)]
    if any(map(kernel.is_across, places)):
        raise NoKernel("its rows are read along the columns of a kernel")
    kernel.whole_row(x)
    value = kernel.value(x, broadcast_index(sizes(x), (*leading, COL)))
    wide = compute_type(wide or wide_type(node))
    if compute_type(value.dtype) == wide:
        return value.name
    return f"{value.name}.to({TL_TYPES[wide]})"


def normalized_row(kernel: RowKernel, node: fx.Node, index: Index) -> str:
    """`row_values` of an op whose result is as long as the row."""
    if index[-1] != COL and kernel.domain.cols != 1:
        raise NoKernel("its rows are read in another order than they are made in")
    return row_values(kernel, node, index)


def wide_type(node: fx.Node) -> torch.dtype:
    """The type that a reduction computes in."""
    return torch.float64 if torch.float64 in (dtype_of(node), dtype_of(node.args[0])) else torch.float32


@emits(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduction(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    if reduces_columns(node):
        return column_reduction(kernel, node, index)
    reduced_axis(node)
    x = node.args[0]
    if not dtype_of(x).is_floating_point:
        return integer_reduction(kernel, node, index)
    row = row_values(kernel, node, index)
    if node.target is aten.mean.dim:
        return kernel.let(node, f"{kernel.reduce('sum', row)} / {int(sizes(x)[-1])}")
    if node.target is aten.sum.dim_IntList:
        return kernel.let(node, kernel.reduce("sum", row))
    not_a_number = kernel.reduce("max", f"tl.where({row} == {row}, 0.0, 1.0)")
    extreme = kernel.reduce("max" if node.target is aten.amax.default else "min", row)
    return kernel.let(node, f'tl.where({not_a_number} > 0, float("nan"), {extreme})')


def integer_reduction(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Sums in int64, as eager's; the largest and smallest in the dtype of the row."""
    dtype = dtype_of(node)
    if dtype not in (torch.int64, torch.int32):
        raise NoKernel(f"a reduction of {dtype_of(node.args[0])} to {dtype} has no kernel")
    row = row_values(kernel, node, index, dtype)
    how = {aten.sum.dim_IntList: "sum", aten.amax.default: "max", aten.amin.default: "min"}[node.target]
    return kernel.let(node, kernel.reduce(how, row, dtype))


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COLUMN_REDUCTIONS: dict[Any, tuple[torch.dtype, ...]] = {
    aten.mean.dim: FLOATS,
    aten.sum.dim_IntList: (*FLOATS, torch.int64, torch.int32, torch.bool),
    aten.amax.default: (*FLOATS, torch.int64, torch.int32),
    aten.amin.default: (*FLOATS, torch.int64, torch.int32),
    aten.any.dim: (*FLOATS, torch.int64, torch.int32, torch.bool),
    aten.all.dim: (*FLOATS, torch.int64, torch.int32, torch.bool),
}
"""Reductions over other axes than the last, and of what."""

STEPS = {
    aten.mean.dim: "{0} + {1}",
    aten.sum.dim_IntList: "{0} + {1}",
    aten.amax.default: "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.amin.default: "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.any.dim: "{0} | ({1} != 0)",
    aten.all.dim: "{0} & ({1} != 0)",
}


def column_reduction(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """A result a lane, one element after the other. Sums of fp32 are made in fp64: one after the other in fp32 would
    err more than eager's, which are made in a tree."""
    x, axes = node.args[0], reduced_axes(node)
    shape = sizes(x)
    kept = iter(index if len(index) < len(shape) else [place for i, place in enumerate(index) if i not in axes])
    count = sympy.prod([shape[axis] for axis in axes])
    total = kernel.assign("total", f"tl.full([BLOCK_R, BLOCK_C], {start(node)}, {TL_TYPES[column_type(node)]})")
    kernel.across.add(total)

    def iteration(k: sympy.Symbol) -> None:
        reduced = dict(zip(axes, reshape_index(tuple(shape[axis] for axis in axes), (count,), (k,))))
        here = tuple(reduced[i] if i in reduced else next(kept) for i in range(len(shape)))
        value = operand(kernel, x, here, dtype_of(x) if dtype_of(node) == torch.bool else column_type(node))
        kernel.body.append(f"{total} = {STEPS[node.target].format(total, value)}")

    kernel.loop(count, iteration)
    result = f"{total} / {kernel.factor_text(count)}" if node.target is aten.mean.dim else total
    wide = TL_TYPES[compute_type(dtype_of(node))]
    return kernel.let(node, f"({result}).to({wide})")


def column_type(node: fx.Node) -> torch.dtype:
    """The type that a column is reduced in."""
    dtype = compute_type(dtype_of(node))
    if node.target in (aten.sum.dim_IntList, aten.mean.dim) and dtype_of(node) == torch.float32:
        return torch.float64
    return dtype


def start(node: fx.Node) -> str:
    """What a reduction of nothing gives."""
    dtype = dtype_of(node.args[0])
    if node.target in (aten.amax.default, aten.amin.default):
        lowest = node.target is aten.amax.default
        if dtype.is_floating_point:
            return 'float("-inf")' if lowest else 'float("inf")'
        return str(torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max)
    return {aten.any.dim: "False", aten.all.dim: "True"}.get(node.target, "0")


@emits(aten.any.dim, aten.all.dim)
def truth(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Whether a row has an element that is (any), or none that is not (all)."""
    if reduces_columns(node):
        return column_reduction(kernel, node, index)
    reduced_axis(node)
    row, every = row_values(kernel, node, index, dtype_of(node.args[0])), node.target is aten.all.dim
    found = kernel.reduce("max", f"({row} {'==' if every else '!='} 0).to(tl.int32)", torch.int32)
    return kernel.let(node, f"{found} {'==' if every else '!='} 0")


@emits(aten.argmax.default, aten.argmin.default)
def place_of_extreme(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Where the largest (or smallest) of a row stands: the first of several, and the first NaN before all."""
    x = node.args[0]
    if len(node.args) < 2 or node.args[1] is None or not sizes(x) or node.args[1] % len(sizes(x)) != len(sizes(x)) - 1:
        raise NoKernel("a place along another axis than the last has no kernel")
    dtype = dtype_of(x)
    wide = compute_type(dtype) if dtype.is_floating_point or dtype == torch.int64 else torch.int32
    row = row_values(kernel, node, index, wide)
    extreme = kernel.reduce("max" if node.target is aten.argmax.default else "min", row, wide)
    hit = f"{row} == {extreme}"
    if dtype.is_floating_point:
        not_a_number = kernel.reduce("max", f"tl.where({row} == {row}, 0, 1)", torch.int32)
        hit = f"tl.where({not_a_number} > 0, {row} != {row}, {hit})"
    return kernel.let(node, f"{kernel.reduce('min', f'tl.where({hit}, col, BLOCK_C)', torch.int32)}.to(tl.int64)")


@emits(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = node.args[0]
    if node.args[1] % len(sizes(x)) != len(sizes(x)) - 1:
        raise NoKernel("a softmax over another axis than the last has no kernel")
    row, wide = normalized_row(kernel, node, index), wide_type(node)
    shifted = kernel.let(node, f"{row} - {kernel.reduce('max', row)}", wide).name
    exponential = kernel.let(node, f"tl.exp({shifted})", wide).name
    total = kernel.reduce("sum", exponential)
    if node.target in (aten.log_softmax.int, aten._log_softmax.default):
        return kernel.let(node, f"{shifted} - tl.log({total})")
    return kernel.let(node, f"{exponential} / {total}")


@emits(effc.rms_norm.default)
def rms_norm(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x, weight, eps = node.args[:3]
    scale_in_fp32 = node.args[3] if len(node.args) > 3 else node.kwargs.get("scale_in_fp32", False)
    row, wide = normalized_row(kernel, node, index), wide_type(node)
    mean = f"{kernel.reduce('sum', f'{row} * {row}')} / {int(sizes(x)[-1])}"
    scale = kernel.assign("scale", f"1.0 / tl.sqrt({mean} + {eps!r})")
    if weight is None:
        return kernel.let(node, f"{row} * {scale}")
    normalized = kernel.let(node, f"{row} * {scale}", wide if scale_in_fp32 else dtype_of(x)).name
    return kernel.let(node, f"{normalized} * {operand(kernel, weight, index[-1:], wide)}")


@emits(aten.layer_norm.default)
def layer_norm(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in fp32, rounded once (as ATen does)."""
    x, shape = node.args[:2]
    weight, bias, eps = (*node.args[2:5], *(None, None, 1e-5)[len(node.args[2:5]) :])
    if len(shape) != 1:
        raise NoKernel("a layer norm over more than the last axis has no kernel")
    row, wide = normalized_row(kernel, node, index), wide_type(node)
    count = int(sizes(x)[-1])
    mean = kernel.assign("mean", f"{kernel.reduce('sum', row)} / {count}")
    centered = kernel.assign("centered", f"{row} - {mean}")
    variance = kernel.assign("variance", f"{kernel.reduce('sum', f'{centered} * {centered}')} / {count}")
    result = kernel.assign("normalized", f"{centered} * (1.0 / tl.sqrt({variance} + {eps!r}))")
    for parameter, sign in ((weight, "*"), (bias, "+")):
        if parameter is not None:
            result = f"{result} {sign} {operand(kernel, parameter, index[-1:], wide)}"
    return kernel.let(node, result)


REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.any.dim,
        aten.all.dim,
        aten.softmax.int,
        aten._softmax.default,
        aten.log_softmax.int,
        aten._log_softmax.default,
        aten.argmax.default,
        aten.argmin.default,
        effc.rms_norm.default,
        aten.layer_norm.default,
    }
)
"""Ops that need whole rows: their kernels run over their input's rows and columns."""


def is_row_reduction(node: fx.Node) -> bool:
    """Whether a node's kernel runs over the rows and columns of its input."""
    if node.target in COLUMN_REDUCTIONS:
        return reduced_axes(node) == [len(sizes(node.args[0])) - 1]
    return node.target in REDUCTIONS
