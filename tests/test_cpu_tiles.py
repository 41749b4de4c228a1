"""Tiles on the CPU target: ragged edges, rows and columns, reductions and scans of them, lookups; against PyTorch."""

import math

import pytest
import torch
import triton
import triton.language as tl

from .on_cpu import randn, run


@triton.jit
def tile_kernel(x_ptr, y_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask)
    y = tl.load(y_ptr + c[None, :] * rows + r[:, None], mask=mask)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], x + tl.cos(c.to(tl.float32))[None, :] * y, mask=mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64), (17, 65), (40, 130)])
def test_ragged_tiles_and_transposed_reads(shape, isa):
    rows, columns = shape
    x, y = randn(rows, columns), randn(columns, rows, seed=1)
    out = torch.zeros_like(x)
    run(tile_kernel, (triton.cdiv(rows, 8), triton.cdiv(columns, 32)), x, y, out, rows, columns, BR=8, BC=32)
    torch.testing.assert_close(out, x + torch.arange(float(columns)).cos() * y.T)


@triton.jit
def norm_kernel(x_ptr, w_ptr, out_ptr, rows, columns, eps, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)
    w = tl.load(w_ptr + c, mask=c < columns, other=0.0)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], x * scale[:, None] * w[None, :], mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 60, 64, 576])
def test_rms_norm(dtype, columns, isa):
    x, w = randn(13, columns, dtype=dtype), randn(columns, seed=1, dtype=dtype)
    out = torch.zeros_like(x)
    run(norm_kernel, (4,), x, w, out, 13, columns, 1e-5, BR=4, BC=max(16, triton.next_power_of_2(columns)))
    wide = x.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    e = tl.where(c[None, :] < columns, e, 0.0)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], e / tl.sum(e, 1)[:, None], mask=mask)


@pytest.mark.parametrize("columns", [1, 3, 31, 64, 100])
def test_softmax_and_nan_stays_in_its_row(columns, isa):
    x = randn(11, columns)
    x[3, columns // 2] = math.nan
    x[5] = -math.inf
    x[7, 0] = math.inf
    out = torch.zeros_like(x)
    run(softmax_kernel, (3,), x, out, 11, columns, BR=4, BC=max(16, triton.next_power_of_2(columns)))
    torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)


