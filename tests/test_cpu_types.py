"""Conversions between all of Triton's types on the CPU target, against values enumerated in float64 and exact integers.

Rules: to f16, bf16 and f32, IEEE (round to nearest even, or toward zero where asked). To fp8, the same and saturating,
infinities too, as NVIDIA's cvt.satfinite; NaN stays NaN. Float to integer saturates and NaN gives 0, as NVIDIA's cvt.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import kernel_from_source

from .on_cpu import run, run_over, some_slow

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}


def codes(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 1- or 2-byte type."""
    size = dtype.itemsize * 8
    return torch.arange(2**size).to(torch.uint8 if size == 8 else torch.uint16).view(dtype)


def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """Finite values from 0 up, in the order of their codes, and for IEEE types what would follow the largest."""
    values = codes(dtype)[: 2 ** (dtype.itemsize * 8 - 1)].double()
    finite = values[values.isfinite()].numpy()
    return np.append(finite, 2 * finite[-1] - finite[-2]) if dtype.itemsize == 2 else finite


def nearest(x: np.ndarray, dtype: torch.dtype, toward_zero: bool = False) -> np.ndarray:
    """x rounded to `dtype`, as float64: by looking its neighbours up. Ties go to even codes."""
    table, size = magnitudes(dtype), np.abs(x)
    if toward_zero:
        code = np.searchsorted(table, size, side="right") - 1
    else:
        middle = (table[1:] + table[:-1]) / 2
        code = np.searchsorted(middle, size, side="left")
        tie = (code < len(middle)) & (size == middle[np.minimum(code, len(middle) - 1)])
        code += tie & (code % 2 == 1)
    value = table[np.clip(code, 0, len(table) - 1)]
    if dtype.itemsize == 2:
        beyond = table[-2] if toward_zero else np.inf
        value = np.where(np.isinf(size), np.inf, np.where(code >= len(table) - 1, beyond, value))
    return np.where(np.isnan(x), np.nan, np.copysign(value, x))


def samples(seed: int) -> np.ndarray:
    """Every value of the small types, every midpoint between two, both with neighbours in float64, and noise."""
    print(f"seed {seed}")
    table = np.concatenate([magnitudes(dtype)[:40000:7] for dtype in (torch.float16, torch.bfloat16)])
    table = np.concatenate([table, *(magnitudes(dtype) for dtype in FP8.values())])
    middles = [(m[1:] + m[:-1])[:40000:5] / 2 for m in map(magnitudes, (torch.float16, torch.bfloat16, *FP8.values()))]
    exact = np.concatenate([table, *middles])
    noise = np.random.default_rng(seed)
    noise = noise.standard_normal(4000) * 2.0 ** noise.uniform(-150, 140, 4000)
    special = [0.0, np.inf, np.nan, 1e-46, 3.4028235e38, 3.5e38, 1e300, 5e-324]
    x = np.concatenate([exact, np.nextafter(exact, np.inf), np.nextafter(exact, 0), noise, special])
    return np.concatenate([x, -x])


def assert_same(got: torch.Tensor, want: np.ndarray, what: str) -> None:
    got, want = got.double().numpy(), np.asarray(want)
    wrong = ~((got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want)))
    assert not wrong.any(), f"{what}: {wrong.sum()} differ, first {got[wrong][0]!r}, not {want[wrong][0]!r}"


@triton.jit
def round_kernel(x_ptr, h, b, f, hz, bz, fz, p, q, r, s, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(h + i, x.to(tl.float16), mask=mask)
    tl.store(b + i, x.to(tl.bfloat16), mask=mask)
    tl.store(f + i, x.to(tl.float32), mask=mask)
    tl.store(hz + i, x.to(tl.float16, fp_downcast_rounding="rtz"), mask=mask)
    tl.store(bz + i, x.to(tl.bfloat16, fp_downcast_rounding="rtz"), mask=mask)
    if x_ptr.dtype.element_ty == tl.float64:
        tl.store(fz + i, x.to(tl.float32, fp_downcast_rounding="rtz"), mask=mask)
    tl.store(p + i, x.to(tl.float8e4nv), mask=mask)
    tl.store(q + i, x.to(tl.float8e5), mask=mask)
    tl.store(r + i, x.to(tl.float8e4b8), mask=mask)
    tl.store(s + i, x.to(tl.float8e5b16), mask=mask)


@pytest.mark.parametrize("source", [torch.float64, torch.float32], ids=str)
def test_rounding_to_every_smaller_float(source, outer_isa):
    x = torch.from_numpy(samples(0)).to(source)
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32, *FP8.values()]
    outs = [torch.zeros(len(x), dtype=dtype) for dtype in types]
    run_over(round_kernel, x, *outs)
    exact = x.double().numpy()
    for k, (dtype, out) in enumerate(zip(types, outs, strict=True)):
        if k == 2:
            assert_same(out, x.float(), "float32")
        elif k == 5:
            with np.errstate(over="ignore"):
                near = exact.astype(np.float32)
            toward_zero = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
            if source == torch.float64:
                assert_same(out, toward_zero, "float32 toward zero")
        else:
            want = nearest(exact, dtype, toward_zero=k in (3, 4))
            if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
                want = want + 0.0  # no -0
            assert_same(out, want, f"{source} to {dtype}, {'toward zero' if k in (3, 4) else 'nearest'}")


