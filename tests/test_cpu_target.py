"""The CPU target against PyTorch: pointwise kernels, reductions, control flow, memory safety and aliasing."""

import math

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import kernel_from_source, launch, lower
from triton.language.extra import libdevice

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
TYPES |= {torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1", torch.int16: "*i16"}


def run(fn, grid, *args, divisible=(), **constants):
    """Lower `fn` for these arguments and run it; returns the kernel."""
    names = [name for name in fn.arg_names if name not in constants]
    signature = {}
    for name, arg in zip(names, args, strict=True):
        if isinstance(arg, torch.Tensor):
            signature[name] = TYPES[arg.dtype]
        else:
            signature[name] = "fp32" if isinstance(arg, float) else "i32"
    kernel = lower(fn, signature, constants, divisible=divisible)
    launch(kernel, grid, *args)
    return kernel


def random(*shape, seed=0, dtype=torch.float32):
    print(f"seed {seed}")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


@pytest.mark.parametrize("source", list(TYPES))
def test_conversions_equal_torch(source):
    values = torch.tensor([0, 1, 2, 3, 5, 17, 100, 126, 127] * 5, dtype=torch.float64)
    for kind in (True, False):  # floats may be any, integers must fit
        targets = [target for target in TYPES if target.is_floating_point == kind]
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
    x, w = random(13, width), random(width, seed=1)
    out = torch.zeros_like(x)
    run(flat_index_kernel, (triton.cdiv(x.numel(), 256),), x, w, out, x.numel(), width, WIDTH=width, BLOCK=256)
    torch.testing.assert_close(out, x * w + torch.arange(13.0)[:, None])


@triton.jit
def tile_kernel(x_ptr, y_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask)
    y = tl.load(y_ptr + c[None, :] * rows + r[:, None], mask=mask)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], x + tl.cos(c.to(tl.float32))[None, :] * y, mask=mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64), (17, 65), (40, 130)])
def test_ragged_tiles_and_transposed_reads(shape, isa):
    rows, columns = shape
    x, y = random(rows, columns), random(columns, rows, seed=1)
    out = torch.zeros_like(x)
    run(tile_kernel, (triton.cdiv(rows, 8), triton.cdiv(columns, 32)), x, y, out, rows, columns, BR=8, BC=32)
    torch.testing.assert_close(out, x + torch.arange(float(columns)).cos() * y.T)


@triton.jit
def norm_kernel(x_ptr, w_ptr, out_ptr, rows, columns, eps, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)
    w = tl.load(w_ptr + c, mask=c < columns, other=0.0)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], x * scale[:, None] * w[None, :], mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 60, 64, 576])
def test_rms_norm(dtype, columns, isa):
    x, w = random(13, columns, dtype=dtype), random(columns, seed=1, dtype=dtype)
    out = torch.zeros_like(x)
    run(norm_kernel, (4,), x, w, out, 13, columns, 1e-5, BR=4, BC=max(16, triton.next_power_of_2(columns)))
    wide = x.double()
    want = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=mask, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    e = tl.where(c[None, :] < columns, e, 0.0)
    tl.store(out_ptr + r[:, None] * columns + c[None, :], e / tl.sum(e, 1)[:, None], mask=mask)


