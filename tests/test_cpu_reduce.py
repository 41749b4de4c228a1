"""Reductions, scans, sorting, gathering and counting on the CPU target, against PyTorch."""

import functools
import itertools
import math
import operator

import pytest
import torch
import triton
import triton.language as tl

from .on_cpu import compiled, randint, randn, run

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def grid_2d(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def extremes_kernel(
    x_ptr, values_ptr, indices_ptr, N: tl.constexpr, M: tl.constexpr, AXIS: tl.constexpr, R: tl.constexpr
):
    x = tl.load(x_ptr + grid_2d(N, M))
    largest, first = tl.max(x, AXIS, return_indices=True)
    least, somewhere = tl.min(x, AXIS, return_indices=True, return_indices_tie_break_left=False)
    r = tl.arange(0, R)
    tl.store(values_ptr + r, largest)
    tl.store(values_ptr + R + r, least)
    tl.store(indices_ptr + r, first)
    tl.store(indices_ptr + R + r, somewhere)
    tl.store(indices_ptr + 2 * R + r, tl.argmin(x, AXIS, tie_break_left=True))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_extremes_with_indices_break_ties_to_the_left(dtype, axis):
    x = randint(0, 50, (16, 32), dtype=dtype)
    r = 32 if axis == 0 else 16
    values, indices = torch.zeros(2, r, dtype=dtype), torch.zeros(3, r, dtype=torch.int32)
    run(extremes_kernel, (1,), x, values, indices, N=16, M=32, AXIS=axis, R=r)
    exact = x.double()
    assert torch.equal(values.double(), torch.stack([exact.amax(axis), exact.amin(axis)]))
    for k, extreme in ((0, exact.amax(axis, keepdim=True)), (2, exact.amin(axis, keepdim=True))):
        assert torch.equal(indices[k].long(), (exact == extreme).int().argmax(axis))
    there = exact.gather(axis, indices[1].long().unsqueeze(axis)).squeeze(axis)
    assert torch.equal(there, exact.amin(axis))


@triton.jit
def merge_moments(mean_a, squares_a, count_a, mean_b, squares_b, count_b):
    count = count_a + count_b
    delta = mean_b - mean_a
    share = count_b / count
    return mean_a + delta * share, squares_a + squares_b + delta * delta * count_a * share, count


@triton.jit
def moments_kernel(x_ptr, rows_ptr, whole_ptr, N: tl.constexpr, M: tl.constexpr):
    x = tl.load(x_ptr + grid_2d(N, M))
    state = (x, tl.zeros_like(x), tl.full((N, M), 1.0, tl.float32))
    mean, squares, count = tl.reduce(state, 1, merge_moments)
    r = tl.arange(0, N)
    tl.store(rows_ptr + r, mean)
    tl.store(rows_ptr + N + r, squares / count)
    mean, squares, count = tl.reduce(state, None, merge_moments)
    tl.store(whole_ptr, mean)
    tl.store(whole_ptr + 1, squares / count)


def test_welford_merges_three_results(isa):
    x, rows, whole = randn(8, 64), torch.zeros(2, 8), torch.zeros(2)
    run(moments_kernel, (1,), x, rows, whole, N=8, M=64)
    torch.testing.assert_close(rows, torch.stack([x.mean(1), x.var(1, unbiased=False)]))
    torch.testing.assert_close(whole, torch.stack([x.mean(), x.var(unbiased=False)]))


@triton.jit
def second_then_first(a, b, c, d):
    return tl.maximum(b, d), tl.minimum(a, c)


@triton.jit
def whole_axis_kernel(x_ptr, out_ptr, any_ptr, N: tl.constexpr, M: tl.constexpr):
    x = tl.load(x_ptr + grid_2d(N, M))
    r, c = tl.arange(0, N), tl.arange(0, M)
    tl.store(out_ptr + r, tl.xor_sum(x, 1))
    tl.store(out_ptr + N + c, tl.xor_sum(x, 0))
    one = out_ptr + N + M
    tl.store(one, tl.xor_sum(x, None))
    tl.store(one + 1, tl.sum(x))
    tl.store(one + 2, tl.max(x, None))
    corner = tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :]
    tl.store(one + 3 + corner, tl.sum(x, keep_dims=True))
    tl.store(one + 4, tl.min(x, keep_dims=True).item())
    tl.store(any_ptr + r[:, None], tl.reduce_or(x > 95, 1, keep_dims=True))
    tl.store(any_ptr + N + c, tl.reduce_or(x > 95, 0))
    high, low = tl.reduce((x, x), 1, second_then_first)
    tl.store(one + 5 + r, high - low)


