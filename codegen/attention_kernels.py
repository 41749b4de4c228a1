"""The text of the attention kernels: tiles of queries, and one query per row with its keys split among programs.

Both run the online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022): keys are read in
blocks, from the first visible one to the last, and only the running maximum, the running sum and the weighted sum of
values are kept. A sink is a key that has been seen before the first block, with a value of zero.
"""

from __future__ import annotations

from .pointwise_ops import TANH_NEAR

KEY_RANGE = """\
#% for line in lines_before
    {{ line }}
#% endfor
#% for line in range_lines
    {{ line }}
#% endfor
    first_key = {{ first_key }}
    last_key = {{ last_key }}
#% if kept
    skipped = tl.maximum(first_key - {{ kept }}, 0)
#% endif
"""
"""The slots that hold keys which a program's queries can see: from first_key to last_key, which is not one of them.

With {{ kept }} > 0 the first {{ kept }} slots are among them too, and `skipped` lie between.
"""

KEY_BLOCKS = (
    """
    for start in range({{ loop[0] }}, {{ loop[1] }}, BLOCK_N):
#% if kept
        at = start + tl.where(start < {{ kept }}, 0, skipped) + key
#% else
        at = start + key
#% endif
#% if ring is not none
        k_at = last_at - (last_at - at) % ({{ t }} - {{ ring }})
#% if ring
        k_at = tl.where(at < {{ ring }}, at, k_at)
#% endif
#% endif
        k = tl.load(k_head + at[None, :].to(tl.int64) * {{ k[2] }} + dim[:, None], mask={{ k_mask }}, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * {{ scale }}
#% if softcap
        square = scores * scores
        near = """
    + TANH_NEAR.format(x="scores", square="square")
    + """
        fade = tl.exp(-2.0 * tl.abs(scores))
        far = tl.where(scores < 0, fade - 1.0, 1.0 - fade) / (1.0 + fade)
        scores = tl.where(square < 0.390625, near, far) * {{ softcap }}
#% endif
#% for line in lines
        {{ line }}
#% endfor
#% if bias
        scores += {{ bias }}
#% endif
#% if mask == "float"
        added = tl.load(
            mask_rows + at[None, :] * {{ mk[3] }},
            mask=(row[:, None] < {{ s }}) & (at[None, :] < last_key), other=0.0,
        )
        scores += added.to(tl.float32)
#% endif
        visible = at[None, :] < last_key
#% if tiled and causal
        visible = visible & ({{ k_at }}[None, :] <= q_at[:, None])
#% endif
#% if tiled and window
        visible = visible & ({{ k_at }}[None, :] > q_at[:, None] - {{ window }})
#% elif window and (kept or ring is not none)
        visible = visible & ({{ k_at }}[None, :] > q_at - {{ window }})
#% endif
#% if condition
        visible = visible & {{ condition }}
#% endif
#% if key_mask
        shown = tl.load(key_mask_ptr + batch * {{ km[0] }} + at * {{ km[1] }}, mask=at < last_key, other=0) != 0
        visible = visible & shown[None, :]
#% endif
#% if mask == "bool"
        allowed = tl.load(
            mask_rows + at[None, :] * {{ mk[3] }},
            mask=(row[:, None] < {{ s }}) & (at[None, :] < last_key), other=0,
        )
        visible = visible & (allowed != 0)
#% endif
        scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = {{ exp }}(scores - shift[:, None])
        decay = {{ exp }}(largest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_head + at[:, None].to(tl.int64) * {{ v[2] }} + value_dim[None, :], mask={{ v_mask }}, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        largest = new_largest
"""
)
"""The loop over keys, which does not count those skipped. Defined before it: q, its position q_at, the range of keys,
largest, total and out.

`k_at` is the position of a slot's key; in a ring, whose slots from {{ ring }} on are used in turn, that is the last one
up to last_at, the last position written, that fell there.
"""