@pytest.mark.parametrize("columns", [1, 3, 31, 64, 100])
def test_softmax_and_nan_stays_in_its_row(columns, isa):
    x = random(11, columns)
    x[3, columns // 2] = math.nan
    x[5] = -math.inf
    x[7, 0] = math.inf
    out = torch.zeros_like(x)
    run(softmax_kernel, (3,), x, out, 11, columns, BR=4, BC=max(16, triton.next_power_of_2(columns)))
    torch.testing.assert_close(out, x.softmax(-1), equal_nan=True)


@triton.jit
def reduce_kernel(x_ptr, i_ptr, out_ptr, int_ptr, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    offsets = r[:, None] * C + c[None, :]
    x, i = tl.load(x_ptr + offsets), tl.load(i_ptr + offsets)
    N: tl.constexpr = R if AXIS == 1 else C
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.sum(x, AXIS))
    tl.store(out_ptr + N + n, tl.max(x, AXIS))
    tl.store(out_ptr + 2 * N + n, tl.min(x, AXIS))
    tl.store(int_ptr + n, tl.argmax(x, AXIS))
    tl.store(int_ptr + N + n, tl.argmin(x, AXIS))
    tl.store(int_ptr + 2 * N + n, tl.xor_sum(i, AXIS))
    tl.store(int_ptr + 3 * N + n, tl.max(i, AXIS))


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (4, 4), (2, 8), (8, 256), (256, 8), (32, 32)])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(shape, axis, isa):
    x = random(*shape)
    x.flatten()[:: max(1, x.numel() // 3)] = x.flatten()[0]  # ties
    i = (x * 1000).to(torch.int32)
    n = shape[1 - axis]
    out, ints = torch.zeros(3, n), torch.zeros(4, n, dtype=torch.int32)
    run(reduce_kernel, (1,), x, i, out, ints, AXIS=axis, R=shape[0], C=shape[1])
    torch.testing.assert_close(out, torch.stack([x.sum(axis), x.amax(axis), x.amin(axis)]), rtol=1e-5, atol=1e-5)
    xor = torch.zeros(n, dtype=torch.int32)
    for part in i.unbind(axis):
        xor ^= part
    first = [(x == best(axis, keepdim=True)).int().argmax(axis).int() for best in (x.amax, x.amin)]
    assert torch.equal(ints, torch.stack([*first, xor, i.amax(axis)]))


@triton.jit
def column_loop_kernel(x_ptr, out_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    total = tl.zeros([BR], tl.float32)
    best = tl.full([BR], float("-inf"), tl.float32)
    for start in range(0, columns, BC):
        c = start + tl.arange(0, BC)
        mask = (r[:, None] < rows) & (c[None, :] < columns)
        offsets = r[:, None] * columns + c[None, :]
        total += tl.sum(tl.load(x_ptr + offsets, mask=mask, other=0.0), 1)
        best = tl.maximum(best, tl.max(tl.load(x_ptr + offsets, mask=mask, other=float("-inf")), 1))
    tl.store(out_ptr + r, total * best, mask=r < rows)


@pytest.mark.parametrize("columns", [1, 64, 1000])
def test_rows_reduced_in_a_loop_over_columns(columns, isa):
    x = random(10, columns)
    out = torch.zeros(10)
    run(column_loop_kernel, (3,), x, out, 10, columns, BR=4, BC=64)
    torch.testing.assert_close(out, x.sum(1) * x.amax(1), rtol=1e-4, atol=1e-4)


@triton.jit
def scan_kernel(x_ptr, out_ptr, count_ptr, C: tl.constexpr, REVERSE: tl.constexpr):
    r, c = tl.arange(0, 4), tl.arange(0, C)
    offsets = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.cumsum(x, 1, reverse=REVERSE))
    tl.store(count_ptr + offsets, tl.cumsum((x > 0).to(tl.int32), 0))


@pytest.mark.parametrize("reverse", [False, True])
def test_scans(reverse):
    x = random(4, 64)
    out, count = torch.zeros_like(x), torch.zeros(4, 64, dtype=torch.int32)
    run(scan_kernel, (1,), x, out, count, C=64, REVERSE=reverse)
    want = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(count, (x > 0).int().cumsum(0, dtype=torch.int32))


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
    x = random(200)
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


@triton.jit
def shift_in_place_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x * 2.0, mask=i < n)


@pytest.mark.parametrize("shift", [0, 1, -1, 16, 40])
def test_a_store_that_overlaps_its_load_sees_the_old_values(shift, isa):
    buffer = random(300)
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
    x, y = random(64), random(64, seed=1)
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
    x = random(64)
    want = x.roll(-3)
    run(rotate_rows_kernel, (1,), x, n=64)
    assert torch.equal(x, want)


@triton.jit
def gather_rows_kernel(ids_ptr, table_ptr, out_ptr, rows, D: tl.constexpr, BR: tl.constexpr):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, triton.next_power_of_2(D))
    ids = tl.load(ids_ptr + r, mask=r < rows, other=0)
    mask = (r[:, None] < rows) & (d[None, :] < D)
    row = tl.load(table_ptr + ids[:, None] * D + d[None, :], mask=mask)
    tl.store(out_ptr + r[:, None] * D + d[None, :], row, mask=mask)


@pytest.mark.parametrize("ids_type", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows(ids_type, dtype, isa):
    table = random(50, 60, dtype=dtype)
    ids = torch.randint(0, 50, (21,), generator=torch.Generator().manual_seed(2), dtype=ids_type)
    out = torch.zeros(21, 60, dtype=dtype)
    run(gather_rows_kernel, (6,), ids, table, out, 21, D=60, BR=4)
    assert torch.equal(out, table[ids.long()])


@triton.jit
def scatter_kernel(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < n, other=0)
    x = tl.load(x_ptr + index, mask=i < n)
    tl.store(out_ptr + index * 2, x, mask=(i < n) & (x > 0))


def test_gather_and_scatter_of_elements(isa):
    x = random(100)
    index = torch.randperm(100, generator=torch.Generator().manual_seed(4)).int()
    out = torch.zeros(200)
    run(scatter_kernel, (1,), x, index, out, 100, BLOCK=128)
    want = torch.zeros(200)
    want[::2] = x.clamp_min(0)
    assert torch.equal(out, want)


@triton.jit
def shapes_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    low, high = tl.split(tl.reshape(x, (N // 2, 2)))
    turned = tl.trans(tl.reshape(tl.join(high, low), (2, N // 2)))
    both = tl.reshape(turned, (N,)) + tl.cat(low, high, can_reorder=True)
    picked = tl.gather(x, (tl.arange(0, N) * 3) % N, 0)
    tl.store(out_ptr + tl.arange(0, N), both + tl.flip(picked, 0) + tl.sort(x))


def test_reshape_split_join_trans_gather_flip_sort(isa):
    x = random(64)
    out = torch.zeros_like(x)
    run(shapes_kernel, (1,), x, out, N=64)
    low, high = x.view(32, 2).unbind(1)
    both = torch.stack([high, low], 1).view(2, 32).T.reshape(64) + torch.cat([low, high])
    picked = x[(torch.arange(64) * 3) % 64]
    torch.testing.assert_close(out, both + picked.flip(0) + x.sort().values)


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


@triton.jit
def wide_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    y = tl.exp(x) + tl.sqrt(tl.abs(x)) * tl.where(x > 0, x, -x) + i.to(tl.float64) / 3
    tl.store(out_ptr + i, y + tl.sum(tl.where(i < n, x, 0.0), 0), mask=i < n)


def test_double_precision(isa):
    x = random(100, dtype=torch.float64)
    out = torch.zeros_like(x)
    run(wide_kernel, (1,), x, out, 100, BLOCK=128)
    want = x.exp() + x.abs().sqrt() * x.abs() + torch.arange(100.0, dtype=torch.float64) / 3 + x.sum()
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
