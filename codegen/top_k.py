"""The places of the k largest entries of each row, one after the other, in one tile of whole rows."""

from __future__ import annotations

from sympy import Integer
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from .domain import NoKernel
from .linear import DTYPES, flat_rows
from .scope import Scope
from .template import Arguments, power_of_two

ORDER = """
    # Integers in the order of the floats: negative ones run backwards, NaN comes last.
    bits = tl.where(VALUE == 0.0, 0.0, VALUE.to(tl.float32)).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(VALUE != VALUE, 0x7FFFFFFF, order)
"""
"""`order` of VALUE, floats; -0x80000000 comes before all."""

TOP_K = (
    """
@triton.jit
def {{ name }}({{ header }}):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    in_rows = row < {{ rows }}

    x = tl.load(x_ptr + row[:, None] * {{ x_stride }} + col[None, :], mask=in_rows[:, None] & {{ in_cols }}, other=0.0)
"""
    + ORDER.replace("VALUE", "x")
    + """
    order = tl.where({{ in_cols }}, order, -0x80000000)
    for k in range(0, {{ k }}):
        largest = tl.max(order, axis=1)
        place = tl.min(tl.where(order == largest[:, None], col[None, :], BLOCK_C), axis=1)
        tl.store(out_ptr + row * {{ k }} + k, place.to(tl.int64), mask=in_rows)
        order = tl.where(col[None, :] == place[:, None], -0x80000000, order)
"""
)

MOST_ENTRIES = 4096
"""The longest row that top_k holds in one tile."""


def lower(scope: Scope, node: fx.Node) -> None:
    """The launch of one `effc.top_k`."""
    x, k = node.args
    if dtype_of(x) not in DTYPES:
        raise NoKernel(f"top_k of {dtype_of(x)} has no kernel")
    count = sizes(x)[-1]
    if not count.is_Integer:
        raise NoKernel("the number of entries that top_k chooses from must be known when compiling")
    if count > MOST_ENTRIES:
        raise NoKernel(f"top_k of {count} entries has no kernel; up to {MOST_ENTRIES} have")
    matrix, out = flat_rows(scope, x), scope.result(node)
    block_c = power_of_two(int(count))
    block_r = max(1, min(16, 1024 // block_c))
    arguments = Arguments()
    arguments.pointer("x_ptr", matrix)
    arguments.pointer("out_ptr", out)
    values = {
        "rows": arguments.size("rows", matrix.sizes[0]),
        "x_stride": arguments.size("x_stride", matrix.strides[0]),
    }
    arguments.constant("BLOCK_R", block_r)
    arguments.constant("BLOCK_C", block_c)
    grid = (FloorDiv(matrix.sizes[0] + block_r - 1, block_r), Integer(1), Integer(1))
    in_cols = f"(col[None, :] < {count})"
    scope.add(arguments.launch("top_k", TOP_K, grid, (node.name,), k=k, in_cols=in_cols, **values))