@triton.jit
def reduce_kernel(x_ptr, i_ptr, out_ptr, int_ptr, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    offsets = r[:, None] * C + c[None, :]
    x, i = tl.load(x_ptr + offsets), tl.load(i_ptr + offsets)
    N: tl.constexpr = R if AXIS == 1 else C
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.sum(x, AXIS))
    tl.store(out_ptr + N + n, tl.max(x, AXIS))
    tl.store(out_ptr + 2 * N + n, tl.min(x, AXIS))
    tl.store(int_ptr + n, tl.argmax(x, AXIS))
    tl.store(int_ptr + N + n, tl.argmin(x, AXIS))
    tl.store(int_ptr + 2 * N + n, tl.xor_sum(i, AXIS))
    tl.store(int_ptr + 3 * N + n, tl.max(i, AXIS))


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (4, 4), (2, 8), (8, 256), (256, 8), (32, 32)])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(shape, axis, isa):
    x = randn(*shape)
    x.flatten()[:: max(1, x.numel() // 3)] = x.flatten()[0]  # ties
    i = (x * 1000).to(torch.int32)
    n = shape[1 - axis]
    out, ints = torch.zeros(3, n), torch.zeros(4, n, dtype=torch.int32)
    run(reduce_kernel, (1,), x, i, out, ints, AXIS=axis, R=shape[0], C=shape[1])
    torch.testing.assert_close(out, torch.stack([x.sum(axis), x.amax(axis), x.amin(axis)]), rtol=1e-5, atol=1e-5)
    xor = torch.zeros(n, dtype=torch.int32)
    for part in i.unbind(axis):
        xor ^= part
    first = [(x == best(axis, keepdim=True)).int().argmax(axis).int() for best in (x.amax, x.amin)]
    assert torch.equal(ints, torch.stack([*first, xor, i.amax(axis)]))


@triton.jit
def column_loop_kernel(x_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    total = tl.zeros([BR], tl.float32)
    best = tl.full([BR], float("-inf"), tl.float32)
    for start in range(0, columns, BC):
        c = start + tl.arange(0, BC)
        mask = (r[:, None] < rows) & (c[None, :] < columns)
        offsets = r[:, None] * columns + c[None, :]
        total += tl.sum(tl.load(x_ptr + offsets, mask=mask, other=0.0), 1)
        best = tl.maximum(best, tl.max(tl.load(x_ptr + offsets, mask=mask, other=float("-inf")), 1))
    tl.store(out_ptr + r, total * best, mask=r < rows)


@pytest.mark.parametrize("columns", [1, 64, 1000])
def test_rows_reduced_in_a_loop_over_columns(columns, isa):
    x = randn(10, columns)
    out = torch.zeros(10)
    run(column_loop_kernel, (3,), x, out, 10, columns, BR=4, BC=64)
    torch.testing.assert_close(out, x.sum(1) * x.amax(1), rtol=1e-4, atol=1e-4)


@triton.jit
def scan_kernel(x_ptr, out_ptr, count_ptr, C: tl.constexpr, REVERSE: tl.constexpr):
    r, c = tl.arange(0, 4), tl.arange(0, C)
    offsets = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.cumsum(x, 1, reverse=REVERSE))
    tl.store(count_ptr + offsets, tl.cumsum((x > 0).to(tl.int32), 0))


@pytest.mark.parametrize("reverse", [False, True])
def test_scans(reverse):
    x = randn(4, 64)
    out, count = torch.zeros_like(x), torch.zeros(4, 64, dtype=torch.int32)
    run(scan_kernel, (1,), x, out, count, C=64, REVERSE=reverse)
    want = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(count, (x > 0).int().cumsum(0, dtype=torch.int32))


@triton.jit
def gather_rows_kernel(ids_ptr, table_ptr, out_ptr, rows, D: tl.constexpr, BR: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, triton.next_power_of_2(D))
    ids = tl.load(ids_ptr + r, mask=r < rows, other=0)
    mask = (r[:, None] < rows) & (d[None, :] < D)
    row = tl.load(table_ptr + ids[:, None] * D + d[None, :], mask=mask)
    tl.store(out_ptr + r[:, None] * D + d[None, :], row, mask=mask)


@pytest.mark.parametrize("ids_type", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows(ids_type, dtype, isa):
    table = randn(50, 60, dtype=dtype)
    ids = torch.randint(0, 50, (21,), generator=torch.Generator().manual_seed(2), dtype=ids_type)
    out = torch.zeros(21, 60, dtype=dtype)
    run(gather_rows_kernel, (6,), ids, table, out, 21, D=60, BR=4)
    assert torch.equal(out, table[ids.long()])


@triton.jit
def scatter_kernel(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < n, other=0)
    x = tl.load(x_ptr + index, mask=i < n)
    tl.store(out_ptr + index * 2, x, mask=(i < n) & (x > 0))


def test_gather_and_scatter_of_elements(isa):
    x = randn(100)
    index = torch.randperm(100, generator=torch.Generator().manual_seed(4)).int()
    out = torch.zeros(200)
    run(scatter_kernel, (1,), x, index, out, 100, BLOCK=128)
    want = torch.zeros(200)
    want[::2] = x.clamp_min(0)
    assert torch.equal(out, want)


@triton.jit
def shapes_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    low, high = tl.split(tl.reshape(x, (N // 2, 2)))
    turned = tl.trans(tl.reshape(tl.join(high, low), (2, N // 2)))
    both = tl.reshape(turned, (N,)) + tl.cat(low, high, can_reorder=True)
    picked = tl.gather(x, (tl.arange(0, N) * 3) % N, 0)
    tl.store(out_ptr + tl.arange(0, N), both + tl.flip(picked, 0) + tl.sort(x))


def test_reshape_split_join_trans_gather_flip_sort(isa):
    x = randn(64)
    out = torch.zeros_like(x)
    run(shapes_kernel, (1,), x, out, N=64)
    low, high = x.view(32, 2).unbind(1)
    both = torch.stack([high, low], 1).view(2, 32).T.reshape(64) + torch.cat([low, high])
    picked = x[(torch.arange(64) * 3) % 64]
    torch.testing.assert_close(out, both + picked.flip(0) + x.sort().values)
