"""Arithmetic and math of `triton.language` on the CPU target: errors in ulp, special values, all integers."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .on_cpu import run, run_over, some_slow

COLUMNS = 256


@triton.jit
def functions_kernel(x_ptr, a, b, c, d, e, f, g, h, p, q, r, s, t, u, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(a + i, tl.exp(x), mask=mask)
    tl.store(b + i, tl.exp2(x), mask=mask)
    tl.store(c + i, tl.log(x), mask=mask)
    tl.store(d + i, tl.log2(x), mask=mask)
    tl.store(e + i, tl.sin(x), mask=mask)
    tl.store(f + i, tl.cos(x), mask=mask)
    tl.store(g + i, tl.erf(x), mask=mask)
    tl.store(h + i, libdevice.tanh(x), mask=mask)
    tl.store(p + i, tl.sqrt(x), mask=mask)
    tl.store(q + i, tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x), mask=mask)
    tl.store(r + i, tl.rsqrt(x), mask=mask)
    tl.store(s + i, tl.floor(x), mask=mask)
    tl.store(t + i, tl.ceil(x), mask=mask)
    tl.store(u + i, tl.abs(x), mask=mask)


ULPS = {"exp": 2, "exp2": 2, "log": 2, "log2": 2, "sin": 2, "cos": 2, "erf": 2, "tanh": 2, "sqrt": 0.5, "sqrt_rn": 0.5}
ULPS |= {"rsqrt": 1.5, "floor": 0, "ceil": 0, "abs": 0}
SUBNORMAL_IS_ZERO = ("exp", "exp2")


def arguments() -> torch.Tensor:
    """Any float32 by its bits, ranges where functions turn, and special values."""
    generator = torch.Generator().manual_seed(0)
    print("seed 0")

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(1 << 13, generator=generator) * (high - low) + low

    bits = torch.randint(-(2**31), 2**31, (1 << 17,), generator=generator).int().view(torch.float32)
    ranges = [
        uniform(*ends) for ends in ((-1, 1), (-9, 9), (-110, 110), (-160, 160), (0.5, 2), (0.999, 1.001), (-2e6, 2e6))
    ]
    special = [0.0, 1e-45, 1e-38, 1.0, 0.5, 2.5, 88.7, 89.0, 128.0, 150.0, 2.0**23, 2.0**31, 3.4e38, math.inf, math.nan]
    return torch.cat([bits, *ranges, torch.tensor(special), -torch.tensor(special)])


def ulps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """|got - want| in units of got's last place, for finite `want` (float64)."""
    bits, least = (24, -126) if got.dtype == torch.float32 else (53, -1022)
    exponent = torch.frexp(want)[1].clamp_min(least + 1)
    return (got.double() - want).abs() / torch.ldexp(torch.ones_like(want), exponent - bits)


def test_fp32_functions_of_any_argument(outer_isa):
    x = arguments()
    outs = [torch.zeros_like(x) for _ in ULPS]
    run_over(functions_kernel, x, *outs)
    wide = x.double()
    for (name, bound), got in zip(ULPS.items(), outs, strict=True):
        function = {"sqrt_rn": torch.sqrt}.get(name) or getattr(torch, name)
        want = function(wide)
        single = want.float()
        if name in SUBNORMAL_IS_ZERO:
            small = want.abs() < 2.0**-126
            assert (got[small] <= 2.0**-126).all(), name
            want = torch.where(small, got.double(), want)
        finite = single.isfinite()
        same = (got == single) | (got.isnan() & single.isnan())
        assert same[~finite].all(), (name, x[~finite][~same[~finite]][:3])
        error = ulps(got, want)[finite]
        assert error.max() <= bound, f"{name}({x[finite][error.argmax()].item()!r}): {error.max():.2f} ulp"
        zero = finite & (single == 0) & (want == 0)
        assert torch.equal(torch.signbit(got[zero]), torch.signbit(single[zero])), name


def test_fp64_functions(outer_isa):
    x = arguments()[::7].double() * (1 + 2.0**-30)
    outs = [torch.zeros_like(x) for _ in ULPS]
    run_over(functions_kernel, x, *outs)
    for name, got in zip(ULPS, outs, strict=True):
        want = ({"sqrt_rn": torch.sqrt}.get(name) or getattr(torch, name))(x)
        finite = want.isfinite()
        assert torch.equal(got[~finite].nan_to_num(1.5), want[~finite].nan_to_num(1.5)), name
        assert ulps(got, want)[finite].max() <= 2, name  # both are a C library's, within 1 ulp


