"""Scalars beside blocks on the CPU target: the same expression over one element and over many, for every type."""

import math

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

from .on_cpu import run, some_slow

INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
QUICK = (torch.int8, torch.uint16, torch.int64, torch.bfloat16, torch.float32)


@triton.jit
def integer_both_ways(x, y):
    a = tl.where(x > y, x, 3) + tl.where(x == 7, 1, y)
    b = tl.maximum(x, 5) // 3 + tl.minimum(y, 100) % 7
    c = (x >> 1) ^ (y << 2) | (x & 15)
    d = (x < 9).to(x.dtype) + (y != x).to(x.dtype) * 2
    e = tl.where((x >= 3) & (y <= 50) | ~(x != y), a, b)
    return a + b * c - d + e + (-x) + tl.abs(x)


@triton.jit
def float_both_ways(x, y):
    a = tl.where(x > y, x, 3.0) + tl.where(x == 7.0, 1.0, y)
    b = tl.maximum(x, 0.5) / 3 + tl.minimum(y, 100.0) % 7
    c = tl.clamp(x, -1.0, 1.0) * tl.abs(y) - (-x)
    d = (x < 9).to(x.dtype) + (y != x).to(x.dtype) * 2
    e = tl.where((x >= 3) & (y <= 50) | (x != y), a, b)
    f = tl.where(x != x, float("inf"), x) + tl.where(y == float("-inf"), 0.0, y)
    return (a + b * c - d + e + f + x.to(tl.int32) + tl.fma(x, y, x)).to(x.dtype)


@triton.jit
def scalars_kernel(x_ptr, y_ptr, block_ptr, scalar_ptr, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(block_ptr + i, FUNCTION(tl.load(x_ptr + i), tl.load(y_ptr + i)))
    for k in range(SIZE):
        tl.store(scalar_ptr + k, FUNCTION(tl.load(x_ptr + k), tl.load(y_ptr + k)))


@pytest.mark.parametrize("dtype", some_slow([*INTEGERS, *FLOATS], QUICK), ids=str)
def test_scalars_and_blocks_agree(dtype, outer_isa):
    generator = torch.Generator().manual_seed(5)
    print("seed 5")
    if dtype in INTEGERS:
        x, y = (torch.randint(0, 120, (64,), generator=generator).to(dtype) for _ in range(2))
        low = torch.iinfo(dtype).min
        x = x - 60 if low else x
        x[:3] = torch.tensor([torch.iinfo(dtype).max, low, 7]).to(dtype) if dtype != torch.uint64 else 7
    else:
        x, y = ((torch.randn(64, generator=generator) * 10).to(dtype) for _ in range(2))
        x[:5] = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 7.0], dtype=dtype)
        y[3:6] = torch.tensor([-math.inf, math.nan, 1.0], dtype=dtype)
    block, scalar = torch.zeros_like(x), torch.zeros_like(x)
    function = integer_both_ways if dtype in INTEGERS else float_both_ways
    run(scalars_kernel, (1,), x, y, block, scalar, FUNCTION=function, SIZE=64)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    number = ~scalar.isnan() if dtype in FLOATS else torch.ones(64, dtype=torch.bool)
    assert torch.equal(block.view(bits)[number], scalar.view(bits)[number])
    if dtype in FLOATS:
        assert torch.equal(block.isnan(), scalar.isnan())
        assert number.sum() > 50


