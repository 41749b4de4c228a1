"""Tuples, hints, addresses, names, constants and shapes on the CPU target: what values Triton's front end knows."""

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

from .on_cpu import randn, run


class Pair(NamedTuple):
    first: object
    second: object


@triton.jit
def swapped(pair):
    return Pair(pair.second, pair.first)


@triton.constexpr_function
def doubled(n):
    return 2 * n


@triton.jit
def tuples_kernel(pointers, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pair = Pair(tl.load(pointers[0] + i), tl.load(pointers[1] + i))
    turned = swapped(pair)
    tl.store(out_ptr + i, turned.first - turned.second * doubled(BLOCK))
    amounts = (1, 2.0, i)
    for k in tl.static_range(3):
        tl.store(out_ptr + BLOCK * (k + 1) + i, pair[0] + amounts[k])


def test_tuples_named_tuples_and_constexpr_functions():
    a, b, out = randn(16), randn(16, seed=1), torch.zeros(4, 16)
    kernel = lower(tuples_kernel, {"pointers": ("*fp32", "*fp32"), "out_ptr": "*fp32"}, {"BLOCK": 16})
    launch(kernel, (1,), a, b, out)
    torch.testing.assert_close(out, torch.stack([b - a * 32, a + 1, a + 2, a + torch.arange(16)]))


@triton.jit
def hints_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.assume(n > 0)
    n = tl.multiple_of(n, 8)
    i = tl.max_constancy(tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), BLOCK), BLOCK), 1)
    x = tl.load(x_ptr + i, mask=i < n, other=0, cache_modifier=".ca", eviction_policy="evict_first", volatile=True)
    tl.debug_barrier()
    tl.store(out_ptr + i, x, mask=i < n, cache_modifier=".wb", eviction_policy="evict_last")


def test_hints_change_nothing():
    x, out = randn(16), torch.zeros(16)
    run(hints_kernel, (1,), x, out, 8, BLOCK=16)
    assert torch.equal(out, torch.cat([x[:8], torch.zeros(8)]))


@triton.jit
def addresses_kernel(table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i, rows = tl.arange(0, BLOCK), tl.arange(0, 2)
    for k in range(n):
        row_ptr = tl.load(table_ptr + k).to(tl.pointer_type(tl.float32))
        tl.store(out_ptr + k * BLOCK + i, tl.load(row_ptr + i))
    row_ptrs = tl.load(table_ptr + rows).to(tl.pointer_type(tl.float32))
    block = rows[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + 2 * BLOCK + block, tl.load(row_ptrs[:, None] + i[None, :]))
    one_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    if n > 1:
        one_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + 4 * BLOCK + i, tl.load(one_ptr + i))
    moving = row_ptrs[:, None] + i[None, :]
    for k in range(n):
        moving += k
    tl.store(out_ptr + 5 * BLOCK + block, tl.load(moving))
    distance = (table_ptr + 1).to(tl.int64) - table_ptr.to(tl.int64)
    tl.store(out_ptr + 7 * BLOCK + i, distance.to(tl.float32))


def test_pointers_to_pointers_and_pointers_as_results(isa):
    a, b = randn(32), randn(32, seed=1)
    table, out = torch.tensor([a.data_ptr(), b.data_ptr()]), torch.zeros(8, 16)
    run(addresses_kernel, (1,), table, out, 2, BLOCK=16)
    both = torch.stack([a, b])
    want = torch.cat([both[:, :16], both[:, :16], b[None, :16], both[:, 1:17], torch.full((1, 16), 8.0)])
    assert torch.equal(out, want)


@triton.jit
def launch_(int, o, float, register, dot, load, pid_x, p, i, tt, B: tl.constexpr):
    double = tl.arange(0, B)
    class_ = tl.load(int + double)
    typename = class_ * float + register
    asm = typename + pid_x
    constexpr = asm * 1.5
    for j in range(load):
        constexpr += j
    main = constexpr + dot + p + i + tt
    NULL = main + 1
    INT32_MAX = NULL
    int32_t = INT32_MAX
    f32x8 = int32_t
    report = f32x8
    launch = report
    tl.store(o + double, launch)


@triton.jit
def main(o, B: tl.constexpr):
    tl.store(o + tl.arange(0, B), 4.0)


def test_words_of_cpp_are_names_like_others(isa):
    x, out = randn(16), torch.zeros(16)
    run(launch_, (1,), x, out, 2.0, 1, 3, 2, 5, 1, 1, 1, B=16)
    torch.testing.assert_close(out, (x * 2 + 6) * 1.5 + 1 + 3 + 1 + 1 + 1 + 1)
    run(main, (1,), out, B=16)
    assert (out == 4).all()


