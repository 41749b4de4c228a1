"""Kernels made to catch a CPU target that moves loads, clips loops or reuses arrays where it may not."""

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

from .on_cpu import randn, run


@triton.jit
def two_masks_kernel(x_ptr, a_ptr, b_ptr, sum_ptr, n, m, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    e = tl.exp(tl.load(x_ptr + i, mask=i < n, other=0.0))
    tl.store(a_ptr + i, e, mask=i < m)
    tl.store(b_ptr + i, e)
    tl.store(sum_ptr, tl.sum(tl.where(i < m, e, 0.0), 0))


def test_an_array_is_filled_as_far_as_any_consumer_reads(isa):
    x, a, b, total = randn(100), torch.zeros(256), torch.zeros(256), torch.zeros(1)
    run(two_masks_kernel, (1,), x, a, b, total, 100, 33, BLOCK=256)
    want = torch.cat([x.exp(), torch.ones(156)])
    torch.testing.assert_close(b, want)
    torch.testing.assert_close(a, torch.cat([want[:33], torch.zeros(223)]))
    torch.testing.assert_close(total[0], want[:33].sum())


@triton.jit
def not_neutral_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    ones = tl.load(x_ptr + i, mask=i < n, other=1.0)
    zeros = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr, tl.sum(ones, 0))
    tl.store(out_ptr + 1, tl.max(zeros, 0))
    tl.store(out_ptr + 2, tl.min(ones, 0))
    tl.store(out_ptr + 3, tl.sum(zeros + 1.0, 0))
    tl.store(out_ptr + 4, tl.sum(ones * zeros, 0))
    tl.store(out_ptr + 5, tl.sum(tl.where((i < n) | (i > 200), ones, 0.0), 0))


def test_masked_elements_that_are_not_neutral_are_counted(isa):
    x, out = -randn(100).abs() - 2, torch.zeros(6)
    run(not_neutral_kernel, (1,), x, out, 100, BLOCK=256)
    s = x.sum()
    want = torch.tensor([s + 156, 0.0, x.min(), s + 256, (x * x).sum(), s + 55])
    torch.testing.assert_close(out, want)


@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    offsets = r[:, None] * columns + c[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf"))
    e = tl.where(mask, tl.exp(x - tl.max(x, 1)[:, None]), 0.0)
    tl.store(out_ptr + offsets, e / tl.sum(e, 1)[:, None], mask=mask)


@pytest.mark.parametrize("columns", [7, 64, 100])
def test_softmax_in_place(columns, isa):
    x = randn(10, columns)
    want = x.softmax(-1)
    run(row_softmax_kernel, (3,), x, x, 10, columns, BR=4, BC=128)
    torch.testing.assert_close(x, want)


@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr):
    row = tl.program_id(0) * 2 * HALF
    c = tl.arange(0, HALF)
    a, b = tl.load(x_ptr + row + c), tl.load(x_ptr + row + HALF + c)
    cos, sin = tl.load(cos_ptr + c), tl.load(sin_ptr + c)
    tl.store(x_ptr + row + c, a * cos - b * sin)
    tl.store(x_ptr + row + HALF + c, b * cos + a * sin)


def test_rotating_halves_in_place(isa):
    x, angle = randn(5, 64), randn(32, seed=1)
    a, b = x.chunk(2, -1)
    want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    run(rope_kernel, (5,), x, angle.cos(), angle.sin(), HALF=32)
    torch.testing.assert_close(x, want)


@triton.jit
def loop_writes_kernel(x_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    start = tl.load(x_ptr + i)
    first = tl.load(x_ptr)
    for step in range(steps):
        now = tl.load(x_ptr + i)
        tl.store(x_ptr + i, now + start * first)
        if step > 1:
            tl.store(x_ptr + (i + step) % BLOCK, now - start)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + start)


