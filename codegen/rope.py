"""Rotary embedding of one tensor, written to a new tensor or straight behind the keys in the cache.

    first' = first * cos - second * sin
    second' = second * cos + first * sin

for each pair (first, second) of a head: halves apart, or neighbours if interleaved. Products round to the dtype that x
and the tables promote to, sums to the dtype of x, as eager does.
"""

from __future__ import annotations

import torch
from sympy import Integer, prod
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from .domain import NoKernel
from .kernel import TL_TYPES, Layout
from .scope import Scope
from .template import Arguments, power_of_two

ROPE = """
@triton.jit
def {{ name }}({{ header }}):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    head = row % {{ heads }}
    position = (row // {{ heads }}) % {{ s }}
    batch = row // ({{ heads }} * {{ s }})
    row_mask = row < {{ rows }}
    mask = row_mask{{ " & (pair < " ~ pairs ~ ")" if pairs != block_p }}
    x_row = x_ptr + batch * {{ x[0] }} + head * {{ x[1] }} + position * {{ x[2] }}
    cos_row = cos_ptr + batch * {{ c[0] }} + position * {{ c[1] }}
    sin_row = sin_ptr + batch * {{ sn[0] }} + position * {{ sn[1] }}
#% if cached
    slot = position + tl.load(past_ptr + batch, mask=row_mask, other=0)
#% if ring == 0
    slot = slot % {{ t }}
#% elif ring is not none
    slot = tl.where(slot < {{ ring }}, slot, {{ ring }} + (slot - {{ ring }}) % ({{ t }} - {{ ring }}))
#% endif
    out_row = out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + slot * {{ o[2] }}
#% else
    out_row = out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + position * {{ o[2] }}
#% endif
    first_at = {{ "2 * pair" if interleaved else "pair" }}
    second_at = {{ "2 * pair + 1" if interleaved else "pair + " ~ pairs }}

    first = tl.load(x_row + first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_row + second_at, mask=mask, other=0.0).to(tl.float32)
    first_cos = tl.load(cos_row + first_at, mask=mask, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_row + second_at, mask=mask, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_row + first_at, mask=mask, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_row + second_at, mask=mask, other=0.0).to(tl.float32)

    first_out = {{ r("first * first_cos") }} - {{ r("second * first_sin") }}
    second_out = {{ r("second * second_cos") }} + {{ r("first * second_sin") }}
#% if rounds_sum
    first_out = first_out{{ rounded }}
    second_out = second_out{{ rounded }}
#% endif

    tl.store(out_row + first_at, first_out.to({{ out_type }}), mask=mask)
    tl.store(out_row + second_at, second_out.to({{ out_type }}), mask=mask)
#% if rest
    rest_at = {{ 2 * pairs }} + tl.arange(0, BLOCK_REST)[None, :]
    rest_mask = row_mask & (rest_at < {{ 2 * pairs + rest }})
    rest = tl.load(x_row + rest_at, mask=rest_mask, other=0.0)
    tl.store(out_row + rest_at, rest.to({{ out_type }}), mask=rest_mask)
#% endif
"""


def lower(
    scope: Scope, node: fx.Node, cache: Layout | None = None, past: Layout | None = None, ring: int | None = None
) -> None:
    """Launch for an `effc.rope` node; with `cache` and `past` (and `ring`), for the `effc.kv_write` of its result."""
    x, cos, sin = node.args[:3]
    interleaved = node.args[3] if len(node.args) > 3 else node.kwargs.get("interleaved", False)
    batch, heads, length, size = sizes(x)
    if dtype_of(x) not in (torch.float32, torch.bfloat16, torch.float16):
        raise NoKernel(f"rope of {dtype_of(x)} has no kernel")
    if not (heads.is_Integer and size.is_Integer):
        raise NoKernel("heads and head size of rope must be known when compiling")
    layouts = [scope.rows(operand) for operand in (x, cos, sin)]
    out = cache if cache is not None else scope.result(node)
    arguments = Arguments()
    for name, layout in zip(("x_ptr", "cos_ptr", "sin_ptr"), layouts):
        arguments.pointer(name, layout)
    if past is not None:
        arguments.pointer("past_ptr", past)
    arguments.pointer("out_ptr", out)

    def strides(name: str, layout: Layout, count: int) -> list[str]:
        broadcast = [Integer(0) if size == 1 else stride for size, stride in zip(layout.sizes[:count], layout.strides)]
        return [arguments.size(f"{name}_stride_{axis}", stride) for axis, stride in enumerate(broadcast)]

    pairs = int(sizes(cos)[-1]) // 2
    rest = int(size) - 2 * pairs
    rows = prod((batch, heads, length))
    block_r = max(1, min(16, 1024 // power_of_two(pairs)))
    arguments.constant("BLOCK_R", block_r)
    arguments.constant("BLOCK_P", power_of_two(pairs))
    if rest:
        arguments.constant("BLOCK_REST", power_of_two(rest))
    product = torch.promote_types(dtype_of(x), dtype_of(cos))
    if dtype_of(cos) != dtype_of(sin) or product not in (dtype_of(x), torch.float32):
        raise NoKernel(f"rope of {dtype_of(x)} by {dtype_of(cos)} and {dtype_of(sin)} has no kernel")
    low = TL_TYPES[product] if product != torch.float32 else None
    rounded = f".to({TL_TYPES[dtype_of(x)]}).to(tl.float32)"
    rounds_sum = dtype_of(x) != torch.float32 and out.buffer.dtype != dtype_of(x)
    values = {
        "heads": int(heads),
        "s": arguments.size("S", length),
        "rows": arguments.size("rows", rows),
        "x": strides("x", layouts[0], 3),
        "c": strides("cos", layouts[1], 2),
        "sn": strides("sin", layouts[2], 2),
        "o": [arguments.size(f"out_stride_{axis}", stride) for axis, stride in enumerate(out.strides[:3])],
    }
    if ring is not None:
        values["t"] = arguments.size("T", out.sizes[2])
    scope.add(
        arguments.launch(
            "rope_to_cache" if cache is not None else "rope",
            ROPE,
            (FloorDiv(rows + block_r - 1, block_r), Integer(1), Integer(1)),
            (node.name,),
            writes=(out.buffer,),
            cached=cache is not None,
            ring=ring,
            interleaved=interleaved,
            pairs=pairs,
            block_p=power_of_two(pairs),
            rest=rest,
            rounds_sum=rounds_sum,
            rounded=rounded,
            out_type=TL_TYPES[out.buffer.dtype],
            r=lambda product: f"({product}).to({low}).to(tl.float32)" if low else product,
            **values,
        )
    )
