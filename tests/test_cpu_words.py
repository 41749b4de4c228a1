"""Products with bytes that lie in words on the CPU target: read in place, and finished in registers where a loop only
adds them to what it carries."""

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu.ir import Op, Type, Value
from effc.codegen.cpu.ranges import largest_byte

from .on_cpu import compiled, randint, randn, run, some_slow

SHAPES = [(1, 1, 32, 64), (3, 4, 32, 16), (20, 16, 64, 32), (33, 32, 16, 64)]  # rows, rows of a tile, depth, columns


@triton.jit
def unpacked(words, K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    shift = BITS * tl.arange(0, 4)
    return tl.reshape((words[:, None, :] >> shift[None, :, None]).to(tl.int8), [K, N])


@triton.jit
def plain_kernel(x_ptr, w_ptr, out_ptr, M, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """out = x @ bytes, of int8; with BITS = 4 what is no product of bytes of words."""
    row, k, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=row[:, None] < M, other=0)
    words = tl.load(w_ptr + tl.arange(0, K // 4)[:, None] * N + n[None, :])
    out = tl.dot(x, unpacked(words, K, N, BITS), out_dtype=tl.int32)
    tl.store(out_ptr + row[:, None] * N + n[None, :], out, mask=row[:, None] < M)


def bytes_of(words: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """int32 [R, N] as int8 [4 R, N]."""
    parts = torch.stack([words >> (bits * k) for k in range(4)], 1).to(torch.int8)
    return parts.reshape(-1, words.shape[1])


@pytest.mark.parametrize("shape", some_slow(SHAPES, SHAPES[1:2]))
def test_bytes_of_words_are_multiplied_in_place(shape, isa):
    m, rows, k, n = shape
    for low, high in ((-128, 127), (-128, -128)):
        x, w = randint(low, high + 1, (m, k), dtype=torch.int8), randint(-(2**31), 2**31, (k // 4, n), seed=1)
        if low == high:
            w = torch.full_like(w, -0x7F7F7F80)  # bytes of -128
        arguments, out = {"K": k, "N": n, "ROWS": rows, "BITS": 8}, torch.zeros(m, n, dtype=torch.int32)
        run(plain_kernel, (-(-m // rows),), x, w, out, m, **arguments)
        assert "accumulate_words<" in compiled(plain_kernel, x, w, out, m, **arguments).cpp
        assert out.tolist() == (x.long() @ bytes_of(w).long()).tolist()


def test_other_parts_of_words_are_not_taken_for_bytes(isa):
    x, w, out = randint(-8, 8, (4, 32), dtype=torch.int8), randint(0, 2**31, (8, 16)), torch.zeros(4, 16).int()
    arguments = {"K": 32, "N": 16, "ROWS": 4, "BITS": 4}
    assert "accumulate_words<" not in compiled(plain_kernel, x, w, out, 4, **arguments).cpp
    run(plain_kernel, (1,), x, w, out, 4, **arguments)
    assert out.tolist() == (x.long() @ bytes_of(w, 4).long()).tolist()


@triton.jit
def scaled_kernel(
    x_ptr, xs_ptr, w_ptr, ws_ptr, out_ptr, seen_ptr, M, GROUPS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    MASK: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """Sums of 32 nibbles, scaled; WAY says what else the loop does with them."""
    row, k, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 32), tl.arange(0, N)
    quad = tl.arange(0, 8)
    acc = tl.zeros([ROWS, N], tl.float32)
    for g in range(GROUPS):
        x = tl.load(x_ptr + row[:, None] * (32 * GROUPS) + g * 32 + k[None, :], mask=row[:, None] < M, other=0)
        words = tl.load(w_ptr + (g * 4 + quad % 4)[:, None] * N + n[None, :])
        words = (words >> (4 * (quad // 4))[:, None]) & MASK
        start = tl.full([ROWS, N], 1, tl.int32) if WAY == "offset" else tl.zeros([ROWS, N], tl.int32)
        sums = tl.dot(x, unpacked(words, 32, N, 8), start, out_dtype=tl.int32)
        x_scale = tl.load(xs_ptr + row * GROUPS + g, mask=row < M, other=0.0)
        w_scale = tl.load(ws_ptr + g * N + n).to(tl.float32)
        acc += sums.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
        if WAY == "stored":
            tl.store(seen_ptr + row[:, None] * N + n[None, :], sums, mask=row[:, None] < M)
    if WAY == "unmasked":
        tl.store(seen_ptr + n, tl.sum(acc, axis=0).to(tl.int32))
    tl.store(out_ptr + row[:, None] * N + n[None, :], acc, mask=row[:, None] < M)


def scaled(m, rows, n, groups, way, mask=0x0F0F0F0F, extreme=False):
    x = randint(-128, 128, (m, 32 * groups), dtype=torch.int8)
    w = randint(-(2**31), 2**31, (4 * groups, n), seed=1)
    if extreme:
        x, w = x.fill_(-128), w.fill_(-1)
    xs, ws = randn(m, groups, seed=2), randn(groups, n, seed=3, dtype=torch.float16)
    out, seen = torch.full((m, n), torch.nan), torch.zeros(m, n, dtype=torch.int32)
    arguments = (x, xs, w, ws, out, seen, m), {"GROUPS": groups, "N": n, "ROWS": rows, "MASK": mask, "WAY": way}
    run(scaled_kernel, (-(-m // rows),), *arguments[0], **arguments[1])
    words = torch.cat([(w.view(groups, 4, n) >> 4 * half) & mask for half in (0, 1)], 1)
    values = bytes_of(words.reshape(8 * groups, n)).view(groups, 32, n)
    sums = torch.einsum("mgk,gkn->mgn", x.double().view(m, groups, 32), values.double()) + (way == "offset")
    want = torch.einsum("mgn,mg,gn->mn", sums, xs.double(), ws.double())
    size = torch.einsum("mgn,mg,gn->mn", sums.abs(), xs.double().abs(), ws.double().abs())
    assert ((out.double() - want).abs() <= 1e-6 * size).all()
    if way == "stored":
        assert seen.tolist() == sums[:, -1].long().tolist()
    if way == "unmasked" and m <= rows:
        assert (seen[0] - want.sum(0)).abs().max() <= 1 + 1e-5 * size.sum(0).max()
    return compiled(scaled_kernel, *arguments[0], **arguments[1]).cpp


@pytest.mark.parametrize("shape", some_slow([(1, 1, 64), (7, 16, 32), (20, 16, 16), (70, 64, 64)], [(20, 16, 16)]))
def test_sums_are_finished_in_registers(shape, isa):
    m, rows, n = shape
    assert "dot::finished_by(" in scaled(m, rows, n, 3, "plain")
    scaled(m, rows, n, 3, "plain", extreme=True)


@pytest.mark.parametrize("mask", some_slow([0x7F7F7F7F, -0x0F0F0F10, 0x1F1F1F1F], [-0x0F0F0F10]))
def test_bytes_of_any_range_are_exact_in_registers(mask, isa):
    scaled(5, 8, 32, 3, "plain", mask)
    scaled(5, 8, 32, 3, "plain", mask, extreme=True)


@pytest.mark.parametrize("way", some_slow(["stored", "offset"], ["stored"]))
def test_sums_that_are_read_otherwise_go_to_memory(way, isa):
    cpp = scaled(5, 8, 32, 3, way)
    assert "dot::finished_by(" not in cpp
    assert "accumulate_words<" in cpp


def test_rows_past_a_mask_are_finished_where_something_reads_them(isa):
    cpp = scaled(5, 8, 32, 3, "unmasked")
    assert "dot::finished_by(" in cpp
    assert "finish_zeros<" in cpp


def test_the_largest_byte_of_words():
    word = Type("i32", (8, 16))

    def value(name: str, *operands: Value, **attrs: object) -> Value:
        op = Op(name, list(operands), attrs=attrs)
        op.results = [Value(name, word, op)]
        return op.result

    loaded = Value("loaded", word)
    constant = [value("arith.constant", value=str(n)) for n in (0x0F0F0F0F, 0x01010101, 4, 0x7F7F7F7F)]
    low = value("arith.andi", loaded, constant[0])
    bit = value("arith.andi", loaded, constant[1])
    high = value("arith.shli", bit, constant[2])
    assert largest_byte(loaded) == 255
    assert largest_byte(low) == 15
    assert largest_byte(value("arith.ori", low, high)) == 31
    assert largest_byte(value("arith.addi", low, high)) == 255