@triton.jit
def constants_kernel(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.full([BLOCK], float("nan"), tl.float32))
    tl.store(out_ptr + BLOCK + i, float("-inf"))
    tl.store(out_ptr + 2 * BLOCK + i, 1e-45)
    tl.store(out_ptr + 3 * BLOCK + i, 3.4028235e38)
    tl.store(out_ptr + 4 * BLOCK + i, tl.full([BLOCK], -(2**63), tl.int64).to(tl.float32))
    tl.store(out_ptr + 5 * BLOCK + i, tl.full([BLOCK], 2**63, tl.uint64).to(tl.float32))
    tl.store(out_ptr + 6 * BLOCK + i, tl.full([BLOCK], -1.5, tl.float16).to(tl.float32))


def test_constants_of_every_kind(isa):
    out = torch.zeros(7, 16)
    run(constants_kernel, (1,), out, BLOCK=16)
    want = torch.tensor([math.nan, -math.inf, 1e-45, 3.4028235e38, -(2.0**63), 2.0**63, -1.5])
    torch.testing.assert_close(out, want[:, None].expand(7, 16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def shapes_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, M: tl.constexpr):
    i = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    wide = tl.arange(0, N)[:, None] * (2 * M) + tl.arange(0, 2 * M)[None, :]
    flat = tl.arange(0, N * M)
    S: tl.constexpr = N * M
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + flat, tl.ravel(x))
    tl.store(out_ptr + S + wide, tl.interleave(x, y))
    pairs = tl.join(x, y)
    left, right = tl.split(pairs)
    tl.store(out_ptr + 3 * S + i, left - right)
    turned = tl.reshape(tl.permute(pairs, (2, 1, 0)), (2 * S,)).reshape(2, S).trans().reshape(S, 2)
    tl.store(out_ptr + 4 * S + flat, turned.sum(1))
    tl.store(out_ptr + 5 * S + tl.arange(0, 2 * S), tl.cat(tl.ravel(x), tl.ravel(y), can_reorder=True))
    tl.store(out_ptr + 7 * S + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], x.T)
    tl.store(out_ptr + 8 * S + i, tl.flip(x, 1))
    tl.store(out_ptr + 9 * S + i, tl.flip(x, 0))
    tl.store(out_ptr + 10 * S + i, tl.broadcast_to(tl.sum(x, 1)[:, None], (N, M)))
    tl.store(out_ptr + 11 * S + i, x[:, None, :].view(N, M))
    tl.store(out_ptr + 12 * S + i, tl.where(x > 0, 1.0, y))
    filled = tl.full((N, M), 2.5, tl.float32) + tl.zeros([N, M], tl.float32) + tl.zeros_like(x)
    tl.store(out_ptr + 13 * S + i, filled)
    row, column = tl.broadcast(tl.max(x, 1)[:, None], tl.expand_dims(tl.max(x, 0), 0))
    tl.store(out_ptr + 14 * S + i, row - column)


@pytest.mark.filterwarnings("ignore:view is deprecated")
def test_shapes_are_turned_joined_and_cut(isa):
    n, m = 8, 16
    x, y, out = randn(n, m), randn(n, m, seed=1), torch.zeros(15 * n * m)
    run(shapes_kernel, (1,), x, y, out, N=n, M=m)
    pairs = torch.stack([x, y], -1)
    parts = [x, pairs, x - y, pairs.permute(2, 1, 0).reshape(2, n * m).T.sum(1), x, y, x.T, x.flip(1), x.flip(0)]
    parts += [x.sum(1)[:, None].expand(n, m), x, torch.where(x > 0, 1.0, y), torch.full((n, m), 2.5)]
    parts += [x.amax(1)[:, None] - x.amax(0)[None]]
    torch.testing.assert_close(out, torch.cat([part.reshape(-1) for part in parts]))


@triton.jit
def squeeze_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.squeeze(tl.squeeze(tl.unsqueeze(tl.unsqueeze(tl.load(x_ptr + i), 0), 2), 2), 0))


@pytest.mark.skipif(not hasattr(tl, "squeeze"), reason="this Triton has no squeeze")
def test_dimensions_of_one_come_and_go():
    x, out = randn(16), torch.zeros(16)
    run(squeeze_kernel, (1,), x, out, BLOCK=16)
    assert torch.equal(out, x)


@triton.jit
def swizzle_kernel(out_ptr):
    columns, rows = tl.num_programs(0), tl.num_programs(1)
    i, j = tl.swizzle2d(tl.program_id(0), tl.program_id(1), columns, rows, 2)
    place = tl.program_id(0) + columns * (tl.program_id(1) + rows * tl.program_id(2))
    tl.store(out_ptr + place, i * 100 + j + 10000 * tl.program_id(2) + 100000 * tl.cdiv(tl.num_programs(2), 2))


def test_grids_of_three_dimensions_and_swizzled_programs():
    out = torch.zeros(3, 4, 5, dtype=torch.int32)
    run(swizzle_kernel, (5, 4, 3), out)
    for z in range(3):
        for y in range(4):
            for x in range(5):
                flat = x * 4 + y
                first = flat // 8 * 2
                group = min(5 - first, 2)
                i, j = first + flat % 8 % group, flat % 8 // group
                assert out[z, y, x] == i * 100 + j + 10000 * z + 200000
