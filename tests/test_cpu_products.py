"""Sums of products of bytes on the CPU target: exact at the extremes, in every form that takes pairs and some that may
not, and the ranges of integers that decide it."""

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import host_target, launch, lower
from effc.codegen.cpu.ir import Op, Type, Value
from effc.codegen.cpu.ranges import value_range
from hypothesis import given, settings
from hypothesis import strategies as st

TYPES = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}


def run(fn, grid, *args, **constants):
    names = [name for name in fn.arg_names if name not in constants]
    pairs = zip(names, args, strict=True)
    kernel = lower(fn, {n: TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in pairs}, constants)
    launch(kernel, grid, *args)
    return kernel


def paired(kernel, kind):
    """Pairs are for instruction sets that can multiply them."""
    return (
        kernel.cpp.count(f"pairs::{kind}<") == 0 if host_target().isa == "generic" else f"pairs::{kind}<" in kernel.cpp
    )


def integers(low, high, *shape, dtype=torch.int8, seed=0):
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    extremes = torch.tensor([low, high], dtype=torch.int64)[torch.randint(0, 2, shape, generator=generator)]
    values = torch.randint(low, high + 1, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, extremes, values).to(dtype)


@triton.jit
def bytes_kernel(
    x_ptr, w_ptr, plain_ptr, shifted_ptr, masked_ptr, unsigned_ptr, K, K_BLOCK: tl.constexpr, N: tl.constexpr
):
    """Four sums over k of a byte of w times a byte of x, [K, N] and [K]."""
    k, n = tl.arange(0, K_BLOCK), tl.program_id(0) * N + tl.arange(0, N)
    total = tl.num_programs(0) * N
    place = k[:, None] * total + n[None, :]
    x = tl.load(x_ptr + k)[:, None]
    w = tl.load(w_ptr + place)
    tl.store(plain_ptr + n, tl.sum(w.to(tl.int32) * x.to(tl.int32), axis=0))
    tl.store(shifted_ptr + n, tl.sum((w.to(tl.int32) - 100) * x.to(tl.int32) + (w & 31).to(tl.int32) * 3, axis=0))
    some = tl.load(w_ptr + place, mask=k[:, None] < K, other=7)
    tl.store(masked_ptr + n, tl.sum(x.to(tl.int32) * some.to(tl.int32), axis=0))
    bits = w.to(tl.uint8, bitcast=True)
    tl.store(unsigned_ptr + n, tl.sum(bits.to(tl.int32) * x.to(tl.uint8, bitcast=True).to(tl.int32), axis=0))