def test_reductions_of_all_axes_and_kept_dimensions(isa):
    n, m = 8, 32
    x, out, some = randint(0, 100, (n, m)), torch.zeros(64, dtype=torch.int32), torch.zeros(n + m, dtype=torch.bool)
    run(whole_axis_kernel, (1,), x, out, some, N=n, M=m)
    xor = functools.partial(functools.reduce, operator.xor)
    assert out[:n].tolist() == [xor(row) for row in x.tolist()]
    assert out[n : n + m].tolist() == [xor(column) for column in x.T.tolist()]
    totals = [xor(x.flatten().tolist()), x.sum(), x.max(), x.sum(), x.min()]
    assert out[n + m : n + m + 5].tolist() == totals
    assert torch.equal(some, torch.cat([(x > 95).any(1), (x > 95).any(0)]))


@triton.jit
def affine(scale_a, shift_a, scale_b, shift_b):
    return scale_a * scale_b, shift_a * scale_b + shift_b


@triton.jit
def scans_kernel(x_ptr, out_ptr, N: tl.constexpr, M: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    i = grid_2d(N, M)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.cumsum(x, AXIS, reverse=REVERSE))
    tl.store(out_ptr + N * M + i, tl.cumprod(x, AXIS, reverse=REVERSE))
    _, shift = tl.associative_scan((x, x + 1), AXIS, affine, reverse=REVERSE)
    tl.store(out_ptr + 2 * N * M + i, shift)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_of_tuples_both_ways(axis, reverse, isa):
    x, out = randn(8, 64).abs().clamp(max=1.2), torch.zeros(3, 8, 64)
    run(scans_kernel, (1,), x, out, N=8, M=64, AXIS=axis, REVERSE=reverse)
    turned = x.flip(axis) if reverse else x
    shift, shifts = torch.zeros(x.shape[1 - axis]), []
    for values in turned.unbind(axis):
        shift = shift * values + values + 1
        shifts.append(shift)
    want = torch.stack([turned.cumsum(axis), turned.cumprod(axis), torch.stack(shifts, axis)])
    torch.testing.assert_close(out, want.flip(axis + 1) if reverse else want, rtol=1e-5, atol=1e-5)