@triton.jit
def arguments_kernel(out_ptr, a, b, c, d, e, f, g, h):
    tl.store(out_ptr, a.to(tl.float64))
    tl.store(out_ptr + 1, b.to(tl.float64))
    tl.store(out_ptr + 2, c.to(tl.float64))
    tl.store(out_ptr + 3, d.to(tl.float64))
    tl.store(out_ptr + 4, e.to(tl.float64))
    tl.store(out_ptr + 5, (f // 3).to(tl.float64))
    tl.store(out_ptr + 6, g.to(tl.float64))
    tl.store(out_ptr + 7, tl.where(h, 1.5, 2.5))


def test_arguments_of_every_kind():
    kinds = {"a": "i8", "b": "i16", "c": "i32", "d": "i64", "e": "fp32", "f": "u32", "g": "fp64", "h": "i1"}
    out = torch.zeros(8, dtype=torch.float64)
    kernel = lower(arguments_kernel, {"out_ptr": "*fp64"} | kinds, {})
    launch(kernel, (1,), out, -5, -300, 70000, 2**40, 0.5, 9, 1e300, True)
    assert out.tolist() == [-5, -300, 70000, 2**40, 0.5, 3, 1e300, 1.5]


@triton.jit
def compare_kernel(x_ptr, y_ptr, out_ptr, bool_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y, b = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(bool_ptr + i)
    code = (x < y).to(tl.int32) | (x <= y).to(tl.int32) << 1 | (x > y).to(tl.int32) << 2
    code |= (x >= y).to(tl.int32) << 3 | (x == y).to(tl.int32) << 4 | (x != y).to(tl.int32) << 5
    code |= (b & (x < y)).to(tl.int32) << 6 | (b | (x < y)).to(tl.int32) << 7 | (b ^ (x < y)).to(tl.int32) << 8
    code |= (
        (~b).to(tl.int32) << 9 | (not_equal(b, x < y)).to(tl.int32) << 10 | tl.where(b, x < y, x > y).to(tl.int32) << 11
    )
    code |= tl.sum((b & (x > y)).to(tl.int32), 0) << 12
    tl.store(out_ptr + i, code)
    tl.store(bool_ptr + i, (x < y) & (y == y))


@triton.jit
def not_equal(a, b):
    return a != b


@pytest.mark.parametrize(
    "dtype", some_slow([*FLOATS, *INTEGERS, torch.bool], (*QUICK, torch.uint64, torch.bool)), ids=str
)
def test_comparisons_and_booleans(dtype, outer_isa):
    if dtype.is_floating_point:
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.5], dtype=dtype)
    elif dtype == torch.bool:
        values = torch.tensor([0, 1] * 4, dtype=dtype)
    else:
        info = torch.iinfo(dtype)
        values = torch.tensor([0, 1, info.max, info.max - 1, 100, 2, 3, info.min], dtype=dtype)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    x, y = values[pairs[:, 0]], values[pairs[:, 1]]
    b = torch.arange(64) % 3 == 0
    out, stored = torch.zeros(64, dtype=torch.int32), b.clone()
    run(compare_kernel, (1,), x, y, out, stored, SIZE=64)
    p, q = (v.double().numpy() if dtype.is_floating_point else v.numpy() for v in (x, y))
    p, q, m = p, q, b.numpy()
    less, more = p < q, p > q
    bits = [
        less,
        p <= q,
        more,
        p >= q,
        p == q,
        p != q,
        m & less,
        m | less,
        m ^ less,
        ~m,
        m != less,
        (m & less) | (~m & more),
    ]
    want = sum(v.astype("int32") << k for k, v in enumerate(bits)) | int((m & more).sum()) << 12
    assert out.tolist() == want.tolist()
    assert stored.tolist() == (less & (q == q)).tolist()


@triton.jit
def bitcast_kernel(h_ptr, s_ptr, f_ptr, d_ptr, out_ptr, wide_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    h, s = tl.load(h_ptr + i), tl.load(s_ptr + i)
    tl.store(out_ptr + i, h.to(tl.bfloat16, bitcast=True).to(tl.int16, bitcast=True).to(tl.int64))
    tl.store(
        out_ptr + SIZE + i,
        s.to(tl.bfloat16, bitcast=True).to(tl.float16, bitcast=True).to(tl.uint16, bitcast=True).to(tl.int64),
    )
    tl.store(out_ptr + 2 * SIZE + i, tl.load(f_ptr + i).to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + 3 * SIZE + i, tl.load(d_ptr + i).to(tl.int64, bitcast=True))
    one = tl.load(h_ptr + 3)
    tl.store(wide_ptr, one.to(tl.int16, bitcast=True).to(tl.float64) + one.to(tl.bfloat16, bitcast=True).to(tl.float64))


def test_bitcasts_keep_the_bits(outer_isa):
    bits = torch.arange(0, 2**16, 257).to(torch.int16)
    bits = bits[~(bits.view(torch.float16).isnan() | bits.view(torch.bfloat16).isnan())][:128]
    f = torch.randn(128, generator=torch.Generator().manual_seed(6))
    print("seed 6")
    d, out, wide = f.double() / 3, torch.zeros(4 * 128, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    run(bitcast_kernel, (1,), bits.view(torch.float16), bits, f, d, out, wide, SIZE=128)
    same, unsigned, single, double = out.view(4, 128)
    assert torch.equal(same, bits.long())
    assert torch.equal(unsigned, bits.view(torch.uint16).long())
    assert torch.equal(single, f.view(torch.int32).long() % 2**32)
    assert torch.equal(double, d.view(torch.int64))
    assert wide.item() == bits[3].double().item() + bits[3:4].view(torch.bfloat16).double().item()


@triton.jit
def constants_kernel(out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + i, tl.full((SIZE,), float("inf"), kind))
    tl.store(out_ptr + SIZE + i, tl.full((SIZE,), float("-inf"), kind))
    tl.store(out_ptr + 2 * SIZE + i, tl.full((SIZE,), float("nan"), kind))
    tl.store(out_ptr + 3 * SIZE + i, tl.full((SIZE,), 1.1, kind))
    tl.store(out_ptr + 4 * SIZE + i, tl.zeros((SIZE,), kind))
    tl.store(out_ptr + 5 * SIZE, tl.full((), 0.1, kind))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_constants_of_every_float_type(dtype):
    if dtype.itemsize == 1 and triton.__version__.startswith("3.6."):
        pytest.skip("the front end of Triton 3.6 has no constants of fp8")
    out = torch.zeros(41).to(dtype)
    run(constants_kernel, (1,), out, SIZE=8)
    want = torch.tensor([math.inf, -math.inf, math.nan, 1.1, 0.0, 0.1], dtype=torch.float64).to(dtype)
    got = out.double()
    for k, value in enumerate(want.double().tolist()):
        part = got[8 * k : 8 * k + 8]
        assert part.isnan().all() if value != value else (part == value).all(), (k, part)