def test_loads_before_a_loop_keep_their_values_while_it_writes(isa):
    x, out = randn(64), torch.zeros(64)
    memory, start = x.clone(), x.clone()
    i = torch.arange(64)
    for step in range(4):
        now = memory.clone()
        memory = now + start * start[0]
        if step > 1:
            memory[(i + step) % 64] = now - start
    run(loop_writes_kernel, (1,), x, out, 4, BLOCK=64)
    torch.testing.assert_close(x, memory)
    torch.testing.assert_close(out, memory + start)


@triton.jit
def nested_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    state = tl.load(x_ptr + i)
    for a in range(n):
        inner = state
        last = total
        for b in range(a + 1):
            inner, last = last + 1.0, inner * 0.5 + b
            if b % 2 == 1:
                inner += state
        total += inner
        state, total = total, state + last
    tl.store(out_ptr + i, state - total)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_nested_loops_that_swap_their_tensors(n, isa):
    x, out = randn(64), torch.zeros(64)
    total, state = torch.zeros(64), x
    for a in range(n):
        inner, last = state, total
        for b in range(a + 1):
            inner, last = last + 1.0, inner * 0.5 + b
            if b % 2 == 1:
                inner = inner + state
        total = total + inner
        state, total = total, state + last
    run(nested_kernel, (1,), x, out, n, BLOCK=64)
    torch.testing.assert_close(out, state - total)


