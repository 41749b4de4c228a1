"""The values of quantized weights inside of pointwise kernels: an embedding reads only the rows that it needs."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from ..compiler.formats import Format, find
from ..compiler.graph import dtype_of
from .domain import NoKernel
from .kernel import TL_TYPES, PackedWords
from .pointwise import RowKernel, Value
from .pointwise_ops import compute_type, emits
from .views import Index

effc = torch.ops.effc


@emits(effc.dequantize.default)
def dequantize(kernel: RowKernel, node: fx.Node, index: Index) -> Value:
    """scale * (code - zero) + min, in the order of `Format.dequantize`."""
    format = find(node.args[1])
    parts = dict(zip(format.part_names, node.args[0]))
    for name, part in parts.items():
        if dtype_of(part) not in TL_TYPES:
            raise NoKernel(f"{name} of {format.name} are {dtype_of(part)}, which has no kernel")

    def at(name: str, run: int | None) -> str:
        """The part's value for this weight, in fp32; `run` weights share it."""
        column = index[-1] * 0 if run is None else FloorDiv(index[-1], run)
        value = kernel.value(parts[name], (*index[:-1], column))
        return value.name if value.dtype.is_floating_point else f"{value.name}.to(tl.float32)"

    scale = at("scales", format.group)
    if format.super_block:
        scale = kernel.assign("scale", f"{at('super', format.super_block)} * {scale}")
    value = f"{scale} * {level(kernel, format, code_of(kernel, format, parts, index))}"
    if format.super_block and format.asymmetric:
        value += f" - {at('super_min', format.super_block)} * {at('mins', format.group)}"
    elif format.asymmetric:
        value += f" + {at('mins', format.group)}"
    dtype = dtype_of(node)
    wide = compute_type(dtype)
    return kernel.let(node, value if wide == torch.float32 else f"({value}).to({TL_TYPES[wide]})")


def code_of(kernel: RowKernel, format: Format, parts: dict[str, fx.Node], index: Index) -> str:
    """The variable with the code, an integer put together from its planes."""
    codes, shift = [], 0
    for name, width in zip(("codes", "high"), format.planes):
        layout = kernel.layout_of(parts[name])
        if isinstance(layout, PackedWords):
            at, lowest = layout.place(index[-1])
        else:
            at, lowest = FloorDiv(index[-1], 8 // width), Mod(index[-1], 8 // width) * width
        byte = kernel.value(parts[name], (*index[:-1], at)).name
        if width == 8:
            return byte
        code = kernel.assign("code", f"{byte}.to(tl.int32) >> ({kernel.index_text(lowest)}) & {(1 << width) - 1}")
        codes.append(f"({code} << {shift})" if shift else code)
        shift += width
    return codes[0] if len(codes) == 1 else kernel.assign("code", " | ".join(codes))


def level(kernel: RowKernel, format: Format, code: str) -> str:
    """What the scale multiplies, fp32: the code less its zero, or the value that it indexes."""
    if format.book is None:
        return f"({code} - {format.zero}).to(tl.float32)" if format.zero else f"{code}.to(tl.float32)"
    value = str(format.book[-1])
    for place, entry in reversed([*enumerate(format.book[:-1])]):
        value = f"tl.where({code} == {place}, {entry}, {value})"
    return value
