"""What each op computes at an index, as Triton code: one row an op in `pointwise.EMITTERS`.

`SIMPLE` holds the ops whose code is one expression over their operands; the rest have a function each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..compiler.graph import dtype_of, is_tensor
from .domain import NoKernel
from .kernel import TL_TYPES
from .pointwise import EMITTERS, LOW_PRECISION, RowKernel, Value
from .views import Index

aten = torch.ops.aten
effc = torch.ops.effc


def emits(*targets: Any) -> Callable:
    def register(function: Callable[[RowKernel, fx.Node, Index], Value]) -> Callable:
        EMITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype


def operand(kernel: RowKernel, argument: Any, index: Index, dtype: torch.dtype) -> str:
    """Text of an operand in the type that the op computes in."""
    value = kernel.argument(argument, index)
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
    aten.rsub.Tensor: "{1} - {0}",
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
    aten.exp2.default: "tl.exp2({0})",
    aten.log2.default: "tl.log2({0})",
    aten.fmax.default: "tl.maximum({0}, {1})",
    aten.fmin.default: "tl.minimum({0}, {1})",
    aten.clamp_min.Tensor: "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.clamp_max.Tensor: "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.bitwise_not.default: "~{0}",
    aten.bitwise_xor.Tensor: "{0} ^ {1}",
    aten.bitwise_and.Tensor: "{0} & {1}",
    aten.bitwise_or.Tensor: "{0} | {1}",
    aten.__and__.Tensor: "{0} & {1}",
    aten.__or__.Tensor: "{0} | {1}",
    aten.clone.default: "{0}",
    aten.contiguous.default: "{0}",
    aten.lift_fresh_copy.default: "{0}",
}

OF_LIBDEVICE: dict[Any, str] = {
    aten.log1p.default: "log1p",
    aten.log10.default: "log10",
    aten.expm1.default: "expm1",
    aten.tan.default: "tan",
    aten.asin.default: "asin",
    aten.acos.default: "acos",
    aten.atan.default: "atan",
    aten.sinh.default: "sinh",
    aten.cosh.default: "cosh",
    aten.asinh.default: "asinh",
    aten.acosh.default: "acosh",
    aten.atanh.default: "atanh",
    aten.erfc.default: "erfc",
    aten.atan2.default: "atan2",
    aten.copysign.Tensor: "copysign",
    aten.fmod.Tensor: "fmod",
    aten.pow.Tensor_Tensor: "pow",
}
"""Functions that Triton itself lacks; every target has them in its `libdevice`."""

ROUNDING: dict[Any, str] = {
    aten.floor.default: "tl.floor",
    aten.ceil.default: "tl.ceil",
    aten.trunc.default: "libdevice.trunc",
    aten.round.default: "libdevice.rint",
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


OF_BOOLEANS: dict[Any, str] = {aten.add.Tensor: "{0} | {1}", aten.mul.Tensor: "{0} & {1}"}
"""What arithmetic means where all operands are booleans."""


@emits(*SIMPLE)
def simple(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype = dtype_of(node)
    operands = [operand(kernel, argument, index, dtype) for argument in node.args[:2]]
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if alpha != 1:
        scaled = 0 if node.target in (aten.rsub.Scalar, aten.rsub.Tensor) else 1
        operands[scaled] = f"({operands[scaled]} * {alpha})"
    form = OF_BOOLEANS.get(node.target, SIMPLE[node.target]) if dtype == torch.bool else SIMPLE[node.target]
    return kernel.let(node, form.format(*operands))


@emits(*OF_LIBDEVICE)
def of_libdevice(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype = dtype_of(node)
    if not dtype.is_floating_point:
        raise NoKernel(f"{node.target} of {dtype} has no kernel")
    kind = TL_TYPES[compute_type(dtype)]
    operands = [operand(kernel, argument, index, dtype) for argument in node.args[:2]]
    operands = [
        text if is_tensor(argument) else f"tl.full([1, 1], {text}, {kind})"
        for text, argument in zip(operands, node.args)
    ]
    return kernel.let(node, f"libdevice.{OF_LIBDEVICE[node.target]}({', '.join(operands)})")


@emits(*ROUNDING)
def rounding(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, dtype_of(node))
    return (
        kernel.let(node, f"{ROUNDING[node.target]}({x})") if dtype_of(node).is_floating_point else kernel.let(node, x)
    )


@emits(aten.isnan.default)
def isnan(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, dtype_of(node.args[0]))
    return kernel.let(node, f"{x} != {x}")


@emits(aten.sign.default)
def sign(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype = dtype_of(node)
    if dtype in (torch.bool, torch.uint8):
        raise NoKernel(f"the sign of {dtype} has no kernel")
    x, kind = operand(kernel, node.args[0], index, dtype), TL_TYPES[compute_type(dtype)]
    return kernel.let(node, f"({x} > 0).to({kind}) - ({x} < 0).to({kind})")


@emits(aten.clamp.Tensor)
def clamp_between(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    text = operand(kernel, node.args[0], index, dtype_of(node))
    for bound, function in ((low, "tl.maximum"), (high, "tl.minimum")):
        if bound is not None:
            limit = operand(kernel, bound, index, dtype_of(node))
            text = f"{function}({text}, {limit}, propagate_nan=tl.PropagateNan.ALL)"
    return kernel.let(node, text)


@emits(*COMPARISONS)
def comparison(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    dtype = promoted(node)
    left, right = (operand(kernel, rounded(argument, dtype), index, dtype) for argument in node.args[:2])
    return kernel.let(node, f"{left} {COMPARISONS[node.target]} {right}")


def rounded(argument: Any, dtype: torch.dtype) -> Any:
    """A number that is compared with a low-precision tensor, as that tensor's dtype holds it."""
    return torch.tensor(argument, dtype=dtype).item() if isinstance(argument, float) else argument


