"""Atomics on the CPU target: every operation and type, blocks and scalars, from many programs at once."""

import operator

import pytest
import torch
import triton
import triton.language as tl
from effc.compiler.errors import UnsupportedKernel

from .on_cpu import randint, run

UPDATES = {"add": operator.add, "max": max, "min": min, "and": operator.and_, "or": operator.or_, "xor": operator.xor}
INTEGERS = (torch.int32, torch.uint32, torch.int64, torch.uint64)


@triton.jit
def update_kernel(x_ptr, places_ptr, values_ptr, old_ptr, n, S: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    j = tl.load(places_ptr + i, mask=mask, other=1 << 30)
    value = tl.load(values_ptr + i, mask=mask)
    tl.atomic_add(x_ptr + j, value, mask=mask)
    tl.atomic_max(x_ptr + S + j, value, mask=mask, sem="relaxed")
    tl.atomic_min(x_ptr + 2 * S + j, value, mask=mask, scope="cta")
    tl.store(old_ptr + i, tl.atomic_xchg(x_ptr + 3 * S + j, value, mask=mask), mask=mask)
    if not FLOAT:
        tl.atomic_and(x_ptr + 4 * S + j, value, mask=mask)
        tl.atomic_or(x_ptr + 5 * S + j, value, mask=mask)
        tl.atomic_xor(x_ptr + 6 * S + j, value, mask=mask)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float64])
def test_programs_update_the_same_elements(dtype):
    s, n, signed = 7, 90, dtype not in (torch.uint32, torch.uint64)
    low = -20 if signed else 0
    x, values = randint(low, 20, (7, s), dtype=dtype), randint(low, 20, (n,), dtype=dtype, seed=1)
    places, old = randint(0, s, (n,), seed=2), torch.zeros(n, dtype=dtype)
    start = x.clone()
    run(update_kernel, (6,), x, places, values, old, n, S=s, FLOAT=dtype.is_floating_point, BLOCK=16)
    for row, name in enumerate(("add", "max", "min")):
        assert x[row].tolist() == expected(start[row], places, values, name)
    for j in range(s):  # an exchange loses nothing: what was there and all that came, but what is there now
        came = sorted([start[3, j].item(), *values[places == j].tolist()])
        assert sorted([x[3, j].item(), *old[places == j].tolist()]) == came
    for row, name in ((4, "and"), (5, "or"), (6, "xor")):
        assert x[row].tolist() == (
            start[row].tolist() if dtype.is_floating_point else expected(start[row], places, values, name)
        )


def expected(start, places, values, name):
    result = start.tolist()
    for place, value in zip(places.tolist(), values.tolist(), strict=True):
        result[place] = UPDATES[name](result[place], value)
    return result


@triton.jit
def half_kernel(x_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(old_ptr + i, tl.atomic_add(x_ptr + i // 4, i.to(x_ptr.dtype.element_ty)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_rounded_at_each_update(dtype):
    x, old = torch.tensor([256.0, 1.5, 0, -3], dtype=dtype), torch.zeros(16, dtype=dtype)
    want, was = x.clone(), torch.zeros(16, dtype=dtype)
    for i in range(16):
        was[i] = want[i // 4]
        want[i // 4] += i
    run(half_kernel, (1,), x, old, BLOCK=16)
    assert torch.equal(x, want)
    assert torch.equal(old, was)


@triton.jit
def lock_kernel(lock_ptr, x_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
        pass
    tl.store(x_ptr, tl.load(x_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0, sem="release")
    ticket = tl.atomic_add(x_ptr + 1, 1)
    tl.atomic_max(x_ptr + 2, ticket)


def test_a_lock_keeps_programs_apart(isa):
    lock, x = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    run(lock_kernel, (200,), lock, x)
    assert x.tolist() == [200, 200, 199]


@triton.jit
def exchange_where_equal_kernel(x_ptr, old_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(old_ptr + i, tl.atomic_cas(x_ptr + i, tl.full([BLOCK], 3, tl.int64), i + tl.full([BLOCK], 9, tl.int64)))


def test_compare_and_swap_of_a_block():
    x, old = randint(0, 5, (16,), dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    start = x.clone()
    run(exchange_where_equal_kernel, (1,), x, old, BLOCK=16)
    assert torch.equal(old, start)
    assert torch.equal(x, torch.where(start == 3, 9 + torch.arange(16), start))


@triton.jit
def load_and_store_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_store(out_ptr + i, tl.atomic_load(x_ptr + i, mask=i < 10, sem="relaxed") + 1, mask=i < 10)
    tl.atomic_store(out_ptr + 12, tl.atomic_load(x_ptr + 3))


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="this Triton has no atomic_load")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_atomic_loads_and_stores(dtype):
    x, out = randint(-9, 9, (16,), dtype=dtype), torch.zeros(16, dtype=dtype)
    run(load_and_store_kernel, (1,), x, out, BLOCK=16)
    assert torch.equal(out, torch.cat([x[:10] + 1, torch.zeros(2, dtype=dtype), x[3:4], torch.zeros(3, dtype=dtype)]))


@triton.jit
def poll_kernel(x_ptr):
    tl.atomic_poll(x_ptr, 1)


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no atomic_poll")
def test_waiting_for_another_program_is_refused():
    with pytest.raises(UnsupportedKernel, match=r"test_cpu_atomics\.py:\d+: tt\.atomic_poll"):
        run(poll_kernel, (1,), torch.zeros(1, dtype=torch.int32))


@triton.jit
def atomic_kernel(x_ptr, total_ptr, best_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(total_ptr + i % 4, x.to(tl.float32), mask=i < n)
    tl.atomic_max(best_ptr, tl.max(x, 0))


def test_atomics():
    x = torch.randint(0, 1000, (1000,), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    total, best = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    run(atomic_kernel, (16,), x, total, best, 1000, BLOCK=64)
    assert torch.equal(total, x.view(250, 4).sum(0).float())
    assert best.item() == x.max().item()