@triton.jit
def widen_kernel(x_ptr, f, d, h, code, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(f + i, x.to(tl.float32), mask=mask)
    tl.store(d + i, x.to(tl.float64), mask=mask)
    if code.dtype.element_ty == tl.uint8:
        tl.store(h + i, x.to(tl.float16), mask=mask)
        tl.store(code + i, x.to(tl.uint8, bitcast=True), mask=mask)
    else:
        tl.store(h + i, x.to(tl.float32).to(tl.float16), mask=mask)
        tl.store(code + i, x.to(tl.uint16, bitcast=True), mask=mask)


@pytest.mark.parametrize(
    "source",
    some_slow([torch.float16, torch.bfloat16, *FP8.values()], (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)),
    ids=str,
)
def test_every_value_of_a_small_float_is_exact_when_widened(source, outer_isa):
    x = codes(source)
    bits = torch.uint8 if source.itemsize == 1 else torch.uint16
    f, d, h = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float16)
    code = torch.zeros(len(x), dtype=bits)
    run_over(widen_kernel, x, f, d, h, code)
    want = x.double().numpy()
    assert_same(f, want, "float32")
    assert_same(d, want, "float64")
    assert_same(h, nearest(want, torch.float16), "float16")
    number = ~x.float().isnan()
    assert torch.equal(code[number], x.view(bits)[number])
    assert torch.equal(code.view(source).float().isnan(), ~number)


@triton.jit
def e4b15_kernel(code_ptr, value_ptr, half_ptr, again_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(code_ptr + i, mask=i < n).to(tl.float8e4b15, bitcast=True)
    tl.store(value_ptr + i, x.to(tl.float32), mask=i < n)
    half = tl.load(half_ptr + i, mask=i < n)
    tl.store(again_ptr + i, half.to(tl.float8e4b15).to(tl.uint8, bitcast=True), mask=i < n)


def test_fp8e4b15_is_the_middle_of_fp16(outer_isa):
    code, half = torch.arange(2**16).to(torch.uint8), codes(torch.float16)
    value, again = torch.zeros(2**16), torch.zeros(2**16, dtype=torch.uint8)
    run_over(e4b15_kernel, code, value, half, again)
    wide = code.numpy().astype(np.uint16)
    assert_same(value, ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16), "value")
    bits = half.view(torch.uint16).numpy()
    want = (np.minimum(bits & 0x7FFF, 0x3F00) * 2 + 0x80 | bits & 0x8000) >> 8
    assert np.array_equal(again.numpy(), want.astype(np.uint8))


