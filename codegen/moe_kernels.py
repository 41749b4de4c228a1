"""Kernels of a mixture of experts, as templates; `moe.py` fills them in.

One token: a program of `UP_OF_TOKEN` multiplies rows of one chosen expert's first weights with the token, having chosen
for itself where there is a router; one of `DOWN_OF_TOKEN` takes rows of the second weights of each expert in turn, and
sums.

Many tokens: `DISPATCH` sorts the pairs of token and expert by expert, and deals them out in tiles of BLOCK_M pairs of
one expert; the products run over tiles (Gale et al., 2023, without padding). Expert e has the tiles from
first_pair[e] // BLOCK_M + e on: enough for all its pairs, since each expert before it leaves at most one tile unfilled.
So the grid, pairs // BLOCK_M + E tiles, depends on no data; tiles without pairs read no weights.

Weights are read by strides: of a panel's columns and depth, or of rows wherever they lie.
"""

from __future__ import annotations

from textwrap import indent

DISPATCH = """
@triton.jit
def {{ name }}({{ header }}):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK_P)

    before = tl.zeros([BLOCK_P], tl.int32)
    mine = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, {{ pairs }}, BLOCK_P):
        chosen = tl.load(experts_ptr + first + lane, mask=first + lane < {{ pairs }}, other={{ experts }})
        before += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
    begin = tl.sum(before, axis=0)
    end = begin + tl.sum(mine, axis=0)
    tl.store(bounds_ptr + expert, begin)
    tl.store(bounds_ptr + {{ experts }} + expert, end)

    place = begin
    for first in range(0, {{ pairs }}, BLOCK_P):
        chosen = tl.load(experts_ptr + first + lane, mask=first + lane < {{ pairs }}, other={{ experts }})
        taken = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(taken, axis=0) - 1, first + lane, mask=taken != 0)
        place += tl.sum(taken, axis=0)

    last_tile = tl.where(expert == {{ experts - 1 }}, {{ tiles }}, end // BLOCK_M + expert + 1)
    for tile in range(begin // BLOCK_M + expert, last_tile):
        tl.store(expert_of_tile_ptr + tile, expert)
"""

TILED = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    tile = tl.program_id(1)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of_tile_ptr + tile)
    begin = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + {{ experts }} + expert)
    first = begin + (tile - begin // BLOCK_M - expert) * BLOCK_M
    place = first + tl.arange(0, BLOCK_M)
    in_tile = place < end
    pair = tl.load(order_ptr + place, mask=in_tile, other=0).to(tl.int64)
    x_rows = x_ptr + {{ x_row }}[:, None] * {{ x_stride }}
    depth = tl.where(first < end, {{ k }}, 0)
#% for part in parts
    {{ part.weight }} = weight_ptr + expert.to(tl.int64) * {{ expert_stride }}
        {{- " + panel.to(tl.int64) * " ~ panel_stride }}{{ " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
#% endfor

    for k in range(0, depth, BLOCK_K):
        x = tl.load(x_rows + (k + inner)[None, :], mask=in_tile[:, None]
            {{- " & ((k + inner)[None, :] < " ~ k ~ ")" if masks_k }}, other=0.0)
#% for part in parts
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None]{{ by_depth }} + col[None, :]{{ by_row }}
            {{- ", mask=" ~ weight_mask ~ ", other=0.0" if weight_mask }})
        {{ part.acc }} = tl.dot(x, {{ part.tile }}, {{ part.acc }}, input_precision="ieee")
#% endfor

    out_col = panel * BLOCK_N + col[None, :]
{{ epilogue }}
    out = out_ptr + {{ out_row }}[:, None] * {{ n }} + out_col
    tl.store(out, {{ result }}, mask=in_tile[:, None]{{ " & (out_col < " ~ n ~ ")" if masks_n }})
"""

VECTOR = """
#% for part in parts
    {{ part.weight }} = weight_ptr + expert * {{ expert_stride }}
        {{- " + panel.to(tl.int64) * " ~ panel_stride }}{{ " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_N], tl.float32)
#% endfor
    for k in range(0, {{ k }}, BLOCK_K):
#% if masks_k
        in_k = k + inner < {{ k }}
#% endif
        x = tl.load(x_row + k + inner{{ ", mask=in_k, other=0.0" if masks_k }}).to(tl.float32)
#% for line in normalize
        {{ line }}
#% endfor
#% for part in parts
#% if by_columns
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None]{{ by_depth }} + col[None, :]{{ by_row }}
            {{- ", mask=" ~ weight_mask ~ ", other=0.0" if weight_mask }}).to(tl.float32)
        {{ part.acc }} += tl.sum(x[:, None] * {{ part.tile }}, axis=0)
#% else
        {{ part.tile }} = tl.load({{ part.weight }} + col[:, None]{{ by_row }} + (k + inner)[None, :]{{ by_depth }}
            {{- ", mask=" ~ weight_mask ~ ", other=0.0" if weight_mask }}).to(tl.float32)
        {{ part.acc }} += tl.sum({{ part.tile }} * x[None, :], axis=1)
#% endif
#% endfor
"""
"""The product of the vector at `x_row` with a panel of the weights of `expert`."""

UP_OF_TOKEN = (
    """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    pair = tl.program_id(1)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    out_col = panel * BLOCK_N + col
#% if choice
{{ choice }}
    expert = tl.sum(tl.where(slot == pair, experts, 0), axis=0).to(tl.int64)
    tl.store(experts_ptr + slot, experts{{ first }})
    tl.store(scores_ptr + slot, scores{{ first }})
#% else
    expert = tl.load(experts_ptr + pair).to(tl.int64)
#% endif
    x_row = x_ptr
#% for line in statistics
    {{ line }}
#% endfor
"""
    + VECTOR
    + """
{{ epilogue }}
    tl.store(out_ptr + pair * {{ n }} + out_col, {{ result }}{{ ", mask=out_col < " ~ n if masks_n }})
"""
)

DOWN_OF_TOKEN = (
    """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    out_col = panel * BLOCK_N + col

    total = tl.zeros([BLOCK_N], tl.float32)
    for pair in range(0, {{ per_token }}):
        expert = tl.load(experts_ptr + pair).to(tl.int64)
        x_row = x_ptr + pair * {{ k }}
"""
    + indent(VECTOR.lstrip("\n"), "    ", lambda line: not line.startswith("#%"))
    + """
{{ epilogue }}
        score = tl.load(scores_ptr + pair).to(tl.float32)
        total += {{ weighted }}

    y = {{ total }}
#% if residual
    y += tl.load(residual_ptr + out_col{{ ", mask=out_col < " ~ n ~ ", other=0.0" if masks_n }}).to(tl.float32)
#% endif
    tl.store(out_ptr + out_col, {{ result }}{{ ", mask=out_col < " ~ n if masks_n }})
"""
)

COMBINE = """
@triton.jit
def {{ name }}({{ header }}):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    total = tl.zeros([BLOCK_D], tl.float32)
    for k in range(0, {{ per_token }}):
        score = tl.load(scores_ptr + token * {{ per_token }} + k).to(tl.float32)
        y = tl.load(y_ptr + (token * {{ per_token }} + k) * {{ d }} + col, mask=col < {{ d }}, other=0.0).to(tl.float32)
        total += {{ weighted }}

    y = {{ total }}
#% if residual
    y += tl.load(residual_ptr + token * {{ d }} + col, mask=col < {{ d }}, other=0.0).to(tl.float32)
#% endif
    tl.store(out_ptr + token * {{ d }} + col, {{ result }}, mask=col < {{ d }})
"""
