"""Kernels as someone writes them who has never heard of effc: this file imports only triton and torch."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

DEVICE = triton.runtime.driver.active.get_active_torch_device()


@triton.jit
def _gelu_tanh(v):
    c: tl.constexpr = 0.7978845608028654
    return 0.5 * v * (1 + libdevice.tanh(c * (v + 0.044715 * v * v * v)))


@triton.autotune(
    configs=[triton.Config({"BLOCK_N": n}, num_warps=w, num_stages=3) for n in (256, 1024) for w in (2, 8)],
    key=["n_cols"],
    reset_to_zero=["Count"],
)
@triton.heuristics({"EVEN": lambda args: args["n_cols"] % args["BLOCK_N"] == 0})
@triton.jit
def _geglu_fwd(
    X, Gate, Out, Count, stride_x, stride_g, stride_o, n_cols, scale: tl.float32,
    HAS_GATE: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EVEN:
        x = tl.load(X + row * stride_x + col).to(tl.float32)
    else:
        x = tl.load(X + row * stride_x + col, mask=col < n_cols, other=0.0).to(tl.float32)
    y = _gelu_tanh(x) * scale
    if HAS_GATE:
        y *= tl.load(Gate + row * stride_g + col, mask=col < n_cols, other=0.0).to(tl.float32)
    tl.store(Out + row * stride_o + col, y.to(Out.dtype.element_ty), mask=col < n_cols)
    if tl.program_id(1) == 0:
        tl.atomic_add(Count, 1)


class GeGLU(torch.nn.Module):
    """gelu(x) * gate * scale, and how many rows were computed."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x, gate=None):
        rows, cols = x.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        count = torch.zeros(1, dtype=torch.int32, device=x.device)
        grid = lambda meta: (rows, triton.cdiv(cols, meta["BLOCK_N"]))  # noqa: E731
        _geglu_fwd[grid](
            x, gate if gate is not None else x, out, count,
            x.stride(0), gate.stride(0) if gate is not None else 0, out.stride(0), cols, self.scale,
            HAS_GATE=gate is not None,
        )  # fmt: skip
        return out, int(count)


@triton.jit
def _row_argmax(x_ptr, val_ptr, idx_ptr, stride, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(axis=0)
    best = tl.full((1,), float("-inf"), tl.float32)
    where = tl.zeros((1,), tl.int32)
    for start in tl.range(0, n_cols, BLOCK, num_stages=2):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + cols, mask=cols < n_cols, other=float("-inf"))
        value, index = tl.max(x[None, :], axis=1, return_indices=True)
        where = tl.where(value > best, start + index, where)
        best = tl.maximum(value, best)
    tl.store(val_ptr + row + tl.arange(0, 1), best)
    tl.store(idx_ptr + row + tl.arange(0, 1), where)


def row_argmax(x):
    values = torch.empty(x.shape[0], dtype=x.dtype, device=DEVICE)
    indices = torch.empty(x.shape[0], dtype=torch.int32, device=DEVICE)
    _row_argmax[(x.shape[0],)](x, values, indices, x.stride(0), x.shape[1], BLOCK=64, num_warps=4)
    return values, indices


@triton.jit
def _negate(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, -tl.load(x_ptr + i, mask=i < n), mask=i < n)


def negate(x):
    out = torch.empty_like(x)
    _negate[(triton.cdiv(x.numel(), 32),)](x, out, x.numel(), BLOCK=32)
    return out
