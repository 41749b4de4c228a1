"""Control flow on the CPU target: returns, calls, branches and loops, with results of every kind."""

import pytest
import torch
import triton
import triton.language as tl

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
def control_kernel(x_ptr, out_ptr, limit_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    limit = tl.load(limit_ptr + pid)
    a, b = x, x + 1.0
    steps = 0
    for _ in range(0, limit):
        a, b = b, a + b * 0.5
        steps += 1
    if limit > 2:
        y = a * 2.0
        z = steps * 3
    else:
        y = b - a
        z = steps - 1
    left = limit
    while left > 1:
        left = left // 2
        y += 1.0
        z += left
    tl.store(out_ptr + i, y + z, mask=i < n)


def test_loops_branches_and_while_with_results(isa):
    x = randn(200)
    limits = torch.tensor([0, 1, 5, 2], dtype=torch.int32)
    out = torch.zeros_like(x)
    run(control_kernel, (4,), x, out, limits, 200, BLOCK=64)
    for pid, limit in enumerate(limits.tolist()):
        part = x[pid * 64 : pid * 64 + 64]
        a, b, steps = part, part + 1, 0
        for _ in range(limit):
            a, b, steps = b, a + b * 0.5, steps + 1
        y, z = (a * 2, steps * 3) if limit > 2 else (b - a, steps - 1)
        left = limit
        while left > 1:
            left //= 2
            y, z = y + 1, z + left
        torch.testing.assert_close(out[pid * 64 : pid * 64 + 64], y + z)