@triton.jit
def scan_types_kernel(x_ptr, half_ptr, narrow_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    i = n[:, None, None] * N * N + n[None, :, None] * N + n[None, None, :]
    x = tl.load(x_ptr + i)
    tl.store(half_ptr + i, tl.cumsum(x.to(tl.float16), 0))
    tl.store(narrow_ptr + i, tl.cumsum(x.to(tl.int8), 1))


def test_scans_in_the_middle_and_of_narrow_types(isa):
    x = randint(0, 9, (8, 8, 8), dtype=torch.float32)
    half, narrow = torch.zeros(8, 8, 8, dtype=torch.float16), torch.zeros(8, 8, 8, dtype=torch.int32)
    run(scan_types_kernel, (1,), x, half, narrow, N=8)
    assert torch.equal(half, x.half().cumsum(0))
    assert torch.equal(narrow, x.int().cumsum(1).int())


@triton.jit
def sort_kernel(x_ptr, up_ptr, down_ptr, top_ptr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    i = grid_2d(N, M)
    x = tl.load(x_ptr + i)
    tl.store(up_ptr + i, tl.sort(x))
    tl.store(down_ptr + i, tl.sort(x, 1, descending=True))
    tl.store(top_ptr + grid_2d(N, K), tl.topk(x, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float16, torch.int64])
def test_sort_both_ways_and_the_largest(dtype):
    x = randint(-100, 100, (2, 32), dtype=dtype)
    up, down, top = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(2, 4, dtype=dtype)
    run(sort_kernel, (1,), x, up, down, top, N=2, M=32, K=4)
    assert torch.equal(up, x.sort(1)[0])
    assert torch.equal(down, x.sort(1, descending=True)[0])
    assert torch.equal(top, x.topk(4, 1)[0])


@triton.jit
def bits_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.exp(tl.load(x_ptr + i))
    bits = y.to(tl.int32, bitcast=True)
    tl.store(out_ptr + i, tl.where(y > 0, bits ^ tl.xor_sum(bits), 0))


def test_bits_of_an_array_get_no_array_of_their_own():
    """Each step of a sort asks for the bits of its values."""
    x, out = randn(64), torch.zeros(64, dtype=torch.int32)
    text = compiled(bits_kernel, x, out, BLOCK=64).cpp
    assert text.count("alignas(64) float") == 1
    assert text.count("alignas(64) int32_t") == 0
    run(bits_kernel, (1,), x, out, BLOCK=64)
    parity = functools.reduce(operator.xor, out.tolist())  # of 64 sums with it, in which it cancels out
    assert torch.allclose((out ^ parity).view(torch.float32), x.exp(), rtol=1e-6)


@pytest.mark.slow
def test_sort_of_a_tile_of_twelve_bits():
    x = randn(4, 1024)
    up, down, top = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(4, 16)
    run(sort_kernel, (1,), x, up, down, top, N=4, M=1024, K=16)
    assert torch.equal(up, x.sort(1)[0])
    assert torch.equal(down, x.sort(1, descending=True)[0])
    assert torch.equal(top, x.topk(16, 1)[0])


@triton.jit
def merge_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.bitonic_merge(tl.load(x_ptr + i)))


def test_bitonic_merge_of_up_and_down(isa):
    x, out = torch.cat([randn(16).sort()[0], randn(16, seed=1).sort(descending=True)[0]]), torch.zeros(32)
    run(merge_kernel, (1,), x, out, BLOCK=32)
    assert torch.equal(out, x.sort()[0])


@triton.jit
def greatest_divisor(a, b):
    while b != 0:
        a, b = b, a % b
    return a


@triton.jit
def larger_and_its_place(a, i, b, j):
    if b > a:
        return b, j
    if b == a and j < i:
        return b, j
    return a, i


@triton.jit
def statements_kernel(x_ptr, sums_ptr, runs_ptr, best_ptr, place_ptr, N: tl.constexpr, AXIS: tl.constexpr):
    at = grid_2d(N, N)
    x, i = tl.load(x_ptr + at), tl.arange(0, N)
    tl.store(sums_ptr + i, tl.reduce(x, AXIS, greatest_divisor))
    tl.store(runs_ptr + at, tl.associative_scan(x, AXIS, greatest_divisor))
    best, place = tl.reduce((x, at), AXIS, larger_and_its_place)
    tl.store(best_ptr + i, best)
    tl.store(place_ptr + i, place)


@pytest.mark.parametrize("axis", [0, 1])
def test_functions_that_combine_may_branch_and_loop(isa, axis):
    x = 12 * randint(1, 20, (16, 16))
    sums, runs, best, place = (torch.zeros_like(x) for _ in range(4))
    run(statements_kernel, (1,), x, sums, runs, best, place, N=16, AXIS=axis)
    rows = (x if axis else x.T).tolist()
    divisors = torch.tensor([list(itertools.accumulate(row, math.gcd)) for row in rows], dtype=torch.int32)
    assert torch.equal(runs if axis else runs.T, divisors)
    assert torch.equal(sums[0], divisors[:, -1])
    assert torch.equal(best[0], x.amax(axis))
    first = x.argmax(axis)
    assert torch.equal(place[0].long(), 16 * torch.arange(16) + first if axis else 16 * first + torch.arange(16))


@triton.jit
def gather_kernel(x_ptr, columns_ptr, rows_ptr, along_ptr, across_ptr, N: tl.constexpr, M: tl.constexpr):
    i = grid_2d(N, M)
    x = tl.load(x_ptr + i)
    tl.store(along_ptr + i, tl.gather(x, tl.load(columns_ptr + i), 1))
    tl.store(across_ptr + i, tl.gather(x + x, tl.load(rows_ptr + i), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.int64])
def test_gather_along_each_axis(dtype):
    x, columns, rows = randint(-60, 60, (8, 32), dtype=dtype), randint(0, 32, (8, 32)), randint(0, 8, (8, 32), seed=1)
    along, across = torch.zeros_like(x), torch.zeros_like(x)
    run(gather_kernel, (1,), x, columns, rows, along, across, N=8, M=32)
    assert torch.equal(along, x.gather(1, columns.long()))
    assert torch.equal(across, (x + x).gather(0, rows.long()))


@triton.jit
def histogram_kernel(x_ptr, all_ptr, masked_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=3)
    tl.store(all_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))
    tl.store(masked_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, mask=i < n))


def test_histogram_counts_what_the_mask_lets_in(isa):
    x, counts = randint(0, 16, (100,)), torch.zeros(2, 16, dtype=torch.int32)
    run(histogram_kernel, (1,), x, counts[0], counts[1], 100, BLOCK=128, BINS=16)
    want = torch.bincount(x, minlength=16).int()
    assert torch.equal(counts[1], want)
    want[3] += 28
    assert torch.equal(counts[0], want)
