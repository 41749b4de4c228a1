"""Reductions and norms over the last axis, as Triton code: more rows of `pointwise.EMITTERS`.

A kernel that reduces holds whole rows: one tile of BLOCK_R rows and all columns.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers effc's)
from ..compiler.graph import dtype_of, sizes
from .kernel import TL_TYPES
from .pointwise import COL, NoKernel, RowKernel, Value
from .pointwise_ops import compute_type, emits, operand
from .views import Index, broadcast_index

aten = torch.ops.aten
effc = torch.ops.effc


def reduced_axis(node: fx.Node) -> None:
    x = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    rank = len(sizes(x))
    if [None if dim is None else dim % rank for dim in dims] != [rank - 1]:
        raise NoKernel(f"a reduction over axes {dims} has no kernel; the last axis alone has")


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


@emits(aten.any.dim, aten.all.dim)
def truth(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Whether a row has an element that is (any), or none that is not (all)."""
    reduced_axis(node)
    row, every = row_values(kernel, node, index, dtype_of(node.args[0])), node.target is aten.all.dim
    found = kernel.reduce("max", f"({row} {'==' if every else '!='} 0).to(tl.int32)", torch.int32)
    return kernel.let(node, f"{found} {'==' if every else '!='} 0")


@emits(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = node.args[0]
    if node.args[1] % len(sizes(x)) != len(sizes(x)) - 1:
        raise NoKernel("a softmax over another axis than the last has no kernel")
    row, wide = normalized_row(kernel, node, index), wide_type(node)
    shifted = kernel.let(node, f"{row} - {kernel.reduce('max', row)}", wide).name
    exponential = kernel.let(node, f"tl.exp({shifted})", wide).name
    total = kernel.reduce("sum", exponential)
    if node.target is aten.log_softmax.int:
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
        effc.rms_norm.default,
        aten.layer_norm.default,
    }
)
"""Ops that need whole rows: their kernels run over their input's rows and columns."""