@pytest.mark.parametrize("shape", [(64, 64), (2, 32), (16, 256)])
def test_sums_of_products_of_bytes_are_exact(shape, isa):
    depth, n = shape
    columns = 2 * n
    x, w = integers(-128, 127, depth), integers(-128, 127, depth, columns, seed=1)
    outs = [torch.zeros(columns, dtype=torch.int32) for _ in range(4)]
    kernel = run(bytes_kernel, (2,), x, w, *outs, depth // 2 + 1, K_BLOCK=depth, N=n)
    assert paired(kernel, "ShortPairs")
    x64, w64 = x.long()[:, None], w.long()
    some = torch.where(torch.arange(depth)[:, None] < depth // 2 + 1, w64, 7)
    wants = [w64 * x64, (w64 - 100) * x64 + (w64 & 31) * 3, some * x64, (w64 & 255) * (x64 & 255)]
    for out, want in zip(outs, wants, strict=True):
        assert out.tolist() == want.sum(0).tolist()


@triton.jit
def nibbles_kernel(x_ptr, w_ptr, out_ptr, sum_ptr, K_BLOCK: tl.constexpr, N: tl.constexpr):
    k, n = tl.arange(0, K_BLOCK), tl.arange(0, N)
    w = tl.load(w_ptr + k[:, None] * N + n[None, :])
    even = tl.load(x_ptr + 2 * k).to(tl.int32)[:, None]
    odd = tl.load(x_ptr + 2 * k + 1).to(tl.int32)[:, None]
    low, high = (w & 15).to(tl.int32), (w >> 4).to(tl.int32)
    tl.store(out_ptr + n, tl.sum((low - 8) * even + (high - 8) * odd, axis=0))
    tl.store(sum_ptr + n, tl.sum(low * even + high * odd + (w >> 7).to(tl.int32) * odd, axis=0))


@pytest.mark.parametrize("shape", [(16, 64), (64, 32), (8, 128)])
def test_nibbles_are_summed_in_16_bits_as_long_as_they_fit(shape, isa):
    depth, n = shape
    for low, high, seed in ((-128, 127, 0), (-128, -128, 1), (127, 127, 2)):
        x = integers(low, high, 2 * depth, seed=seed)
        w = (
            integers(0, 255, depth, n, dtype=torch.uint8, seed=seed)
            if seed == 0
            else torch.full((depth, n), 255).byte()
        )
        out, total = (torch.zeros(n, dtype=torch.int32) for _ in range(2))
        kernel = run(nibbles_kernel, (1,), x, w, out, total, K_BLOCK=depth, N=n)
        assert paired(kernel, "BytePairs")
        even, odd, w64 = x.long()[0::2, None], x.long()[1::2, None], w.long()
        want = ((w64 & 15) - 8) * even + ((w64 >> 4) - 8) * odd
        assert out.tolist() == want.sum(0).tolist()
        want = (w64 & 15) * even + (w64 >> 4) * odd + (w64 >> 7) * odd
        assert total.tolist() == want.sum(0).tolist()


@triton.jit
def near_misses_kernel(x_ptr, w_ptr, out_ptr, columns, K_BLOCK: tl.constexpr, N: tl.constexpr):
    k, n = tl.arange(0, K_BLOCK), tl.arange(0, N)
    place = k[:, None] * N + n[None, :]
    w = tl.load(w_ptr + place)
    x = tl.load(x_ptr + k)[:, None]
    ragged = tl.load(w_ptr + place, mask=n[None, :] < columns, other=1)
    tl.store(out_ptr + n, tl.sum(ragged.to(tl.int32) * x.to(tl.int32), axis=0))  # lanes differ in their mask
    tl.store(out_ptr + N + n, tl.sum(w.to(tl.int32) * w.to(tl.int32), axis=0))  # both vary along the columns
    tl.store(out_ptr + 2 * N + n, tl.sum(w.to(tl.int32) * (x.to(tl.int32) + 1), axis=0))  # not a byte in each row
    tl.store(out_ptr + 3 * N + n, tl.sum(w.to(tl.int32) * x.to(tl.int32) - 1, axis=0))  # a term that is no product
    tl.store(out_ptr + 4 * N + n, tl.sum(w.to(tl.int32) * 1000000007 * x.to(tl.int32), axis=0))


def test_other_sums_are_left_alone(isa):
    depth, n = 16, 64
    x, w = integers(-128, 127, depth), integers(-128, 127, depth, n, seed=1)
    out = torch.zeros(5, n, dtype=torch.int32)
    kernel = run(near_misses_kernel, (1,), x, w, out, 37, K_BLOCK=depth, N=n)
    assert "pairs::" not in kernel.cpp
    x64, w64 = x.long()[:, None], w.long()
    ragged = torch.where(torch.arange(n) < 37, w64, 1)
    wants = [ragged * x64, w64 * w64, w64 * (x64 + 1), w64 * x64 - 1, w64 * 1000000007 * x64]
    for got, want in zip(out, wants, strict=True):
        assert got.tolist() == want.sum(0).int().tolist()


BYTE = Type("i8")
OPERATORS = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.shrsi": lambda a, b: a >> (b & 7),
    "arith.shrui": lambda a, b: (a & 255) >> (b & 7),
}


def value_of(name, *operands, element="i8", **attrs):
    value = Value("v", Type(element), Op(name, list(operands), attrs=attrs))
    value.op.results = [value]
    return value


def constant(number, element="i8"):
    return value_of("arith.constant", element=element, value=str(number))


@st.composite
def byte_expressions(draw, depth=4):
    """A value of int8 made of two unknown bytes, and its result for given ones."""
    kind = draw(st.sampled_from(["x", "y", "constant", *OPERATORS])) if depth else draw(st.sampled_from(["x", "y"]))
    if kind in ("x", "y"):
        return Value(kind, BYTE), lambda x, y: x if kind == "x" else y
    if kind == "constant":
        number = draw(st.integers(-128, 127))
        return constant(number), lambda x, y: number
    left, of_left = draw(byte_expressions(depth=depth - 1))
    right, of_right = draw(byte_expressions(depth=depth - 1))
    if kind.startswith("arith.shr"):  # by more than the width is undefined
        number = draw(st.integers(0, 7))
        right, of_right = constant(number), lambda x, y: number
    return value_of(kind, left, right), lambda x, y: wrapped(OPERATORS[kind](of_left(x, y), of_right(x, y)))


def wrapped(number):
    return (number + 128) % 256 - 128


@settings(max_examples=200, deadline=None)
@given(byte_expressions(), st.lists(st.tuples(st.integers(-128, 127), st.integers(-128, 127)), min_size=8, max_size=8))
def test_a_range_holds_every_value(expression, points):
    value, result = expression
    low, high = value_range(value)
    for x, y in [*points, (-128, 127), (127, -128), (-128, -128), (0, 0)]:
        assert low <= result(x, y) <= high


def test_ranges_see_through_what_cuts_bytes():
    w = Value("w", BYTE)
    wide = value_of("arith.extsi", w, element="i32")
    assert value_range(w) == (-128, 127)
    assert value_range(value_of("arith.andi", w, constant(15))) == (0, 15)
    assert value_range(value_of("arith.shrui", w, constant(4))) == (0, 15)
    assert value_range(value_of("arith.extui", w, element="i32")) == (0, 255)
    assert value_range(value_of("arith.addi", wide, constant(1, "i32"), element="i32")) == (-127, 128)
    assert value_range(value_of("arith.addi", w, constant(1))) == (-128, 127)  # which may wrap around
