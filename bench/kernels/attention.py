"""Attention: one query over a cache with grouped heads, and causal prefill; both with the online softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .case import Call, Case, Goal, Step, call, random

SIZE = 64
SCALE = SIZE**-0.5
LOG2_E = 1.4426950408889634
SPLITS = 4


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, largest_ptr, total_ptr, length, capacity, scale: tl.constexpr,
    GROUP: tl.constexpr, HEADS_BLOCK: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A share of the keys of one key/value head, for the GROUP query heads that use it."""
    group = tl.program_id(0)
    split = tl.program_id(1)
    member = tl.arange(0, HEADS_BLOCK)
    head = group * GROUP + member
    dim = tl.arange(0, SIZE)
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    end = tl.minimum(split * share + share, length)
    q = tl.load(q_ptr + head[:, None] * SIZE + dim[None, :], mask=member[:, None] < GROUP, other=0.0)
    largest = tl.full([HEADS_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_BLOCK], tl.float32)
    out = tl.zeros([HEADS_BLOCK, SIZE], tl.float32)
    for first in range(split * share, end, KEYS):
        key = first + tl.arange(0, KEYS)
        row = group * capacity + key
        k = tl.load(k_ptr + row[None, :] * SIZE + dim[:, None], mask=key[None, :] < end, other=0.0)
        scores = tl.where(key[None, :] < end, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + row[:, None] * SIZE + dim[None, :], mask=key[:, None] < end, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        largest = new_largest
    place = head * SPLITS + split
    tl.store(largest_ptr + place, largest, mask=member < GROUP)
    tl.store(total_ptr + place, total, mask=member < GROUP)
    tl.store(partial_ptr + place[:, None] * SIZE + dim[None, :], out, mask=member[:, None] < GROUP)


@triton.jit
def combine_kernel(partial_ptr, largest_ptr, total_ptr, out_ptr, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The splits of one head put together."""
    head = tl.program_id(0)
    dim = tl.arange(0, SIZE)
    place = head * SPLITS + tl.arange(0, SPLITS)
    largest = tl.load(largest_ptr + place)
    share = tl.exp2(largest - tl.max(largest, axis=0))
    weight = tl.sum(tl.load(total_ptr + place) * share, axis=0)
    partial = tl.load(partial_ptr + place[:, None] * SIZE + dim[None, :])
    out = tl.sum(partial * share[:, None], axis=0) / weight
    tl.store(out_ptr + head * SIZE + dim, out.to(out_ptr.dtype.element_ty))


@triton.jit
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, length, scale: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head over the keys that they may see."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) * length * SIZE
    dim = tl.arange(0, SIZE)
    tile = head + row[:, None] * SIZE + dim[None, :]
    q = tl.load(q_ptr + tile, mask=row[:, None] < length, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, SIZE], tl.float32)
    end = tl.minimum(tl.program_id(0) * ROWS + ROWS, length)
    for first in range(0, end, KEYS):
        key = first + tl.arange(0, KEYS)
        k = tl.load(k_ptr + head + key[None, :] * SIZE + dim[:, None], mask=key[None, :] < end, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where((key[None, :] < end) & (key[None, :] <= row[:, None]), scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + head + key[:, None] * SIZE + dim[None, :], mask=key[:, None] < end, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        largest = new_largest
    out = out / total[:, None]
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < length)


def cases() -> list[Case]:
    kinds = ((torch.float32, 1.8, 1.5), (torch.bfloat16, 8.0, 1.5))
    decoding = [decode(length, dtype, goal) for length in (512, 4096) for dtype, goal, _ in kinds]
    return decoding + [prefill(length, dtype, goal) for length in (512, 2048) for dtype, _, goal in kinds]


def decode_calls(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Call]:
    """q: [heads, D], k and v: [groups, T, D]."""
    heads, (groups, length, _) = q.shape[0], k.shape
    ratio = heads // groups
    partial, largest, total = torch.empty(heads, SPLITS, SIZE), torch.empty(heads, SPLITS), torch.empty(heads, SPLITS)
    return [
        call(
            decode_kernel, (groups, SPLITS), q, k, v, partial, largest, total, length, length,
            scale=SCALE * LOG2_E, GROUP=ratio, HEADS_BLOCK=triton.next_power_of_2(ratio), SPLITS=SPLITS, KEYS=64,
            SIZE=SIZE,
        ),
        call(combine_kernel, (heads,), partial, largest, total, out, SPLITS=SPLITS, SIZE=SIZE),
    ]  # fmt: skip


def decode(length: int, dtype: torch.dtype, goal: float, heads: int = 9, groups: int = 3) -> Case:
    q = random(heads, SIZE, dtype=dtype, seed=1)
    k, v = (random(groups, length, SIZE, dtype=dtype, seed=seed) for seed in (2, 3))
    out = torch.empty_like(q)
    step = Step(*decode_calls(q, k, v, out), result=out)
    one, keys, values = q[None, :, None], k[None], v[None]
    expanded = [x.repeat_interleave(heads // groups, 1) for x in (keys, values)]
    grouped = q.view(1, groups, heads // groups, SIZE)
    attend = F.scaled_dot_product_attention
    baselines = {
        "SDPA, enable_gqa": lambda: attend(one, keys, values, enable_gqa=True).view(heads, SIZE),
        "SDPA, heads repeated before": lambda: attend(one, *expanded).view(heads, SIZE),
    }
    aside = {"SDPA, heads of a group as queries": lambda: attend(grouped, keys, values).view(heads, SIZE)}
    exact = lambda: attend(grouped.double(), keys.double(), values.double()).view(heads, SIZE)  # noqa: E731
    return Case(
        f"decode attention, {name(dtype)}",
        f"{heads} q / {groups} kv heads, {length}",
        step,
        baselines,
        exact,
        k.nbytes + v.nbytes,
        4 * heads * length * SIZE,
        Goal(goal),
        aside=aside,
    )


def prefill_call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int = 64, keys: int = 128) -> Call:
    """All [heads, S, D]."""
    heads, length, _ = q.shape
    grid = (triton.cdiv(length, rows), heads)
    return call(
        prefill_kernel, grid, q, k, v, out, length, scale=SCALE * LOG2_E, ROWS=rows, KEYS=keys, SIZE=SIZE
    )  # fmt: skip


def prefill(length: int, dtype: torch.dtype, goal: float, heads: int = 9) -> Case:
    q, k, v = (random(heads, length, SIZE, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    out = torch.empty_like(q)
    attend = F.scaled_dot_product_attention
    exact = lambda: attend(q.double(), k.double(), v.double(), is_causal=True)  # noqa: E731
    return Case(
        f"causal prefill, {name(dtype)}",
        f"{heads} heads, {length}",
        Step(prefill_call(q, k, v, out), result=out),
        {"SDPA": lambda: attend(q[None], k[None], v[None], is_causal=True)[0]},
        exact,
        4 * q.nbytes,
        2 * heads * length * (length + 1) * SIZE,
        Goal(goal),
    )


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
