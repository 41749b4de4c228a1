"""What each op computes at an index, as Triton code: one row an op in `pointwise.EMITTERS`.

`SIMPLE` holds the ops whose code is one expression over their operands; the rest have a function each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.graph import dtype_of, is_tensor, size_expr, sizes
from .kernel import TL_TYPES
from .pointwise import COL, EMITTERS, LOW_PRECISION, NoKernel, RowKernel, Value
from .views import Index, broadcast_index

aten = torch.ops.aten
effc = torch.ops.effc


def emits(*targets: Any) -> Callable:
    def register(function: Callable[[RowKernel, fx.Node, Index], Value]) -> Callable:
        EMITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype


def operand(kernel: RowKernel, argument: Any, index: Index, rank: int, dtype: torch.dtype) -> str:
    """Text of an operand in the type that the op computes in."""
    value = kernel.argument(argument, index, rank)
    if isinstance(value, str):
        return value
    if compute_type(value.dtype) == compute_type(dtype):
        return value.name
    if dtype == torch.bool:
        return f"({value.name} != 0)"
    return f"{value.name}.to({TL_TYPES[compute_type(dtype)]})"


def promoted(node: fx.Node) -> torch.dtype:
    """The dtype that a comparison's operands meet in."""
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in node.args[:2]]
    return torch.result_type(*values)


# --- ops of one expression ---------------------------------------------------------------------------------------

GELU_TANH = "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))"
"""0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3); the right side does not cancel."""

SIMPLE: dict[Any, str] = {
    aten.add.Tensor: "{0} + {1}",
    aten.add.Scalar: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.sub.Scalar: "{0} - {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.div.Scalar: "{0} / {1}",
    aten.reciprocal.default: "1.0 / {0}",
    aten.maximum.default: "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.minimum.default: "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.neg.default: "-{0}",
    aten.abs.default: "tl.abs({0})",
    aten.exp.default: "tl.exp({0})",
    aten.log.default: "tl.log({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.rsqrt.default: "1.0 / tl.sqrt({0})",
    aten.sin.default: "tl.sin({0})",
    aten.cos.default: "tl.cos({0})",
    aten.erf.default: "tl.erf({0})",
    aten.sigmoid.default: "1.0 / (1.0 + tl.exp(-{0}))",
    aten.silu.default: "{0} / (1.0 + tl.exp(-{0}))",
    aten.relu.default: "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    aten.bitwise_not.default: "~{0}",
    aten.bitwise_and.Tensor: "{0} & {1}",
    aten.bitwise_or.Tensor: "{0} | {1}",
    aten.__and__.Tensor: "{0} & {1}",
    aten.__or__.Tensor: "{0} | {1}",
    aten.clone.default: "{0}",
    aten.contiguous.default: "{0}",
    aten.lift_fresh_copy.default: "{0}",
}

COMPARISONS: dict[Any, str] = {
    aten.lt.Tensor: "<",
    aten.lt.Scalar: "<",
    aten.le.Tensor: "<=",
    aten.le.Scalar: "<=",
    aten.gt.Tensor: ">",
    aten.gt.Scalar: ">",
    aten.ge.Tensor: ">=",
    aten.ge.Scalar: ">=",
    aten.eq.Tensor: "==",
    aten.eq.Scalar: "==",
    aten.ne.Tensor: "!=",
    aten.ne.Scalar: "!=",
}


