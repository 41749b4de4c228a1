"""Attention: a tiled kernel for many queries, and a split-K pair of kernels for one query per row.

Both run the online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022): keys are read in
blocks, and only the running maximum, the running sum and the weighted sum of values are kept. Keys behind the last
visible one are never read. Query heads that share a key/value head (GQA) are processed together while decoding
(Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from .kernel import TL_TYPES, Launch, Layout, contiguous_strides
from .pointwise import NoKernel
from .scope import Scope
from .target import Target
from .template import Arguments, power_of_two

ONE = sympy.Integer(1)

TILED = """
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
    last_key = past + tl.minimum(tl.program_id(1) * BLOCK_M + BLOCK_M, {{ s }})
#% elif causal
    last_key = tl.minimum(tl.minimum(tl.program_id(1) * BLOCK_M + BLOCK_M, {{ s }}), {{ t }})
#% else
    last_key = {{ t }}
#% endif

    q = tl.load(q_tile, mask={{ q_mask }}, other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    for first in range(0, last_key, BLOCK_N):
        at = first + key
        k = tl.load(k_head + at[None, :].to(tl.int64) * {{ k[2] }} + dim[:, None], mask={{ k_mask }}, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * {{ scale }}
#% if mask == "float"
        bias = tl.load(
            mask_rows + at[None, :] * {{ mk[3] }},
            mask=(row[:, None] < {{ s }}) & (at[None, :] < last_key), other=0.0,
        )
        scores += bias.to(tl.float32)
#% endif
        visible = at[None, :] < last_key
#% if cached
        visible = visible & (at[None, :] <= past + row[:, None])
#% elif causal
        visible = visible & (at[None, :] <= row[:, None])
#% endif
#% if key_mask
        shown = tl.load(key_mask_ptr + batch * {{ km[0] }} + at * {{ km[1] }}, mask=at < last_key, other=0)
        visible = visible & (shown != 0)[None, :]
#% endif
#% if mask == "bool"
        shown_pairs = tl.load(
            mask_rows + at[None, :] * {{ mk[3] }},
            mask=(row[:, None] < {{ s }}) & (at[None, :] < last_key), other=0,
        )
        visible = visible & (shown_pairs != 0)
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

    out = tl.where(total[:, None] == 0.0, 0.0, out / total[:, None])
    out_tile = out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + row[:, None].to(tl.int64) * {{ o[2] }}
    tl.store(out_tile + value_dim[None, :], out.to({{ out_type }}), mask={{ out_mask }})
"""

SPLIT = """
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
    length = tl.load(past_ptr + batch).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(length, {{ splits }}), BLOCK_N) * BLOCK_N
    last_key = tl.minimum(split * share + share, length)

    q = tl.load(q_ptr + batch * {{ q[0] }} + head[:, None] * {{ q[1] }} + dim[None, :], mask={{ q_mask }}, other=0.0)
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    out = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)

    for first in range(split * share, last_key, BLOCK_N):
        at = first + key
        k = tl.load(k_head + at[None, :].to(tl.int64) * {{ k[2] }} + dim[:, None], mask={{ k_mask }}, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * {{ scale }}
        visible = at < last_key
#% if key_mask
        visible = visible & (tl.load(key_mask_ptr + batch * {{ km[0] }} + at * {{ km[1] }}, mask=visible, other=0) != 0)
#% endif
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_head + at[:, None].to(tl.int64) * {{ v[2] }} + value_dim[None, :], mask={{ v_mask }}, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        largest = new_largest

    in_group = member < {{ ratio }}
    place = (batch * {{ heads }} + head) * {{ splits }} + split
    tl.store(largest_ptr + place, largest, mask=in_group)
    tl.store(total_ptr + place, total, mask=in_group)
    tl.store(
        partial_ptr + place[:, None] * {{ value_size }} + value_dim[None, :], out,
        mask=in_group[:, None]{{ " & (value_dim < " ~ value_size ~ ")[None, :]" if masks_v }},
    )
"""

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
    share = tl.exp2(largest - tl.where(shift == float("-inf"), 0.0, shift))
    weight = tl.sum(total * share, axis=0)
    out = tl.sum(partial * share[:, None], axis=0)
    out = tl.where(weight == 0.0, 0.0, out / weight)

    tl.store(
        out_ptr + batch * {{ o[0] }} + head * {{ o[1] }} + value_dim, out.to({{ out_type }})
        {{- ", mask=value_dim < " ~ value_size if masks_v }}
    )
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def output_layout(scope: Scope, node: fx.Node) -> Layout:
    """The result [B, H, S, D] laid out as [B, S, H, D], so that merging the heads of a token is a view."""
    batch, heads, length, size = sizes(node)
    out = scope.result(node, (batch, length, heads, size))
    order = (0, 2, 1, 3)
    return Layout(out.buffer, out.offset, tuple(out.sizes[i] for i in order), tuple(out.strides[i] for i in order))


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one `effc.attention` or `effc.cached_attention`."""
    cached = node.target is torch.ops.effc.cached_attention.default
    names = (
        ("q", "k", "v", "past", "scale", "key_mask")
        if cached
        else ("q", "k", "v", "scale", "causal", "key_mask", "mask")
    )
    operands = {**dict.fromkeys(names), **dict(zip(names, node.args)), **node.kwargs}
    for name in ("window", "softcap", "visible", "bias", "sinks"):
        if operands.get(name) is not None:
            raise NoKernel(f"attention with {name} has no kernel")
    q, k, v = (operands[name] for name in "qkv")
    if not {dtype_of(x) for x in (q, k, v)} <= set(DTYPES) or dtype_of(q) != dtype_of(k):
        raise NoKernel(f"attention of {dtype_of(q)} over {dtype_of(k)} has no kernel")
    if not all(sizes(x)[axis].is_Integer for x in (q, k, v) for axis in (1, 3)):
        raise NoKernel("heads and head sizes of attention must be known when compiling")
    layouts = {name: scope.rows(operands[name]) for name in "qkv"}
    for name in ("past", "key_mask", "mask"):
        if operands.get(name) is not None:
            layouts[name] = scope.layout(operands[name])
    out = output_layout(scope, node)
    scope.layouts[node] = out
    if cached and sizes(q)[2] == 1:
        lower_split(scope, node, operands, layouts, out)
    else:
        scope.add(tiled(scope, node, operands, layouts, out, cached))


def shared_values(
    arguments: Arguments, operands: dict, layouts: dict[str, Layout], out: Layout, target: Target
) -> dict:
    """Template values that both kernels use: strides, sizes, masks of ragged head sizes, the scale in base 2."""
    q, k, v = (operands[name] for name in "qkv")
    heads, groups = int(sizes(q)[1]), int(sizes(k)[1])
    size, value_size = int(sizes(q)[3]), int(sizes(v)[3])

    def strides(name: str, layout: Layout) -> list[str]:
        return [arguments.size(f"{name}_stride_{axis}", stride) for axis, stride in zip("bhs", layout.strides)]

    return {
        "heads": heads,
        "groups": groups,
        "ratio": heads // groups,
        "size": size,
        "value_size": value_size,
        "masks_v": value_size != head_block(value_size, target),
        "exp": "tl.exp2",
        "scale": repr(float(operands["scale"]) * math.log2(math.e)),
        "q": strides("q", layouts["q"]),
        "k": strides("k", layouts["k"]),
        "v": strides("v", layouts["v"]),
        "o": strides("out", out),
        "out_type": TL_TYPES[out.buffer.dtype],
    }


def head_block(size: int, target: Target) -> int:
    """Lanes that hold one head: a power of two, and no fewer than `tl.dot` takes."""
    return max(power_of_two(size), target.min_dot_size)


def ragged(condition: str, dim: str, size: int, axis: str, target: Target) -> str:
    """A mask over keys or rows, with the padding lanes of a head size that does not fill its block."""
    return condition if size == head_block(size, target) else f"{condition} & ({dim} < {size}){axis}"


def tiled(scope: Scope, node: fx.Node, operands: dict, layouts: dict, out: Layout, cached: bool) -> Launch:
    target, arguments = scope.target, Arguments()
    for name in ("q", "k", "v", "past", "key_mask", "mask"):
        if name in layouts:
            arguments.pointer(f"{name}_ptr", layouts[name])
    arguments.pointer("out_ptr", out)
    values = shared_values(arguments, operands, layouts, out, target)
    s, t = arguments.size("S", sizes(operands["q"])[2]), arguments.size("T", sizes(operands["k"])[2])
    if "key_mask" in layouts:
        values["km"] = [arguments.size(f"key_mask_stride_{i}", x) for i, x in enumerate(layouts["key_mask"].strides)]
    kind = None
    if "mask" in layouts:
        mask = layouts["mask"]
        kind = "bool" if mask.buffer.dtype == torch.bool else "float"
        broadcast = [0 if size == 1 else stride for size, stride in zip(mask.sizes, mask.strides)]
        broadcast = [0] * (4 - len(broadcast)) + broadcast
        if kind == "float":  # scores in base 2 would overflow at the most negative number, which hides keys
            values["scale"], values["exp"] = repr(float(operands["scale"])), "tl.exp"
        values["mk"] = [arguments.size(f"mask_stride_{i}", x) for i, x in enumerate(broadcast)]
    block_m, block_n = target.attention
    size, value_size = values["size"], values["value_size"]
    for name, value in (("BLOCK_M", block_m), ("BLOCK_N", block_n)):
        arguments.constant(name, value)
    arguments.constant("BLOCK_D", head_block(size, target))
    arguments.constant("BLOCK_V", head_block(value_size, target))
    batch, heads, length = sizes(operands["q"])[:3]
    return arguments.launch(
        "cached_attention" if cached else "attention",
        TILED,
        (batch * heads, FloorDiv(length + block_m - 1, block_m), ONE),
        (node.name,),
        cached=cached,
        causal=bool(operands.get("causal")),
        s=s,
        t=t,
        mask=kind,
        key_mask="key_mask" in layouts,
        q_mask=ragged(f"(row[:, None] < {s})", "dim", size, "[None, :]", target),
        k_mask=ragged("(at[None, :] < last_key)", "dim", size, "[:, None]", target),
        v_mask=ragged("(at[:, None] < last_key)", "value_dim", value_size, "[None, :]", target),
        out_mask=ragged(f"(row[:, None] < {s})", "value_dim", value_size, "[None, :]", target),
        **values,
    )


def lower_split(scope: Scope, node: fx.Node, operands: dict, layouts: dict, out: Layout) -> None:
    target = scope.target
    splits = target.splits
    batch, heads = sizes(operands["q"])[:2]
    value_size = sizes(operands["v"])[3]
    per_split = batch * heads * splits
    scratch = {
        name: Layout(buffer, sympy.Integer(0), shape, contiguous_strides(shape))
        for name, shape in (("largest", (per_split,)), ("total", (per_split,)), ("partial", (per_split, value_size)))
        for buffer in (scope.temporary(f"{node.name}_{name}", sympy.prod(shape), torch.float32),)
    }
    arguments = Arguments()
    for name in ("q", "k", "v", "past", "key_mask"):
        if name in layouts:
            arguments.pointer(f"{name}_ptr", layouts[name])
    for name, layout in scratch.items():
        arguments.pointer(f"{name}_ptr", layout)
    values = shared_values(arguments, operands, layouts, out, target)
    if "key_mask" in layouts:
        values["km"] = [arguments.size(f"key_mask_stride_{i}", x) for i, x in enumerate(layouts["key_mask"].strides)]
    size = values["size"]
    block_h = max(power_of_two(values["ratio"]), target.min_dot_size)
    arguments.constant("BLOCK_H", block_h)
    arguments.constant("BLOCK_N", target.decode_keys)
    arguments.constant("BLOCK_D", head_block(size, target))
    arguments.constant("BLOCK_V", head_block(int(value_size), target))
    scope.add(
        arguments.launch(
            "decode_attention",
            SPLIT,
            (batch * values["groups"], sympy.Integer(splits), ONE),
            (node.name,),
            splits=splits,
            key_mask="key_mask" in layouts,
            q_mask=ragged(f"(member[:, None] < {values['ratio']})", "dim", size, "[None, :]", target),
            k_mask=ragged("(at[None, :] < last_key)", "dim", size, "[:, None]", target),
            v_mask=ragged("(at[:, None] < last_key)", "value_dim", int(value_size), "[None, :]", target),
            **values,
        )
    )
    arguments = Arguments()
    for name, layout in scratch.items():
        arguments.pointer(f"{name}_ptr", layout)
    arguments.pointer("out_ptr", out)
    values["o"] = [arguments.size(f"out_stride_{axis}", stride) for axis, stride in zip("bhs", out.strides)]
    arguments.constant("BLOCK_V", head_block(int(value_size), target))
    scope.add(
        arguments.launch("combine_splits", COMBINE, (batch * heads, ONE, ONE), (node.name,), splits=splits, **values)
    )