@triton.jit
def dot_state_kernel(x_ptr, out_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    offsets = i[:, None] * B + i[None, :]
    x = tl.load(x_ptr + offsets)
    acc = x
    before = x * 2.0
    for _ in range(n):
        before = acc
        acc = tl.dot(x, acc, acc, input_precision="ieee")
        acc = acc * 0.25 + tl.trans(before)
    tl.store(out_ptr + offsets, acc - before)


def test_a_dot_does_not_overwrite_a_carried_tensor_that_is_read_later(isa):
    x, out = randn(16, 16), torch.zeros(16, 16)
    acc, before = x, x * 2
    for _ in range(3):
        before = acc
        acc = (x @ acc + acc) * 0.25 + before.T
    run(dot_state_kernel, (1,), x, out, 3, B=16)
    torch.testing.assert_close(out, acc - before, rtol=1e-4, atol=1e-4)


@triton.jit
def guarded_kernel(x_ptr, out_ptr, flag, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = flag > 0
    x = tl.load(x_ptr + i, mask=(i < n) & on, other=3.0)
    y = tl.load(x_ptr + i, mask=(i >= 5) & (i < n - 3) & ((i % 3) != 1), other=-1.0)
    tl.store(out_ptr + i, x + y, mask=(i < n) & (i % 7 != 2))


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("n", [1, 16, 50, 63])
def test_masks_of_all_kinds(flag, n, isa):
    x, out = randn(64), torch.full((64,), 9.0)
    run(guarded_kernel, (2,), x, out, flag, n, BLOCK=32)
    i = torch.arange(64)
    a = x if flag else torch.full_like(x, 3.0)
    b = torch.where((i >= 5) & (i < n - 3) & (i % 3 != 1), x, -1.0)
    torch.testing.assert_close(out, torch.where((i < n) & (i % 7 != 2), a + b, 9.0))


@triton.jit
def strided_kernel(x_ptr, out_ptr, stride_r, stride_c, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r, c = tl.arange(0, BR), tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * stride_r + c[None, :] * stride_c, mask=mask, other=0.0)
    tl.store(out_ptr + c[None, :] * rows + r[:, None], x, mask=mask)


def test_runtime_strides(isa):
    x = randn(20, 30)
    out = torch.zeros(10, 13)
    view = x[3:16, ::3]
    run(strided_kernel, (1,), view, out, view.stride(0), view.stride(1), 13, 10, BR=16, BC=16)
    assert torch.equal(out, view.T)


@triton.jit
def names_kernel(x_ptr, out_ptr, load, store, BLOCK: tl.constexpr):
    pid_x, num_x = tl.program_id(0), tl.num_programs(0)
    mask = load > store
    span = pid_x * BLOCK
    select = span + tl.arange(0, BLOCK)
    clip = tl.where(select > 5, 1.0, 2.0)
    int_ = load - store
    if mask:
        clip += num_x + int_
    tl.store(out_ptr + select, tl.load(x_ptr + select, mask=select < load) * clip, mask=select < load)


def test_variables_may_be_called_like_the_preludes_functions(isa):
    x, out = randn(50), torch.zeros(50)
    run(names_kernel, (2,), x, out, 50, 3, BLOCK=32)
    torch.testing.assert_close(out, x * (torch.where(torch.arange(50) > 5, 1.0, 2.0) + 49))


@triton.jit
def far_kernel(x_ptr, w_ptr, out_ptr, start, stride, N: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, N)
    at = (start + i).to(tl.int64)
    x = tl.load(x_ptr + at[:, None] * stride + j[None, :])
    w = tl.load(w_ptr + i[:, None] * N + j[None, :])
    again = tl.load(x_ptr + (start + i)[:, None].to(tl.int64) * stride + (j[None, :] + 0 * i[:, None]))
    tl.store(out_ptr + i[:, None] * N + j[None, :], tl.dot(w, x, input_precision="ieee") + again)


def test_offsets_past_32_bits(isa):
    x, w, out = randn(16, 16), randn(16, 16, seed=1), torch.zeros(16, 16)
    start, stride = 3 << 20, 4096 + 16
    wide = torch.zeros(16, stride)
    wide[:, :16] = x
    base = wide.data_ptr() - 4 * start * stride
    signature = {"x_ptr": "*fp32", "w_ptr": "*fp32", "out_ptr": "*fp32", "start": "i32", "stride": "i32"}
    launch(lower(far_kernel, signature, {"N": 16}), (1,), base, w, out, start, stride)
    torch.testing.assert_close(out, w @ x + x, rtol=1e-4, atol=1e-4)


@triton.jit
def one_element_kernel(x_ptr, out_ptr, n):
    x = tl.load(x_ptr + tl.arange(0, 1)) * 2.0
    if n > 0:
        tl.store(out_ptr, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.sum(x, 0))


@pytest.mark.parametrize("n", [0, 1])
def test_an_array_made_in_a_branch_is_made_again_after_it(isa, n):
    x, out = randn(1), torch.zeros(2)
    run(one_element_kernel, (1,), x, out, n)
    torch.testing.assert_close(out, torch.stack([x[0] * 2 * n, x[0] * 2]))


@triton.jit
def shift_in_place_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x * 2.0, mask=i < n)


@pytest.mark.parametrize("shift", [0, 1, -1, 16, 40])
def test_a_store_that_overlaps_its_load_sees_the_old_values(shift, isa):
    buffer = randn(300)
    x, out = buffer[100 : 100 + 130], buffer[100 + shift : 230 + shift]
    want = x.clone() * 2
    run(shift_in_place_kernel, (1,), x, out, 130, BLOCK=256)
    assert torch.equal(out, want)


@triton.jit
def two_stores_kernel(x_ptr, y_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(a_ptr + i, x + y)
    tl.store(b_ptr + i, x - y)
    later = tl.load(a_ptr + i)
    tl.store(a_ptr + i, later * 2)


def test_a_load_before_a_store_is_not_moved_past_it(isa):
    x, y = randn(64), randn(64, seed=1)
    x0, y0 = x.clone(), y.clone()
    run(two_stores_kernel, (1,), x, y, x, y, BLOCK=64)
    assert torch.equal(x, (x0 + y0) * 2)
    assert torch.equal(y, x0 - y0)


@triton.jit
def rotate_rows_kernel(x_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    for _ in range(3):
        x = tl.load(x_ptr + (i + 1) % n)
        tl.store(x_ptr + i, x)


def test_stores_in_a_loop_come_before_the_next_turns_loads():
    x = randn(64)
    want = x.roll(-3)
    run(rotate_rows_kernel, (1,), x, n=64)
    assert torch.equal(x, want)