@triton.jit
def binary_kernel(x_ptr, y_ptr, a, b, c, d, e, f, g, h, p, q, r, s, t, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask)
    tl.store(a + i, tl.maximum(x, y), mask=mask)
    tl.store(b + i, tl.minimum(x, y), mask=mask)
    tl.store(c + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    tl.store(d + i, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    tl.store(e + i, tl.clamp(x, -1.0, 2.0), mask=mask)
    tl.store(f + i, tl.clamp(x, -1.0, 2.0, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    tl.store(g + i, x / y, mask=mask)
    tl.store(h + i, tl.fdiv(x, y), mask=mask)
    tl.store(p + i, tl.div_rn(x, y) if x.dtype == tl.float32 else x / y, mask=mask)
    tl.store(q + i, x % y, mask=mask)
    product = x * y
    tl.store(r + i, product, mask=mask)
    tl.store(s + i, tl.fma(x, y, -product), mask=mask)
    tl.store(t + i, tl.sub(tl.add(tl.mul(x, 1.0), y), y), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_binary_operations_and_nan(dtype, outer_isa):
    special = torch.tensor([0.0, -0.0, 1.0, -1.5, 7.0, 1e30, math.inf, -math.inf, math.nan], dtype=dtype)
    pairs = torch.cartesian_prod(special, special)
    noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1), dtype=dtype) * 10
    print("seed 1")
    x, y = torch.cat([pairs[:, 0], noise[0]]), torch.cat([pairs[:, 1], noise[1]])
    outs = [torch.zeros_like(x) for _ in range(13)]
    run_over(binary_kernel, x, y, *outs)
    product = x * y
    wants = [torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), torch.minimum(x, y)]
    wants += [torch.where(x.isnan(), -1.0, x).clamp(-1, 2), x.clamp(-1, 2), x / y, x / y, x / y, torch.fmod(x, y)]
    wants += [product, error_of_product(x, y), (x + y) - y]
    for k, (got, want) in enumerate(zip(outs, wants, strict=True)):
        assert torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0)), k
        assert torch.equal(got.isnan(), want.isnan()), k