LOGIC = {aten.logical_and.default: " & ", aten.logical_or.default: " | ", aten.logical_xor.default: " ^ "}


@emits(*LOGIC, aten.logical_not.default)
def logical(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    operands = [operand(kernel, argument, index, torch.bool) for argument in node.args]
    joined = LOGIC.get(node.target)
    return kernel.let(node, joined.join(operands) if joined else f"~{operands[0]}")


@emits(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, torch.ops.prims.convert_element_type.default)
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
    dtype = dtype_of(node)
    condition = operand(kernel, node.args[0], index, torch.bool)
    yes, no = (operand(kernel, argument, index, dtype) for argument in node.args[1:3])
    return kernel.let(node, f"tl.where({condition}, {yes}, {no})")


@emits(aten.masked_fill.Scalar)
def masked_fill(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x, mask, fill = node.args
    condition = operand(kernel, mask, index, torch.bool)
    kept = operand(kernel, x, index, dtype_of(node))
    return kernel.let(node, f"tl.where({condition}, {kernel.argument(fill, index)}, {kept})")


@emits(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    low, high = (*node.args[1:], None, None)[:2]
    if node.target is aten.clamp_max.default:
        low, high = None, node.args[1]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    text = operand(kernel, node.args[0], index, dtype_of(node))
    for bound, function in ((low, "tl.maximum"), (high, "tl.minimum")):
        if bound is not None:
            text = f"{function}({text}, {bound}, propagate_nan=tl.PropagateNan.ALL)"
    return kernel.let(node, text)


@emits(aten.pow.Tensor_Scalar)
def power(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, dtype_of(node))
    exponent = node.args[1]
    texts = {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 0.5: f"tl.sqrt({x})", -0.5: f"1.0 / tl.sqrt({x})", 1: x}
    if exponent not in texts and not dtype_of(node).is_floating_point:
        raise NoKernel(f"power {exponent} of {dtype_of(node)} has no kernel; 1, 2 and 3 have")
    general = f"libdevice.pow({x}, tl.full([1, 1], {exponent}, {TL_TYPES[compute_type(dtype_of(node))]}))"
    return kernel.let(node, texts.get(exponent, general))


@emits(aten.gelu.default)
def gelu(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    x = operand(kernel, node.args[0], index, dtype_of(node))
    if node.kwargs.get("approximate", "none") == "tanh":
        return kernel.let(node, GELU_TANH.format(x))
    return kernel.let(node, f"0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))")


TANH_NEAR = (
    "{x} + {x} * {square} * (-3.33332819422e-1 + {square} * (1.33314422036e-1 + {square} * (-5.37397155531e-2"
    " + {square} * (2.06390887954e-2 + {square} * -5.70498872745e-3))))"
)
"""tanh for |x| < 0.625 to one ulp of fp32 (Cephes, tanhf), where 1 - exp(-2|x|) would cancel."""


@emits(aten.tanh.default)
def tanh(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    if dtype_of(node) == torch.float64:
        raise NoKernel("tanh of float64 has no kernel")
    x = operand(kernel, node.args[0], index, dtype_of(node))
    square = kernel.assign("square", f"{x} * {x}")
    near = kernel.assign("near", TANH_NEAR.format(x=x, square=square))
    decay = kernel.assign("decay", f"tl.exp(-2.0 * tl.abs({x}))")
    far = kernel.assign("far", f"tl.where({x} < 0, {decay} - 1.0, 1.0 - {decay}) / (1.0 + {decay})")
    return kernel.let(node, f"tl.where({square} < 0.390625, {near}, {far})")


def is_fusible(node: fx.Node) -> bool:
    """Whether a node has an emitter and touches only dtypes that kernels may touch."""
    if node.op != "call_function" or node.target not in EMITTERS or not is_tensor(node):
        return False
    tensors = [node, *(argument for argument in node.all_input_nodes if is_tensor(argument))]
    return all(dtype_of(tensor) in TL_TYPES for tensor in tensors)
