"""Functions of one element, conversions and integers on the CPU target, against PyTorch."""

import math

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import kernel_from_source
from triton.language.extra import libdevice

from .on_cpu import randn, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES += [torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.int16]


@triton.jit
def math_kernel(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    if OP == "exp":
        z = tl.exp(x)
    elif OP == "exp2":
        z = tl.exp2(x)
    elif OP == "log":
        z = tl.log(tl.abs(x))
    elif OP == "log2":
        z = tl.log2(tl.abs(x))
    elif OP == "sin":
        z = tl.sin(x)
    elif OP == "cos":
        z = tl.cos(x)
    elif OP == "tanh":
        z = libdevice.tanh(x)
    elif OP == "erf":
        z = tl.erf(x)
    elif OP == "sqrt":
        z = tl.sqrt(x)
    elif OP == "rsqrt":
        z = tl.rsqrt(x)
    elif OP == "sigmoid":
        z = tl.sigmoid(x)
    elif OP == "floor":
        z = tl.floor(x)
    elif OP == "ceil":
        z = tl.ceil(x)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "maximum":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "minimum":
        z = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "fmax":
        z = tl.maximum(x, y)
    elif OP == "fmin":
        z = tl.minimum(x, y)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    else:
        z = tl.clamp(x, -1.0, 1.0)
    tl.store(out_ptr + i, z, mask=i < n)


EXPECTED = {
    "exp": lambda x, y: x.exp(),
    "exp2": lambda x, y: x.exp2(),
    "log": lambda x, y: x.abs().log(),
    "log2": lambda x, y: x.abs().log2(),
    "sin": lambda x, y: x.sin(),
    "cos": lambda x, y: x.cos(),
    "tanh": lambda x, y: x.tanh(),
    "erf": lambda x, y: x.erf(),
    "sqrt": lambda x, y: x.sqrt(),
    "rsqrt": lambda x, y: x.rsqrt(),
    "sigmoid": lambda x, y: x.sigmoid(),
    "floor": lambda x, y: x.floor(),
    "ceil": lambda x, y: x.ceil(),
    "abs": lambda x, y: x.abs(),
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "fmax": lambda x, y: torch.fmax(x, y),
    "fmin": lambda x, y: torch.fmin(x, y),
    "fma": lambda x, y: x * y + x,
}


def ulps(got, want64):
    """Distance to the exact value in units of fp32's last place."""
    want = want64.float()
    spacing = (torch.nextafter(want.abs(), torch.tensor(math.inf)) - want.abs()).double().clamp_min(2.0**-149)
    return (got.double() - want64).abs() / spacing


def edge_inputs():
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1.0,
        -1.0,
        1e-40,
        -1e-40,
        3.4e38,
        -3.4e38,
        88.8,
        -87.4,
        -103.9,
        -104.5,
    ]
    special += [0.5, -0.5, 0.625, 0.9277, 128.0, -149.0, 1e5, -1e5, 12345.678, 2.0**23 + 1, 8388607.5, 3e9, 1e20]
    generator = torch.Generator().manual_seed(3)
    parts = [torch.tensor(special)]
    parts += [torch.randn(500, generator=generator) * scale for scale in (1e-3, 1.0, 10.0, 100.0, 1e5)]
    return torch.cat(parts)


@pytest.mark.parametrize("op", list(EXPECTED))
def test_elementwise_functions_are_within_2_ulp(op, isa):
    x = edge_inputs()
    y = x.flip(0).contiguous()
    out = torch.full_like(x, 7.0)
    run(math_kernel, (triton.cdiv(len(x), 256),), x, y, out, len(x), OP=op, BLOCK=256)
    want = EXPECTED[op](x.double(), y.double())
    rounded = want.float()
    assert torch.equal(out.isnan(), rounded.isnan()), x[out.isnan() != rounded.isnan()]
    assert torch.equal(out.isinf(), rounded.isinf()), (
        x[out.isinf() != rounded.isinf()],
        out[out.isinf() != rounded.isinf()],
    )
    finite = rounded.isfinite()
    if op == "sigmoid":  # Triton's 1 / (1 + exp(-x)) gives 0 where exp overflows
        finite &= x > -88
    if op in ("exp", "exp2"):  # results below the normal numbers may be 0
        tiny = want < 2.0**-126
        assert (out[tiny] <= 2.0**-126).all()
        finite &= ~tiny
    bound = 3.0 if op == "sigmoid" else 2.0
    worst = ulps(out, want)[finite]
    assert worst.max() <= bound, (
        op,
        x[finite][worst.argmax()],
        out[finite][worst.argmax()],
        rounded[finite][worst.argmax()],
        worst.max(),
    )
    if op in ("floor", "ceil", "abs"):
        assert torch.equal(torch.signbit(out[finite]), torch.signbit(rounded[finite]))