TILED = (
    """
@triton.jit
def {{ name }}({{ header }}):
    head = tl.program_id(0) % {{ heads }}
    batch = (tl.program_id(0) // {{ heads }}).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    q_tile = q_ptr + batch * {{ q[0] }} + head * {{ q[1] }} + row[:, None].to(tl.int64) * {{ q[2] }} + dim[None, :]
    k_head = k_ptr + batch * {{ k[0] }} + (head // {{ ratio }}) * {{ k[1] }}
    v_head = v_ptr + batch * {{ v[0] }} + (head // {{ ratio }}) * {{ v[1] }}
#% if mask
    mask_rows = mask_ptr + batch * {{ mk[0] }} + head * {{ mk[1] }} + row[:, None].to(tl.int64) * {{ mk[2] }}
#% endif
#% if cached
    past = tl.load(past_ptr + batch).to(tl.int32)
    q_at = past + row
#% else
    q_at = row
#% endif
#% if ring is not none
    last_at = past + {{ s }} - 1
#% endif
"""
    + KEY_RANGE
    + """
    q = tl.load(q_tile, mask={{ q_mask }}, other=0.0)
#% if sinks
    sink = tl.load(sinks_ptr + {{ sink_place }}).to(tl.float32){{ to_base }}
    largest = tl.zeros([BLOCK_M], tl.float32) + sink
    total = tl.full([BLOCK_M], 1.0, tl.float32)
#% else
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
#% endif
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
"""
    + KEY_BLOCKS
    + """
    out = tl.where(total[:, None] == 0.0, 0.0, out / total[:, None])
    out_tile = out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + row[:, None].to(tl.int64) * {{ o[2] }}
    tl.store(out_tile + value_dim[None, :], out.to({{ out_type }}), mask={{ out_mask }})
"""
)

SPLIT = (
    """
@triton.jit
def {{ name }}({{ header }}):
    group = tl.program_id(0) % {{ groups }}
    batch = (tl.program_id(0) // {{ groups }}).to(tl.int64)
    split = tl.program_id(1)
    member = tl.arange(0, BLOCK_H)
    key = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_V)
    head = group * {{ ratio }} + member
    k_head = k_ptr + batch * {{ k[0] }} + group * {{ k[1] }}
    v_head = v_ptr + batch * {{ v[0] }} + group * {{ v[1] }}
    q_at = tl.load(past_ptr + batch).to(tl.int32)
#% if ring is not none
    last_at = q_at
#% endif
"""
    + KEY_RANGE
    + """
#% if kept
    share = tl.cdiv(tl.cdiv(last_key - skipped, {{ splits }}), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, last_key - skipped)
#% else
    share = tl.cdiv(tl.cdiv(last_key - first_key, {{ splits }}), BLOCK_N) * BLOCK_N
    first = first_key + split * share
    last = tl.minimum(first + share, last_key)
#% endif

    q = tl.load(q_ptr + batch * {{ q[0] }} + head[:, None] * {{ q[1] }} + dim[None, :], mask={{ q_mask }}, other=0.0)
#% if sinks
    sink = tl.load(sinks_ptr + {{ sink_place }}, mask=member < {{ ratio }}, other=0.0).to(tl.float32){{ to_base }}
    largest = tl.where(split == 0, sink, float("-inf"))
    total = tl.where(split == 0, tl.full([BLOCK_H], 1.0, tl.float32), 0.0)
#% else
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
#% endif
    out = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
"""
    + KEY_BLOCKS
    + """
    in_group = member < {{ ratio }}
    place = (batch * {{ heads }} + head) * {{ splits }} + split
    tl.store(largest_ptr + place, largest, mask=in_group)
    tl.store(total_ptr + place, total, mask=in_group)
    tl.store(
        partial_ptr + place[:, None] * {{ value_size }} + value_dim[None, :], out,
        mask=in_group[:, None]{{ " & (value_dim < " ~ value_size ~ ")[None, :]" if masks_v }},
    )
"""
)

COMBINE = """
@triton.jit
def {{ name }}({{ header }}):
    head = tl.program_id(0) % {{ heads }}
    batch = (tl.program_id(0) // {{ heads }}).to(tl.int64)
    split = tl.arange(0, {{ splits }})
    value_dim = tl.arange(0, BLOCK_V)
    place = tl.program_id(0).to(tl.int64) * {{ splits }} + split

    largest = tl.load(largest_ptr + place)
    total = tl.load(total_ptr + place)
    partial = tl.load(
        partial_ptr + place[:, None] * {{ value_size }} + value_dim[None, :]
        {{- ", mask=(value_dim < " ~ value_size ~ ")[None, :], other=0.0" if masks_v }}
    )

    shift = tl.max(largest, axis=0)
    share = {{ exp }}(largest - tl.where(shift == float("-inf"), 0.0, shift))
    weight = tl.sum(total * share, axis=0)
    out = tl.sum(partial * share[:, None], axis=0)
    out = tl.where(weight == 0.0, 0.0, out / weight)

    tl.store(
        out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + value_dim, out.to({{ out_type }})
        {{- ", mask=value_dim < " ~ value_size if masks_v }}
    )
"""
