"""Control flow, calls, shapes and names on the CPU target: whatever Triton's front end makes of Python."""

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

from .on_cpu import randn, run


@triton.jit
def early_return_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    if first >= n:
        return
    i = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    scale = 1.0
    if tl.sum(x) > 0:
        tl.store(out_ptr + i, x * 2, mask=i < n)
        if n > 1000:
            return
        scale = 3.0
    if n == 99:
        return
    tl.store(out_ptr + i, x * scale, mask=i < n)


@pytest.mark.parametrize("n", [100, 99])
def test_early_returns_end_one_program(n, isa):
    x, out = randn(100), torch.full((160,), 7.0)
    run(early_return_kernel, (10,), x, out, n, BLOCK=16)
    want = torch.full((160,), 7.0)
    for k in range(0, n, 16):
        part = x[k : min(k + 16, n)]
        positive = part.sum() > 0
        if n == 99:
            want[k : k + len(part)] = part * 2 if positive else 7.0
        else:
            want[k : k + len(part)] = part * 3 if positive else part
    torch.testing.assert_close(out, want)


@triton.jit
def one_of(a, b, which):
    if which > 1:
        return a * 2
    if which > 0:
        return b
    return a + b


@triton.jit(noinline=True)
def two_results(x, which):
    if which > 1:
        return x * 2, which
    return x + 1, which + 5


@triton.jit(noinline=True)
def fill(out_ptr, value):
    tl.store(out_ptr + tl.arange(0, 16), value)


@triton.jit
def calls_kernel(x_ptr, out_ptr, numbers_ptr, n):
    i = tl.arange(0, 16)
    a, b = tl.load(x_ptr + i), tl.load(x_ptr + 16 + i)
    for which in range(n):
        tl.store(out_ptr + which * 16 + i, one_of(a, b, which))
        doubled, code = two_results(tl.sum(a), which)
        fill(out_ptr + 48 + which * 16, doubled)
        tl.store(numbers_ptr + which, code)


def test_calls_with_several_returns_and_results(isa):
    x, out, numbers = randn(2, 16), torch.zeros(6, 16), torch.zeros(3, dtype=torch.int32)
    run(calls_kernel, (1,), x, out, numbers, 3)
    a, b = x
    torch.testing.assert_close(out[:3], torch.stack([a + b, b, a * 2]))
    total = a.sum()
    torch.testing.assert_close(out[3:], torch.stack([total + 1, total + 1, total * 2])[:, None].expand(3, 16))
    assert numbers.tolist() == [5, 6, 2]


@triton.jit
def flow_kernel(x_ptr, out_ptr, numbers_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if n > 3:
        tile, scale, shift = x * 2, 1.5, i
    elif n > 1:
        tile, scale, shift = x + 1, 2.5, i + 1
    else:
        tile, scale, shift = x, 0.5, i * 2
    tl.store(out_ptr + i, tile * scale + shift)
    total = tl.zeros([BLOCK], tl.float32)
    k, previous, current = 0, 0, 1
    while (k < n) & (current < 100):
        total += x * current
        previous, current = current, previous + current
        k += 1
    tl.store(out_ptr + BLOCK + i, total)
    tl.store(numbers_ptr, current)
    triangle = 0
    for a in range(n, 0, -1):
        for b in range(0, a, 2):
            triangle += a * b
            if b > 2:
                triangle -= 1
    tl.store(numbers_ptr + 1, triangle)
    tl.store(numbers_ptr + 2, max(n, 3) * 10 + min(n, 3))
    tl.store(out_ptr + 2 * BLOCK + i, x if (n == 2 or (n > 4 and n != 30)) else x * 3)
    here, there = x, x + 1
    for _ in range(n):
        here, there = there, here
    tl.store(out_ptr + 3 * BLOCK + i, here)
    sums = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(3):
        sums += x * j
    for j in tl.range(0, n, 1, num_stages=3, loop_unroll_factor=2, flatten=True, disallow_acc_multi_buffer=True):
        sums += j
    tl.store(out_ptr + 4 * BLOCK + i, sums)


def test_branches_and_loops_with_results_of_every_kind():
    for n in (0, 1, 2, 3, 5, 30):
        x, out, numbers = randn(16, seed=n), torch.zeros(5, 16), torch.zeros(3, dtype=torch.int32)
        run(flow_kernel, (1,), x, out, numbers, n, BLOCK=16)
        i = torch.arange(16)
        tile, scale, shift = (x * 2, 1.5, i) if n > 3 else (x + 1, 2.5, i + 1) if n > 1 else (x, 0.5, i * 2)
        total, k, previous, current = torch.zeros(16), 0, 0, 1
        while k < n and current < 100:
            total, previous, current, k = total + x * current, current, previous + current, k + 1
        triangle = sum(a * b - (b > 2) for a in range(n, 0, -1) for b in range(0, a, 2))
        chosen = x if n in (2, 5) else x * 3
        want = torch.stack([tile * scale + shift, total, chosen, x + n % 2, x * 3 + n * (n - 1) // 2])
        torch.testing.assert_close(out, want)
        assert numbers.tolist() == [current, triangle, max(n, 3) * 10 + min(n, 3)]


@triton.jit
def carried_branch_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    weight = tl.full([BLOCK], 1.0, tl.float32)
    for k in range(n):
        x = tl.load(x_ptr + k * BLOCK + i)
        if tl.max(x) > 1.5:
            most = tl.maximum(most, x)
            weight = weight * 2
        else:
            weight = weight + x
    tl.store(out_ptr + i, most)
    tl.store(out_ptr + BLOCK + i, weight)


def test_a_branch_inside_a_loop_changes_carried_tiles(isa):
    x, out = randn(6, 16), torch.zeros(2, 16)
    run(carried_branch_kernel, (1,), x, out, 6, BLOCK=16)
    most, weight = torch.zeros(16), torch.ones(16)
    for row in x:
        most, weight = (torch.maximum(most, row), weight * 2) if row.max() > 1.5 else (most, weight + row)
    torch.testing.assert_close(out, torch.stack([most, weight]))


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


class State:
    first: tl.tensor
    second: tl.tensor

    @triton.constexpr_function
    def __init__(self, first, second):
        self.first, self.second = first, second

    @triton.jit
    def total(self):
        return self.first + self.second


State = tl.core._aggregate(State)


@triton.jit
def aggregate_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    state = State(tl.load(x_ptr + i), i)
    for _ in range(n):
        state = State(state.first * 2, state.second + 1)
    tl.store(out_ptr + i, state.total())


def test_a_loop_carries_an_aggregate():
    x, out = randn(16), torch.zeros(16)
    run(aggregate_kernel, (1,), x, out, 2, BLOCK=16)
    torch.testing.assert_close(out, x * 4 + torch.arange(16) + 2)


@triton.jit
def condition_kernel(out_ptr, n):
    k = 0
    while tl.condition(k < n, disable_licm=True):
        k += 3
    tl.store(out_ptr, k)


@pytest.mark.skipif(not hasattr(tl, "condition"), reason="this Triton has no condition")
def test_a_while_loop_with_hints():
    out = torch.zeros(1, dtype=torch.int32)
    run(condition_kernel, (1,), out, 10)
    assert out.item() == 12


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