CONVERT = """
import triton
import triton.language as tl


@triton.jit
def convert_kernel(x_ptr, {outs}, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
{stores}
"""


@pytest.mark.parametrize("source", DTYPES)
def test_conversions_equal_torch(source):
    values = torch.tensor([0, 1, 2, 3, 5, 17, 100, 126, 127] * 5, dtype=torch.float64)
    for kind in (True, False):  # floats may be any, integers must fit
        targets = [target for target in DTYPES if target.is_floating_point == kind]
        if source.is_floating_point and kind:
            special = [math.inf, -math.inf, math.nan, 1e-8, 6e-8, 65504.0, 65520.0, 65519.0, 1e-40, 1.00390625, -0.0]
            noise = torch.randn(200, generator=torch.Generator().manual_seed(1)).double() * 300
            inputs = torch.cat([values, torch.tensor(special), noise])
        else:
            inputs = values + 0.7 if source.is_floating_point else values
        x = inputs.to(source)
        names = [f"out{k}_ptr" for k in range(len(targets))]
        stores = [f"    tl.store({name} + i, x.to({name}.dtype.element_ty), mask=i < n)" for name in names]
        fn = kernel_from_source(CONVERT.format(outs=", ".join(names), stores="\n".join(stores)), "convert_kernel")
        outs = [torch.zeros(len(x), dtype=target) for target in targets]
        run(fn, (triton.cdiv(len(x), 64),), x, *outs, len(x), BLOCK=64)
        for out in outs:
            torch.testing.assert_close(out, x.to(out.dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def integer_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n, other=1)
    b = tl.load(b_ptr + i, mask=i < n, other=1)
    c = (a // b) * 3 + a % b - (a ^ b) + ((a & 255) << 3) + (a >> 2)
    c += tl.where((a < b) & (b != 7) | (a == 5), tl.minimum(a, b), tl.maximum(a, b))
    tl.store(out_ptr + i, c, mask=i < n)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_arithmetic(dtype, isa):
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(-1000000, 1000000, (1003,), generator=generator, dtype=dtype)
    b = torch.randint(1, 3000, (1003,), generator=generator, dtype=dtype)
    out = torch.zeros_like(a)
    run(integer_kernel, (4,), a, b, out, 1003, BLOCK=256)
    quotient = torch.div(a, b, rounding_mode="trunc")
    want = quotient * 3 + (a - quotient * b) - (a ^ b) + ((a & 255) << 3) + (a >> 2)
    want += torch.where((a < b) & (b != 7) | (a == 5), torch.minimum(a, b), torch.maximum(a, b))
    assert torch.equal(out, want)


@triton.jit
def flat_index_kernel(x_ptr, w_ptr, out_ptr, n, width, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = i // WIDTH, i % WIDTH
    x = tl.load(x_ptr + row * width + column, mask=i < n)
    w = tl.load(w_ptr + i % width, mask=i < n)
    tl.store(out_ptr + i, x * w + row.to(tl.float32), mask=i < n)


@pytest.mark.parametrize("width", [576, 64, 50, 7])
def test_quotients_and_remainders_of_flat_indices(width, isa):
    x, w = randn(13, width), randn(width, seed=1)
    out = torch.zeros_like(x)
    run(flat_index_kernel, (triton.cdiv(x.numel(), 256),), x, w, out, x.numel(), width, WIDTH=width, BLOCK=256)
    torch.testing.assert_close(out, x * w + torch.arange(13.0)[:, None])


@triton.jit
def wide_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    y = tl.exp(x) + tl.sqrt(tl.abs(x)) * tl.where(x > 0, x, -x) + i.to(tl.float64) / 3
    tl.store(out_ptr + i, y + tl.sum(tl.where(i < n, x, 0.0), 0), mask=i < n)


def test_double_precision(isa):
    x = randn(100, dtype=torch.float64)
    out = torch.zeros_like(x)
    run(wide_kernel, (1,), x, out, 100, BLOCK=128)
    want = x.exp() + x.abs().sqrt() * x.abs() + torch.arange(100.0, dtype=torch.float64) / 3 + x.sum()
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
