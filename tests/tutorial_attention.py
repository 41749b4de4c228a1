"""Attention of our own after the idea of Triton's tutorial (FlashAttention-2), forward and backward; causal or not.

Like the tutorial, this file imports only triton and torch.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def attend(
    acc, total, peak, q, k_desc, v_desc, first, begin, end, rows, length, scale,
    BN: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BN):
        start = tl.multiple_of(start, BN)
        columns = start + tl.arange(0, BN)
        k = k_desc.load([first + start, 0])
        scores = tl.dot(q, k.T) * scale
        seen = columns[None, :] < length
        if DIAGONAL:
            seen = seen & (rows[:, None] >= columns[None, :])
        scores = tl.where(seen, scores, -1.0e6)
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.math.exp2(scores - higher[:, None])
        shrink = tl.math.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v_desc.load([first + start, 0]), acc * shrink[:, None])
        peak = higher
    return acc, total, peak


def configs():
    return [triton.Config({"BM": m, "BN": n}, num_stages=s, num_warps=4) for m, n, s in ((32, 32, 2), (64, 32, 3))]


@triton.autotune(configs=configs(), key=["length", "D"], prune_configs_by={"early_config_prune": lambda c, *_, **__: c})
@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, peaks_ptr, scale, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    first = head * length
    total_rows = tl.num_programs(1) * length
    k_desc = tl.make_tensor_descriptor(k_ptr, shape=[total_rows, D], strides=[D, 1], block_shape=[BN, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, shape=[total_rows, D], strides=[D, 1], block_shape=[BN, D])
    rows = block * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    at = (first + rows)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + at, mask=rows[:, None] < length, other=0.0)
    peak = tl.zeros([BM], dtype=tl.float32) - float("inf")
    total = tl.zeros([BM], dtype=tl.float32)
    acc = tl.zeros([BM, D], dtype=tl.float32)
    base2 = scale * 1.4426950408889634
    whole = block * BM // BN * BN if CAUSAL else length
    if whole > 0:
        acc, total, peak = attend(
            acc, total, peak, q, k_desc, v_desc, first, 0, whole, rows, length, base2, BN, False
        )  # fmt: skip
    if CAUSAL:
        end = tl.minimum((block + 1) * BM, length)
        acc, total, peak = attend(
            acc, total, peak, q, k_desc, v_desc, first, whole, end, rows, length, base2, BN, True
        )  # fmt: skip
    tl.store(peaks_ptr + first + rows, peak + tl.math.log2(total), mask=rows < length)
    out = acc / total[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def attention_delta(out_ptr, grad_ptr, delta_ptr, rows_total, D: tl.constexpr, BM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    mask = rows[:, None] < rows_total
    o, g = tl.load(out_ptr + at, mask=mask, other=0.0), tl.load(grad_ptr + at, mask=mask, other=0.0)
    tl.store(delta_ptr + rows, tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1), mask=rows < rows_total)


@triton.jit
def attention_backward(
    q_ptr, k_ptr, v_ptr, grad_ptr, peaks_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, scale, length,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One block of keys and values: its gradients, and its part of the queries', added atomically."""
    head = tl.program_id(1).to(tl.int64)
    first = head * length
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, D)
    inside = columns < length
    here = (first + columns)[:, None] * D + d[None, :]
    k = tl.load(k_ptr + here, mask=inside[:, None], other=0.0)
    v = tl.load(v_ptr + here, mask=inside[:, None], other=0.0)
    dk = tl.zeros([BN, D], dtype=tl.float32)
    dv = tl.zeros([BN, D], dtype=tl.float32)
    base2 = scale * 1.4426950408889634
    begin = tl.program_id(0) * BN // BM * BM if CAUSAL else 0
    for start in range(begin, length, BM):
        rows = start + tl.arange(0, BM)
        valid = rows < length
        there = (first + rows)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + there, mask=valid[:, None], other=0.0)
        grad = tl.load(grad_ptr + there, mask=valid[:, None], other=0.0)
        peak = tl.load(peaks_ptr + first + rows, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + first + rows, mask=valid, other=0.0)
        p = tl.math.exp2(tl.dot(q, tl.trans(k)) * base2 - peak[:, None])
        seen = valid[:, None] & inside[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] >= columns[None, :])
        p = tl.where(seen, p, 0.0)
        dv += tl.dot(tl.trans(p.to(grad.dtype)), grad)
        ds = (p * (tl.dot(grad, tl.trans(v)) - delta[:, None])).to(q.dtype)
        dk += tl.dot(tl.trans(ds), q)
        tl.atomic_add(dq_ptr + there, tl.dot(ds, k) * scale, mask=valid[:, None], sem="relaxed")
    tl.store(dk_ptr + here, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptr + here, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


class Attention(torch.autograd.Function):
    """q, k, v [heads, length, D], contiguous."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        heads, length, D = q.shape
        out = torch.empty_like(q)
        peaks = torch.empty((heads, length), dtype=torch.float32, device=q.device)

        def grid(meta):
            return (triton.cdiv(length, meta["BM"]), heads, 1)

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        attention_forward[grid](q, k, v, out, peaks, scale, length, D=D, CAUSAL=causal)
        ctx.save_for_backward(q, k, v, out, peaks)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, peaks = ctx.saved_tensors
        heads, length, D = q.shape
        grad = grad.contiguous()
        delta = torch.empty_like(peaks)
        attention_delta[(triton.cdiv(heads * length, 32),)](out, grad, delta, heads * length, D=D, BM=32)
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        attention_backward[(triton.cdiv(length, 32), heads)](
            q, k, v, grad, peaks, delta, dq, dk, dv, ctx.scale, length, D=D, BM=32, BN=32, CAUSAL=ctx.causal
        )
        return dq.to(q.dtype), dk, dv, None, None