@emits(*SIMPLE)
def simple(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype, rank = dtype_of(node), len(index)
    operands = [operand(kernel, argument, index, rank, dtype) for argument in node.args[:2]]
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        operands[1] = f"({operands[1]} * {alpha})"
    return kernel.let(node, SIMPLE[node.target].format(*operands))


@emits(*COMPARISONS)
def comparison(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype = promoted(node)
    left, right = (operand(kernel, argument, index, len(index), dtype) for argument in node.args[:2])
    return kernel.let(node, f"{left} {COMPARISONS[node.target]} {right}")


@emits(aten.logical_and.default, aten.logical_or.default, aten.logical_not.default)
def logical(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    operands = [operand(kernel, argument, index, len(index), torch.bool) for argument in node.args]
    joined = {aten.logical_and.default: " & ", aten.logical_or.default: " | "}.get(node.target)
    return kernel.let(node, joined.join(operands) if joined else f"~{operands[0]}")


@emits(aten._to_copy.default, aten.to.dtype, aten._to_copy, aten.to.dtype_layout)
def cast(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    value = kernel.value(node.args[0], index)
    dtype = dtype_of(node)
    if dtype == value.dtype:
        return value
    if dtype == torch.bool:
        return kernel.let(node, f"{value.name} != 0")
    return kernel.let(node, f"{value.name}.to({TL_TYPES[compute_type(dtype)]})")


@emits(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype, rank = dtype_of(node), len(index)
    condition = operand(kernel, node.args[0], index, rank, torch.bool)
    yes, no = (operand(kernel, argument, index, rank, dtype) for argument in node.args[1:3])
    return kernel.let(node, f"tl.where({condition}, {yes}, {no})")


@emits(aten.masked_fill.Scalar)
def masked_fill(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x, mask, fill = node.args
    condition = operand(kernel, mask, index, len(index), torch.bool)
    kept = operand(kernel, x, index, len(index), dtype_of(node))
    return kernel.let(node, f"tl.where({condition}, {kernel.argument(fill, index, len(index))}, {kept})")


@emits(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    low, high = (*node.args[1:], None, None)[:2]
    if node.target is aten.clamp_max.default:
        low, high = None, node.args[1]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    text = operand(kernel, node.args[0], index, len(index), dtype_of(node))
    for bound, function in ((low, "tl.maximum"), (high, "tl.minimum")):
        if bound is not None:
            text = f"{function}({text}, {bound}, propagate_nan=tl.PropagateNan.ALL)"
    return kernel.let(node, text)


@emits(aten.pow.Tensor_Scalar)
def power(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, len(index), dtype_of(node))
    exponent = node.args[1]
    texts = {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 0.5: f"tl.sqrt({x})", -0.5: f"1.0 / tl.sqrt({x})", 1: x}
    if exponent not in texts:
        raise NoKernel(f"power {exponent} has no kernel; 1, 2, 3, 0.5 and -0.5 have")
    return kernel.let(node, texts[exponent])


@emits(aten.gelu.default)
def gelu(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, len(index), dtype_of(node))
    if node.kwargs.get("approximate", "none") == "tanh":
        return kernel.let(node, GELU_TANH.format(x))
    return kernel.let(node, f"0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))")


@emits(aten.tanh.default)
def tanh(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """(1 - e) / (1 + e) with e = exp(-2|x|), and a Taylor polynomial below 1/8, where that would cancel."""
    x = operand(kernel, node.args[0], index, len(index), dtype_of(node))
    decay = kernel.let(node, f"tl.exp(-2.0 * tl.abs({x}))", compute_type(dtype_of(node))).name
    far = f"tl.where({x} < 0, {decay} - 1.0, 1.0 - {decay}) / (1.0 + {decay})"
    square = kernel.let(node, f"{x} * {x}", compute_type(dtype_of(node))).name
    series = (
        f"{x} * (1.0 + {square} * (-1 / 3 + {square} * (2 / 15 + {square} * (-17 / 315 + {square} * (62 / 2835)))))"
    )
    return kernel.let(node, f"tl.where({square} < 0.015625, {series}, {far})")


# --- made from nothing, gathered, joined -----------------------------------------------------------------------


@emits(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    bounds = [size_expr(bound) for bound in node.args]
    start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
    step = bounds[2] if len(bounds) > 2 else sympy.Integer(1)
    place = kernel.index_text(start + index[0] * step)
    return kernel.let(node, f"({place} + 0 * col).to({TL_TYPES[compute_type(dtype_of(node))]})")


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
    text = kernel.argument(fill, index, len(index))
    return kernel.let(node, f"tl.full([1, 1], {text}, {TL_TYPES[compute_type(dtype_of(node))]})")


@emits(aten.embedding.default)
def embedding(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    table, ids = node.args[:2]
    row = kernel.index_from(kernel.value(ids, index[:-1]))
    return kernel.value(table, (row, index[-1]))


@emits(aten.cat.default)
def cat(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """Each lane takes its value from the part that its index falls into; the others are masked off."""
    parts = node.args[0]
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)
    at = index[dim]
    start, result = sympy.Integer(0), ""
    for position, part in enumerate(parts):
        end = start + sizes(part)[dim]
        bounds = []
        if position:
            bounds.append(f"({kernel.index_text(at)} >= {kernel.index_text(start)})")
        if position < len(parts) - 1:
            bounds.append(f"({kernel.index_text(at)} < {kernel.index_text(end)})")
        kernel.condition.append(" & ".join(bounds))
        value = operand(kernel, part, (*index[:dim], at - start, *index[dim + 1 :]), len(index), dtype_of(node))
        condition = kernel.condition.pop()
        result = value if not position else f"tl.where({condition}, {value}, {result})"
        start = end
    return kernel.let(node, result)


# --- reductions over the last axis -----------------------------------------------------------------------------


def reduced_axis(node: fx.Node) -> None:
    x = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    rank = len(sizes(x))
    if [None if dim is None else dim % rank for dim in dims] != [rank - 1]:
        raise NoKernel(f"a reduction over axes {dims} has no kernel; the last axis alone has")


def row_values(kernel: RowKernel, node: fx.Node, x: fx.Node, index: Index) -> str:
    """The whole row of `x` that the element at `index` of `node` reduces or normalizes, in the type to compute in."""
    kernel.whole_row(x)
    reads_row = (*index[: len(sizes(x)) - 1], COL)
    value = kernel.value(x, broadcast_index(sizes(x), reads_row))
    wide = torch.float64 if dtype_of(x) == torch.float64 else torch.float32
    if value.dtype in (wide, *LOW_PRECISION):
        return value.name
    return f"{value.name}.to({TL_TYPES[wide]})"


@emits(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduction(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    reduced_axis(node)
    x = node.args[0]
    if not dtype_of(x).is_floating_point:
        raise NoKernel(f"a reduction of {dtype_of(x)} has no kernel")
    row = row_values(kernel, node, x, index)
    if node.target is aten.mean.dim:
        return kernel.let(node, f"{kernel.reduce('sum', row, '0.0')} / {int(sizes(x)[-1])}")
    how, neutral = {
        aten.sum.dim_IntList: ("sum", "0.0"),
        aten.amax.default: ("max", 'float("-inf")'),
        aten.amin.default: ("min", 'float("inf")'),
    }[node.target]
    return kernel.let(node, kernel.reduce(how, row, neutral))


@emits(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = node.args[0]
    if node.args[1] % len(sizes(x)) != len(sizes(x)) - 1 or index[-1] != COL:
        raise NoKernel("a softmax over another axis than the last has no kernel")
    row = row_values(kernel, node, x, index)
    wide = compute_type(dtype_of(node))
    largest = kernel.reduce("max", row, 'float("-inf")')
    shifted = kernel.let(node, f"{row} - {largest}", wide).name
    exponential = kernel.let(node, f"tl.exp({shifted})", wide).name
    total = kernel.reduce("sum", exponential, "0.0")
    if node.target is aten.log_softmax.int:
        return kernel.let(node, f"{shifted} - tl.log({total})")
    return kernel.let(node, f"{exponential} / {total}")


@emits(effc.rms_norm.default)
def rms_norm(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x, weight, eps = node.args[:3]
    scale_in_fp32 = node.args[3] if len(node.args) > 3 else node.kwargs.get("scale_in_fp32", False)
    row = row_values(kernel, node, x, index)
    wide = torch.float64 if dtype_of(x) == torch.float64 else torch.float32
    mean = f"{kernel.reduce('sum', f'{row} * {row}', '0.0')} / {int(sizes(x)[-1])}"
    scale = kernel.let(node, f"1.0 / tl.sqrt({mean} + {eps!r})", wide).name
    if weight is None:
        return kernel.let(node, f"{row} * {scale}")
    normalized = kernel.let(node, f"{row} * {scale}", wide if scale_in_fp32 else dtype_of(x)).name
    return kernel.let(node, f"{normalized} * {operand(kernel, weight, index[-1:], 1, wide)}")


@emits(aten.layer_norm.default)
def layer_norm(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in fp32, rounded once (as ATen does)."""
    x, shape = node.args[:2]
    weight, bias, eps = (*node.args[2:5], *(None, None, 1e-5)[len(node.args[2:5]) :])
    if len(shape) != 1:
        raise NoKernel("a layer norm over more than the last axis has no kernel")
    row = row_values(kernel, node, x, index)
    wide = torch.float64 if dtype_of(x) == torch.float64 else torch.float32
    count = int(sizes(x)[-1])
    mean = kernel.let(node, f"{kernel.reduce('sum', row, '0.0')} / {count}", wide).name
    centered = kernel.let(node, f"{row} - {mean}", wide).name
    variance = f"{kernel.reduce('sum', f'{centered} * {centered}', '0.0')} / {count}"
    result = kernel.let(node, f"{centered} * (1.0 / tl.sqrt({variance} + {eps!r}))", wide).name
    for parameter, sign in ((weight, "*"), (bias, "+")):
        if parameter is not None:
            result = f"{result} {sign} {operand(kernel, parameter, index[-1:], 1, wide)}"
    return kernel.let(node, result)


REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.softmax.int,
        aten._softmax.default,
        aten.log_softmax.int,
        effc.rms_norm.default,
        aten.layer_norm.default,
    }
)
"""Ops that need whole rows: their kernels run over their input's rows and columns."""


def is_fusible(node: fx.Node) -> bool:
    """Whether a node has an emitter and touches only dtypes that kernels may touch."""
    if node.op != "call_function" or node.target not in EMITTERS or not is_tensor(node):
        return False
    tensors = [node, *(argument for argument in node.all_input_nodes if is_tensor(argument))]
    return all(dtype_of(tensor) in TL_TYPES for tensor in tensors)
