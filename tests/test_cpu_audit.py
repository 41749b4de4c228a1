"""One kernel for each way in which reasoning about masks, addresses and memory could go wrong."""

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

KIND = {torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8", torch.int64: "*i64"}
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def run(kernel, *args, grid=(1,), **constants) -> None:
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = (KIND[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" for arg in args)
    launch(lower(kernel, dict(zip(names, kinds, strict=True)), constants), grid, *args)


@triton.jit
def extreme_bounds_kernel(x_ptr, out_ptr, low, high, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i <= high, other=-1))
    tl.store(out_ptr + N + i, tl.load(x_ptr + i, mask=i >= low, other=-1))
    tl.store(out_ptr + 2 * N + i, tl.load(x_ptr + i, mask=i + 5 < high, other=-1))
    tl.store(out_ptr + 3 * N + i, 7, mask=(high >= i) & (i > low))
    total = tl.load(x_ptr + i, mask=i + 9 <= high, other=0)
    tl.store(out_ptr + 4 * N + i, total * 0 + tl.sum(total, 0))


@pytest.mark.parametrize("low", [INT_MIN, -1, 3, INT_MAX])
@pytest.mark.parametrize("high", [INT_MIN, INT_MIN + 3, -1, 9, 31, INT_MAX - 4, INT_MAX])
def test_bounds_at_the_ends_of_32_bits(low, high):
    x, i = torch.arange(1, 33, dtype=torch.int32), torch.arange(32)
    out = torch.zeros(5, 32, dtype=torch.int32)
    run(extreme_bounds_kernel, x, out, low, high, N=32)
    want = torch.stack(
        [
            torch.where(i <= high, x, -1),
            torch.where(i >= low, x, -1),
            torch.where(i + 5 < high, x, -1),
            torch.where((i <= high) & (i > low), 7, 0),
            torch.where(i + 9 <= high, x, 0).sum().expand(32),
        ]
    )
    assert torch.equal(out, want.to(torch.int32))


@triton.jit
def almost_neutral_kernel(x_ptr, bytes_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    inside = i < n
    unsigned = tl.load(bytes_ptr + i, mask=inside, other=-1).to(tl.uint8, bitcast=True).to(tl.int32)
    tl.store(out_ptr, tl.reduce(unsigned, 0, both))  # past the mask: 255, not -1
    rounded = tl.where(inside, x, 2048.0).to(tl.float16) + 1.0 + 1.0 - 2050.0
    tl.store(out_ptr + 1, tl.sum(rounded.to(tl.float32), 0).to(tl.int32))  # past the mask: 2048 + 1 = 2048 in fp16
    small = tl.where(inside, tl.load(bytes_ptr + i), 64)
    tl.store(out_ptr + 2, tl.sum((small * 4).to(tl.int32), 0))  # past the mask: 64 * 4 = 0 in 8 bits
    truth = tl.where(inside, i < 3, True)
    tl.store(out_ptr + 3, tl.reduce(truth.to(tl.int32), 0, times))
    tl.store(out_ptr + 4, tl.sum(tl.where(inside, x, 0.0) + tl.where(inside, 0.0, 0.5), 0).to(tl.int32))


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def times(a, b):
    return a * b


def test_what_is_almost_neutral_counts():
    x, small = torch.ones(64), torch.full((64,), -1, dtype=torch.int8)
    small[:10] = torch.arange(-5, 5, dtype=torch.int8)
    out = torch.zeros(5, dtype=torch.int32)
    run(almost_neutral_kernel, x, small, out, 10, N=64)
    unsigned = small.view(torch.uint8).to(torch.int32)
    conjunction = 255
    for value in unsigned.tolist():
        conjunction &= value
    rounded = 10 * (1 + 1 + 1 - 2050) + 54 * (2048 - 2050)
    quarters = (small[:10].to(torch.int32) * 4).sum()
    assert out.tolist() == [conjunction, rounded, int(quarters), 0, 10 + 27]


@triton.jit
def far_kernel(x_ptr, out_ptr, step, turns, N: tl.constexpr):
    i = tl.arange(0, N)
    pointers, whole = x_ptr + i, x_ptr + i
    for _ in range(turns):
        pointers += step
        whole += 1 << 30
    back = step.to(tl.int64) * turns
    tl.store(out_ptr + i, tl.load(pointers - back) + tl.load(whole - (turns.to(tl.int64) << 30)))


@pytest.mark.parametrize("turns", [0, 1, 3, 5])
def test_carried_pointers_that_move_past_32_bits(turns):
    x, out = torch.arange(64, dtype=torch.int8), torch.zeros(64, dtype=torch.int8)
    run(far_kernel, x, out, 1 << 30, turns, N=64)
    assert torch.equal(out, 2 * x)


@triton.jit
def division_kernel(x_ptr, y_ptr, out_ptr, scalar, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    defined = (y != 0) & ((x != -2147483648) | (y != -1))
    tl.store(out_ptr + i, tl.where(defined, x // y, 0))
    tl.store(out_ptr + N + i, tl.where(defined, x % y, 0))
    if scalar != 0:
        tl.store(out_ptr + 2 * N + i, x // scalar)
        tl.store(out_ptr + 3 * N + i, i // scalar + i % scalar)
    quotient = (x // scalar) + (i % scalar)
    tl.store(out_ptr + 2 * N + i, quotient, mask=(i < N) & (scalar > 1000))


@pytest.mark.parametrize("scalar", [0, 3])
def test_division_by_zero_in_lanes_that_nobody_looks_at(scalar):
    print("seed 0")
    x = torch.randint(INT_MIN, INT_MAX, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    y = torch.randint(-3, 4, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    x[5], y[5] = INT_MIN, -1
    out = torch.zeros(4, 64, dtype=torch.int32)
    run(division_kernel, x, y, out, scalar, N=64)
    defined = (y != 0) & ((x != INT_MIN) | (y != -1))
    safe, wide = torch.where(defined, y, 1), x.long()
    assert torch.equal(out[0], torch.where(defined, torch.div(wide, safe, rounding_mode="trunc"), 0).int())
    assert torch.equal(out[1], torch.where(defined, torch.fmod(wide, safe), 0).int())
    if scalar:
        i = torch.arange(64)
        assert torch.equal(out[2], torch.div(wide, scalar, rounding_mode="trunc").int())
        assert torch.equal(out[3], (i // scalar + i % scalar).int())
    else:
        assert not out[2:].any()


@triton.jit
def wild_gather_kernel(x_ptr, index_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    index = tl.load(index_ptr + i)
    picked = tl.gather(tl.load(x_ptr + i), index, 0)
    tl.store(out_ptr + i, tl.where((index >= 0) & (index < N), picked, -1))


def test_gathering_from_a_tile_with_wild_indices():
    x, out = torch.arange(100, 164, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    index = torch.arange(63, -1, -1, dtype=torch.int32)
    index[::7] = torch.tensor([-1, 64, INT_MAX, INT_MIN, -(2**24), 2**26, 10**9, -(10**9), 3, 5], dtype=torch.int32)
    run(wild_gather_kernel, x, index, out, N=64)
    inside = (index >= 0) & (index < 64)
    assert torch.equal(out, torch.where(inside, x[index.clamp(0, 63).long()], -1))


@triton.jit
def same_place_kernel(x_ptr, stride, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    one = x_ptr + (i * 0 + j)
    tl.store(one, tl.load(one) + 1)  # M lanes read, then M lanes write the same
    two = x_ptr + N + (i + j)
    tl.store(two, tl.load(two) * 2)
    three = x_ptr + 2 * N + M + (i * stride + j)
    tl.store(three, tl.load(three) + 5)


@pytest.mark.parametrize("stride", [0, 1, 3, 16])
def test_lanes_that_meet_at_an_address_read_before_any_writes(stride):
    x = torch.arange(300, dtype=torch.int32)
    want = x.clone()
    want[:16] += 1
    want[16 : 16 + 16 + 8 - 1] *= 2
    three = sorted({40 + i * stride + j for i in range(8) for j in range(16)})
    want[three] += 5
    run(same_place_kernel, x, stride, M=8, N=16)
    assert torch.equal(x, want)


@triton.jit
def nan_rows_kernel(x_ptr, out_ptr, n, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + j[None, :])
    tl.store(out_ptr + i, tl.max(x, 1))
    tl.store(out_ptr + M + i, tl.min(x, 1))
    masked = tl.load(x_ptr + i[:, None] * N + j[None, :], mask=j[None, :] < n, other=float("-inf"))
    tl.store(out_ptr + 2 * M + i, tl.max(masked, 1))
    tl.store(out_ptr + 3 * M + i, tl.max(x, 0) if M == N else tl.max(x, 1))


@pytest.mark.parametrize("n", [0, 10, 16])
def test_the_maximum_of_nothing_but_nan_is_nan(n):
    x = torch.arange(256.0).reshape(16, 16)
    x[3], x[:, 5], x[4, 2:9] = torch.nan, torch.nan, torch.nan
    out = torch.zeros(4, 16)
    run(nan_rows_kernel, x, out, n, M=16, N=16)
    masked = x.clone()
    masked[:, n:] = -torch.inf

    def most(values, sign=1):
        best = torch.where(values.isnan(), -torch.inf, values * sign).amax(1) * sign
        return torch.where(values.isnan().all(1), torch.nan, best)

    want = torch.stack([most(x), most(x, -1), most(masked), most(x.T)])
    torch.testing.assert_close(out, want, equal_nan=True, rtol=0, atol=0)


@triton.jit
def deep_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    for _ in tl.static_range(24):
        x = tl.where(x > 0, x * x + x, x - i)
        i = i + i - i
    tl.store(out_ptr + i, tl.sum(x, 0) + x, mask=i < n)


def test_values_used_many_times_over_are_looked_at_once():
    x, out, i = torch.arange(-20, 44, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), torch.arange(64).int()
    run(deep_kernel, x, out, 60, N=64)
    want = torch.where(i < 60, x, 0)
    for _ in range(24):
        want = torch.where(want > 0, want * want + want, want - i)
    assert torch.equal(out, torch.where(i < 60, want + want.sum().int(), 0))


@triton.jit
def nothing_loaded_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    wide = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + i, mask=i < -3).to(tl.float64, bitcast=True)
    x = tl.load(x_ptr + i, mask=i < -3).to(tl.uint8, bitcast=True)
    tl.store(out_ptr + i, wide.to(tl.int32) + x.to(tl.int32) + x.to(tl.float32).to(tl.int32) + (x >> 1).to(tl.int32))


@pytest.mark.parametrize("size", [1, 16])
def test_a_mask_that_never_holds_makes_zeros_of_any_type(size):
    out = torch.ones(16, dtype=torch.int32)
    run(nothing_loaded_kernel, torch.zeros(0, dtype=torch.int8), out, N=size)
    assert not out[:size].any()