def error_of_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x * y less its rounded value, exactly."""
    from fractions import Fraction

    rest = []
    for a, b, p in zip(x.tolist(), y.tolist(), (x * y).tolist(), strict=True):
        if math.isfinite(p):
            rest.append(float(Fraction(a) * Fraction(b) - Fraction(p)))
        else:
            rest.append(math.nan if not (math.isfinite(a) and math.isfinite(b)) else -p)
    return torch.tensor(rest, dtype=x.dtype)


@triton.jit
def integer_kernel(x_ptr, y_ptr, z_ptr, a, b, c, d, e, f, g, h, p, q, r, s, t, u, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask, other=1)
    z = tl.load(z_ptr + i, mask=mask)
    tl.store(a + i, x + y, mask=mask)
    tl.store(b + i, x - y, mask=mask)
    tl.store(c + i, x * y, mask=mask)
    tl.store(d + i, x // y, mask=mask)
    tl.store(e + i, x % y, mask=mask)
    tl.store(f + i, x << z, mask=mask)
    tl.store(g + i, x >> z, mask=mask)
    tl.store(h + i, tl.maximum(x, y), mask=mask)
    tl.store(p + i, tl.minimum(x, y), mask=mask)
    tl.store(q + i, (x < y) | (x >= z), mask=mask)
    tl.store(r + i, ~x ^ (x & y), mask=mask)
    tl.store(s + i, tl.where(x != y, -x, tl.abs(x)), mask=mask)
    tl.store(t + i, (x // 3) * 2 + x % 10 + (x >> 1) - (x << 3), mask=mask)
    one = tl.load(x_ptr)  # a scalar
    tl.store(u + i, one // 3 + one % 5 + (one >> 2) + (one << 1) + tl.maximum(one, 3), mask=mask)


def c_divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
QUICK = (torch.int8, torch.uint16, torch.int32, torch.uint64)


@pytest.mark.parametrize("dtype", some_slow(INTEGERS, QUICK), ids=str)
def test_integers_of_every_width(dtype, outer_isa):
    bits, low = torch.iinfo(dtype).bits, torch.iinfo(dtype).min

    def wrap(v: int) -> int:
        return (v - low) % 2**bits + low

    noise = np.random.default_rng(bits)
    print(f"seed {bits}")
    size = 700
    rows = [
        [
            wrap(int(v) >> int(s))
            for v, s in zip(
                noise.integers(2**64, size=size, dtype=np.uint64), noise.integers(64, size=size), strict=True
            )
        ]
        for _ in range(2)
    ]
    xs, ys = rows[0], [v or 1 for v in rows[1]]
    xs[:6], ys[:6] = [low, wrap(low - 1), low, 0, wrap(low - 1), 5], [1, 1, wrap(low - 1), 5, wrap(low - 1), 7]
    pairs = [(x, y) if wrap(-1) > 0 or (x, y) != (low, -1) else (x, 1) for x, y in zip(xs, ys, strict=True)]
    xs, ys = zip(*pairs, strict=True)
    zs = [k % bits for k in range(size)]
    x, y, z = (torch.tensor(v, dtype=dtype) for v in (xs, ys, zs))
    outs = [torch.zeros(size, dtype=torch.bool if k == 9 else dtype) for k in range(14)]
    run_over(integer_kernel, x, y, z, *outs)
    one = xs[0]
    for k, (a, b, s) in enumerate(zip(xs, ys, zs, strict=True)):
        quotient = c_divide(a, b)
        want = [a + b, a - b, a * b, quotient, a - quotient * b, a << s, a >> s, max(a, b), min(a, b)]
        want += [a < b or a >= s, ~a ^ (a & b), -a if a != b else abs(a)]
        want += [c_divide(a, 3) * 2 + a - c_divide(a, 10) * 10 + (a >> 1) - (a << 3)]
        want += [c_divide(one, 3) + one - c_divide(one, 5) * 5 + (one >> 2) + (one << 1) + max(one, 3)]
        got = [out[k].item() for out in outs]
        assert got == [bool(w) if j == 9 else wrap(int(w)) for j, w in enumerate(want)], (a, b, s)


@triton.jit
def undefined_kernel(x_ptr, y_ptr, q_ptr, r_ptr, left_ptr, right_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask)
    tl.store(q_ptr + i, x // y, mask=mask)
    tl.store(r_ptr + i, x % y, mask=mask)
    tl.store(left_ptr + i, x << y, mask=mask)
    tl.store(right_ptr + i, x >> y, mask=mask)
    one, zero = tl.load(x_ptr), tl.load(y_ptr)
    tl.store(q_ptr + n, one // zero + one % zero)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint32, torch.int64], ids=str)
def test_division_by_zero_and_long_shifts_do_not_trap(dtype, outer_isa):
    low, bits = torch.iinfo(dtype).min, torch.iinfo(dtype).bits
    x = torch.tensor([low, low, 5, 5, 5, 100], dtype=dtype)
    y = torch.tensor([0, -1 if low else 3, 0, bits, bits + 1, 127], dtype=dtype)
    q, r, left, right = (torch.zeros(7, dtype=dtype) for _ in range(4))
    run_over(undefined_kernel, x, y, q, r, left, right)
    assert left[3:6].tolist() == [0, 0, 0]
    assert right[3:6].tolist() == [0, 0, 0]


@triton.jit
def high_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    high = tl.umulhi(tl.load(x_ptr + i, mask=mask), tl.load(y_ptr + i, mask=mask))
    tl.store(out_ptr + i, high + tl.umulhi(tl.load(x_ptr), tl.load(y_ptr)), mask=mask)


@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint64, torch.int32, torch.int64], ids=str)
def test_umulhi(dtype, outer_isa):
    bits = torch.iinfo(dtype).bits
    x, y = (np.random.default_rng(seed).integers(2**bits, size=300, dtype=f"uint{bits}") for seed in (1, 2))
    print("seeds 1, 2")
    out = torch.zeros(300, dtype=dtype)
    run_over(high_kernel, torch.from_numpy(x).view(dtype), torch.from_numpy(y).view(dtype), out)
    high = [int(a) * int(b) >> bits for a, b in zip(x, y, strict=True)]
    assert out.numpy().view(f"uint{bits}").tolist() == [(h + high[0]) % 2**bits for h in high]


@triton.jit
def helpers_kernel(x_ptr, s_ptr, m_ptr, z_ptr, c_ptr, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(s_ptr + at, tl.sigmoid(x))
    tl.store(m_ptr + at, tl.softmax(x, 1, keep_dims=True))
    tl.store(z_ptr + at, tl.zeros_like(x))
    tl.store(c_ptr, tl.cdiv(n, 7))


def test_helpers_of_the_standard_library(outer_isa):
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(3))
    print("seed 3")
    s, m, z, c = torch.zeros_like(x), torch.zeros_like(x), torch.ones_like(x), torch.zeros(1, dtype=torch.int32)
    run(helpers_kernel, (1,), x, s, m, z, c, 50, ROWS=4, COLUMNS=COLUMNS)
    torch.testing.assert_close(s, x.sigmoid(), rtol=4e-7, atol=0)
    torch.testing.assert_close(m, x.softmax(1), rtol=2e-6, atol=0)
    assert not z.any()
    assert c.item() == 8


@triton.jit
def expect_zero_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, tl.expect_zero(x, x < -1e30), mask=i < n)


@pytest.mark.skipif(not hasattr(tl, "expect_zero"), reason="this Triton has no expect_zero")
def test_expect_zero_keeps_values():
    x = torch.randn(100, generator=torch.Generator().manual_seed(4))
    print("seed 4")
    out = torch.zeros(100)
    run_over(expect_zero_kernel, x, out)
    assert torch.equal(out, x)