@triton.jit
def casts_kernel(x_ptr, a, b, c, d, e, f, g, h, t, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    outs = (a, b, c, d, e, f, g, h, t)
    for k in tl.static_range(9):
        tl.store(outs[k] + i, x.to(outs[k].dtype.element_ty), mask=i < n)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


@pytest.mark.parametrize("source", some_slow(FLOATS, (torch.float64, torch.float32)), ids=str)
def test_float_to_integer_truncates_and_saturates(source, outer_isa):
    edges = [
        float(s * 2.0**k + d) for k in (7, 8, 15, 16, 31, 32, 63, 64) for s in (1, -1) for d in (-1, -0.5, 0, 0.5, 1)
    ]
    noise = np.random.default_rng(1)
    noise = noise.standard_normal(400) * 2.0 ** noise.uniform(-3, 70, 400)
    print("seed 1")
    values = [*edges, *noise, 0.0, -0.0, 0.5, -0.99, np.inf, -np.inf, np.nan, 1e300, -1e300]
    x = torch.tensor(values, dtype=torch.float64).to(source)
    outs = [torch.zeros(len(x), dtype=dtype) for dtype in (*INTEGERS, torch.bool)]
    run_over(casts_kernel, x, *outs)
    exact = x.double().tolist()
    for dtype, out in zip(INTEGERS, outs, strict=False):
        low, high = limits(dtype)
        want = [0 if v != v else low if v < low else high if v > high else int(v) for v in exact]
        assert out.tolist() == want, dtype
    assert outs[-1].tolist() == [v != 0 for v in exact]


@pytest.mark.parametrize("source", some_slow([*INTEGERS, torch.bool], (torch.int8, torch.uint64, torch.bool)), ids=str)
def test_integer_to_float_rounds_once_and_to_integer_wraps(source, outer_isa):
    noise = np.random.default_rng(2)
    print("seed 2")
    numbers = [
        int(bits) >> int(k)
        for bits, k in zip(noise.integers(2**64, size=600, dtype=np.uint64), noise.integers(64, size=600))
    ]
    numbers += [2**k + d for k in range(65) for d in (-1, 0, 1)]
    numbers += [2**24 + 1, 2**24 + 3, 2**53 + 1, 2**63 + 2**39, 2**63 + 2**39 + 1]
    low, high = (0, 1) if source == torch.bool else limits(source)
    span = high - low + 1
    numbers = [(v - low) % span + low for s in (1, -1) for v in (s * w for w in numbers)]
    x = torch.tensor(numbers, dtype=source)
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    types += [torch.int8, torch.uint16, torch.int32, torch.uint64]
    outs = [torch.zeros(len(x), dtype=dtype) for dtype in (*types, torch.bool)]
    run_over(casts_kernel, x, *outs)
    single = np.array([float32_of(v) for v in numbers])
    assert_same(outs[0], nearest(single, torch.float16), "float16")  # through float32, as on a GPU
    assert_same(outs[1], nearest(single, torch.bfloat16), "bfloat16")
    assert_same(outs[2], single, "float32")
    assert_same(outs[3], np.array([float(v) for v in numbers]), "float64")
    for dtype, out in zip(types[4:], outs[4:], strict=False):
        low, high = limits(dtype)
        assert out.tolist() == [(v - low) % (high - low + 1) + low for v in numbers], dtype
    assert outs[-1].tolist() == [v != 0 for v in numbers]


def float32_of(number: int) -> float:
    """The float32 nearest to an integer, ties to even, in integer arithmetic."""
    size = abs(number)
    drop = max(size.bit_length() - 24, 0)
    kept, rest = size >> drop, size & ((1 << drop) - 1)
    kept += 2 * rest > 1 << drop or (2 * rest == 1 << drop and kept & 1) if drop else 0
    return float(np.copysign(kept << drop, number))


NAMES = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8e4nv", torch.float8_e5m2: "float8e5", torch.bool: "int1",
} | {dtype: str(dtype).removeprefix("torch.") for dtype in INTEGERS}  # fmt: skip
BOTH_WAYS = """
import triton
import triton.language as tl


@triton.jit
def widened(v):
    if v.dtype.is_int():
        return v.to(tl.int64)
    else:
        return v.to(tl.float64).to(tl.int64, bitcast=True)


@triton.jit
def both_ways_kernel(x_ptr, block_ptr, scalar_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
{blocks}
    for k in range(SIZE):
        one = tl.load(x_ptr + k)
{scalars}
"""


QUICK = (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.uint64, torch.bool)


def castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Triton casts between fp8 and other floats only."""
    kinds = [dtype.itemsize == 1 for dtype in (source, target) if dtype.is_floating_point]
    return len(kinds) == 2 or not any(kinds)


@pytest.mark.parametrize("source", some_slow(NAMES, QUICK), ids=str)
def test_a_scalar_is_cast_as_a_block_is(source):
    casts = [f"to(tl.{name})" for dtype, name in NAMES.items() if castable(source, dtype)]
    if source == torch.float64:
        casts += [f'to(tl.{name}, fp_downcast_rounding="rtz")' for name in ("float32", "float16", "bfloat16")]
    blocks = [f"    tl.store(block_ptr + {k} * SIZE + i, widened(x.{cast}))" for k, cast in enumerate(casts)]
    scalars = [f"        tl.store(scalar_ptr + {k} * SIZE + k, widened(one.{cast}))" for k, cast in enumerate(casts)]
    text = BOTH_WAYS.format(blocks="\n".join(blocks), scalars="\n".join(scalars))
    kernel = kernel_from_source(text, "both_ways_kernel")
    x = torch.from_numpy(samples(7)[::311][:64] if source.is_floating_point else np.arange(-32, 32) * 3).to(source)
    block, scalar = torch.zeros(len(casts), 64, dtype=torch.int64), torch.zeros(len(casts), 64, dtype=torch.int64)
    run(kernel, (1,), x, block, scalar, SIZE=64)
    for cast, b, s in zip(casts, block, scalar, strict=True):
        assert torch.equal(b, s), cast


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_products_of_fp8(dtype):
    generator = torch.Generator().manual_seed(8)
    print("seed 8")
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.zeros(16, 16)
    run(dot_kernel, (1,), a, b, out)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-5)
