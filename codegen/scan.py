"""Running sums along one axis of any length: a tile of rows at a time, what is left of it carried to the next.

program: BLOCK_R rows; out[row, i] = x[row, 0] + ... + x[row, i], BLOCK_C elements after the other
"""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from .domain import NoKernel
from .kernel import TL_TYPES
from .scope import Scope
from .template import Arguments

CUMSUM = """
@triton.jit
def {{ name }}({{ header }}):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    first = {{ first }}
    carried = tl.full([BLOCK_R, 1], 0, {{ wide }})
    for start in range(0, {{ length }}, BLOCK_C):
        place = start + tl.arange(0, BLOCK_C)[None, :]
        mask = (row < {{ rows }}) & (place < {{ length }})
        x = tl.load(x_ptr + first + place * {{ step }}, mask=mask, other=0).to({{ wide }})
        tl.store(out_ptr + first + place * {{ step }}, (carried + tl.cumsum(x, 1)).to({{ narrow }}), mask=mask)
        carried += tl.sum(x, 1)[:, None]
"""

WIDE = {torch.float32: torch.float64, torch.float64: torch.float64, torch.int64: torch.int64, torch.int32: torch.int32}
"""What sums are carried in: fp32's in fp64, as eager's are."""


def lower(scope: Scope, node: fx.Node) -> None:
    """The launch of one `aten.cumsum`."""
    x, shape, dtype = node.args[0], sizes(node), dtype_of(node)
    wide = WIDE.get(dtype, torch.float32 if dtype.is_floating_point else None)
    if not shape or wide is None or dtype_of(x) not in TL_TYPES:
        raise NoKernel(f"a running sum of {dtype_of(x)} {list(shape)} to {dtype} has no kernel")
    if dtype_of(x).is_floating_point and dtype_of(x) != dtype:
        raise NoKernel(f"a running sum of {dtype_of(x)} in {dtype} has no kernel")
    if any(size == 0 for size in shape):
        scope.result(node)
        return
    axis = node.args[1] % len(shape)
    matrix, out = scope.contiguous(x), scope.result(node)
    step = sympy.prod(shape[axis + 1 :])
    rows = sympy.prod(shape[:axis]) * step
    arguments = Arguments()
    arguments.pointer("x_ptr", matrix)
    arguments.pointer("out_ptr", out)
    length, step_text = arguments.size("length", shape[axis]), arguments.size("step", step)
    first = f"row * {length}" if step == 1 else f"row // {step_text} * ({length} * {step_text}) + row % {step_text}"
    block_r, block_c = (1, 256) if step == 1 else (16, 16)
    arguments.constant("BLOCK_R", block_r)
    arguments.constant("BLOCK_C", block_c)
    values = {"rows": arguments.size("rows", rows), "length": length, "step": step_text, "first": first}
    kinds = {"wide": TL_TYPES[wide], "narrow": TL_TYPES[dtype]}
    grid = (FloorDiv(rows + block_r - 1, block_r), sympy.Integer(1), sympy.Integer(1))
    scope.add(arguments.launch("cumsum", CUMSUM, grid, (node.name,), **values, **kinds))
